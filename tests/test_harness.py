"""The measurement compares like with like, from the stored poison, and loses no finished work.

Claims of `poisonbench.harness` tested here:

- a clean victim and its poisoned twin share every random choice: under an empty poison they are the
  same victim and the drop is exactly zero, for every seed, recipe and epoch;
- a seed's result depends on the seed and the recipe, not on which recipes stand beside it or in
  which order; different seeds give different victims;
- what is trained on is the clean set and the set with the poison applied, what is scored is the test
  split, and both the last and the best epoch are reported;
- a poison beyond its budget, or for other data, is refused before anything is trained;
- an interrupted evaluation trains only what is not finished; a spoilt file is trained again, and what
  is kept is used for nothing but the same data, recipe and seeds.

Real victims are of width 2, on 40 images of 8×8; where only bookkeeping is tested, training is
replaced by a table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from poisonbench import harness
from poisonbench._files import content_hash
from poisonbench.data import Dataset, DataSpec
from poisonbench.errors import UserError
from poisonbench.threat import Budget, LInf, PoisonSet
from poisonbench.tracks import DIGITS
from poisonbench.victim import evaluation
from poisonbench.victim.training import TrainingSet

RECIPES = {
    name: recipe.replace(network="cnn", width=2, epochs=3, batch_size=20)
    for name, recipe in DIGITS.recipes.items()
}
SMOOTH = {"smooth": RECIPES["smooth"]}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)

    def split(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(size, dtype=np.int32) % 4
        images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8) // 2
        images[np.arange(size), labels * 2] += 100  # a bright row tells the class
        return images, labels

    spec = DataSpec(name="digits", val_size=20)
    return Dataset(spec, *split(40), *split(20), *split(60), ("a", "b", "c", "d"))


def poison_of(dataset: Dataset, count: int = 4, budget: Budget | None = None) -> PoisonSet:
    """The first images turned into black ones, labels kept."""
    rows = np.arange(count)
    return PoisonSet(
        rows,
        np.zeros_like(dataset.train_images[rows]),
        dataset.train_labels[rows],
        budget or Budget(fraction=0.1),
        content_hash(dataset.train_images, dataset.train_labels),
    )


def test_twins_of_an_empty_poison_are_the_same(dataset: Dataset) -> None:
    done = harness.evaluate(dataset, poison_of(dataset, 0), RECIPES, range(2))
    assert [victim.recipe_name for victim in done.victims] == ["smooth", "standard"]
    for victim in done.victims:
        assert victim.clean == victim.poisoned
        assert victim.clean_best == victim.poisoned_best
        assert (victim.drop.mean, victim.drop.low, victim.drop.high) == (0, 0, 0)


def test_a_seed_gives_its_victim_in_whatever_order(dataset: Dataset) -> None:
    poison = poison_of(dataset)
    backwards = dict(reversed(RECIPES.items()))
    first = harness.evaluate(dataset, poison, RECIPES, [0, 1]).victims
    again = harness.evaluate(dataset, poison, backwards, [0, 1]).victims
    assert first == again[::-1]
    alone = harness.evaluate(dataset, poison, SMOOTH, [0, 1]).victims
    assert alone == first[:1]
    swapped = harness.evaluate(dataset, poison, SMOOTH, [1, 0]).victims[0]
    assert swapped.clean == first[0].clean[::-1]
    assert swapped.poisoned == first[0].poisoned[::-1]


def test_seeds_give_different_victims(dataset: Dataset) -> None:
    keys = jax.numpy.stack([harness.evaluation_key(seed) for seed in (5, 6)])
    training = TrainingSet.clean(dataset.train_images, dataset.train_labels, 4)
    run, state = evaluation.TrainingRun.start(SMOOTH["smooth"], training, keys)
    assert bool((run.order[0] != run.order[1]).any())
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 2]
    assert kernels
    assert all(bool((leaf[0] != leaf[1]).any()) for leaf in kernels)


class Table:
    """In place of training: accuracies from a table, and a note of every call.

    Attributes:
        calls: content hash of the training data, width of the recipe and keys, for each call.
        stop_after: calls after which the process is interrupted.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, tuple[tuple[int, ...], ...]]] = []
        self.scored: set[str] = set()
        self.stop_after: int | None = None

    def __call__(
        self, recipe: Any, data: TrainingSet, keys: jax.Array, images: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        used = content_hash(np.asarray(data.images), np.asarray(data.labels))
        words = tuple(tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist())
        self.calls.append((used, recipe.width, words))
        self.scored.add(content_hash(images, labels))
        first = np.array([int(word) % 7 for _, word in words], np.float64)
        offset = 10.0 if data.images[0].any() else 0.0  # clean: the first image is not black
        return np.stack([50 + first + offset, 80 + first + offset, 60 + first + offset], 1)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    table = Table()
    monkeypatch.setattr(evaluation, "train_and_score", table)
    monkeypatch.setattr(harness, "GROUP", 2)
    return table


def test_the_last_and_the_best_epoch_are_reported(dataset: Dataset, table: Table) -> None:
    (victim,) = harness.evaluate(dataset, poison_of(dataset), SMOOTH, range(3)).victims
    assert victim.seeds == [0, 1, 2]
    assert len(set(victim.clean)) > 1
    for clean, poisoned, clean_best, poisoned_best in zip(
        victim.clean, victim.poisoned, victim.clean_best, victim.poisoned_best, strict=True
    ):
        assert clean == poisoned + 10
        assert clean_best == clean + 20
        assert poisoned_best == poisoned + 20
    assert victim.drop.mean == victim.best_drop.mean == 10
    assert victim.recipe == RECIPES["smooth"].as_dict()


def test_twins_share_a_key_and_differ_in_the_data(dataset: Dataset, table: Table) -> None:
    poison = poison_of(dataset)
    harness.evaluate(dataset, poison, SMOOTH, [3, 9, 27])
    clean = content_hash(dataset.train_images, dataset.train_labels)
    dirty = content_hash(*poison.apply(dataset.train_images, dataset.train_labels))
    assert [used for used, _, _ in table.calls] == [clean, dirty, clean, dirty]
    assert table.calls[0][2] == table.calls[1][2]
    assert table.calls[2][2] == table.calls[3][2]
    keys = [
        tuple(np.asarray(jax.random.key_data(harness.evaluation_key(s))).tolist()) for s in (3, 9, 27)
    ]
    assert [*table.calls[0][2], *table.calls[2][2]] == keys
    assert table.scored == {content_hash(dataset.test_images, dataset.test_labels)}


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda p: replace(p, budget=Budget(fraction=0.05)), id="too many"),
        pytest.param(
            lambda p: replace(p, budget=Budget(fraction=0.1, pixels=LInf(radius=1))), id="too far"
        ),
        pytest.param(lambda p: replace(p, labels=(p.labels + 1) % 4), id="labels"),
        pytest.param(lambda p: replace(p, train_hash="0"), id="other data"),
    ],
)
def test_a_poison_beyond_its_budget_is_never_trained_on(
    spoil: Callable[[PoisonSet], PoisonSet], dataset: Dataset, table: Table, tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        harness.evaluate(dataset, spoil(poison_of(dataset)), RECIPES, range(2), tmp_path)
    assert table.calls == []
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_evaluation_trains_only_what_is_left(
    dataset: Dataset, table: Table, tmp_path: Path
) -> None:
    poison = poison_of(dataset)
    whole = harness.evaluate(dataset, poison, RECIPES, range(4))
    wanted = list(table.calls)
    assert len(wanted) == 8  # two recipes, two groups, clean and poisoned

    table.calls.clear()
    table.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(dataset, poison, RECIPES, range(4), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    table.stop_after = None
    resumed = harness.evaluate(dataset, poison, RECIPES, range(4), tmp_path)
    assert table.calls == wanted
    assert resumed.victims == whole.victims

    again = harness.evaluate(dataset, poison, RECIPES, range(4), tmp_path)
    assert table.calls == wanted
    assert again == resumed  # the seconds too: they are those of the training


@pytest.mark.parametrize(("mode", "changes"), [("replace", 2), ("add", 1)])
def test_a_promise_that_did_not_hold_is_counted(dataset: Dataset, mode: str, changes: int) -> None:
    budget = Budget.model_validate({"fraction": 0.1, "mode": mode})
    poison = poison_of(dataset, 1, budget)

    def scores(certified: list[list[int]]) -> list[harness._Scores]:
        return [harness._Scores(np.zeros((2, 1)), None, np.array(certified), 0.0)]

    clean = scores([[0, 1, 2, 3], [5, -1, 1, 2]])
    broken = harness._certificate({"clean": clean, "poisoned": scores([[-1] * 4] * 2)}, poison)
    assert broken is not None
    assert broken.changes == changes
    assert broken.violations == {1: 6, 2: 4}[changes]
    np.testing.assert_allclose(broken.curve, [87.5, 75, 50, 25, 12.5, 12.5])
    held = harness._certificate({"clean": clean, "poisoned": scores([[0] * 4] * 2)}, poison)
    assert held is not None
    assert held.violations == 0
    # The other way round: answers for the poisoned set that are sure to be those for the clean one.
    wrong = harness._certificate({"clean": scores([[-1] * 4] * 2), "poisoned": clean}, poison)
    assert wrong is not None
    assert wrong.violations == {1: 6, 2: 4}[changes]


def test_long_trainings_are_kept_one_by_one(
    dataset: Dataset, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.evaluate(dataset, poison_of(dataset), RECIPES, range(4))
    grouped = len(table.calls)
    table.calls.clear()
    images = len(dataset.train_labels) * min(recipe.epochs for recipe in RECIPES.values())
    monkeypatch.setattr(harness, "LONG", images)
    harness.evaluate(dataset, poison_of(dataset), RECIPES, range(4))
    assert len(table.calls) == 16 > grouped


@pytest.mark.parametrize(
    "spoilt",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"by_epoch": [[1.0]]}',
        '{"by_epoch": "much", "seconds": 1}',
        pytest.param(
            '{"by_epoch": [], "seconds": 1}',
        ),
    ],
)
def test_a_spoilt_file_is_trained_again(
    spoilt: str, dataset: Dataset, table: Table, tmp_path: Path
) -> None:
    poison = poison_of(dataset)
    first = harness.evaluate(dataset, poison, SMOOTH, range(4), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls = len(table.calls)
    victim = sorted(before)[0]
    victim.write_text(spoilt)
    again = harness.evaluate(dataset, poison, SMOOTH, range(4), tmp_path)
    assert again.victims == first.victims
    assert len(table.calls) == calls + 1
    assert json.loads(victim.read_text())["by_epoch"] == json.loads(before[victim])["by_epoch"]


def test_what_is_kept_is_bound_to_data_recipe_and_seeds(
    dataset: Dataset, table: Table, tmp_path: Path
) -> None:
    def trainings(poison: PoisonSet, recipe: Any, seeds: list[int], data: Dataset = dataset) -> int:
        before = len(table.calls)
        harness.evaluate(data, poison, {"smooth": recipe}, seeds, tmp_path)
        return len(table.calls) - before

    poison, recipe = poison_of(dataset), RECIPES["smooth"]
    assert trainings(poison, recipe, [0, 1]) == 2
    assert trainings(poison, recipe, [0, 1]) == 0
    assert trainings(poison_of(dataset, 3), recipe, [0, 1]) == 1  # the clean twins are the same
    assert trainings(poison, recipe.replace(learning_rate=0.3), [0, 1]) == 2
    assert trainings(poison, recipe, [1, 0]) == 2
    other = replace(dataset, test_labels=dataset.test_labels[::-1].copy())
    assert trainings(poison, recipe, [0, 1], other) == 2
