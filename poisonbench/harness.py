"""The measurement: victims retrained in pairs, clean and poisoned, from a file on disk.

What is scored is the poison as it was stored and read back, after a check against its budget. A
clean victim and its poisoned twin share one key, so initialisation, order and augmentation. The
keys come from the evaluation seeds alone, through a root that no attack is given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench._files import content_hash, write_text
from poisonbench.data import Dataset
from poisonbench.progress import Progress
from poisonbench.records import VictimScores, hardware, library_versions
from poisonbench.threat import PoisonSet
from poisonbench.victim.recipe import Recipe

GROUP = 5
"""Victims trained in one `vmap`: few enough to show progress and to fit in memory."""


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

    Raises:
        UserError: the poison breaks its budget, or is for other data.
    """
    poison.check(dataset.train_images, dataset.train_labels, dataset.num_classes)
    clean = (dataset.train_images, dataset.train_labels)
    poisoned = poison.apply(*clean)
    groups = [list(seeds[i : i + GROUP]) for i in range(0, len(seeds), GROUP)]
    victims: list[VictimScores] = []
    total_seconds = 0.0
    with Progress("training victims", 2 * len(recipes) * len(seeds)) as progress:
        for name, recipe in recipes.items():
            scores: dict[str, list[np.ndarray]] = {"clean": [], "poisoned": []}
            for group in groups:
                for condition, data in (("clean", clean), ("poisoned", poisoned)):
                    by_epoch, seconds = _scores(dataset, data, recipe, group, folder, reuse)
                    scores[condition].append(by_epoch)
                    total_seconds += seconds
                    progress.advance(len(group), f"{name}, {condition}")
            accuracies = {c: np.concatenate(parts) for c, parts in scores.items()}
            victims.append(
                VictimScores(
                    recipe_name=name, recipe=recipe.as_dict(), seeds=list(seeds),
                    clean=_rounded(accuracies["clean"][:, -1]),
                    poisoned=_rounded(accuracies["poisoned"][:, -1]),
                    clean_best=_rounded(accuracies["clean"].max(1)),
                    poisoned_best=_rounded(accuracies["poisoned"].max(1)),
                )
            )  # fmt: skip
    return Evaluation(victims, total_seconds)


def _scores(
    dataset: Dataset,
    data: tuple[np.ndarray, np.ndarray],
    recipe: Recipe,
    seeds: list[int],
    folder: Path | None,
    reuse: bool,
) -> tuple[np.ndarray, float]:
    """Accuracy in percent, `[seeds, epochs]`, and the seconds it took, from `folder` if there."""
    import jax.numpy as jnp

    from poisonbench.victim.evaluation import train_and_score
    from poisonbench.victim.training import TrainingSet

    test = (dataset.test_images, dataset.test_labels)
    what = f"{content_hash(*data, *test)}{json.dumps(recipe.as_dict(), sort_keys=True)}{seeds}"
    kept = None if folder is None else folder / f"{content_hash(_bytes(what + _code()))[:24]}.json"
    if kept is not None and kept.exists() and reuse:
        try:
            stored = json.loads(kept.read_text("utf-8"))
            by_epoch = np.array(stored["by_epoch"], np.float64)
            if by_epoch.shape == (len(seeds), recipe.epochs) and np.isfinite(by_epoch).all():
                return by_epoch, float(stored["seconds"])
        except (ValueError, KeyError, TypeError):
            pass  # not whole: train again
    began = time.monotonic()
    training = TrainingSet.clean(*data, dataset.num_classes)
    keys = jnp.stack([evaluation_key(seed) for seed in seeds])
    by_epoch = train_and_score(recipe, training, keys, *test)
    seconds = time.monotonic() - began
    if kept is not None:
        write_text(kept, json.dumps({"by_epoch": by_epoch.tolist(), "seconds": seconds}))
    return by_epoch, seconds


@cache
def _code() -> str:
    """All that decides a victim besides its arguments: pairs must not mix two versions of it."""
    root = Path(__file__).parent
    sources = [*sorted((root / "victim").glob("*.py")), root / "compute.py"]
    text = "".join(path.read_text("utf-8") for path in sources)
    return f"{text}{library_versions()}{hardware().model_dump_json()}"


def _root(purpose: str, seed: int) -> PRNGKeyArray:
    import jax

    purposes = ("craft", "evaluate", "smoothness")
    return jax.random.fold_in(jax.random.key(purposes.index(purpose)), seed)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _rounded(accuracies: np.ndarray) -> list[float]:
    # Shares of a finite test set; six digits hold them and keep the record readable.
    return [round(float(a), 6) for a in accuracies]
