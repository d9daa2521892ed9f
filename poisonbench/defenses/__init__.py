"""What a defence is, and where to find one.

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

Several compose: each hook passes on what the one before it gave, in the order in which they are named.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from poisonbench import _plugins
from poisonbench.errors import UserError
from poisonbench.trained import TrainedVictim
from poisonbench.victim.recipe import Recipe

_plugins.extend(__path__, "defenses")

Loss = Callable[[Array], Array]
"""Of a batch's images in [0, 1], at the victim's current weights; a scalar."""


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
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    num_classes: int
    recipe: Recipe
    allowed: int
    trusted_images: UInt8[np.ndarray, "m h w c"]
    trusted_labels: Int[np.ndarray, " m"]
    poisoned: Bool[np.ndarray, " n"] | None = None

    def trained(
        self, key: PRNGKeyArray, weights: Float[np.ndarray, " n"] | None = None
    ) -> TrainedVictim:
        """A victim trained on these images, or on those of positive weight."""
        kept = np.arange(len(self.labels)) if weights is None else np.flatnonzero(weights)
        return TrainedVictim.on(self.images[kept], self.labels[kept], self.num_classes, self.recipe, key)

    def share(self, factor: float) -> int:
        """So many times as many images as may be poisoned, and one less than all at the most."""
        return min(round(factor * self.allowed), len(self.labels) - 1)

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
        certified: `[m]`, how many training images may be changed, in whatever way, without changing that
            answer; None where nothing is certified.
    """

    classes: Int[np.ndarray, " m"]
    certified: Int[np.ndarray, " m"] | None = None


class Defense(ABC):  # noqa: B024 - hooks are optional; the class is what `load` looks for
    """A change to how victims are trained; subclasses are frozen dataclasses of their hyperparameters.

    Attributes:
        sees_poison: it is told which points are poisoned: the oracle alone.
        trusted: clean images that it is given; a hyperparameter in those that need some.
        every: epochs between two calls of `revise`; 0 for none.
        parts: parts of a batch whose gradients `aggregate` gets; 0 for the batch as a whole.
    """

    sees_poison: ClassVar[bool] = False
    trusted: int = 0
    every: int = 0
    parts: int = 0

    def preprocess(self, view: View, key: PRNGKeyArray) -> UInt8[np.ndarray, "n h w c"]:
        """Other images in the place of the training set's."""
        return view.images

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """How much each image counts in the loss: 0 removes it, 1 is as usual; None for all as usual."""
        return None

    def revise(self, view: View, victim: TrainedVictim, epoch: int) -> Float[np.ndarray, " n"] | None:
        """As `filter`, of a victim in training, after so many epochs; times what counted before."""
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
            targets: label distributions.
            key: of this step.
            loss: of images under these targets, at the weights before the step.
        """
        return images, targets

    def aggregate(self, gradients: Any, key: PRNGKeyArray) -> Any:
        """One gradient from those of the parts of a batch, whose leaves have a leading axis of parts."""
        raise NotImplementedError

    def transform(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """Another optimizer in the place of the recipe's."""
        return optimizer

    def pick(self, accuracy: Float[np.ndarray, " epochs"]) -> int | None:
        """Which epoch's victim is kept, by its accuracy on trusted images; None for the last."""
        return None

    def train(
        self, view: View, images: UInt8[np.ndarray, "m h w c"], key: PRNGKeyArray
    ) -> Predictions | None:
        """What takes the place of training says of these test images; None to train as usual."""
        return None


@dataclass(frozen=True)
class Composed(Defense):
    """Several defences, one after the other.

    Attributes:
        defenses: in the order in which they are named.
    """

    defenses: tuple[Defense, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("every", "parts"):
            if sum(getattr(d, name) > 0 for d in self.defenses) > 1:
                raise UserError(
                    f"two of these defences use `{name}`, of which there can be one: name one"
                )
        if sum(type(d).train is not Defense.train for d in self.defenses) and len(self.defenses) > 1:
            raise UserError("a defence that replaces training cannot be combined: name it alone")

    @property
    def trusted(self) -> int:  # type: ignore[override]
        """The most that any of them needs: they share it."""
        return max((d.trusted for d in self.defenses), default=0)

    @property
    def every(self) -> int:  # type: ignore[override]
        """That of the one that has it."""
        return max((d.every for d in self.defenses), default=0)

    @property
    def parts(self) -> int:  # type: ignore[override]
        """That of the one that has it."""
        return max((d.parts for d in self.defenses), default=0)

    def preprocess(self, view: View, key: PRNGKeyArray) -> UInt8[np.ndarray, "n h w c"]:
        """All of them, in order."""
        for i, defense in enumerate(self.defenses):
            view = replace(view, images=defense.preprocess(view, _own(key, i)))
        return view.images

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """The product; each sees all images, so that it does not matter who comes first."""
        return self._product(d.filter(view, _own(key, i)) for i, d in enumerate(self.defenses))

    def revise(self, view: View, victim: TrainedVictim, epoch: int) -> Float[np.ndarray, " n"] | None:
        """That of the one that does."""
        return self._product(d.revise(view, victim, epoch) for d in self.defenses)

    def augment(
        self, images: Array, targets: Array, key: PRNGKeyArray, loss: Loss
    ) -> tuple[Array, Array]:
        """All of them, in order."""
        for i, defense in enumerate(self.defenses):
            images, targets = defense.augment(images, targets, _own(key, i), loss)
        return images, targets

    def aggregate(self, gradients: Any, key: PRNGKeyArray) -> Any:
        """That of the one that does."""
        return next(d for d in self.defenses if d.parts).aggregate(gradients, key)

    def transform(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """All of them, the first innermost."""
        for defense in self.defenses:
            optimizer = defense.transform(optimizer)
        return optimizer

    def pick(self, accuracy: Float[np.ndarray, " epochs"]) -> int | None:
        """That of the last one that picks."""
        picked = [epoch for d in self.defenses if (epoch := d.pick(accuracy)) is not None]
        return picked[-1] if picked else None

    def train(
        self, view: View, images: UInt8[np.ndarray, "m h w c"], key: PRNGKeyArray
    ) -> Predictions | None:
        """That of the only one, if it does."""
        return self.defenses[0].train(view, images, key) if len(self.defenses) == 1 else None

    @staticmethod
    def _product(several: Iterable[np.ndarray | None]) -> np.ndarray | None:
        given = [weights for weights in several if weights is not None]
        return np.prod(given, axis=0) if given else None


def names() -> list[str]:
    """Every defence's name, plugins included; imports none of them."""
    return _plugins.names("defenses")


def load(name: str) -> type[Defense]:
    """The defence class of that name.

    Raises:
        UserError: there is none.
    """
    loaded: type[Defense] = _plugins.load("defenses", name, Defense)
    return loaded


def build(text: str, options: Sequence[str] = ()) -> Composed:
    """The defences that a user named, with the hyperparameters that they typed.

    Args:
        text: names, with a comma between them.
        options: such as `spectral.factor=2`.

    Raises:
        UserError: no such defence or hyperparameter, a name given twice, a wrong value, or defences that
            cannot be combined.
    """
    wanted = [name.strip() for name in text.split(",")]
    given: dict[str, list[tuple[str, str]]] = {name: [] for name in wanted}
    if len(given) < len(wanted):
        raise UserError(f"--defense {text}: name each defence once")
    for option in options:
        where, equals, value = option.partition("=")
        name, dot, field_name = where.rpartition(".")
        if not (equals and dot):
            raise UserError(f"--defense-set {option}: write it as defence.option=value")
        if name not in given:
            raise UserError(f"--defense-set {option}: --defense does not name {name}")
        given[name].append((field_name.replace("_", "-"), value))
    return Composed(tuple(_plugins.build(load(name), name, given[name]) for name in wanted))


def in_steps(text: str) -> Composed:
    """Defences of these names, of which all act in the victim's steps alone, and can be gone through.

    Raises:
        UserError: no such defence, or one that acts elsewhere.
    """
    built = build(text)
    for name, defense in zip(text.split(","), built.defenses, strict=True):
        for hook in ("preprocess", "filter", "revise", "pick", "train"):
            if getattr(type(defense), hook) is not getattr(Defense, hook):
                raise UserError(
                    f"no attack is made against {name.strip()}: it acts by `{hook}`, not in the victim's"
                    " steps"
                )
    return built


def config(defense: Composed) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each defence by its name, JSON-ready."""
    return {
        type(part).__module__.rsplit(".", 1)[-1]: {
            option.name: getattr(part, option.name) for option in _plugins.options(type(part))
        }
        for part in defense.defenses
    }


def summary(name: str) -> str:
    """What the defence does, in a line."""
    return _plugins.summary("defenses", name)


def _own(key: PRNGKeyArray, i: int) -> PRNGKeyArray:
    import jax

    return jax.random.fold_in(key, i)
