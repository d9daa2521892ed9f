"""What a user typed becomes a setting, or a message that says how to type it.

Claims of `poisonbench.setting` tested here:

- a setting starts from the track that was named, from the data set's own, or from the default;
- what differs from the preset beyond the game is listed as custom, in order; what was typed but
  changes nothing is not; fraction, labels and radius are the game and never custom;
- `--set` reaches one recipe or all, and every mistake in it is a `UserError` of one line;
- unknown names come with the nearest known ones; fewer than two seeds are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from poisonbench import setting, tracks
from poisonbench.errors import UserError
from poisonbench.setting import Setting
from poisonbench.threat import Box, LInf


def resolve(**typed: Any) -> Setting:
    """What the command line resolves when only these options were typed."""
    nothing: dict[str, Any] = {
        "track": None, "dataset": None, "data_dir": None, "sizes": {}, "fraction": None,
        "labels": None, "radius": None, "overrides": [], "seeds": None,
    }  # fmt: skip
    return setting.resolve(**{**nothing, **typed})


def refused(**typed: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(**typed)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_options_it_is_the_digits_track() -> None:
    plain = resolve()
    assert plain.track is tracks.DIGITS
    assert plain.custom == ()
    assert plain.dataset == tracks.DIGITS.dataset
    assert plain.budget == tracks.DIGITS.budget
    assert plain.recipes == dict(tracks.DIGITS.recipes)
    assert plain.seeds == tuple(range(10))
    assert plain.surrogate == tracks.DIGITS.recipes["smooth"]


@pytest.mark.parametrize("track", tracks.TRACKS.values(), ids=lambda track: track.name)
def test_a_track_by_name_or_by_its_data_set_is_frozen(track: tracks.Track) -> None:
    assert resolve(track=track.name).custom == ()
    assert resolve(track=track.name).track is track
    first = next(t for t in tracks.TRACKS.values() if t.dataset.name == track.dataset.name)
    assert resolve(dataset=track.dataset.name).track is first
    assert resolve(dataset=track.dataset.name).custom == ()
    assert track.surrogate in track.recipes


def test_another_data_set_starts_from_the_small_track() -> None:
    other = resolve(dataset="tfds:mnist")
    assert other.track is tracks.CIFAR10_SMALL
    assert other.dataset.name == "tfds:mnist"
    assert other.custom == ("dataset",)


def test_the_game_is_not_custom() -> None:
    game = resolve(fraction=0.05, labels="free", radius=8)
    assert game.custom == ()
    assert (game.budget.fraction, game.budget.labels) == (0.05, "free")
    assert game.budget.pixels == LInf(radius=8)
    assert resolve().budget.pixels == Box()
    assert (resolve().budget.mode, resolve(mode="add").budget.mode) == ("replace", "add")
    assert resolve(mode="add").custom == ()


def test_what_differs_is_listed_in_order() -> None:
    typed = resolve(
        sizes={"train_size": 300, "val_size": 697, "test_size": None, "split_seed": 1},
        overrides=["width=2", "smooth.epochs=12", "standard.epochs=1"],
        seeds=3,
    )
    assert typed.custom == (
        *("seeds", "smooth.width=2", "split_seed"),
        *("standard.epochs=1", "standard.width=2", "train_size"),
    )
    assert typed.dataset.train_size == 300
    assert typed.dataset.test_size == tracks.DIGITS.dataset.test_size
    assert typed.seeds == (0, 1, 2)


def test_typing_what_the_track_says_changes_nothing() -> None:
    typed = resolve(
        dataset="digits", sizes={"train_size": 500}, overrides=["width=16", "smooth.epochs=12"], seeds=10
    )
    assert typed == resolve()


def test_of_two_overrides_the_last_counts() -> None:
    assert resolve(overrides=["smooth.width=2", "smooth.width=16"]) == resolve()


def test_set_reaches_one_recipe_or_all() -> None:
    recipes = resolve(overrides=["width=2", "smooth.learning_rate=0.5", "standard.flip=true"]).recipes
    assert [recipe.width for recipe in recipes.values()] == [2, 2]
    assert recipes["smooth"].learning_rate == 0.5
    assert recipes["standard"].learning_rate == tracks.DIGITS.recipes["standard"].learning_rate
    assert (recipes["smooth"].flip, recipes["standard"].flip) == (False, True)


def test_optimizer_options_are_json() -> None:
    typed = resolve(overrides=['optimizer_options={"nesterov": true, "momentum": 0.5}'])
    for recipe in typed.recipes.values():
        assert recipe.optimizer_options == (("momentum", 0.5), ("nesterov", True))


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("width", "field=value"),
        ("", "field=value"),
        ("width=", "--set width="),
        ("width=wide", "--set width=wide: input should be a valid integer"),
        ("width=2.5", "valid integer"),
        ("width=0", "width must be at least 1"),
        ("width=-4", "width must be at least 1"),
        ("epochs=0", "epochs must be at least 1"),
        ("learning_rate=0", "learning_rate must be above 0"),
        ("learning_rate=nan", "learning_rate"),
        ("label_smoothing=1.5", "label_smoothing must lie in"),
        ("crop_padding=-1", "crop_padding must not be negative"),
        ("flip=perhaps", "valid boolean"),
        ("activation=rleu", "relu"),
        ("widht=2", "did you mean width"),
        ("smoth.width=2", "did you mean smooth"),
        ("smooth.widht=2", "did you mean width"),
        (".width=2", "no recipe called ''"),
        ("smooth.=2", "no recipe field called ''"),
        ("optimizer_options=momentum", "optimizer_options"),
        ('optimizer_options={"momentum": "much"}', "optimizer_options"),
        ("replace=1", "no recipe field called 'replace'"),
        pytest.param("learning_rate=inf", "learning_rate"),
        pytest.param("weight_decay=nan", "weight_decay"),
        pytest.param("start_factor=nan", "start_factor"),
        pytest.param("input_mean=inf", "input_mean"),
    ],
)
def test_a_mistake_in_set_is_named(override: str, hint: str) -> None:
    assert hint in refused(overrides=[override])


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ({"track": "digit"}, "no track called 'digit'; did you mean digits?"),
        ({"track": "cifar"}, "cifar10-small"),
        ({"dataset": "digts"}, "did you mean digits?"),
        ({"dataset": "cifar10"}, "did you mean tfds:cifar10?"),
        ({"dataset": "tfds:"}, "tfds:"),
        ({"dataset": ""}, "digits"),
        ({"seeds": 1}, "--seeds must be at least 2"),
        ({"seeds": 0}, "--seeds must be at least 2"),
        ({"seeds": -5}, "--seeds must be at least 2"),
        ({"fraction": 1.0}, "--fraction"),
        ({"mode": "both"}, "--mode must be 'replace' or 'add'"),
        ({"labels": "maybe"}, "--labels must be 'fixed' or 'free'"),
        ({"radius": 0}, "--radius"),
        ({"data_dir": "."}, "--data-dir is for tfds:… sets"),
        ({"dataset": "tfds:cifar10", "data_dir": "no/where"}, "--data-dir no/where is not a folder"),
        pytest.param(
            {"dataset": "tfds:cifar10", "data_dir": "~nosuchuser/tfds"},
            "--data-dir ~nosuchuser/tfds",
        ),
    ],
)
def test_a_mistake_in_an_option_is_named(typed: dict[str, Any], hint: str) -> None:
    assert hint in refused(**typed)


def test_a_data_dir_is_not_part_of_the_identity(tmp_path: Path) -> None:
    typed = resolve(dataset="tfds:cifar10", data_dir=str(tmp_path))
    assert typed.custom == ()
    assert typed.dataset == resolve(dataset="tfds:cifar10").dataset
