"""Defences: several as one, and where to find them; what one is, `poisonbench.hooks` says."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from poisonbench import _plugins
from poisonbench.errors import UserError
from poisonbench.hooks import Defense as Defense
from poisonbench.hooks import Loss as Loss
from poisonbench.hooks import Predict as Predict
from poisonbench.hooks import Predictions as Predictions
from poisonbench.hooks import View as View
from poisonbench.trained import TrainedVictim
from poisonbench.victim.recipe import Recipe

_plugins.extend(__path__, "defenses")


@dataclass(frozen=True)
class Composed(Defense):
    """Several defences as one, hook by hook; none sees another's trusted images.

    Attributes:
        defenses: in the order in which they are named.
        names: as typed; those of their classes where they were not.
    """

    defenses: tuple[Defense, ...] = field(default=())
    names: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for option, what in (("every", "look at their victim in training"), ("parts", "cut up batches")):
            those = [name for name, _ in self._with(option)]
            if len(those) > 1:
                raise UserError(f"--defense: {' and '.join(those)} {what}, which only one can: name one")
        for name, defense in self._named():
            others = [other for other in self._named() if other[1] is not defense]
            if defense.replaces_training() and (why := _more_than_steps(others)):
                raise UserError(f"--defense: {name} trains victims of its own, and {why}: leave one out")

    @property
    def trusted(self) -> int:  # type: ignore[override]
        """What all of them need together: none sees another's."""
        return sum(d.trusted for d in self.defenses)

    @property
    def every(self) -> int:  # type: ignore[override]
        """That of the one that has it."""
        return max((d.every for d in self.defenses), default=0)

    @property
    def parts(self) -> int:  # type: ignore[override]
        """That of the one that has it."""
        return max((d.parts for d in self.defenses), default=0)

    def dropped(self, allowed: int) -> int:
        """At the most."""
        return sum(d.dropped(allowed) for d in self.defenses)

    def require(self, recipe: Recipe, number: int, allowed: int, available: int) -> None:
        """Refuse what cannot work, before anything is crafted or trained.

        Args:
            recipe: of the victims.
            number: training images.
            allowed: how many of them the budget lets an attacker poison.
            available: validation images, of which the trusted ones are taken.

        Raises:
            UserError: naming what to change.
        """
        if self.trusted > available:
            raise UserError(
                f"the defence needs {self.trusted} trusted images, and validation data has {available}:"
                f" lower {self._settings('trusted')}, or give more with --val-size"
            )
        if self.parts and recipe.batch_size % self.parts:
            raise UserError(
                f"a batch of {recipe.batch_size} cannot be cut into {self.parts} equal parts: give"
                f" another --set batch_size=… or {self._settings('parts')}"
            )
        if self.every >= recipe.epochs:
            raise UserError(
                f"the defence looks at its victim every {self.every} epochs, and there are"
                f" {recipe.epochs}: lower {self._settings('every')}"
            )
        if number - self.dropped(allowed) < recipe.batch_size:
            raise UserError(
                f"where {allowed} of {number} images may be poisoned, {self} leaves less than a batch of"
                f" {recipe.batch_size}: lower --fraction or --set batch_size=…, or have fewer dropped"
            )

    def preprocess(self, view: View, key: PRNGKeyArray) -> UInt8[np.ndarray, "n h w c"]:
        """All of them, in order."""
        images = view.images
        for i, (name, defense, own) in enumerate(self._views(view)):
            images = defense.preprocess(replace(own, images=images), _own(key, i))
            _require_arrays(f"{name}.preprocess", (images,), (view.images,))
        return images

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """The product; each sees all images, so that it does not matter who comes first."""
        return _product(
            _weights(f"{name}.filter", defense.filter(own, _own(key, i)), len(view.labels))
            for i, (name, defense, own) in enumerate(self._views(view))
        )

    def revise(
        self, view: View, victim: TrainedVictim, epoch: int, weights: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"] | None:
        """That of the one that does."""
        return _product(
            _weights(f"{name}.revise", defense.revise(own, victim, epoch, weights), len(view.labels))
            for name, defense, own in self._views(view)
        )

    def augment(
        self, images: Array, targets: Array, key: PRNGKeyArray, loss: Loss
    ) -> tuple[Array, Array]:
        """All of them, in order."""
        for i, (name, defense) in enumerate(self._named()):
            batch = defense.augment(images, targets, _own(key, i), loss)
            _require_arrays(f"{name}.augment", batch, (images, targets))
            images, targets = batch
        return images, targets

    def aggregate(self, gradients: Any, key: PRNGKeyArray) -> Any:
        """That of the one that does."""
        return next(d for d in self.defenses if d.parts).aggregate(gradients, key)

    def transform(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        """All of them, the first innermost."""
        for defense in self.defenses:
            optimizer = defense.transform(optimizer)
        return optimizer

    def pick(self, right: Bool[np.ndarray, "epochs m"]) -> int | None:
        """That of the last one that picks, by its own trusted images."""
        picked, first = None, 0
        for defense in self.defenses:
            epoch = defense.pick(right[:, first : first + defense.trusted])
            picked, first = picked if epoch is None else epoch, first + defense.trusted
        return picked

    def train(self, view: View, key: PRNGKeyArray) -> Predict | None:
        """That of the one that does, whose victims meet what the others do in a step."""
        for defense in self.defenses:
            if defense.replaces_training():
                others = tuple(other for other in self.defenses if other is not defense)
                return defense.train(replace(view, guard=Composed(others) if others else None), key)
        return None

    def __str__(self) -> str:
        return " and ".join(name for name, _ in self._named())

    def _named(self) -> list[tuple[str, Defense]]:
        names = self.names or tuple(type(defense).__name__ for defense in self.defenses)
        return list(zip(names, self.defenses, strict=True))

    def _with(self, option: str) -> list[tuple[str, Defense]]:
        """The defences that use what this hyperparameter is of, by name."""
        return [(name, defense) for name, defense in self._named() if getattr(defense, option)]

    def _settings(self, option: str) -> str:
        """How a user sets this hyperparameter."""
        return " and ".join(f"--defense-set {name}.{option}=…" for name, _ in self._with(option))

    def _views(self, view: View) -> list[tuple[str, Defense, View]]:
        """What each of them sees: its own trusted images, and the poison if it is the oracle."""
        several: list[tuple[str, Defense, View]] = []
        first = 0
        for name, defense in self._named():
            own = slice(first, first + defense.trusted)
            first += defense.trusted
            mine = replace(
                view,
                trusted_images=view.trusted_images[own],
                trusted_labels=view.trusted_labels[own],
                poisoned=view.poisoned if defense.sees_poison else None,
            )
            several.append((name, defense, mine))
        return several


def _weights(whose: str, given: Any, number: int) -> Float[np.ndarray, " n"] | None:
    """What a hook gave, if it is one weight for each image.

    Raises:
        UserError: it is something else; it says whose.
    """
    if given is None:
        return None
    weights = np.asarray(given)
    if weights.shape != (number,) or weights.dtype.kind not in "biuf":
        raise UserError(
            f"{whose} gave {weights.dtype} of shape {weights.shape}, and there are {number} training"
            " images: give one number for each, 0 to drop it and 1 to keep it"
        )
    weights = weights.astype(float)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise UserError(f"{whose} gave weights that are negative or not finite: correct its code")
    return weights


def _require_arrays(whose: str, given: Any, wanted: tuple[Any, ...]) -> None:
    """Refuse anything but arrays like these.

    Raises:
        UserError: saying whose they are.
    """

    def kinds(several: Any) -> list[str]:
        return [f"{getattr(x, 'dtype', type(x).__name__)} {getattr(x, 'shape', '')}" for x in several]

    several = given if isinstance(given, tuple) else (given,)
    if kinds(several) != kinds(wanted):
        raise UserError(
            f"{whose} gave {' and '.join(kinds(several))}, and is to give {' and '.join(kinds(wanted))}"
        )


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


def build(text: str, options: Sequence[str] = (), *, typed_as: str = "--defense") -> Composed:
    """The defences that a user named, with the hyperparameters that they typed.

    Args:
        text: names, with a comma between them.
        options: such as `spectral.factor=2`.
        typed_as: which option they were given to, to say in an error.

    Raises:
        UserError: no such defence or hyperparameter, a name given twice, a wrong value, or defences that
            cannot be combined.
    """
    wanted = [name.strip() for name in text.split(",")]
    if "none" in wanted and len(wanted) > 1:
        raise UserError(f"{typed_as} {text}: none is no defence beside others: leave it out")
    given: dict[str, list[tuple[str, str]]] = {name: [] for name in wanted}
    if len(given) < len(wanted):
        raise UserError(f"{typed_as} {text}: name each defence once")
    for option in options:
        where, equals, value = option.partition("=")
        name, dot, field_name = where.rpartition(".")
        if not (equals and dot):
            raise UserError(f"--defense-set {option}: write it as defence.option=value")
        if name not in given:
            raise UserError(f"--defense-set {option}: --defense does not name {name}")
        given[name].append((field_name.replace("_", "-"), value))
    for name in wanted:
        if load(name).sees_poison and name != "oracle":
            raise UserError(
                f"{name} asks to be told which points are poisoned, which is the oracle's alone"
            )
    built = tuple(
        _plugins.build(load(name), name, given[name], spelling=f"--defense-set {name}.".__add__)
        for name in wanted
    )
    return Composed(built, tuple(wanted))


def in_steps(text: str) -> Composed:
    """Defences of these names, of which all act in the victim's steps alone, and can be gone through.

    Raises:
        UserError: no such defence, or one that acts elsewhere.
    """
    built = build(text, typed_as="--against")
    for name, defense in zip(built.names, built.defenses, strict=True):
        if name == "none":
            raise UserError("--against none: there is nothing to know about no defence: leave it out")
        if hook := _elsewhere(defense):
            raise UserError(
                f"no attack is made against {name}: it acts by `{hook}`, not in the victim's steps"
            )
    return built


def _elsewhere(defense: Defense) -> str | None:
    """A hook by which it acts outside of the victim's steps."""
    hooks = ("preprocess", "filter", "revise", "pick", "train")
    acts = [hook for hook in hooks if getattr(type(defense), hook) is not getattr(Defense, hook)]
    return next(iter(acts), None)


def _more_than_steps(several: Sequence[tuple[str, Defense]]) -> str | None:
    """Why they cannot go into the steps of victims on any part of the data, of any batch."""
    for name, defense in several:
        if defense.parts:
            return f"{name} cuts their batches, which may be of any size, into {defense.parts}"
        if hook := _elsewhere(defense):
            return f"{name} acts by `{hook}`, not in each of their steps alone"
    return None


def config(defense: Composed) -> dict[str, dict[str, Any]]:
    """The hyperparameters of each defence by its name, JSON-ready."""
    return {
        name: {option.name: getattr(part, option.name) for option in _plugins.options(type(part))}
        for name, part in zip(defense.names, defense.defenses, strict=True)
    }


def sources(defense: Composed) -> str:
    """All code that decides what a defence does to a victim."""
    root = Path(__file__).parents[1]
    library = (
        "defenses/__init__.py", "arrays.py", "defended.py", "hooks.py", "trained.py", "_files.py",
        "metagradient/*.py",
    )  # fmt: skip
    paths = [path for name in library for path in sorted(root.glob(name))]
    own = [Path(inspect.getfile(type(part))) for part in defense.defenses]
    return "".join(path.read_text("utf-8") for path in [*own, *paths])


def summary(name: str) -> str:
    """What the defence does, in a line."""
    return _plugins.summary("defenses", name)


def _own(key: PRNGKeyArray, i: int) -> PRNGKeyArray:
    return jax.random.fold_in(key, i)
