"""Figures across records show what the records hold, and are drawn anew when that changes.

Claims of `poisonbench.leaderboard.figures` tested here:

- a table of two attacks that cost something gets a figure of drop against cost, one of fewer does not,
  nor do custom records;
- how crafting went is drawn where the run's log has enough checks, against trainings spent;
- tables that differ in nothing but the fraction share a figure, whose lines join records of one attack
  with one configuration;
- where attacks have scores on transfer victims, a figure shows the first such row of each beside what
  the table's own victims lost, without that of no attack, and none where there is one attack alone;
- a figure that shows other numbers than the records is found and drawn anew, one that belongs to no
  record goes; the same numbers are not drawn again;
- the page shows the figures that there are.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_leaderboard import DIGITS, FREE, make, page, put

from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.submission import manifest
from poisonbench.threat import Budget, LInf
from poisonbench.transfer import Transfer

figures: Any = importlib.import_module("poisonbench.leaderboard.figures")
games: Any = importlib.import_module("poisonbench.leaderboard.games")
tables: Any = importlib.import_module("poisonbench.leaderboard.tables")

COSTS = Path("figures/digits-replace-free-labels-any-pixels-0.025-of-the-set.png")
LOG = "metastep,loss,held_out_loss\n0,,0.5\n1,0.6,\n2,0.7,0.8\n4,0.7,0.9\n"


def found(results: Path) -> dict[Path, Any]:
    pictures: dict[Path, Any] = figures.pictures(games.read(results), results)
    return pictures


@pytest.fixture
def results(tmp_path: Path) -> Path:
    several = [make("mgd", 12.0, budget=FREE), make("es", 3.0, budget=FREE, crafting_seconds=40.0)]
    (put(tmp_path, *several) / "digits/mgd/none/run-0/crafting.csv").write_text(LOG)
    return tmp_path


def test_drop_against_cost(results: Path) -> None:
    numbers = found(results)[COSTS].numbers
    # Forty victims in 80 s: two seconds for one.
    assert [(p["name"], p["trainings"], p["drop"]) for p in numbers["points"]] == [
        ("mgd", 617.2, 12.0), ("es", 20.0, 3.0),
    ]  # fmt: skip
    assert numbers["points"][0]["half"] == pytest.approx(0.0754, abs=1e-4)
    # By hand: 617.2 trainings over 4 metasteps.
    assert numbers["curves"] == [{"name": "mgd", "points": [[0.0, 0.5], [308.6, 0.8], [617.2, 0.9]]}]
    assert f"]({COSTS.as_posix()})" in page(results)


def test_the_unit_of_cost_is_the_tables(tmp_path: Path) -> None:
    """A busy machine on one day does not make that day's attack look cheap."""
    put(tmp_path, make("mgd", 12.0), make("es", 3.0), make("slow", 1.0, evaluation_seconds=800.0))
    (numbers,) = [picture.numbers for picture in found(tmp_path).values()]
    assert {point["trainings"] for point in numbers["points"]} == {617.2}


def test_another_machine_has_a_unit_of_its_own(tmp_path: Path) -> None:
    there = make("slow", 1.0).hardware.model_copy(update={"processor": "an older one"})
    slow = make("slow", 1.0, evaluation_seconds=800.0, crafting_seconds=12344.0, hardware=there)
    put(tmp_path, make("mgd", 12.0), make("es", 3.0), slow)
    (numbers,) = [picture.numbers for picture in found(tmp_path).values()]
    assert {point["trainings"] for point in numbers["points"]} == {617.2}


def test_what_makes_a_curve(results: Path) -> None:
    log = results / "digits/mgd/none/run-0/crafting.csv"
    log.write_text("metastep,held_out_loss\n1,0.5\n2,0.6\n3,0.7\n")  # trials, not an ascent
    assert found(results)[COSTS].numbers["curves"] == []
    log.write_text("metastep,held_out_loss\n0,0.5\n2,0.6\n")
    assert found(results)[COSTS].numbers["curves"] == []
    log.write_text("metastep,held_out_loss\n0,0.5\n1,much\n2,0.6\n")
    with pytest.raises(UserError, match=r"cannot read .*crafting\.csv"):
        found(results)


@pytest.mark.parametrize(
    ("config", "goal"),
    [
        ({"goal": "error"}, "expected validation error"),
        ({"goal": "margin"}, "validation margin"),
        ({"temperature": 0.5}, "validation loss at temperature 0.5"),
        ({"goal": "error", "judged_on": "all"}, "expected clean-image error"),
    ],
)
def test_curves_of_one_panel_are_of_one_goal(config: dict[str, Any], goal: str, tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 12.0), make("es", 3.0, attack_config=config))
    for attack in ("mgd", "es"):
        (tmp_path / f"digits/{attack}/none/run-0/crafting.csv").write_text(LOG)
    (numbers,) = [picture.numbers for picture in found(tmp_path).values()]
    assert [curve["name"] for curve in numbers["curves"]] == ["mgd"], "that of the best"
    assert numbers["goal"] == "validation loss"
    put(tmp_path, make("tgda", 1.0, attack_config=config))
    (tmp_path / "digits/tgda/none/run-0/crafting.csv").write_text(LOG)
    (numbers,) = [picture.numbers for picture in found(tmp_path).values()]
    assert [curve["name"] for curve in numbers["curves"]] == ["es", "tgda"], "those that are more"
    assert numbers["goal"] == goal
    for seed in (1, 2):
        put(tmp_path, make("mgd", 13.0 + seed, attack_seed=seed))
        (tmp_path / f"digits/mgd/none/run-{seed}/crafting.csv").write_text(LOG)
    (numbers,) = [picture.numbers for picture in found(tmp_path).values()]
    assert numbers["goal"] == goal, "more attacks count for more than more rows of one"


def test_a_long_name_stays_within_the_figure(tmp_path: Path) -> None:
    """Whatever names the rows have, all that is drawn lies within the canvas, and panels stay wide."""
    config = {f"option_{i}": "a value" for i in range(12)}
    put(tmp_path, make("mgd", 12.0, attack_config=config), make("mgd", 9.0), make("es", 3.0))
    (picture,) = found(tmp_path).values()
    figure = picture.draw(picture.numbers)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert any(len(text.get_text().splitlines()) > 1 for text in legend.get_texts())
    for drawn in (legend, *figure.axes):
        box = drawn.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert all(axes.get_window_extent().height > figure.bbox.height / 4 for axes in figure.axes)


def test_no_figure_of_one_attack_or_of_custom_records(tmp_path: Path) -> None:
    put(tmp_path, make("mgd", 12.0), make("none", 0.0, 0.0, crafting_seconds=0.0))
    put(tmp_path, make("mgd", custom=["seeds"]), make("es", custom=["seeds"]))
    assert found(tmp_path) == {}
    assert "![Drop" not in page(tmp_path)


def test_drop_against_fraction(tmp_path: Path) -> None:
    for fraction, drop in ((0.05, 9.0), (0.01, 2.0), (0.025, 5.0)):
        budget = DIGITS.budget.model_copy(update={"fraction": fraction})
        num_poison = budget.count(500)
        put(tmp_path, make("mgd", drop, budget=budget, num_poison=num_poison))
    put(
        tmp_path,
        make("mgd", 7.0, attack_seed=1, attack_config={"steps": 9}),
        make("es", 1.0, attack_config={"sigma": 0.1}),
    )
    handed_in = {"budget": DIGITS.budget.model_copy(update={"fraction": 0.05}), "crafting_seconds": None}
    put(tmp_path, make("theirs", 1.0, crafting_seconds=None), make("theirs", 2.0, **handed_in))
    path = Path("figures/digits-replace-fixed-labels-any-pixels-by-fraction.png")
    (line,) = found(tmp_path)[path].numbers["lines"]
    assert line["name"] == "mgd (attack_seed=0)"
    assert [(point["fraction"], point["drop"]) for point in line["points"]] == [
        (0.01, 2.0), (0.025, 5.0), (0.05, 9.0),
    ]  # fmt: skip
    assert f"]({path.as_posix()})" in page(tmp_path)


def test_each_game_has_its_own_figure_of_fractions_without_entries_of_others(tmp_path: Path) -> None:
    for radius in (8, 16):
        for fraction in (0.05, 0.5):
            budget = Budget(fraction=fraction, pixels=LInf(radius=radius))
            several = [make(name, budget=budget, num_poison=20) for name in ("mgd", "theirs")]
            put(tmp_path, *several)
    for record in (tmp_path / "digits" / "theirs").rglob("record.json"):
        (record.parent / manifest.FILE).write_text("{}")
    drawn = {
        path: p.numbers["lines"] for path, p in found(tmp_path).items() if "by-fraction" in path.name
    }
    assert {path.name for path in drawn} == {
        f"digits-replace-fixed-labels-pixels-within-{radius}-255-by-fraction.png" for radius in (8, 16)
    }
    assert all([line["name"] for line in lines] == ["mgd"] for lines in drawn.values())


def carry(results: Path, record: Record, **drops: float) -> None:
    """Store a record, and beside it what transfer victims lost: these drops, and nothing elsewhere."""
    put(results, record)
    several = [
        make(drop=drops.get(name, 0.0), recipes={name: recipe.as_dict()}, surrogate=name)
        for name, recipe in DIGITS.transfer.items()
    ]
    transferred = Transfer(
        poison_hash=record.poison_hash, victims=[one.victims[0] for one in several],
        evaluation_seconds=1.0, created=record.created, command="poisonbench transfer",
        code=record.code, libraries={}, hardware=record.hardware,
    )  # fmt: skip
    last = max((results / "digits" / record.attack / "none").iterdir(), key=lambda path: path.name)
    transferred.save(last / "transfer.json")


def test_drop_of_victims_of_every_kind(tmp_path: Path) -> None:
    path = Path("figures/digits-replace-fixed-labels-any-pixels-0.025-of-the-set-transfer.png")
    put(tmp_path, make("mgd", 12.0, attack_seed=1))
    carry(tmp_path, make("none", 0.0, 0.0, num_poison=0))
    carry(tmp_path, make("mgd", 9.0, attack_seed=2), wide=8.0, velo=-1.0)
    carry(tmp_path, make("mgd", 5.0, attack_seed=3), wide=20.0)
    assert path not in found(tmp_path), "one attack"
    carry(tmp_path, make("es", 3.0), narrow=2.0)
    picture = found(tmp_path)[path]
    kinds = ["smooth", "standard", *DIGITS.transfer]
    assert (picture.numbers["kinds"], picture.numbers["own"]) == (kinds, 2)
    drops = {
        attack["name"]: dict(zip(kinds, [drop["drop"] for drop in attack["drops"]], strict=True))
        for attack in picture.numbers["attacks"]
    }
    nothing = dict.fromkeys(kinds, 0.0)
    assert drops == {
        "mgd (attack_seed=2)": nothing | {"smooth": 9.0, "standard": 9.0, "wide": 8.0, "velo": -1.0},
        "es": nothing | {"smooth": 3.0, "standard": 3.0, "narrow": 2.0},
    }
    (axes,) = picture.draw(picture.numbers).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == kinds
    assert f"]({path.as_posix()})" in page(tmp_path)
    tables.update(tmp_path, site=tmp_path / "board")
    shown = (tmp_path / "board" / "track-digits.html").read_text("utf-8")
    assert "es: smooth 3.00, standard 3.00, wide 0.00, narrow 2.00" in shown, "for those who do not see"


def test_what_was_handed_in_does_not_hide_an_attack_of_ours(tmp_path: Path) -> None:
    carry(tmp_path, make("mgd", 9.0, attack_seed=1), wide=8.0)
    (tmp_path / "digits/mgd/none/run-0" / manifest.FILE).write_text("{}")
    carry(tmp_path, make("mgd", 5.0, attack_seed=2), wide=4.0)
    (numbers,) = [p.numbers for path, p in found(tmp_path).items() if "transfer" in path.name]
    assert [attack["drops"][0]["drop"] for attack in numbers["attacks"]] == [9.0, 5.0]


def test_figures_follow_the_records(results: Path) -> None:
    path = results / COSTS
    assert path in tables.update(results, check=True)
    assert not path.exists()
    tables.update(results)
    drawn = path.read_bytes()
    with Image.open(path) as image:
        assert image.width > image.height > 100
    assert tables.update(results, check=True) == tables.update(results) == []
    assert path.read_bytes() == drawn

    log = results / "digits/mgd/none/run-0/crafting.csv"
    log.write_text(LOG.replace("0.8", "0.81"))
    assert tables.update(results, check=True) == [path]
    assert path.read_bytes() == drawn
    assert tables.update(results) == [path]
    assert path.read_bytes() != drawn

    path.write_bytes(b"no picture")
    assert tables.update(results) == [path]
    stale = path.with_name("gone.png")
    stale.write_bytes(b"")
    assert tables.update(results) == [stale]
    assert not stale.exists()
