"""Every attack keeps the rules: one suite over `attacks.names()`, with no special case by name.

The checks are those of `poisonbench.conformance`, which `poisonbench check` runs on one attack. Claims
tested for each attack, under every game it accepts:

- it is a frozen dataclass that documents itself, its options, its paper and its cost; its options can be
  typed, and what makes no sense is refused in a line that names the option;
- the poison stays within its budget, at the stored 8 bits, and is for the data it was made for;
- the same key gives the same poison, byte for byte; nothing outside the task is needed;
- it survives being saved and loaded unchanged;
- it can be interrupted at any checkpoint and ends with the same bytes;
- the test split, filled with pills, makes no difference;
- it says how far it has come;
- unless it is a control, it costs victims that it was not fitted to a floor of accuracy.

Of what attacks are given: the attacker's view is read-only, and holds neither test images nor evaluation
seeds. That each check can fail is tested in `test_conformance.py`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from poisonbench import attacks, conformance, harness
from poisonbench.attacks import Task
from poisonbench.conformance import CHECKS, Check, Entry, Inapplicable
from poisonbench.data import DataSpec, load
from poisonbench.journal import Journal
from poisonbench.threat import Box, Budget
from poisonbench.tracks import DIGITS

RULES = [
    pytest.param(check, id=check.title, marks=[pytest.mark.slow] if check.slow else [])
    for check in CHECKS
]


@cache
def entry(name: str) -> Entry:
    """One for all checks, so that it crafts no more than it must."""
    return Entry(name)


@pytest.mark.parametrize("name", attacks.names())
@pytest.mark.parametrize("check", RULES)
def test_it_keeps_the_rule(check: Check, name: str) -> None:
    try:
        check.run(entry(name))
    except Inapplicable as why:
        pytest.skip(str(why))


def task(budget: Budget) -> Task:
    return Task.of(conformance.tiny(), budget, conformance.TINY)


def test_the_view_of_an_attacker() -> None:
    view = task(Budget(fraction=0.1))
    for array in (view.train_images, view.train_labels, view.val_images, view.val_labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert not any("test" in field or "seed" in field for field in vars(view))
    assert not any(
        np.array_equal(array, conformance.tiny().test_images)
        for array in vars(view).values()
        if isinstance(array, np.ndarray)
    )


def test_crafting_and_evaluation_keys_differ() -> None:
    import jax

    craft = {tuple(jax.random.key_data(harness.crafting_key(seed)).tolist()) for seed in range(50)}
    judge = {tuple(jax.random.key_data(harness.evaluation_key(seed)).tolist()) for seed in range(50)}
    assert len(craft) == len(judge) == 50
    assert not craft & judge


def test_bounds_of_the_box_are_the_whole_range() -> None:
    view = task(Budget(fraction=0.1, pixels=Box()))
    low, high = view.bounds(np.arange(3))
    assert (low == 0).all()
    assert (high == 255).all()


def held_out_losses(**options: str) -> list[float]:
    """Of victims with seeds that no metastep used, in an ascent of a digits task that learns."""
    digits = load(DataSpec(name="digits", train_size=100, val_size=200, test_size=100))
    learns = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=8, norm_momentum=0.8)
    journal = Journal()
    attack = attacks.build("mgd", [(name.replace("_", "-"), text) for name, text in options.items()])
    attack.craft(Task.of(digits, Budget(fraction=0.1), learns), harness.crafting_key(0), journal)
    return [row["held_out_loss"] for row in journal.rows if "held_out_loss" in row]


@pytest.mark.slow
def test_mgd_climbs() -> None:
    held_out = held_out_losses(start="random", steps="8", step_size="0.2", check_every="4")
    assert held_out[0] < 2, "untrained victims are at log(10) = 2.3, and would prove nothing"
    assert held_out[0] + 0.01 < held_out[1]
    assert held_out[0] + 0.02 < held_out[2]


@pytest.mark.slow
def test_the_highest_ranked_images_are_a_better_start() -> None:
    (random,) = held_out_losses(start="random", steps="0")
    (ranked,) = held_out_losses(start="influence", steps="0", start_seeds="2")
    assert random + 0.02 < ranked
