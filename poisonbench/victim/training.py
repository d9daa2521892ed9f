"""Training a victim, as one pure function of (recipe, data, key).

The attack differentiates exactly what the harness runs: both call a `TrainingRun`. A
run is a pytree, so its arrays are arguments of compiled programs and not constants in them; and
it carries a leading axis of seeds, so several victims train in one `vmap`. Everything random
(initialisation, order, augmentation) is drawn from the run's key before the first step or folded
from it at each step, so that a replayed step is the same step.

Poison enters as `z`, one row for each poisoned image. Rows are gathered from `z` and from the
clean images separately: clean pixels are constants, and only the poisoned ones carry a cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from poisonbench.victim.network import architecture, build
from poisonbench.victim.optimizer import make_optimizer
from poisonbench.victim.recipe import Recipe

PyTree = Any


@runtime_checkable
class Guard(Protocol):
    """What a defence does in a step; hashable. See `poisonbench.defenses.Defense`."""

    @property
    def parts(self) -> int:
        """Parts of a batch whose gradients are aggregated; 0 for the batch as a whole."""

    def augment(
        self, images: Array, targets: Array, key: PRNGKeyArray, loss: Callable[[Array, Array], Array]
    ) -> tuple[Array, Array]:
        """Other images and targets."""

    def aggregate(self, gradients: PyTree, key: PRNGKeyArray) -> PyTree:
        """One gradient from those of the parts."""

    def transform(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Another optimizer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes: parameters, tracked batch statistics, optimizer state."""

    params: PyTree
    stats: PyTree
    optimizer: PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingSet:
    """A training set with room for poison.

    Attributes:
        images: `[n, height, width, channels]`, uint8; rows that are poisoned are never read.
        labels: `[n]`, int32, as the victim sees them (poisoned labels included).
        slot: `[n]`, int32; which row of `z` stands in for an image, or -1 where it is clean.
        num_classes: how many labels there are.
    """

    images: Array
    labels: Array
    slot: Array
    num_classes: int = field(metadata={"static": True})

    @staticmethod
    def clean(images: np.ndarray, labels: np.ndarray, num_classes: int) -> TrainingSet:
        """A training set in which nothing is poisoned."""
        nowhere = np.full(len(labels), -1, np.int32)
        return TrainingSet(
            jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.asarray(nowhere), num_classes
        )

    def with_poison(self, indices: np.ndarray, labels: np.ndarray, *, add: bool = False) -> TrainingSet:
        """The same set with the images at `indices` taken from `z`, and given these labels.

        With `add` the images stay, and as many places follow the last one.
        """
        if add:
            return TrainingSet(
                jnp.concatenate([self.images, self.images[indices]]),
                jnp.concatenate([self.labels, jnp.asarray(labels, jnp.int32)]),
                jnp.concatenate([self.slot, jnp.arange(len(indices), dtype=jnp.int32)]),
                self.num_classes,
            )
        slot = np.array(self.slot)
        slot[indices] = np.arange(len(indices))
        changed = np.array(self.labels)
        changed[indices] = labels
        return replace(self, labels=jnp.asarray(changed), slot=jnp.asarray(slot))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Poison:
    """What stands in for poisoned images, where labels are to be differentiated too.

    Attributes:
        pixels: `[p, height, width, channels]`, in [0, 1].
        targets: `[p, classes]`, the label as a distribution over classes.
    """

    pixels: Array
    targets: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingRun:
    """Several seeds' training on one set: everything but the state and the poison.

    Attributes:
        recipe: the victim, static.
        data: the training set, shared by all seeds.
        keys: `[seeds]`, one key for each victim.
        order: `[seeds, steps, batch]`, int32, the images of each step.
        weights: `[seeds, n]`, how much each image counts in the loss; None for all alike.
        guard: what a defence does in a step, static; None for nothing.
    """

    recipe: Recipe = field(metadata={"static": True})
    data: TrainingSet
    keys: Key[Array, " seeds"]
    order: Int[Array, "seeds steps batch"]
    weights: Float[Array, "seeds n"] | None = None
    guard: Guard | None = field(default=None, metadata={"static": True})

    @staticmethod
    def start(
        recipe: Recipe, data: TrainingSet, keys: Key[Array, " seeds"], guard: Guard | None = None
    ) -> tuple[TrainingRun, TrainState]:
        """A run and its initial state, for each of `keys` (shape `[seeds]`)."""
        order, state = _start(recipe, data, keys, guard)
        return TrainingRun(recipe, data, keys, order, guard=guard), state

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.order.shape[1]

    def __call__(
        self,
        state: TrainState,
        t: Int[Array, ""],
        z: Float[Array, "poison height width channels"] | Poison,
    ) -> TrainState:
        """One step of every seed: `s[t+1] = h_t(s[t], z)`.

        Args:
            state: a `TrainState` whose leaves have a leading axis of seeds.
            t: the step, from 0.
            z: poisoned pixels in [0, 1], under the labels in `data`; or pixels and labels.
        """

        def one_seed(
            state: TrainState, key: PRNGKeyArray, rows: Array, weights: Array | None
        ) -> TrainState:
            images, targets = _batch(self.data, z, rows)
            augmentation_key = jax.random.fold_in(jax.random.split(key, 3)[2], t)
            images = augment(self.recipe, images, augmentation_key)
            counted = None if weights is None else weights[rows]
            return _update(self, state, images, targets, counted, augmentation_key)

        return jax.vmap(one_seed)(state, self.keys, self.order[:, t], self.weights)


def _start(
    recipe: Recipe, data: TrainingSet, keys: Key[Array, " seeds"], guard: Guard | None
) -> tuple[Array, TrainState]:
    per_epoch = recipe.steps_per_epoch(len(data.labels))
    shape = tuple(data.images.shape[1:])
    # One by one, so that one compilation, which is slow, serves any number of seeds.
    starts = [
        _start_compiled(
            recipe, guard, shape, data.num_classes, per_epoch, len(data.labels), keys[i : i + 1]
        )
        for i in range(len(keys))
    ]
    return jax.tree.map(lambda *seeds: jnp.concatenate(seeds), *starts)


@jax.jit(static_argnums=(0, 1, 2, 3, 4, 5))
def _start_compiled(
    recipe: Recipe,
    guard: Guard | None,
    image_shape: tuple[int, int, int],
    num_classes: int,
    per_epoch: int,
    num_images: int,
    keys: Key[Array, " seeds"],
) -> tuple[Array, TrainState]:
    num_steps = recipe.epochs * per_epoch

    def one_epoch(key: PRNGKeyArray) -> Array:
        order = jax.random.permutation(key, num_images)[: per_epoch * recipe.batch_size]
        return order.reshape(per_epoch, recipe.batch_size).astype(jnp.int32)

    def one_seed(key: PRNGKeyArray) -> tuple[Array, TrainState]:
        init_key, order_key, _ = jax.random.split(key, 3)  # the third is for augmentation
        order = jax.vmap(one_epoch)(jax.random.split(order_key, recipe.epochs))
        model = build(recipe, image_shape[2], num_classes, nnx.Rngs(init_key))
        parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
        optimizer = _guarded(make_optimizer(recipe, num_steps), guard)
        params, stats = nnx.to_pure_dict(parts[1]), nnx.to_pure_dict(parts[2])
        state = TrainState(params, stats, optimizer.init(params))
        return order.reshape(num_steps, recipe.batch_size), state

    return jax.vmap(one_seed)(keys)


def _batch(data: TrainingSet, z: Array | Poison, rows: Array) -> tuple[Array, Array]:
    """Images and target distributions of a batch, poison in its place."""
    images = data.images[rows].astype(jnp.float32) / 255
    targets = jax.nn.one_hot(data.labels[rows], data.num_classes)
    slot = data.slot[rows]
    pixels = z.pixels if isinstance(z, Poison) else z
    if len(pixels):
        images = jnp.where((slot >= 0)[:, None, None, None], pixels[jnp.maximum(slot, 0)], images)
    if isinstance(z, Poison) and len(pixels):
        targets = jnp.where((slot >= 0)[:, None], z.targets[jnp.maximum(slot, 0)], targets)
    return images, targets


def _update(
    run: TrainingRun,
    state: TrainState,
    images: Array,
    targets: Array,
    counted: Array | None,
    key: PRNGKeyArray,
) -> TrainState:
    recipe, guard = run.recipe, run.guard
    graph = architecture(recipe, images.shape[1:], run.data.num_classes)

    def loss(params: PyTree, images: Array, targets: Array) -> tuple[Array, PyTree]:
        model = nnx.merge(graph, params, state.stats)
        logits = model(images, train=True)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return optax.softmax_cross_entropy(logits, targets).mean(), stats

    gradient_of = jax.value_and_grad(loss, has_aux=True)
    targets = optax.smooth_labels(targets, recipe.label_smoothing)
    if counted is not None:
        targets = targets * counted[:, None]  # so that blends of images are blends of what they count
    if guard is not None:
        images, targets = guard.augment(
            images, targets, jax.random.fold_in(key, 1), lambda x, y: loss(state.params, x, y)[0]
        )
    if guard is not None and guard.parts:
        batch = (images, targets)
        parts = jax.tree.map(lambda x: x.reshape(guard.parts, -1, *x.shape[1:]), batch)
        (values, several), stack = jax.vmap(gradient_of, (None, 0, 0))(state.params, *parts)
        gradient = guard.aggregate(stack, jax.random.fold_in(key, 2))
        value, stats = values.mean(), jax.tree.map(lambda x: x.mean(0), several)
    else:
        (value, stats), gradient = gradient_of(state.params, images, targets)
    optimizer = _guarded(make_optimizer(recipe, run.num_steps), guard)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params, value=value)
    return TrainState(optax.apply_updates(state.params, updates), stats, optimizer_state)


def _guarded(
    optimizer: optax.GradientTransformation, guard: Guard | None
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that also takes the loss, whether it reads it or not."""
    return optax.with_extra_args_support(optimizer if guard is None else guard.transform(optimizer))


def augment(
    recipe: Recipe, images: Float[Array, "batch height width channels"], key: PRNGKeyArray
) -> Float[Array, "batch height width channels"]:
    """Mirror and shift images as the recipe asks, differentiably, the same for the same key."""
    # 0 to 2 of this key are the step's others: `fold_in(key, 1)` is the second half of `split(key)`.
    flip_key, shift_key = jax.random.fold_in(key, 3), jax.random.fold_in(key, 4)
    if recipe.flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if recipe.crop_padding:
        pad = recipe.crop_padding
        # The constant that the network sees as zero, so a shifted border carries no signal.
        padded = jnp.pad(
            images,
            ((0, 0), (pad, pad), (pad, pad), (0, 0)),
            constant_values=recipe.input_mean,
        )
        shifts = jax.random.randint(shift_key, (len(images), 2), 0, 2 * pad + 1)

        def crop(image: Array, shift: Array) -> Array:
            return jax.lax.dynamic_slice(image, (*shift, 0), images.shape[1:])

        images = jax.vmap(crop)(padded, shifts)
    return images


def logits(
    recipe: Recipe,
    num_classes: int,
    state: TrainState,
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "batch classes"]:
    """What one trained victim (a state without a seed axis) says of images in [0, 1]."""
    graph = architecture(recipe, tuple(images.shape[1:]), num_classes)
    model = nnx.merge(graph, state.params, state.stats)
    return model(images, train=False)


def features(
    recipe: Recipe,
    num_classes: int,
    state: TrainState,
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "batch features"]:
    """What the classifier of one trained victim reads of images in [0, 1]."""
    graph = architecture(recipe, tuple(images.shape[1:]), num_classes)
    model = nnx.merge(graph, state.params, state.stats)
    return model.features(images, train=False)
