"""Tables follow from the records alone, and never rank what was not measured alike.

Claims of `poisonbench.leaderboard` tested here:

- the same records give the same bytes, in whatever order they are read and hashed, and a second
  update changes nothing;
- a row shows what its record holds, and the CSV has the numbers in full;
- a table holds one game: labels, fraction, pixels, data, victims and seeds agree, and headings and
  files of two tables differ; what defended victims scored stands elsewhere;
- a record that changes a track, or says it does not and does, stands apart from the track's own;
- ranks tie where intervals do not part, rows are in order of rank, then of drop;
- controls are marked, a table names those that it lacks, and a handed-in poison is no control;
- records marked invalid or superseded are shown with the reason, neither ranked nor counted as
  controls;
- text from a record is shown as it is: no link, emphasis, HTML, new cell, new line or formula.
"""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from poisonbench import attacks, records
from poisonbench.records import Record, VictimScores
from poisonbench.stored import Hardware
from poisonbench.submission import manifest
from poisonbench.threat import Budget, LInf
from poisonbench.tracks import TRACKS

tables: Any = importlib.import_module("poisonbench.leaderboard.tables")

DIGITS = TRACKS["digits"]
FREE = Budget(fraction=0.025, labels="free")


def make(
    attack: str = "mgd",
    drop: float = 10.0,
    spread: float = 0.1,
    *,
    recipes: dict[str, dict[str, Any]] | None = None,
    seeds: int = DIGITS.seeds,
    **changes: Any,
) -> Record:
    """A record of the track `digits` whose drops lie `spread` above and below `drop` by turns."""
    recipes = recipes or {name: recipe.as_dict() for name, recipe in DIGITS.recipes.items()}
    clean = [90.0 + 0.1 * seed for seed in range(seeds)]
    poisoned = [c - drop - spread * (-1) ** seed for seed, c in enumerate(clean)]
    victims = [
        VictimScores(
            recipe_name=name, recipe=numbers, seeds=list(range(seeds)), clean=clean,
            poisoned=poisoned, clean_best=[c + 0.5 for c in clean], poisoned_best=poisoned,
        )
        for name, numbers in recipes.items()
    ]  # fmt: skip
    values: dict[str, Any] = {
        "track": "digits", "attack": attack, "attack_config": {}, "attack_seed": 0,
        "dataset": DIGITS.dataset, "hashes": dict.fromkeys(("train", "val", "test"), "a" * 64),
        "budget": DIGITS.budget, "num_train": 500, "num_poison": 12, "surrogate": "smooth",
        "victims": victims, "poison_hash": "d" * 64, "crafting_seconds": 1234.4,
        "evaluation_seconds": 80.0, "created": datetime(2025, 3, 1, 23, 30, tzinfo=UTC),
        "command": "poisonbench run", "code": {"version": "0.1.0", "commit": None, "dirty": None},
        "libraries": {},
        "hardware": Hardware(system="Linux", processor="any", cores=2, device="cpu: cpu"),
    }  # fmt: skip
    return Record(**values | changes)


def put(results: Path, *several: Record) -> Path:
    """Store records as `publish` does; each in a folder of its own."""
    for record in several:
        home = results / record.track / re.sub(r"\W+", "-", record.attack) / record.defense
        folder = home / f"run-{len(list(home.glob('*')))}"
        record.save(folder / "record.json")
        (folder / "poison.safetensors").write_bytes(b"")
    return results


def controls(budget: Budget) -> list[Record]:
    flips = [
        make("label_flip", drop, budget=budget, attack_config={"spread": spread, "candidates": 6})
        for spread, drop in (("random", 1.0), ("concentrated", 8.0))
    ]
    return [
        make("none", 0.0, 0.0, budget=budget, num_poison=0),
        make("noise", 0.5, budget=budget),
        *(flips if budget.can_flip else []),
    ]


def page(results: Path) -> str:
    text: str = tables.build(results)[Path("README.md")]
    return text


def csvs(results: Path) -> dict[str, pd.DataFrame]:
    built = {str(path): text for path, text in tables.build(results).items()}
    return {path: pd.read_csv(StringIO(text)) for path, text in built.items() if path != "README.md"}


def rows(text: str) -> list[list[str]]:
    """The cells of every row that begins with a rank."""
    lines = [line for line in text.splitlines() if re.match(r"\| \d+=? \|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def headings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("### ")]


def test_same_records_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        *controls(FREE), make("mgd", 12, budget=FREE), make("mgd", 12, budget=FREE, attack_seed=1),
        make("mgd"), make("mgd", custom=["seeds"]),
        make("mgd", custom=["seeds"], num_train=400, num_poison=10),
        make("mgd", budget=FREE, status="invalid", remark="no"),
        make("mgd", budget=FREE, status="invalid", remark="neither"),
    ]  # fmt: skip
    results = put(tmp_path / "results", *some)
    built = tables.build(results)
    assert all(text.endswith("\n") and "\r" not in text for text in built.values())

    find = records.find
    monkeypatch.setattr(records, "find", lambda folder: find(folder)[::-1])
    assert tables.build(results) == built

    script = (
        "import sys, json, importlib, pathlib\n"
        "tables = importlib.import_module('poisonbench.leaderboard.tables')\n"
        "built = tables.build(pathlib.Path(sys.argv[1]))\n"
        "sys.stdout.write(json.dumps({str(path): text for path, text in built.items()}))"
    )
    root = Path(__file__).resolve().parents[1]
    again = subprocess.run(
        [sys.executable, "-c", script, str(results)],
        capture_output=True, check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert json.loads(again.stdout) == {str(path): text for path, text in built.items()}


def test_a_row_shows_its_record(tmp_path: Path) -> None:
    results = put(tmp_path, make("mgd", 10.0, 0.1), *controls(DIGITS.budget))
    here = "digits/mgd/none/run-0"
    # By hand: s = 0.1·√(10/9), t(9) = 2.262157, half = t·s/√10 = 0.0754; 40 victims took 80 s.
    assert rows(page(results))[0] == [
        "1", "mgd", "10.00 ± 0.08", "10.00 ± 0.08", "yes", "90.45 → 80.45", "10.50 ± 0.08",
        "12 of 500", "1,234 s", "617", "2025-03-01",
        f"[record]({here}/record.json), [poison]({here}/poison.safetensors)",
    ]  # fmt: skip
    (results / here / "summary.png").write_bytes(b"")
    assert f"[picture]({here}/summary.png)" in rows(page(results))[0][-1]
    assert "victims: 10 smooth, 10 standard." in page(results)


def test_unknown_crafting_time_is_a_dash(tmp_path: Path) -> None:
    assert rows(page(put(tmp_path, make(crafting_seconds=None))))[0][8:10] == ["–", "–"]


def test_the_csv_has_the_numbers_in_full(tmp_path: Path) -> None:
    several = [make("mgd", 10.123456), make("noise", 0.5), make("other", status="invalid", remark="x")]
    (table,) = csvs(put(tmp_path, *several)).values()
    assert table["attack"].tolist() == ["mgd", "noise", "other"]
    assert table["rank"].tolist()[:2] == [1, 2]
    assert pd.isna(table["rank"][2])
    assert table["control"].tolist() == [False, True, False]
    drop = several[0].victims[0].drop
    got = [table[name][0] for name in ("smooth_drop", "smooth_drop_low", "smooth_drop_high")]
    assert got == pytest.approx([drop.mean, drop.low, drop.high], abs=1e-6)
    assert table["fraction"].tolist() == [0.025] * 3
    # Ranks stay whole numbers in the text, though one row has none.
    (text,) = (text for path, text in tables.build(tmp_path).items() if path.suffix == ".csv")
    assert "\n1,False,True,mgd," in text


SMOOTH_WIDER = {
    name: recipe.replace(width=17).as_dict() if name == "smooth" else recipe.as_dict()
    for name, recipe in DIGITS.recipes.items()
}
OTHER_GAMES: dict[str, dict[str, Any]] = {
    "labels": {"budget": FREE},
    "fraction": {"budget": Budget(fraction=0.05)},
    "fraction, in digits that the heading rounds": {"budget": Budget(fraction=0.025001)},
    "pixels": {"budget": Budget(fraction=0.025, pixels=LInf(radius=8))},
    "track": {"track": "cifar10-small"},
    "unknown track": {"track": "mine"},
    "custom": {"custom": ["smooth.width=17"]},
    "data": {"dataset": DIGITS.dataset.model_copy(update={"split_seed": 1})},
    "hashes": {"hashes": {"train": "b" * 64, "val": "a" * 64, "test": "a" * 64}},
    "size": {"num_train": 490},
    "recipe": {"recipes": SMOOTH_WIDER},
    "victims": {"recipes": {"smooth": DIGITS.recipes["smooth"].as_dict()}},
    "seeds": {"seeds": DIGITS.seeds - 1},
    "surrogate": {"surrogate": "standard"},
}


@pytest.mark.parametrize("change", OTHER_GAMES.values(), ids=OTHER_GAMES.keys())
def test_other_games_have_other_tables(tmp_path: Path, change: dict[str, Any]) -> None:
    results = put(tmp_path, make("mgd", 10), make("other", 20), make("mgd", 30, **change))
    assert len(csvs(results)) == 2
    assert sorted(len(table) for table in csvs(results).values()) == [1, 2]
    text = page(results)
    assert len(headings(text)) == len(set(headings(text))) == 2
    assert sorted(row[0] for row in rows(text)) == ["1", "1", "2"]


def test_what_differs_in_the_attack_alone_shares_a_table(tmp_path: Path) -> None:
    same: dict[str, Any] = {
        "code": {"version": "9"},
        "libraries": {"numpy": "9"},
        "command": "x",
        "num_poison": 3,
    }
    results = put(tmp_path, make("mgd"), make("other", **same), make("other", attack_seed=5))
    assert [len(table) for table in csvs(results).values()] == [3]


@pytest.mark.parametrize(
    "change",
    ["unknown track", "custom", "data", "recipe", "victims", "seeds", "surrogate", "track"],
)
def test_a_changed_track_stands_apart(tmp_path: Path, change: str) -> None:
    results = put(tmp_path, make("mgd", 10), make("changed", 30, **OTHER_GAMES[change]))
    frozen, custom = page(results).split("## Custom runs")
    assert [row[1] for row in rows(frozen)] == ["mgd"]
    assert [row[1] for row in rows(custom)] == ["changed"]
    assert ", custom (" in headings(custom)[0]


def test_no_custom_section_without_custom_runs(tmp_path: Path) -> None:
    assert "## Custom runs" not in page(put(tmp_path, make("mgd")))
    assert "## Invalid" not in page(tmp_path)


def test_ranks_tie_where_intervals_do_not_part(tmp_path: Path) -> None:
    results = put(
        tmp_path, make("noise", 0.5), make("b", 9.95, 0.2), make("a", 10.0), make("d", 5.0),
        make("c", 10.0),
    )  # fmt: skip
    assert [row[:2] for row in rows(page(results))] == [
        ["1=", "a"], ["1=", "c"], ["1=", "b"], ["4", "d"], ["5", "*noise*"],
    ]  # fmt: skip


@pytest.mark.parametrize(("surrogate", "best"), [("smooth", "two"), ("standard", "one")])
def test_ranks_go_by_the_surrogates_victims(tmp_path: Path, surrogate: str, best: str) -> None:
    one, two = make("one", 5, surrogate=surrogate), make("two", 6, surrogate=surrogate)
    worse = one.victims[1].model_copy(update={"poisoned": [0.0] * DIGITS.seeds})
    results = put(tmp_path, one.model_copy(update={"victims": [one.victims[0], worse]}), two)
    assert rows(page(results))[0][1] == best
    assert f"Ranked by the drop of {surrogate} victims." in page(results)
    assert re.search(r"\| attack \| drop, (\w+) \|", page(results))[1] == surrogate  # type: ignore[index]


NEAR = DIGITS.budget.model_copy(update={"pixels": LInf(radius=8)})


@pytest.mark.parametrize("budget", [DIGITS.budget, FREE, NEAR], ids=["fixed", "free", "within a radius"])
def test_controls_are_marked_and_missed(tmp_path: Path, budget: Budget) -> None:
    every = controls(budget)
    names = {"none": r"none", "noise": r"noise", "random": r"label\_flip (spread=random)"}
    results = put(tmp_path / "all", make(budget=budget), *every)
    text = page(results)
    assert "Controls missing" not in text
    marked = [row[1] for row in rows(text) if row[1].startswith("*")]
    assert len(marked) == len(every)
    assert {f"*{name}*" for key, name in names.items() if key != "random"} <= set(marked)
    assert "mgd" in [row[1] for row in rows(text)]

    text = page(put(tmp_path / "none", make(budget=budget)))
    flips = r", label\_flip (spread=random), label\_flip (spread=concentrated)"
    assert f"Controls missing: none, noise{flips if budget.can_flip else ''}.\n" in text

    if budget.can_flip:  # a lone flip says of which kind it is
        text = page(put(tmp_path / "one", every[2]))
        assert rows(text)[0][1] == rf"*{names['random']}*"
        assert r"Controls missing: none, noise, label\_flip (spread=concentrated)." in text


def test_what_works_ranks_above_every_control(tmp_path: Path) -> None:
    weak = make("weak", 7.9, 1.0, budget=FREE)  # told apart from noise, not from concentrated flips
    every = [make("mgd", 20, budget=FREE), weak, *controls(FREE)]
    shown = {row[1]: row[4] for row in rows(page(put(tmp_path / "all", *every)))}
    assert (shown.pop("mgd"), shown.pop("weak")) == ("yes", "no")
    assert set(shown.values()) == {"–"}
    alone = rows(page(put(tmp_path / "none", make(budget=FREE))))
    assert alone[0][4] == "–"


def test_a_remark_on_a_valid_record_stands_below_its_table(tmp_path: Path) -> None:
    results = put(tmp_path, make("es", remark="kept | its start"), make("mgd", remark="best of all"))
    (stranger,) = (tmp_path / "digits" / "mgd" / "none").iterdir()
    (stranger / manifest.FILE).write_text("")
    shown = page(results)
    assert "\n\nes: kept \\| its start\n" in shown
    assert "best of all" not in shown


def test_a_poison_that_was_handed_in_is_no_control(tmp_path: Path) -> None:
    results = put(tmp_path, make("noise", crafting_seconds=None), make("none", 0.0, 0.0))
    assert [row[1] for row in rows(page(results))] == ["noise (from a file)", "*none*"]
    assert "Controls missing: noise, " in page(results)


def test_an_option_that_came_later_is_told_only_where_it_is_used(tmp_path: Path) -> None:
    names: Any = importlib.import_module("poisonbench.leaderboard.names")
    now = attacks.config(attacks.build("mgd", []))
    assert now.items() >= names.UNSAID.items() > names.LATER.items()
    old = {"steps": 40}
    same = put(tmp_path / "same", make("mgd", attack_config=old), make(attack_config=old | names.LATER))
    assert [row[1] for row in rows(page(same))] == ["mgd", "mgd"]
    unlike = {"step_size": 0.03, "temperature": 0.5, "update": "sign"}
    name = "mgd (step\\_size=0.03, temperature=0.5, update=sign)"
    used = make("mgd", 9, attack_config=old | names.UNSAID | unlike)
    other = put(tmp_path / "other", make("mgd", attack_config=old), used)
    assert [row[1] for row in rows(page(other))] == ["mgd", name]


def test_options_that_differ_are_shown(tmp_path: Path) -> None:
    base = {"steps": 40, "step_size": 0.1, "start": "auto"}
    results = put(
        tmp_path, make("mgd", 3, attack_config=base),
        make("mgd", 2, attack_config=base | {"steps": 80}),
        make("mgd", 1, attack_config=base | {"goal": "error"}),
        make("noise", 0), make("noise", -1, attack_seed=4), make("flat", -2, attack_config={"a": 1}),
    )  # fmt: skip
    assert [row[1] for row in rows(page(results))] == [
        "mgd (steps=40)", "mgd (steps=80)",
        "mgd (goal=error, steps=40)", r"*noise (attack\_seed=0)*", r"*noise (attack\_seed=4)*",
        "flat",
    ]  # fmt: skip


def test_invalid_records_are_marked(tmp_path: Path) -> None:
    wrong = make("best", 50, status="invalid", remark="trained on | test")
    results = put(tmp_path, make("mgd", 10), wrong, make("noise", status="superseded", remark="twice"))
    ranked, invalid = page(results).split("## Invalid and superseded records")
    assert [row[:2] for row in rows(ranked)] == [["1", "mgd"]]
    assert "| best |" not in ranked
    assert "Controls missing: none, noise, " in ranked
    assert r"| best | digits: replace, fixed labels, any pixels, 0.025 of the set | invalid |" in invalid
    assert (
        r"| trained on \| test | 2025-03-01 | [record](digits/best/none/run-0/record.json) |" in invalid
    )
    (table,) = csvs(results).values()
    assert table["status"].tolist() == ["valid", "invalid", "superseded"]


def test_a_table_of_invalid_records_only(tmp_path: Path) -> None:
    text = page(put(tmp_path, make("mgd", status="invalid", remark="wrong")))
    assert "No valid record." in text
    assert "Controls missing" not in text
    assert rows(text) == []


HOSTILE = [
    "a|b", "a\\|b", "<img src=x onerror=y>", "[x](https://evil.example)", "![x](y)", "`a`", "**a**",
    "_a_ *b* ~~c~~", "a<!-- leaderboard: end -->b", "&lt;script&gt;", "{{ 7 * 7 }}{% if %}", "$x$",
    "<https://evil.example>", "\\", "a\\", "*", "#", "tfds:cifar10: half",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_text_from_records_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    results = put(tmp_path, make("mgd", custom=[name], defense="none", status="valid"))
    (row,) = re.findall(r"<tbody>\s*<tr>(.*?)</tr>", render(page(results)), re.DOTALL)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
    assert len(cells) == 12
    (heading,) = re.findall("<h3>(.*?)</h3>", render(page(results)))
    assert html.unescape(heading).startswith(f"digits, custom ({name}): replace")
    # What stands in the top-level page cannot end its own marked part.
    tables.update(results, None)
    assert tables.update(results, None, check=True) == []


def test_text_from_records_stays_on_its_line_and_makes_no_link() -> None:
    assert tables.escape("a\nb\r\n| c\u2028d\x00\u202e") == r"a b \| c d"
    assert tables.escape("https://x www.x.y") == r"https\://x www\.x.y"
    assert len(tables.escape("x" * 10_000)) == 300


def test_text_from_records_is_no_formula(tmp_path: Path) -> None:
    (table,) = csvs(put(tmp_path, make("mgd", custom=["=cmd()"], remark="-1+1", drop=-3))).values()
    assert table["remark"][0] == "'-1+1"
    assert table["smooth_drop"][0] == pytest.approx(-3)
