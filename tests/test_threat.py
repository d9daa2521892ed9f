"""What an attacker may change is counted exactly, and a set that changes more is refused.

Claims of `poisonbench.threat` tested here:

- a budget counts images of the whole training set, rounded down, whatever floating point makes of
  the product, and refuses to count none; values out of range are refused; a game names every rule;
- a set that changes too many images, images or labels that are not there, labels under fixed labels,
  a pixel by one level too much, or that was made for other data, is refused;
- what is applied is a copy: clean data stay as they were.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pydantic
import pytest

from poisonbench._files import content_hash
from poisonbench.errors import UserError
from poisonbench.threat import Budget, LInf, PoisonSet, make_budget

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(20, 236, (20, 4, 4, 3)).astype(np.uint8)
LABELS = (np.arange(20) % 4).astype(np.int32)
CLASSES = 4


def make(budget: Budget | None = None, **changes: Any) -> PoisonSet:
    """Two poisons of twenty images, each pixel moved by 8 levels, labels kept."""
    rows = np.array([3, 12], np.int64)
    poison = PoisonSet(
        rows,
        IMAGES[rows] + 8,
        LABELS[rows],
        budget or Budget(fraction=0.1),
        content_hash(IMAGES, LABELS),
    )
    return replace(poison, **changes)


def check(poison: PoisonSet) -> None:
    poison.check(IMAGES, LABELS, CLASSES)


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    [
        (0.025, 500, 12),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (1 / 3, 9, 3),
        (0.0199, 100, 1),
        (0.999, 10, 9),
        (0.025, 40_000, 1000),
    ],
)
def test_a_budget_counts_whole_images_rounded_down(fraction: float, size: int, count: int) -> None:
    assert Budget(fraction=fraction).count(size) == count


@pytest.mark.parametrize("numerator", range(1, 100))
def test_percentages_of_a_hundred_count_themselves(numerator: int) -> None:
    assert Budget(fraction=numerator / 100).count(100) == numerator


def test_a_budget_that_selects_nothing_says_what_would_do() -> None:
    with pytest.raises(UserError, match=r"selects no image of 50: use at least 0\.02$"):
        Budget(fraction=0.019).count(50)


def test_all_images_may_be_poisoned_within_a_radius() -> None:
    assert make_budget(1.0, "fixed", radius=8).count(50) == 50
    with pytest.raises(UserError, match="--radius"):
        make_budget(1.0, "fixed")
    with pytest.raises(UserError, match="--fraction"):
        make_budget(1.5, "fixed", radius=8)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 2.0, -0.1, float("nan"), float("inf")])
def test_a_fraction_lies_strictly_between_0_and_1(fraction: float) -> None:
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        make_budget(fraction, "fixed")
    with pytest.raises(pydantic.ValidationError):
        Budget(fraction=fraction)


@pytest.mark.parametrize(("labels", "radius"), [("any", None), ("fixed", 0), ("free", 256)])
def test_rules_out_of_range_are_refused(labels: str, radius: int | None) -> None:
    with pytest.raises(UserError, match=r"--labels|--radius"):
        make_budget(0.1, labels, radius)


def test_a_game_names_every_rule() -> None:
    games = {
        make_budget(fraction, labels, radius).game()
        for fraction in (0.025, 0.05)
        for labels in ("fixed", "free")
        for radius in (None, 4, 8)
    }
    assert len(games) == 12
    assert make_budget(0.025, "fixed", 8).game() == (
        "replace, fixed labels, pixels within 8/255, 0.025 of the set"
    )


FREE = Budget(fraction=0.1, labels="free")
NEAR = Budget(fraction=0.1, pixels=LInf(radius=8))


@pytest.mark.parametrize("budget", [Budget(fraction=0.1), FREE, NEAR])
def test_a_set_within_its_budget_passes(budget: Budget) -> None:
    check(make(budget))


@pytest.mark.parametrize(
    ("poison", "problem"),
    [
        (make(Budget(fraction=0.05)), "changes 2 images; its budget allows 1"),
        (make(indices=np.array([3, 20])), "outside the 20 training images"),
        (make(indices=np.array([-1, 3])), "outside the 20 training images"),
        (make(FREE, labels=np.array([0, 4], np.int32)), "outside the 4 classes"),
        (make(FREE, labels=np.array([-1, 0], np.int32)), "outside the 4 classes"),
        (make(images=make().images[:, :3]), "have the shape"),
        (make(images=make().images[..., :1]), "have the shape"),
        (make(labels=make().labels[::-1]), "changes labels, which its budget fixes"),
        (make(NEAR, images=make().images + 1), "by 9 levels; its budget allows 8"),
        (make(NEAR, images=make().images - 17), "by 9 levels; its budget allows 8"),
        (make(train_hash="0" * 64), "made for another training set"),
        (make(indices=np.array([3, 3])), "changes one image twice"),
    ],
)  # fmt: skip
def test_a_set_beyond_its_budget_is_refused(poison: PoisonSet, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check(poison)


def test_a_pixel_that_wraps_around_is_a_large_change() -> None:
    white = np.full_like(IMAGES, 255)
    poison = make(NEAR, train_hash=content_hash(white, LABELS), images=np.zeros_like(make().images))
    with pytest.raises(UserError, match="by 255 levels"):
        poison.check(white, LABELS, CLASSES)


def test_applying_it_leaves_clean_data_as_they_were() -> None:
    images, labels = IMAGES.copy(), LABELS.copy()
    poison = make(FREE, labels=np.array([0, 1], np.int32))
    new_images, new_labels = poison.apply(images, labels)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    changed = np.flatnonzero((new_images != images).any((1, 2, 3)))
    np.testing.assert_array_equal(changed, poison.indices)
    np.testing.assert_array_equal(new_images[changed], poison.images)
    np.testing.assert_array_equal(np.flatnonzero(new_labels != labels), poison.indices)
    assert new_labels.dtype == np.int32


def test_added_poison_stands_beside_clean_data() -> None:
    beside = Budget(fraction=0.1, mode="add", pixels=LInf(radius=8))
    poison = make(beside)
    poison.check(IMAGES, LABELS, CLASSES)
    new_images, new_labels = poison.apply(IMAGES, LABELS)
    np.testing.assert_array_equal(new_images, np.concatenate([IMAGES, poison.images]))
    np.testing.assert_array_equal(new_labels, np.concatenate([LABELS, poison.labels]))
    assert new_labels.dtype == np.int32
    assert beside.game().startswith("add, ")
    with pytest.raises(UserError, match="changes labels"):
        make(beside, labels=(LABELS[poison.indices] + 1) % CLASSES).check(IMAGES, LABELS, CLASSES)
