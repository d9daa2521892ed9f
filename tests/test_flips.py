"""Wrong pairs of image and label, by flips where labels are free and by copies where they are not.

Claims of `poisonbench.flips`, and of the start of `mgd`, tested here:

- under free labels the images bear the wrong labels themselves, or stand again beside the set where
  poison is added;
- under fixed labels copies of them stand in places of the wrong labels' classes, drawn at random or
  those that are worth most; whatever gives no place stays, and no label changes;
- a class with too few places is refused, and so is a budget under which no wrong pair can be;
- `label_flip` makes the same wrong pairs under either rule;
- `mgd --start pixels` begins with the images whose own pixels matter most, untouched, and so does
  `mgd` where no wrong pair can be;
- the pairs that gain most are taken, an image once, a class as often as it has room; what the right pair
  is worth counts where it is taken away, and under fixed labels those worth least give their places;
- `mgd --start pair` takes the images of one class that gain most under the label of the other, and does
  not search for the classes again where it was killed after that, nor lose a run of the ranking;
- the search for the best concentrated flips takes those that do most harm, also where it was killed in
  between, on victims under the defence that it is told of, and passes over classes without validation
  images;
- victims that diverge choose nothing, and the right label is never taken for a wrong one.

The problem: 40 images of 4×4 in four classes, ten of each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from poisonbench import attacks
from poisonbench.attacks import Task, mgd
from poisonbench.defenses import in_steps
from poisonbench.errors import UserError
from poisonbench.flips import (
    Flips,
    best_concentrated_flips,
    confident_flips,
    placed,
    require_flips,
)
from poisonbench.journal import Journal
from poisonbench.threat import Budget, LInf
from poisonbench.tracks import DIGITS
from poisonbench.victim.training import TrainingRun

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
LABELS = (np.arange(40) % 4).astype(np.int32)
FLIPS = Flips(np.array([0, 5, 8]), np.array([1, 2, 1], np.int32))


def task(**budget: object) -> Task:
    rules = Budget.model_validate({"fraction": 0.1, **budget})
    return Task(IMAGES, LABELS, IMAGES, LABELS, ("a", "b", "c", "d"), rules, DIGITS.recipes["smooth"])


def pairs(images: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((bytes(image), int(label)) for image, label in zip(images, labels, strict=True))


def test_free_labels_are_changed() -> None:
    poison = placed(task(labels="free"), FLIPS, KEY)
    np.testing.assert_array_equal(poison.indices, FLIPS.indices)
    np.testing.assert_array_equal(poison.labels, FLIPS.labels)
    np.testing.assert_array_equal(poison.images, IMAGES[FLIPS.indices])
    images, labels = placed(task(labels="free", mode="add"), FLIPS, KEY).apply(IMAGES, LABELS)
    np.testing.assert_array_equal(images[:40], IMAGES)
    np.testing.assert_array_equal(labels, [*LABELS, 1, 2, 1])


def test_fixed_labels_are_borne_by_copies() -> None:
    poison = placed(task(), FLIPS, KEY)
    poison.check(IMAGES, LABELS, 4)
    assert pairs(poison.images, poison.labels) == pairs(IMAGES[FLIPS.indices], FLIPS.labels)
    images, labels = poison.apply(IMAGES, LABELS)
    np.testing.assert_array_equal(labels, LABELS)
    stay = np.setdiff1d(np.arange(40), poison.indices)
    np.testing.assert_array_equal(images[stay], IMAGES[stay])
    others = {tuple(placed(task(), FLIPS, jax.random.key(seed)).indices) for seed in range(20)}
    assert len(others) > 5


def test_what_is_worth_most_gives_its_place() -> None:
    worth = np.arange(40, dtype=np.float32)
    poison = placed(task(), FLIPS, KEY, worth)
    assert poison.indices.tolist() == [33, 37, 38]  # two of class 1, one of class 2
    np.testing.assert_array_equal(poison.images[2], IMAGES[5])
    assert placed(task(), FLIPS, KEY, -worth).indices.tolist() == [1, 2, 5]


def test_too_few_places_are_refused() -> None:
    eleven = np.flatnonzero(LABELS != 3)[:11]
    with pytest.raises(UserError, match=r"class 3 has 10 training images.*--fraction"):
        placed(task(fraction=0.5), Flips(eleven, np.full(11, 3, np.int32)), KEY)


def test_wrong_pairs_need_labels_or_pixels() -> None:
    with pytest.raises(UserError, match="x needs wrong labels: give --labels free"):
        require_flips(Budget(fraction=0.1, pixels=LInf(radius=8)), "x")
    require_flips(Budget(fraction=0.1, labels="free", pixels=LInf(radius=8)), "x")
    require_flips(Budget(fraction=0.1), "x")


def test_label_flip_makes_the_same_pairs_under_either_rule() -> None:
    typed = [("spread", "concentrated"), ("source", "0"), ("target", "2")]
    attack = attacks.build("label_flip", typed)
    free, fixed = (attack.craft(task(labels=labels), KEY, Journal()) for labels in ("free", "fixed"))
    assert (LABELS[free.indices] == 0).all()
    assert (LABELS[fixed.indices] == 2).all()
    assert (free.labels == 2).all()
    assert pairs(free.images, free.labels) == pairs(fixed.images, fixed.labels)


def test_the_pairs_that_gain_most() -> None:
    gains = np.array([[-np.inf, 5, 4], [9, -np.inf, 8], [7, 6, -np.inf], [1, -np.inf, 2]])
    free = mgd._best_pairs(gains, 3, np.full(3, np.inf))
    assert (free.indices.tolist(), free.labels.tolist()) == ([0, 1, 2], [1, 0, 0])
    # One place for class 0: image 2 takes its second best, which is left.
    tight = mgd._best_pairs(gains, 3, np.array([1, 2, 1]))
    assert (tight.indices.tolist(), tight.labels.tolist()) == ([0, 1, 2], [1, 0, 1])
    assert tight.labels.dtype == np.int32
    # Right pairs gain minus infinity, and are never taken.
    with pytest.raises(UserError, match="room for 3 wrong pairs"):
        mgd._best_pairs(gains, 4, np.array([1, 1, 1]))


def test_influence_ranks_by_what_a_pair_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**rules: object) -> Any:
        monkeypatch.setattr(mgd.MGD, "_summed", lambda *_: jax.numpy.asarray(gains))
        return mgd.MGD(start_seeds=1).started(task(**rules), KEY, Journal())

    gains = np.zeros((40, 4), np.float32)
    rows = [4, 8, 12, 16, 20]  # all of class 0
    gains[rows, 1], gains[rows, 0] = [5, 3, 2, 1, 0.9], [4, 0, -4, -1, -1]
    assert start(labels="free").indices.tolist() == [8, 12, 16, 20]
    assert start(labels="free", mode="add").indices.tolist() == [4, 8, 12, 16]
    gains[[1, 5, 9, 13], 1] = [-9, -8, -7, -6]  # whose right pairs are worth most to the attacker gone
    fixed = start()
    assert pairs(fixed.images, fixed.labels) == pairs(IMAGES[[4, 8, 12, 16]], np.ones(4, int))
    assert fixed.indices.tolist() == [1, 5, 9, 13]


def test_a_pair_s_images_are_ranked_by_what_they_gain_under_its_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gains = np.zeros((40, 4), np.float32)
    gains[:, 3] = 9  # of another label: no candidates
    zeros = np.flatnonzero(LABELS == 0)
    gains[zeros, 1] = np.arange(len(zeros))
    gains[zeros[-1], 0] = 7  # the last has its right pair to lose
    monkeypatch.setattr(mgd.MGD, "concentrated", lambda *_: Flips(zeros[:4], np.ones(4, np.int32)))
    monkeypatch.setattr(mgd.MGD, "_summed", lambda *_: jnp.asarray(gains))
    attack = mgd.MGD(start="pair", start_seeds=1)
    free = attack.started(task(labels="free"), KEY, Journal())
    assert free.indices.tolist() == zeros[-5:-1].tolist()
    assert (free.labels == 1).all()
    fixed = attack.started(task(), KEY, Journal())
    assert pairs(fixed.images, fixed.labels) == pairs(IMAGES[zeros[-4:]], np.ones(4, int))
    with pytest.raises(UserError, match=r"mgd --start pair needs wrong labels"):
        attack.require(Budget(fraction=0.1, pixels=LInf(radius=8)))


def test_pairs_without_room_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    few = np.array([0] * 3 + [1] * 19 + [2] * 18, np.int32)
    scarce = replace(task(), train_labels=few, class_names=("a", "b", "c"))
    pairs = [(0, 1), (1, 0), (2, 1)]
    monkeypatch.setattr("poisonbench.flips._nearest_pairs", lambda *_: pairs)
    monkeypatch.setattr("poisonbench.flips._validation_error", lambda *_: 1.0)
    found = best_concentrated_flips(scarce, KEY, Journal(), candidates=1, seeds=1)
    assert (few[found.indices] == 2).all()
    assert (found.labels == 1).all()
    free = replace(scarce, budget=Budget(fraction=0.1, labels="free"))
    assert (best_concentrated_flips(free, KEY, Journal(), candidates=1, seeds=1).labels == 0).all()


def test_victims_that_diverge_choose_no_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poisonbench.flips.train", lambda run, state, z: state)
    monkeypatch.setattr("poisonbench.flips.logits", lambda *_: jnp.full((40, 4), jnp.nan))
    small = replace(task(), recipe=task().recipe.replace(width=1, batch_size=10))
    for spread in ("confident", "concentrated"):
        attack = attacks.build("label_flip", [("spread", spread)])
        with pytest.raises(UserError, match="a victim of clean data diverged: lower its learning rate"):
            attack.craft(small, KEY, Journal())
    monkeypatch.setattr("poisonbench.flips._nearest_pairs", lambda *_: [(0, 1), (1, 2)])
    monkeypatch.setattr("poisonbench.flips._validation_error", lambda *_: float("nan"))
    with pytest.raises(UserError, match="no check had a finite loss"):
        best_concentrated_flips(task(), KEY, Journal(), candidates=2, seeds=1)


def test_the_right_label_is_no_flip_even_if_least_likely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = 0.3 - 0.2 * np.eye(4)[LABELS]  # the right label is the least likely one, everywhere
    monkeypatch.setattr("poisonbench.flips._probabilities", lambda *_: said.copy())
    found = confident_flips(task(labels="free"), KEY, seeds=1)
    assert (found.labels != LABELS[found.indices]).all()


@pytest.mark.parametrize("killed", [1, 3])
def test_a_killed_search_goes_on(killed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried: list[int] = []

    def harm(task: Task, poison: Any, keys: Any, guard: Any) -> float:
        (label,) = set(poison.labels.tolist())
        tried.append(label)
        if len(tried) == killed:
            raise KeyboardInterrupt
        return {1: float("nan"), 2: 0.9, 3: 0.9}[label]

    nearest = [[(0, 1), (0, 2), (0, 3)]]
    monkeypatch.setattr("poisonbench.flips._nearest_pairs", lambda *_: nearest.pop())
    monkeypatch.setattr("poisonbench.flips._validation_error", harm)
    searched = task(labels="free")
    with pytest.raises(KeyboardInterrupt):
        best_concentrated_flips(searched, KEY, Journal(tmp_path), candidates=3, seeds=1)
    found = best_concentrated_flips(searched, KEY, Journal(tmp_path), candidates=3, seeds=1)
    assert tried == [*range(1, killed + 1), *range(killed, 4)]
    assert (LABELS[found.indices] == 0).all()
    assert (found.labels == 2).all(), "the first of those that do the same harm"


def test_a_search_knows_the_defence_and_the_classes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    guards: list[Any] = []
    real = TrainingRun.start

    def start(recipe: Any, data: Any, keys: Any, guard: Any) -> Any:
        guards.append(guard)
        return real(recipe.replace(width=1, batch_size=10), data, keys, guard)

    def said(recipe: Any, classes: int, state: Any, images: Any) -> Any:
        return jax.numpy.tile(jax.numpy.arange(4.0), (len(images), 1))

    monkeypatch.setattr(TrainingRun, "start", start)
    for module in ("flips", "problem"):
        monkeypatch.setattr(f"poisonbench.{module}.train", lambda run, state, z: state)
    monkeypatch.setattr("poisonbench.flips.logits", said)
    monkeypatch.setattr("poisonbench.problem._judge", lambda loss, state: (0.5, 0.5))
    rare = replace(task(labels="free"), val_images=IMAGES[LABELS != 3], val_labels=LABELS[LABELS != 3])
    mixup = in_steps("mixup")
    found = best_concentrated_flips(rare, KEY, Journal(), candidates=9, seeds=1, guard=mixup)
    assert {int(LABELS[found.indices[0]]), int(found.labels[0])} == {1, 2}, "the nearest of 0, 1 and 2"
    assert guards == [mixup] * 7, "clean victims, and those of six pairs"


def test_pixels_that_matter_most_start_under_their_own_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(attack: Any, problem: Any, z: Any, pixels: Any, *_: Any) -> Any:
        assert pixels is None, "a start from pixels needs no metagradient of labels"
        return jax.numpy.zeros_like(z).at[jax.numpy.array([3, 8, 21, 30])].set(-1)

    monkeypatch.setattr(mgd.MGD, "_summed", gradient)
    for rules in ({}, {"labels": "free"}, {"pixels": LInf(radius=8)}):
        start = mgd.MGD(start="pixels").started(task(**rules), KEY, Journal())
        assert start.indices.tolist() == [3, 8, 21, 30]
        np.testing.assert_array_equal(start.images, IMAGES[start.indices])
        np.testing.assert_array_equal(start.labels, LABELS[start.indices])
    within = mgd.MGD().started(task(pixels=LInf(radius=8)), KEY, Journal())
    assert within.hash == start.hash


def test_killed_before_and_in_the_ranking_of_a_pair_it_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros, done = np.flatnonzero(LABELS == 0), list[str]()
    kills = {1, 2}  # after the search, and after the first run

    def search(*_: Any) -> Flips:
        done.append("search")
        return Flips(zeros[:4], np.ones(4, np.int32))

    def ranked(*_: Any) -> tuple[Array, Array]:
        if len(done) in kills:
            kills.remove(len(done))
            raise KeyboardInterrupt
        done.append("run")
        gains = np.zeros((40, 4), np.float32)
        gains[zeros[4 * len(done) - 8 :][:2], 1] = 1  # the first two, then the fifth and the sixth
        return jnp.zeros(()), jnp.asarray(gains)

    monkeypatch.setattr(mgd.MGD, "concentrated", search)
    monkeypatch.setattr(mgd.MGD, "_metagradient", ranked)
    attack = mgd.MGD(start="pair", start_seeds=2)
    free = task(labels="free")
    free = replace(free, recipe=free.recipe.replace(width=2, batch_size=20))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            attack.started(free, KEY, Journal(tmp_path))
    resumed = attack.started(free, KEY, Journal(tmp_path))
    assert done == ["search", "run", "run"]
    assert resumed.indices.tolist() == zeros[[0, 1, 4, 5]].tolist()
