"""The measurement: victims retrained in pairs, clean and poisoned, from a file on disk.

What is scored is the poison as it was stored and read back, after a check against its budget. A
clean victim and its poisoned twin share one key, so initialisation, order and augmentation. The
keys come from the evaluation seeds alone, through a root that no attack is given.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench._files import content_hash, write_text
from poisonbench.data import Dataset, read_only
from poisonbench.progress import Progress
from poisonbench.records import Certificate, Filtering, VictimScores
from poisonbench.stored import hardware, library_versions
from poisonbench.threat import PoisonSet
from poisonbench.victim.recipe import Recipe

if TYPE_CHECKING:  # it imports JAX
    from poisonbench.defenses import Composed

TRUSTED = 0
"""Seed of the draw of trusted images from validation data: the same for all defences and attacks."""
SHUFFLED = 1
"""Seed of the order of a training set that poison was added to."""
GROUP = 5
"""Victims trained in one `vmap`: few enough to show progress and to fit in memory."""
LONG = 200_000
"""Images in a training, epoch by epoch, from which on victims are trained one by one, to lose little."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and how long it took.

    Attributes:
        victims: one entry per recipe.
        seconds: wall time, that of an interrupted evaluation's finished groups included.
    """

    victims: list[VictimScores]
    seconds: float


def crafting_key(seed: int) -> PRNGKeyArray:
    """The key that an attack with this seed is given."""
    return _root("craft", seed)


def evaluation_key(seed: int) -> PRNGKeyArray:
    """The key of the clean victim and of its poisoned twin; no attack is given it."""
    return _root("evaluate", seed)


def smoothness_key(seed: int) -> PRNGKeyArray:
    """The key of everything that a measurement of smoothness draws."""
    return _root("smoothness", seed)


def evaluate(
    dataset: Dataset,
    poison: PoisonSet,
    recipes: dict[str, Recipe],
    seeds: Sequence[int],
    folder: Path | None = None,
    *,
    reuse: bool = True,
    defense: Composed | None = None,
) -> Evaluation:
    """Train and score victims, clean and poisoned, for every recipe and seed.

    Args:
        dataset: clean data; its test split is what victims are scored on.
        poison: as loaded from a file; checked against its budget before anything is trained.
        recipes: the victims, by name.
        seeds: evaluation seeds.
        folder: where finished groups of victims are kept, so that an interrupted evaluation
            goes on where it was, and clean victims serve every attack.
        reuse: read what is kept there; otherwise train everything anew.
        defense: what both the clean and the poisoned victims are defended by.

    Raises:
        UserError: the poison breaks its budget, or is for other data.
    """
    poison.check(dataset.train_images, dataset.train_labels, dataset.num_classes)
    number = len(dataset.train_labels)
    shield = _shield(defense, poison, dataset)
    bare = (dataset.train_images, dataset.train_labels)
    clean = _Condition(bare, np.zeros(number, bool), shield)
    poisoned = _Condition(*_shuffled(poison.apply(*bare), poison.where(number), number), shield)
    victims: list[VictimScores] = []
    total_seconds = 0.0
    with Progress("training victims", 2 * len(recipes) * len(seeds)) as progress:
        for name, recipe in recipes.items():
            scores: dict[str, list[_Scores]] = {"clean": [], "poisoned": []}
            size = GROUP if number * recipe.epochs < LONG else 1
            for group in (list(seeds[i : i + size]) for i in range(0, len(seeds), size)):
                for which, condition in (("clean", clean), ("poisoned", poisoned)):
                    scored = _scores(dataset, condition, recipe, group, folder, reuse)
                    scores[which].append(scored)
                    total_seconds += scored.seconds
                    progress.advance(len(group), f"{name}, {which}")
            accuracies = {c: np.concatenate([s.by_epoch for s in parts]) for c, parts in scores.items()}
            victims.append(
                VictimScores(
                    recipe_name=name, recipe=recipe.as_dict(), seeds=list(seeds),
                    clean=_rounded(accuracies["clean"][:, -1]),
                    poisoned=_rounded(accuracies["poisoned"][:, -1]),
                    clean_best=_rounded(accuracies["clean"].max(1)),
                    poisoned_best=_rounded(accuracies["poisoned"].max(1)),
                    filtering=_filtering(scores, poisoned.poisoned),
                    certificate=_certificate(scores, poison),
                )
            )  # fmt: skip
    return Evaluation(victims, total_seconds)


@dataclass(frozen=True)
class _Shield:
    """A defence, and what it may know beside the training set.

    Attributes:
        defense: it.
        allowed: how many images the budget lets an attacker poison.
        trusted: clean images and labels, as many as it declares.
    """

    defense: Composed
    allowed: int
    trusted: tuple[np.ndarray, np.ndarray]

    def identity(self, condition: _Condition) -> str:
        """All of it that decides a score, as text."""
        from poisonbench import defenses

        seen = [*self.trusted, *([condition.poisoned] if self.sees_poison else [])]
        return (
            f"{defenses.config(self.defense)}{defenses.sources(self.defense)}{self.allowed}"
            f"{content_hash(*seen)}"
        )

    @property
    def sees_poison(self) -> bool:
        """Whether one of them is the oracle."""
        return any(d.sees_poison for d in self.defense.defenses)


@dataclass(frozen=True)
class _Condition:
    """What victims are trained on.

    Attributes:
        data: images and labels.
        poisoned: `[n]`, which of them are poison.
        shield: what the victims are defended by, if anything.
    """

    data: tuple[np.ndarray, np.ndarray]
    poisoned: np.ndarray
    shield: _Shield | None = None


@dataclass(frozen=True)
class _Scores:
    """What a group of victims scored, and what their defence did.

    Attributes:
        by_epoch: `[seeds, epochs]`, accuracy in percent.
        dropped: for each seed, the images that were given no weight; None where nothing was weighed.
        certified: `[seeds, m]`, see `poisonbench.defended`.
        seconds: what it took.
    """

    by_epoch: np.ndarray
    dropped: list[list[int]] | None
    certified: np.ndarray | None
    seconds: float

    @staticmethod
    def of(stored: dict[str, Any]) -> _Scores:
        """As read back."""
        certified = stored.get("certified")
        return _Scores(
            np.array(stored["by_epoch"], np.float64), stored.get("dropped"),
            None if certified is None else np.array(certified, np.int64), float(stored["seconds"]),
        )  # fmt: skip

    def text(self) -> str:
        """As stored."""
        certified = None if self.certified is None else self.certified.tolist()
        stored = {"by_epoch": self.by_epoch.tolist(), "seconds": self.seconds}
        if self.dropped is not None or certified is not None:
            stored |= {"dropped": self.dropped, "certified": certified}
        return json.dumps(stored)


def _scores(
    dataset: Dataset,
    condition: _Condition,
    recipe: Recipe,
    seeds: list[int],
    folder: Path | None,
    reuse: bool,
) -> _Scores:
    """What this group of victims scores, from `folder` if it is there."""
    test = (dataset.test_images, dataset.test_labels)
    what = f"{content_hash(*condition.data, *test)}{json.dumps(recipe.as_dict(), sort_keys=True)}{seeds}"
    what += "" if condition.shield is None else condition.shield.identity(condition)
    kept = None if folder is None else folder / f"{content_hash(_bytes(what + victim_code()))[:24]}.json"
    if kept is not None and kept.exists() and reuse:
        try:
            stored = _Scores.of(json.loads(kept.read_text("utf-8")))
            right_shape = stored.by_epoch.shape == (len(seeds), recipe.epochs)
            if right_shape and np.isfinite(stored.by_epoch).all():
                return stored
        except (ValueError, KeyError, TypeError):
            pass  # not whole: train again
    scored = _trained(dataset, condition, recipe, seeds)
    if kept is not None:
        write_text(kept, scored.text())
    return scored


def _trained(dataset: Dataset, condition: _Condition, recipe: Recipe, seeds: list[int]) -> _Scores:
    import jax.numpy as jnp

    from poisonbench import defended
    from poisonbench.defenses import View
    from poisonbench.victim.evaluation import train_and_score
    from poisonbench.victim.training import TrainingSet

    test = (dataset.test_images, dataset.test_labels)
    keys = jnp.stack([evaluation_key(seed) for seed in seeds])
    began = time.monotonic()
    shield = condition.shield
    if shield is None:
        training = TrainingSet.clean(*condition.data, dataset.num_classes)
        by_epoch = train_and_score(recipe, training, keys, *test)
        return _Scores(by_epoch, None, None, time.monotonic() - began)
    arrays = (*condition.data, *shield.trusted)
    images, labels, trusted_images, trusted_labels = (read_only(array) for array in arrays)
    view = View(
        images, labels, dataset.num_classes, recipe, shield.allowed, trusted_images, trusted_labels,
        read_only(condition.poisoned) if shield.sees_poison else None,
    )  # fmt: skip
    done = defended.train_and_score(shield.defense, view, keys, *test)
    dropped = None
    if done.weights is not None:
        dropped = [np.flatnonzero(row == 0).tolist() for row in done.weights]
    return _Scores(done.by_epoch, dropped, done.certified, time.monotonic() - began)


def _shuffled(
    data: tuple[np.ndarray, np.ndarray], poisoned: np.ndarray, number: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The same where poison was added, which comes last: no defence may see that."""
    if len(poisoned) == number:
        return data, poisoned
    rows = np.random.default_rng(SHUFFLED).permutation(len(poisoned))
    return (data[0][rows], data[1][rows]), poisoned[rows]


def _shield(defense: Composed | None, poison: PoisonSet, dataset: Dataset) -> _Shield | None:
    if defense is None or not defense.defenses:
        return None
    rows = np.random.default_rng(TRUSTED).permutation(len(dataset.val_labels))[: defense.trusted]
    trusted = (dataset.val_images[rows], dataset.val_labels[rows])
    return _Shield(defense, poison.budget.count(len(dataset.train_labels)), trusted)


def _filtering(scores: dict[str, list[_Scores]], poisoned: np.ndarray) -> Filtering | None:
    """What was dropped, seed by seed; None where nothing is ever weighed."""
    if all(s.dropped is None for parts in scores.values() for s in parts):
        return None
    clean, both = (
        [rows for s in scores[c] for rows in s.dropped or [[]] * len(s.by_epoch)]
        for c in ("clean", "poisoned")
    )
    return Filtering(
        clean_run=[len(rows) for rows in clean],
        poisoned_run=[len(rows) for rows in both],
        poison=[int(poisoned[rows].sum()) for rows in both],
    )


def _certificate(scores: dict[str, list[_Scores]], poison: PoisonSet) -> Certificate | None:
    """Certified accuracy of clean victims, and how often the poison made a liar of it."""
    if scores["clean"][0].certified is None:
        return None
    clean, both = (
        np.concatenate([s.certified for s in scores[c] if s.certified is not None])
        for c in ("clean", "poisoned")
    )
    # An image replaced is one removed and one added.
    changes = len(poison) * (2 if poison.budget.mode == "replace" else 1)

    def broken(sure: np.ndarray, other: np.ndarray) -> np.ndarray:
        """An answer sure to be the same for the other set is not: here it is right, there wrong."""
        return (sure >= changes) & (other < 0)

    curve = [float(100 * (clean >= r).mean()) for r in range(max(0, int(clean.max())) + 1)]
    return Certificate(
        curve=_rounded(np.array(curve)), changes=changes,
        violations=int((broken(clean, both) + broken(both, clean)).sum()),
    )  # fmt: skip


@cache
def victim_code() -> str:
    """All that decides a victim besides its arguments: pairs must not mix two versions of it."""
    root = Path(__file__).parent
    learned = (root / "optimizers").glob("*.*")  # code and weights
    alone = (root / "arrays.py", root / "compute.py")
    files = [*sorted((root / "victim").glob("*.py")), *sorted(learned), *alone]
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return f"{content}{library_versions()}{hardware().model_dump_json()}"


def _root(purpose: str, seed: int) -> PRNGKeyArray:
    import jax

    purposes = ("craft", "evaluate", "smoothness")
    return jax.random.fold_in(jax.random.key(purposes.index(purpose)), seed)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _rounded(accuracies: np.ndarray) -> list[float]:
    # Shares of a finite test set; six digits hold them and keep the record readable.
    return [round(float(a), 6) for a in accuracies]
