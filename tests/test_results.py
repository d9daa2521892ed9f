"""What the committed records have in common.

Claims of `results/` tested here:

- the valid records of a table, entries by others apart, were measured beside the same clean victims, so
  that a drop of one row can be held against that of another on every kind of victim;
- so were the defended ones of a table by each defence, whatever the attack;
- processors round differently, and a victim's accuracy may hang on that: on one kind of machine clean
  victims are the same to the last digit, and between kinds their means do not differ for sure;
- where a filter drops nothing of the clean set, its clean victims are the undefended ones or, of another
  kind of machine, as good on average;
- every file that says by what code it was made was made from committed code;
- an option that an attack was given after a record was made is known to have come later, with the value
  that it had in effect, so that rows are not told apart by it.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_ind

from poisonbench import attacks
from poisonbench.records import Record
from poisonbench.statistics import quantile
from poisonbench.submission import manifest

defended: Any = importlib.import_module("poisonbench.leaderboard.defended")
games: Any = importlib.import_module("poisonbench.leaderboard.games")
RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def tables() -> list[Any]:
    if not RESULTS.is_dir():
        pytest.skip(f"no {RESULTS}: the records are in a checkout only")
    return [game for game in games.read(RESULTS) if game.ranked]


def disagreement(measured: Iterable[tuple[Record, list[float]]]) -> list[Any]:
    """Clean victims of one kind of machine that are not the same, or else means that differ for sure."""
    clean = defaultdict(set)
    for record, scores in measured:
        clean[record.hardware.processor, record.hardware.cores].add(tuple(scores))
    if unlike := [kind for kind, found in clean.items() if len(found) > 1]:
        return unlike
    firsts = [(kind, *found) for kind, found in clean.items()]
    return [
        (one, other)
        for (one, a), (other, b) in combinations(firsts, 2)
        if a != b and ttest_ind(a, b, equal_var=False).pvalue < 1e-3
    ]


def test_what_disagreement_is(tables: list[Any]) -> None:
    here = tables[0].ranked[0].record
    there = here.model_copy(
        update={"hardware": here.hardware.model_copy(update={"processor": "another"})}
    )
    scores = here.victims[0].clean
    rounded, other = [score + 0.1 for score in scores], [score + 9.0 for score in scores]
    assert disagreement([(here, scores), (here, scores), (there, rounded)]) == []
    assert disagreement([(here, scores), (here, rounded)])
    assert disagreement([(here, scores), (there, other)])


def test_rows_of_a_table_share_their_clean_victims(tables: list[Any]) -> None:
    assert tables
    for game in tables:
        ours = [row for row in game.ranked if manifest.FILE not in row.beside]
        for recipe in game.recipes:
            measured = [(row.record, row.scores(recipe).clean) for row in ours]
            assert disagreement(measured) == [], (game.title, recipe)


def test_a_defence_has_the_same_clean_victims_whatever_the_attack(tables: list[Any]) -> None:
    several = [grid for one in defended.defense_tables(RESULTS, tables) for grid in (one, *one.others)]
    assert several
    for grid in several:
        for defense in grid.defenses:
            clean = defaultdict(list)  # by how many pairs there are
            for cell in grid.of(defense):
                clean[cell.clean.n].append((cell.record, cell.record.victim(grid.judge).clean))
            for measured in clean.values():
                assert disagreement(measured) == [], (grid.game.title, grid.judge, defense)


def test_a_filter_that_drops_nothing_leaves_clean_victims_as_they_are(tables: list[Any]) -> None:
    several = [grid for one in defended.defense_tables(RESULTS, tables) for grid in one.by_recipe]
    same, other = [], []
    for grid in several:
        for cell in grid.cells.values():
            dropped = cell.record.victim(grid.judge).filtering
            if dropped is not None and not any(dropped.clean_run):
                (other if cell.elsewhere else same).append(cell)
    assert {cell.defense for cell in same} >= {"oracle"}
    for cell in same:
        assert (cell.price.low, cell.price.high) == (0, 0), cell.folder
    assert other
    for cell in other:
        wide = cell.price.half * quantile(cell.price.n - 1, 1 - 0.05 / len(other))
        assert abs(cell.price.mean) <= wide / quantile(cell.price.n - 1, 0.95) + 1e-9, cell.folder


def test_everything_was_made_from_committed_code(tables: list[Any]) -> None:
    made = {path: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.rglob("*.json"))}
    told = {
        path: about["code"]
        for path, about in made.items()
        if "code" in about and not (path.parent / manifest.FILE).exists()
    }
    assert len(told) > len([row for game in tables for row in game.ranked])
    assert [path for path, code in told.items() if code.get("dirty") is not False] == []


def test_options_that_came_later_are_known_as_such(tables: list[Any]) -> None:
    later: Any = importlib.import_module("poisonbench.leaderboard.names").LATER
    records = [row.record for game in tables for row in game.ranked if manifest.FILE not in row.beside]
    ours = [record for record in records if record.attack in attacks.names()]
    assert {record.attack for record in ours} >= {"mgd", "es"}
    for record in ours:
        now = attacks.config(attacks.build(record.attack, []))
        missing = now.keys() - record.attack_config.keys()
        assert {name: now[name] for name in missing} == {name: later.get(name) for name in missing}
