"""A recipe is frozen, hashable, whole, and refuses what no victim can be.

Claims of the docstring of `poisonbench.victim.recipe` tested here: recipes cannot be changed, only
replaced; equal ones are one key of a dictionary; `as_dict` holds every field and survives JSON;
values out of range are refused, and a batch larger than the training set; the named recipes differ
in what makes a training metasmooth.
"""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from poisonbench.errors import UserError
from poisonbench.victim.recipe import RECIPES, SMOOTH, STANDARD, Recipe


def test_frozen_and_hashable() -> None:
    recipe = Recipe(width=8)
    with pytest.raises(FrozenInstanceError):
        recipe.width = 9  # type: ignore[misc]
    wider = recipe.replace(width=9)
    assert (recipe.width, wider.width) == (8, 9)
    assert {recipe: "found"}[wider.replace(width=8)] == "found"
    assert recipe != wider


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES.values(), Recipe(flip=True, crop_padding=4, optimizer="adamw", optimizer_options=())],
)
def test_as_dict_is_whole_and_survives_json(recipe: Recipe) -> None:
    values = recipe.as_dict()
    assert values.keys() == Recipe.__dataclass_fields__.keys()
    assert json.loads(json.dumps(values)) == values
    assert Recipe(**values | {"optimizer_options": recipe.optimizer_options}) == recipe


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"activation": "rellu"}, "did you mean relu"),
        ({"pooling": "min"}, "no value of pooling"),
        ({"norm": "none"}, "no value of norm"),
        ({"schedule": "cosine"}, "no value of schedule"),
        ({"width": 0}, "width must be at least 1"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": -3}, "batch_size must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"final_scale": -1.0}, "final_scale must be above 0"),
        ({"input_std": 0.0}, "input_std must be above 0"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be above 0"),
        ({"norm_momentum": 1.5}, r"norm_momentum must lie in \[0, 1\]"),
        ({"peak_at": -0.1}, r"peak_at must lie in \[0, 1\]"),
        ({"label_smoothing": 2.0}, r"label_smoothing must lie in \[0, 1\]"),
        ({"weight_decay": -1e-4}, "weight_decay must not be negative"),
        ({"crop_padding": -1}, "crop_padding must not be negative"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Recipe(**values)


def test_steps_count_full_batches() -> None:
    recipe = Recipe(epochs=3, batch_size=40)
    assert recipe.steps_per_epoch(40) == 1
    assert recipe.steps_per_epoch(119) == 2
    assert recipe.num_steps(119) == 6


def test_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size 40 is larger than the training set of 39"):
        Recipe(batch_size=40).num_steps(39)


def test_named_recipes() -> None:
    assert (SMOOTH.activation, SMOOTH.pooling, SMOOTH.norm) == ("gelu", "average", "before_activation")
    assert (STANDARD.activation, STANDARD.pooling) == ("relu", "max")
    assert SMOOTH.width > STANDARD.width
    assert SMOOTH.final_scale < STANDARD.final_scale == 1
