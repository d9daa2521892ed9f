"""What an attack is, and where to find one.

An attack is one file in `attacks/`: a frozen dataclass of its hyperparameters, derived from
`Attack`, whose `craft` turns a `Task` into a `PoisonSet`. The task holds all that an attacker may
know; the test split and the seeds that the poison is judged by are not in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench import _plugins
from poisonbench._files import content_hash
from poisonbench.arrays import drawn
from poisonbench.data import Dataset, read_only
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.threat import Budget, LInf, PoisonSet
from poisonbench.victim.recipe import Recipe

_plugins.extend(__path__, "attacks")


@dataclass(frozen=True)
class Task:
    """All that an attacker knows.

    Attributes:
        train_images: `[n, height, width, channels]`, uint8, the clean training set.
        train_labels: `[n]`, int32.
        val_images: `[m, height, width, channels]`, uint8, to tune on.
        val_labels: `[m]`, int32.
        class_names: one for each label.
        budget: what may be changed.
        recipe: how the victim is trained.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    val_images: np.ndarray
    val_labels: np.ndarray
    class_names: tuple[str, ...]
    budget: Budget
    recipe: Recipe

    @staticmethod
    def of(dataset: Dataset, budget: Budget, recipe: Recipe) -> Task:
        """The attacker's view of a data set. Its arrays are read-only copies."""
        return Task(
            read_only(dataset.train_images), read_only(dataset.train_labels),
            read_only(dataset.val_images), read_only(dataset.val_labels),
            dataset.class_names, budget, recipe,
        )  # fmt: skip

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.class_names)

    @property
    def num_poison(self) -> int:
        """How many images the budget allows to change."""
        return self.budget.count(len(self.train_labels))

    def random_indices(self, key: PRNGKeyArray) -> np.ndarray:
        """As many images as the budget allows, drawn without replacement."""
        return drawn(np.arange(len(self.train_labels)), self.num_poison, key)

    def bounds(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest pixels that the budget allows at these images, uint8."""
        images = self.train_images[indices]
        if isinstance(self.budget.pixels, LInf):
            radius = self.budget.pixels.radius
            wide = images.astype(np.int16)
            low, high = np.clip(wide - radius, 0, 255), np.clip(wide + radius, 0, 255)
            return low.astype(np.uint8), high.astype(np.uint8)
        return np.zeros_like(images), np.full_like(images, 255)

    def poison(self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray) -> PoisonSet:
        """A poison set for this task, in order of its indices.

        Raises:
            ValueError: pixels that are not whole numbers from 0 to 255, such as floats in [0, 1],
                or labels or indices that are not whole numbers.
        """
        for name, array in (("indices", indices), ("images", images), ("labels", labels)):
            if not np.issubdtype(np.asarray(array).dtype, np.integer):
                raise ValueError(f"{name} must be integers, not {np.asarray(array).dtype}")
        if np.size(images) and not 0 <= np.min(images) <= np.max(images) <= 255:
            raise ValueError("pixels must lie in 0 to 255")
        order = np.argsort(indices)
        return PoisonSet(
            np.asarray(indices, np.int64)[order],
            np.asarray(images, np.uint8)[order],
            np.asarray(labels, np.int32)[order],
            self.budget,
            content_hash(self.train_images, self.train_labels),
        )


class Attack(ABC):
    """A way to spend the budget; subclasses are frozen dataclasses of their hyperparameters.

    Attributes:
        control: it does no harm by its choices; others are held against it.
    """

    control: ClassVar[bool] = False

    @abstractmethod
    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Make the poison.

        Args:
            task: what the attacker knows.
            key: the only source of randomness.
            journal: where to save progress, show it, and log what was measured on the way.

        Returns:
            A set within `task.budget`, a function of the arguments alone.
        """

    def require(self, budget: Budget) -> None:  # noqa: B027 - most attacks can work under any
        """Refuse a budget that this attack cannot work under.

        Raises:
            UserError: naming the option to change.
        """


def require_at_least_one(attack: Attack, *names: str) -> None:
    """Refuse hyperparameters of these names that are below 1.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        if getattr(attack, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")


def require_positive(attack: Attack, *names: str) -> None:
    """Refuse hyperparameters of these names that are not above 0; None is let pass.

    Raises:
        UserError: naming the option.
    """
    for name in names:
        value = getattr(attack, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")


def names() -> list[str]:
    """Every attack's name, plugins included; imports none of them."""
    return _plugins.names("attacks")


def load(name: str) -> type[Attack]:
    """The attack class of that name.

    Raises:
        UserError: there is none.
    """
    loaded: type[Attack] = _plugins.load("attacks", name, Attack)
    return loaded


def build(name: str, given: list[tuple[str, str]], also_known: Iterable[str] = ()) -> Attack:
    """The attack with hyperparameters as typed on the command line.

    Args:
        name: the attack's.
        given: pairs such as `("step-size", "0.02")`.
        also_known: options that were read elsewhere, to suggest for a typing error.

    Raises:
        UserError: no such attack or hyperparameter, or a wrong value.
    """
    attack: Attack = _plugins.build(load(name), name, given, also_known)
    return attack


def summary(name: str) -> str:
    """What the attack does, in a line."""
    return _plugins.summary("attacks", name)


def config(attack: Attack) -> dict[str, Any]:
    """The attack's hyperparameters, JSON-ready."""
    return {field.name: getattr(attack, field.name) for field in _plugins.options(type(attack))}
