"""What a defence is: its hooks, and all that it sees.

A defence is one file in `defenses/`: a frozen dataclass of its hyperparameters, derived from
`Defense`, that overrides the hooks it needs. It sees the training set that the victim is given, poisoned
or not, and never which points are poisoned; only the oracle does, which is a control.

In the order in which a victim meets them:

1. `preprocess`: other images, once, before training;
2. `filter`: which images are kept, or how much each counts, once, before training;
3. `revise`: the same anew, every few epochs, from the victim as it then is;
4. `augment`: other images and targets, in every step;
5. `aggregate`: one gradient from those of several parts of a batch, in every step;
6. `transform`: another optimizer;
7. `pick`: which epoch's victim is kept, by its accuracy on trusted images;
8. `train`: something else altogether in the place of training.

Several compose hook by hook: all that preprocess do, then all that filter, and so on; within a hook they
come in the order in which they are named. `preprocess`, `augment` and `transform` work on what the one
before gave; filters all see the same images, and their weights are multiplied; of several that pick an
epoch, the last decides. `revise` and `aggregate` are one defence's alone. So is `train`, whose victims
meet what others do by `augment` and `transform`; it cannot stand beside more than that.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from poisonbench.trained import TrainedVictim
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import Guard

Loss = Callable[[Array, Array], Array]
"""Of a batch's images in [0, 1] and targets, at the victim's current weights; a scalar."""


@dataclass(frozen=True)
class View:
    """All that a defence sees.

    Attributes:
        images: `[n, height, width, channels]`, uint8, the training set as the victim is given it.
        labels: `[n]`, int32.
        num_classes: how many labels there are.
        recipe: how the victim is trained.
        allowed: how many images the budget lets an attacker poison, which is public.
        trusted_images, trusted_labels: as many clean images, not of the training set, as the defence
            declares.
        poisoned: `[n]`, which points are poisoned; None for all but the oracle.
        guard: what other defences do in a step, for those that replace training; None for nothing.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    num_classes: int
    recipe: Recipe
    allowed: int
    trusted_images: UInt8[np.ndarray, "m h w c"]
    trusted_labels: Int[np.ndarray, " m"]
    poisoned: Bool[np.ndarray, " n"] | None = None
    guard: Guard | None = None

    def trained(
        self, key: PRNGKeyArray, weights: Float[np.ndarray, " n"] | None = None
    ) -> TrainedVictim:
        """A victim trained on these images, or on those of positive weight."""
        kept = np.arange(len(self.labels)) if weights is None else np.flatnonzero(weights)
        return TrainedVictim.on(self.images[kept], self.labels[kept], self.num_classes, self.recipe, key)

    def without(self, dropped: Int[np.ndarray, " d"]) -> Float[np.ndarray, " n"]:
        """Weights that drop these images."""
        weights = np.ones(len(self.labels))
        weights[dropped] = 0
        return weights


@dataclass(frozen=True)
class Predictions:
    """What takes the place of a trained victim says of test images.

    Attributes:
        classes: `[m]`, the answer for each image.
        certified: `[m]`, how many training images may be added or removed without changing that
            answer, an image replaced being one of each; None where nothing is certified.
    """

    classes: Int[np.ndarray, " m"]
    certified: Int[np.ndarray, " m"] | None = None


Predict = Callable[[UInt8[np.ndarray, "m h w c"]], Predictions]
"""The answers of what took the place of a trained victim, for images it has not seen."""


class Defense(ABC):  # noqa: B024 - hooks are optional; the class is what `load` looks for
    """A change to how victims are trained; subclasses are frozen dataclasses of their hyperparameters.

    Attributes:
        sees_poison: it is told which points are poisoned: the oracle alone may be.
        trusted: clean images that it is given; a hyperparameter in those that need some.
        every: epochs between two calls of `revise`; 0 for none.
        parts: parts of a batch whose gradients `aggregate` gets; 0 for the batch as a whole.
    """

    sees_poison: ClassVar[bool] = False
    trusted: int = 0
    every: int = 0
    parts: int = 0

    @classmethod
    def replaces_training(cls) -> bool:
        """Whether `train` is all there is to it."""
        return cls.train is not Defense.train

    def dropped(self, allowed: int) -> int:
        """How many images it is sure to drop, where so many may be poisoned."""
        return 0

    def preprocess(self, view: View, key: PRNGKeyArray) -> UInt8[np.ndarray, "n h w c"]:
        """Other images in the place of the training set's."""
        return view.images

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """How much each image counts in the loss: 0 removes it, 1 is as usual; None for all as usual."""
        return None

    def revise(
        self, view: View, victim: TrainedVictim, epoch: int, weights: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"] | None:
        """As `filter`, of a victim in training, after so many epochs, given what counts until now."""
        return None

    def augment(
        self,
        images: Float[Array, "b h w c"],
        targets: Float[Array, "b classes"],
        key: PRNGKeyArray,
        loss: Loss,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
        """A batch in the place of another, in a compiled step.

        Args:
            images: in [0, 1].
            targets: label distributions, each times how much its image counts.
            key: of this step.
            loss: of images under targets, at the weights before the step.
        """
        return images, targets

    def aggregate(self, gradients: Any, key: PRNGKeyArray) -> Any:
        """One gradient from those of the parts of a batch, whose leaves have a leading axis of parts."""
        raise NotImplementedError

    def transform(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Another optimizer in the place of the recipe's."""
        return optimizer

    def pick(self, right: Bool[np.ndarray, "epochs m"]) -> int | None:
        """Which epoch's victim is kept, by the trusted images that it gets right; None for the last."""
        return None

    def train(self, view: View, key: PRNGKeyArray) -> Predict | None:
        """What takes the place of a trained victim; None to train as usual."""
        return None
