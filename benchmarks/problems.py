"""The training runs that are differentiated, the same to the last bit for every way of doing so.

- `8x8` and `16x16`: ResNet-9 by the smooth recipe of the digits track, longer. The 16×16 images are
  the same digits with every pixel doubled: speed depends on the shapes alone, and these are at hand
  everywhere.
- `mlp`: two layers on the 8×8 digits, by SGD with momentum. A step takes about a millisecond, so
  that a run of thousands of steps can be measured.
- `leaves`: the state of `8x8` with every array cut to one number, and a step that touches each. What
  the engine takes for it is its dispatch, and next to nothing else.

A problem is made in float32 and then cast where float64 is asked for: both precisions start from the
same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import BaseModel, ConfigDict, Field

from poisonbench import data, tracks
from poisonbench.data import DataSpec
from poisonbench.victim.evaluation import ValidationLoss
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import TrainingRun, TrainingSet

PyTree = Any
SEED = 0


class Setting(BaseModel):
    """Which problem, and how large.

    Attributes:
        kind: `resnet9`, `mlp` or `leaves`.
        resolution: side of the images in pixels; a multiple of 8.
        width: channels of the first convolution, or hidden units.
        batch_size: images in a step.
        steps: length of the training run.
        images: training images; every 20th is poisoned.
        held_out: images that the objective is evaluated on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: str
    resolution: int = 8
    width: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    steps: int = Field(ge=1)
    images: int = Field(default=500, ge=1)
    held_out: int = Field(default=500, ge=10)

    def replace(self, **changes: Any) -> Setting:
        """A copy with some numbers changed."""
        return self.model_copy(update=changes)

    @property
    def recipe(self) -> Recipe:
        """The smooth recipe of the digits track at this size."""
        per_epoch = self.images // self.batch_size
        return tracks.DIGITS.recipes["smooth"].replace(
            width=self.width, batch_size=self.batch_size, epochs=-(-self.steps // per_epoch)
        )

    def __str__(self) -> str:
        name = {"resnet9": "ResNet-9", "mlp": "MLP", "leaves": "one number for each array of ResNet-9"}
        return (
            f"{name[self.kind]}, width {self.width}, {self.resolution}×{self.resolution}, batch"
            f" {self.batch_size}, {self.steps} steps"
        )


@dataclass(frozen=True)
class Problem:
    """A run to differentiate; `step` and `objective` are pytrees, as the engine likes them.

    Attributes:
        setting: what it was made from.
        step: `step(state, t, z) -> state`.
        objective: scalar function of the final state.
        state: before step 0.
        z: `[p, height, width, channels]`, poisoned pixels in [0, 1].
    """

    setting: Setting
    step: Any
    objective: Any
    state: PyTree
    z: Array

    @property
    def num_steps(self) -> int:
        """Length of the training run."""
        return self.setting.steps


def make(setting: Setting, *, double: bool = False) -> Problem:
    """Build a problem; in float64 where `double`, which needs `jax_enable_x64`."""
    with jax.enable_x64(False):
        problem = _BUILDERS[setting.kind](setting)
    if not double:
        return problem

    def cast(x: Any) -> Any:
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    step, objective, state, z = jax.tree.map(
        cast, (problem.step, problem.objective, problem.state, problem.z)
    )
    return Problem(setting, step, objective, state, z)


def digits(setting: Setting) -> tuple[TrainingSet, np.ndarray, np.ndarray, np.ndarray]:
    """Training set with room for poison, the pixels of the poison, held-out images and labels."""
    spec = DataSpec(name="digits", train_size=setting.images, val_size=setting.held_out, test_size=10)
    found = data.load(spec)
    zoom = setting.resolution // 8

    def larger(images: np.ndarray) -> np.ndarray:
        return images.repeat(zoom, axis=1).repeat(zoom, axis=2)

    images = larger(found.train_images)
    indices = np.arange(0, setting.images, 20)
    labels = found.train_labels
    training = TrainingSet.clean(images, labels, found.num_classes)
    training = training.with_poison(indices, (labels[indices] + 1) % found.num_classes)
    pixels = images[indices].astype(np.float32) / 255
    return training, pixels, larger(found.val_images), found.val_labels


def _resnet9(setting: Setting) -> Problem:
    training, pixels, images, labels = digits(setting)
    recipe = setting.recipe
    run, state = TrainingRun.start(recipe, training, jax.random.key(SEED)[None])
    objective = ValidationLoss(
        recipe, training.num_classes, "cross_entropy", jnp.asarray(images), jnp.asarray(labels)
    )
    return Problem(setting, run, objective, state, jnp.asarray(pixels))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _MlpStep:
    """One step of SGD with momentum 0.9.

    Attributes:
        data: the training set.
        order: `[steps, batch]`, the images of each step.
        rate: learning rate.
    """

    data: TrainingSet
    order: Array
    rate: float = field(default=0.1, metadata={"static": True})

    def __call__(self, state: PyTree, t: Array, z: Array) -> PyTree:
        rows = self.order[t]
        slot = self.data.slot[rows]
        clean = self.data.images[rows].astype(z.dtype) / 255
        images = jnp.where((slot >= 0)[:, None, None, None], z[jnp.maximum(slot, 0)], clean)
        loss = partial(_cross_entropy, images=images, labels=self.data.labels[rows])
        gradient = jax.grad(loss)(state["params"])
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state["velocity"], gradient)
        params = jax.tree.map(lambda p, v: p - self.rate * v, state["params"], velocity)
        return {"params": params, "velocity": velocity}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _MlpObjective:
    images: Array
    labels: Array

    def __call__(self, state: PyTree) -> Float[Array, ""]:
        images = self.images.astype(jax.tree.leaves(state)[0].dtype) / 255
        return _cross_entropy(state["params"], images, self.labels)


def _cross_entropy(params: PyTree, images: Array, labels: Array) -> Float[Array, ""]:
    hidden = jax.nn.gelu(images.reshape(len(images), -1) @ params["w1"] + params["b1"][None])
    said = jax.nn.log_softmax(hidden @ params["w2"] + params["b2"][None])
    return -jnp.take_along_axis(said, labels[:, None], axis=1).mean()


def _mlp(setting: Setting) -> Problem:
    training, pixels, images, labels = digits(setting)
    random = np.random.default_rng(SEED)
    inputs, hidden, classes = setting.resolution**2, setting.width, training.num_classes
    params = {
        "w1": random.normal(size=(inputs, hidden)) / inputs**0.5,
        "b1": np.zeros(hidden),
        "w2": random.normal(size=(hidden, classes)) / hidden**0.5,
        "b2": np.zeros(classes),
    }
    floats = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    state = {"params": floats, "velocity": jax.tree.map(jnp.zeros_like, floats)}
    order = random.integers(setting.images, size=(setting.steps, setting.batch_size), dtype=np.int32)
    step = _MlpStep(training, jnp.asarray(order))
    objective = _MlpObjective(jnp.asarray(images), jnp.asarray(labels))
    return Problem(setting, step, objective, state, jnp.asarray(pixels))


def _touch(state: PyTree, t: Array, z: Array) -> PyTree:
    return jax.tree.map(lambda x: x + z[0] if jnp.issubdtype(x.dtype, jnp.floating) else x + t, state)


def _first_sum(state: PyTree) -> Float[Array, ""]:
    return sum((x.sum() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)),
               start=jnp.float32(0))  # fmt: skip


def _leaves(setting: Setting) -> Problem:
    state = jax.tree.map(lambda x: x.ravel()[:1], _resnet9(setting).state)
    return Problem(setting, _touch, _first_sum, state, jnp.zeros(1))


_BUILDERS = {"resnet9": _resnet9, "mlp": _mlp, "leaves": _leaves}
