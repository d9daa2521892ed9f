"""What a trained victim is worth: the attacker's objective and the harness's score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from poisonbench.arrays import CHUNK
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import Poison, TrainingRun, TrainingSet, TrainState, logits

Goal = Literal["cross_entropy", "margin", "error"]
KEPT = 2000
"""Images of which a derivative keeps all that was computed; of more it computes each chunk anew."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ValidationLoss:
    """How badly trained victims do on held-out images; a pytree, callable on a `TrainState`.

    Attributes:
        recipe: the victims'.
        num_classes: how many labels there are.
        goal: `cross_entropy` in nats; `margin`, by how much the largest logit of a wrong class exceeds
            that of the right one; or `error`, the expected share of wrong answers, which saturates
            where an answer is surely right or surely wrong.
        images: `[m, height, width, channels]`, uint8.
        labels: `[m]`, int32.
        temperature: logits are divided by it; the lower, the closer `error` comes to the share of
            wrong answers. Of `margin` it is only the unit.
    """

    recipe: Recipe = field(metadata={"static": True})
    num_classes: int = field(metadata={"static": True})
    goal: Goal = field(metadata={"static": True})
    images: Array
    labels: Array
    temperature: float = field(default=1.0, metadata={"static": True})

    def __call__(self, state: TrainState) -> Float[Array, ""]:
        """Mean over the victims and images."""
        return self.per_seed(state).mean()

    def per_seed(self, state: TrainState) -> Float[Array, " seeds"]:
        """Mean over the images, for each victim."""

        def one_seed(state: TrainState) -> Array:
            said = self._logits(state) / self.temperature
            if self.goal == "error":
                right = jnp.take_along_axis(jax.nn.softmax(said), self.labels[:, None], axis=1)
                return 1 - right.mean()
            if self.goal == "margin":
                truth = jax.nn.one_hot(self.labels, self.num_classes, dtype=bool)
                return (said.max(-1, where=~truth, initial=-jnp.inf) - (said * truth).sum(-1)).mean()
            return optax.softmax_cross_entropy_with_integer_labels(said, self.labels).mean()

        return jax.vmap(one_seed)(state)

    def wrong(self, state: TrainState) -> Float[Array, ""]:
        """The share of images that the victims get wrong, on average; it has no derivative."""
        return jax.vmap(lambda s: (self._logits(s).argmax(-1) != self.labels).mean())(state).mean()

    def _logits(self, state: TrainState) -> Float[Array, "m classes"]:
        return _chunked_logits(self.recipe, self.num_classes, state, self.images)


def train_and_score(
    recipe: Recipe,
    data: TrainingSet,
    keys: Key[Array, " seeds"],
    images: np.ndarray,
    labels: np.ndarray,
) -> Float[np.ndarray, "seeds epochs"]:
    """Train a victim for each key, and score it on these images after every epoch.

    Args:
        recipe: the victims'.
        data: what they train on, poison applied.
        keys: `[seeds]`; equal keys share initialisation, order and augmentation.
        images: `[m, height, width, channels]`, uint8.
        labels: `[m]`, int32.

    Returns:
        Accuracies in percent, float64.
    """
    run, state = TrainingRun.start(recipe, data, keys)
    epochs = jnp.arange(recipe.epochs)
    _, right = train_and_score_epochs(run, state, epochs, jnp.asarray(images), jnp.asarray(labels))
    return np.asarray(right).sum(-1, dtype=np.float64) / len(labels) * 100


@jax.jit
def train(run: TrainingRun, state: TrainState, z: Array | Poison) -> TrainState:
    """All steps of a run: the final state of each seed."""
    return jax.lax.fori_loop(0, run.num_steps, lambda t, s: run(s, t, z), state)


@jax.jit
def train_some(
    run: TrainingRun, state: TrainState, z: Array | Poison, first: Array, last: Array
) -> TrainState:
    """The steps of a run from `first` up to `last`: the state of each seed after them."""
    return jax.lax.fori_loop(first, last, lambda t, s: run(s, t, z), state)


@jax.jit
def train_and_score_epochs(
    run: TrainingRun, state: TrainState, epochs: Array, images: Array, labels: Array
) -> tuple[TrainState, Array]:
    """Train through some epochs of a run.

    Args:
        run: the run.
        state: before the first of these epochs.
        epochs: `[e]`, their numbers, in order.
        images: `[m, height, width, channels]`, uint8.
        labels: `[m]`, int32.

    Returns:
        The state after the last; and which images each victim gets right after each epoch, bool of
        shape `[seeds, e, m]`.
    """
    per_epoch = run.num_steps // run.recipe.epochs
    nothing = jnp.zeros((0, *images.shape[1:]))

    def one_epoch(state: TrainState, epoch: Array) -> tuple[TrainState, Array]:
        first = epoch * per_epoch
        state = jax.lax.fori_loop(first, first + per_epoch, lambda t, s: run(s, t, nothing), state)
        return state, jax.vmap(correct)(state)

    def correct(state: TrainState) -> Array:
        said = _chunked_logits(run.recipe, run.data.num_classes, state, images)
        return said.argmax(-1) == labels

    state, right = jax.lax.scan(one_epoch, state, epochs)
    return state, right.swapaxes(0, 1)


def _chunked_logits(
    recipe: Recipe, num_classes: int, state: TrainState, images: Array
) -> Float[Array, "m classes"]:
    # In chunks, since what a network computes of a whole test set would not fit in memory. Not image by
    # image, as `lax.map` with a batch size would: that makes a gradient by weights for each image.
    def some(images: Array) -> Array:
        return logits(recipe, num_classes, state, images.astype(jnp.float32) / 255)

    if len(images) <= CHUNK:
        return some(images)
    each = some if len(images) <= KEPT else jax.checkpoint(some)
    whole = len(images) // CHUNK * CHUNK
    said = jax.lax.map(each, images[:whole].reshape(-1, CHUNK, *images.shape[1:])).reshape(whole, -1)
    return jnp.concatenate([said, each(images[whole:])]) if whole < len(images) else said
