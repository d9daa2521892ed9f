"""The table of what choices in `mgd` are worth: changes that are some, scored on validation alone.

The preset is that of digits with a hundred images and victims of width 2, judged by two of them; each
row is held against what the harness gives for the same poison.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from poisonbench import attacks, harness, runs, tracks
from poisonbench.errors import UserError
from poisonbench.setting import Setting
from poisonbench.tracks import AVAILABILITY, DIGITS

if not (Path(__file__).parents[1] / "benchmarks").is_dir():
    pytest.skip("NOT TESTED: benchmarks/ is part of the checkout only", allow_module_level=True)

from benchmarks import choice_pictures, choices
from benchmarks.choices import Change, Choices, Row


def small() -> Setting:
    """Digits at a size at which a test can train its victims."""
    recipes = {
        name: recipe.replace(network="cnn", width=2, epochs=1, batch_size=50)
        for name, recipe in DIGITS.recipes.items()
    }
    options = {"mgd": {"start": "random", "steps": "1", "check-every": "1", "check-seeds": "1"}}
    spec = DIGITS.dataset.model_copy(update={"train_size": 100, "val_size": 50, "test_size": 50})
    track = replace(
        DIGITS, dataset=spec, recipes=MappingProxyType(recipes), attack_options=MappingProxyType(options)
    )
    return Setting(track, (), spec, None, DIGITS.budget, recipes, (0, 1))


@pytest.mark.parametrize("track", ["digits", "cifar10-small"])
@pytest.mark.parametrize("labels", ["fixed", "free"])
def test_every_change_changes_one_thing_of_the_preset(track: str, labels: str) -> None:
    options = tracks.load(track).options("mgd", labels)  # type: ignore[arg-type]
    preset = attacks.build("mgd", list(options.items()))
    known = choices.changes(preset)
    assert Change(choices.PRESET).attack(options) == preset
    assert known[0].title == choices.PRESET
    assert len({change.title for change in known}) == len(known)
    for change in known[1:]:
        changed = change.attack(options)
        assert (changed != preset) == bool(change.options)
        assert bool(change.options) + (change.seed != 0) + (change.widths != 1) == 1


def test_rows_are_what_the_harness_gives_on_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    game = small()
    dataset = runs.load_data(game)
    pills = replace(
        dataset, test_images=255 - dataset.test_images, test_labels=dataset.test_labels[::-1]
    )
    several = [
        Change("preset"), Change("length", {"steps": "0"}), Change("surrogate", widths=2),
        Change("preset", seed=1),
    ]  # fmt: skip
    result = choices.measure(game, several, tmp_path, "measure")
    monkeypatch.setattr(runs, "load_data", lambda _: pills)
    again = choices.measure(game, several, tmp_path / "again", "measure")
    assert (again.clean, [r.poisoned for r in again.rows]) == (
        result.clean,
        [r.poisoned for r in result.rows],
    )

    attack = attacks.build("mgd", list({**game.track.attack_options["mgd"], "steps": "0"}.items()))
    poison = runs.craft(runs.Request(game, "mgd", attack, 0, ""), tmp_path).poison
    judged = replace(dataset, test_images=dataset.val_images, test_labels=dataset.val_labels)
    (smooth, standard) = harness.evaluate(judged, poison, game.recipes, result.seeds).victims
    assert result.rows[1].poisoned == {"smooth": smooth.poisoned, "standard": standard.poisoned}
    assert not set(result.seeds) & set(range(game.track.seeds))
    usual = [result.rows[i].poisoned["smooth"] for i in (0, 3)]
    lost = np.mean(usual) - np.mean(result.rows[1].poisoned["smooth"])
    assert result.gain(result.rows[1], "smooth") == pytest.approx(lost)

    result.save(tmp_path / "digits.json")
    assert Choices.load(tmp_path / "digits.json") == result
    assert choice_pictures.write(result, tmp_path / "digits.png").stat().st_size > 10_000
    choices.show(result)


def test_the_band_holds_one_more_poison_of_the_preset_as_often_as_it_says() -> None:
    def told(*drops: float) -> bool:
        groups = (choices.PRESET,) * 3 + ("seed",)
        rows = [
            Row.model_construct(group=group, poisoned={"smooth": [90 - drop, 92 - drop]})
            for group, drop in zip(groups, drops, strict=True)
        ]
        table = Choices.model_construct(clean={"smooth": [90.0, 92.0]}, rows=rows)
        return table.told(rows[-1], "smooth")

    draws = np.random.default_rng(0).normal(3.0, 0.4, (2000, 4))
    # Three standard deviations of a share of 5 % among so many.
    assert np.mean([told(*drops) for drops in draws]) == pytest.approx(0.05, abs=0.015)


def test_what_the_page_says_is_what_was_measured() -> None:
    """Rows outside the band for smooth victims are those that `docs/choices.md` calls worse."""
    root = Path(__file__).parents[1]
    result = Choices.load(root / "benchmarks/results/choices/digits-fixed.json")
    told = {row.title for row in result.rows if row.group != "preset" and result.told(row, "smooth")}
    assert told == {
        "start=pixels", "start=flips", "start=pair", "start=random", "temperature=0.5", "update=sign",
        "step-size=0.3", "runs-per-step=4, steps=11", "differentiated=0.25", "steps=0",
    }  # fmt: skip
    assert max(result.rows, key=lambda row: result.drop(row, "smooth").mean).title == "steps=90"
    page = (root / "docs/choices.md").read_text("utf-8")
    for title, drop in (("temperature=0.5", 3.9), ("start=random", 1.4), ("differentiated=0.25", 1.8)):
        (row,) = [row for row in result.rows if row.title == title]
        assert round(result.drop(row, "smooth").mean, 1) == drop
        assert f"{drop}" in page


def test_kinds_of_choices_that_the_game_does_not_allow_are_left_out() -> None:
    titles = {change.title for change in choices.chosen(small(), ["start"])}
    assert "start=flips" in titles
    bounded = replace(small(), budget=AVAILABILITY.budget)
    refused = titles - {change.title for change in choices.chosen(bounded, ["start"])}
    assert refused == {"start=flips", "start=pair"}
    with pytest.raises(UserError, match="--group steps: known are"):
        choices.chosen(small(), ["steps"])


def test_an_attack_that_does_not_suit_the_game_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start"):
        choices.measure(small(), [Change("start", {"start": "nowhere"})], tmp_path, "measure")
    assert not list(tmp_path.iterdir())


def test_what_the_page_says_of_later_choices_is_what_was_measured() -> None:
    """Which are told from chance; and what an earlier file holds too was found again, digit by digit."""
    root = Path(__file__).parents[1]
    folder, page = root / "benchmarks/results/choices", (root / "docs/choices.md").read_text("utf-8")

    def load(name: str) -> Choices:
        return Choices.load(folder / f"digits-{name}.json")

    later = {
        "fixed-step": ("last-step=1", "last-step=0", "restarts=2"),
        "free-labels": ("label-step=0.1", "label-step=0.3", "label-step=1"),
        "fixed-goal-truncated": (
            "goal=margin", "differentiated=0.5, full-from=0.5", "differentiated=0.25, full-from=0.5",
        ),
    }  # fmt: skip
    told = set()
    for name, titles in later.items():
        result = load(name)
        rows = [row for row in result.rows if row.title in titles]
        assert len(rows) == 3
        for row in rows:
            assert f"{result.drop(row, 'smooth').mean:.1f}" in page
        told |= {row.title for row in rows if result.told(row, "smooth")}
    assert told == {"goal=margin", "differentiated=0.25, full-from=0.5"}
    whole = {row.title: row for row in load("fixed").rows}
    for name, count in (("fixed-step", 5), ("fixed-goal-truncated", 8)):
        again = [row for row in load(name).rows if row.title in whole]
        assert len(again) == count
        for row in again:
            assert row.poisoned == whole[row.title].poisoned
