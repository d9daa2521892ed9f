"""A trained victim as a function of its weights and images: what filters and many attacks begin with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from poisonbench.arrays import chunks
from poisonbench.victim.evaluation import train
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import Guard, TrainingRun, TrainingSet, TrainState, features, logits

PyTree = Any
Layers = Literal["all", "last"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainedVictim:
    """A victim after training, or on its way, its batch norm held still.

    Batch norm normalises by the statistics that its training tracked, so that a loss is a sum over
    images, and so is its gradient.

    Attributes:
        recipe, num_classes: the victim's.
        layers: `all` weights may move, or those of the `last` layer.
        state: as trained, without an axis of seeds.
    """

    recipe: Recipe = field(metadata={"static": True})
    num_classes: int = field(metadata={"static": True})
    layers: Layers = field(metadata={"static": True})
    state: TrainState

    @staticmethod
    def on(
        images: UInt8[np.ndarray, "n h w c"],
        labels: Int[np.ndarray, " n"],
        num_classes: int,
        recipe: Recipe,
        key: PRNGKeyArray,
        layers: Layers = "all",
        guard: Guard | None = None,
    ) -> TrainedVictim:
        """Train one on any data, with what a defence does in its steps."""
        data = TrainingSet.clean(images, labels, num_classes)
        run, state = TrainingRun.start(recipe, data, key[None], guard)
        state = train(run, state, jnp.zeros((0, *images.shape[1:])))
        return TrainedVictim(recipe, num_classes, layers, jax.tree.map(lambda x: x[0], state))

    @property
    def weights(self) -> PyTree:
        """Those that may move; the classifier's under its own name in either case."""
        params = self.state.params
        return params if self.layers == "all" else {"classifier": params["classifier"]}

    def loss(
        self,
        weights: PyTree,
        images: Float[Array, "b h w c"],
        labels: Int[Array, " b"],
        counted: Float[Array, " b"],
    ) -> Float[Array, ""]:
        """The sum of what images in [0, 1] lose at these weights; `counted` are their shares in it."""
        state = TrainState({**self.state.params, **weights}, self.state.stats, None)
        targets = jax.nn.one_hot(labels, self.num_classes)
        targets = optax.smooth_labels(targets, self.recipe.label_smoothing)
        said = logits(self.recipe, self.num_classes, state, images)
        return (optax.softmax_cross_entropy(said, targets) * counted).sum()

    def classes(
        self, images: UInt8[np.ndarray, "p h w c"] | Float[np.ndarray, "p h w c"]
    ) -> Int[np.ndarray, " p"]:
        """What it takes images for, of 8 bits or in [0, 1]."""
        return self._in_chunks(_classes, images)

    def features(self, images: UInt8[np.ndarray, "p h w c"]) -> Float[np.ndarray, "p features"]:
        """What its classifier reads, float64."""
        return self._in_chunks(_features, images).astype(np.float64)

    def probabilities(self, images: UInt8[np.ndarray, "p h w c"]) -> Float[np.ndarray, "p classes"]:
        """What it says of images, float64."""
        return self._in_chunks(_probabilities, images).astype(np.float64)

    def _in_chunks(self, function: Any, images: np.ndarray) -> np.ndarray:
        whole = 255 if images.dtype == np.uint8 else 1
        parts = [
            np.asarray(function(self, jnp.asarray(images[rows], jnp.float32) / whole))
            for _, rows in chunks(len(images))
        ]
        return np.concatenate(parts)[: len(images)]


@jax.jit
def _probabilities(victim: TrainedVictim, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
    return jax.nn.softmax(logits(victim.recipe, victim.num_classes, victim.state, images))


@jax.jit
def _classes(victim: TrainedVictim, images: Float[Array, "b h w c"]) -> Int[Array, " b"]:
    return logits(victim.recipe, victim.num_classes, victim.state, images).argmax(-1)


@jax.jit
def _features(victim: TrainedVictim, images: Float[Array, "b h w c"]) -> Float[Array, "b features"]:
    return features(victim.recipe, victim.num_classes, victim.state, images)
