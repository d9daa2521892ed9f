"""What the committed records have in common.

Claims of `results/` tested here:

- the valid records of a table, entries by others apart, were measured beside the same clean victims, so
  that a drop of one row can be held against that of another on every kind of victim;
- so were the defended ones of a table by each defence, whatever the attack;
- every file that says by what code it was made was made from committed code.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from poisonbench.submission import manifest

defended: Any = importlib.import_module("poisonbench.leaderboard.defended")
games: Any = importlib.import_module("poisonbench.leaderboard.games")
RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def tables() -> list[Any]:
    if not RESULTS.is_dir():
        pytest.skip(f"no {RESULTS}: the records are in a checkout only")
    return [game for game in games.read(RESULTS) if game.ranked]


def test_rows_of_a_table_share_their_clean_victims(tables: list[Any]) -> None:
    assert tables
    for game in tables:
        for recipe in game.recipes:
            clean = defaultdict(list)
            for row in game.ranked:
                if manifest.FILE not in row.beside:
                    clean[tuple(row.scores(recipe).clean)].append(row.folder)
            assert len(clean) == 1, (game.title, recipe, list(clean.values()))


def test_a_defence_has_the_same_clean_victims_whatever_the_attack(tables: list[Any]) -> None:
    several = [grid for one in defended.defense_tables(RESULTS, tables) for grid in (one, *one.others)]
    assert several
    for grid in several:
        for defense in grid.defenses:
            clean = defaultdict(set)  # by how many pairs there are
            for cell in grid.of(defense):
                clean[cell.clean.n].add(tuple(cell.record.victim(grid.judge).clean))
            assert all(len(each) == 1 for each in clean.values()), (grid.game.title, grid.judge, defense)


def test_everything_was_made_from_committed_code(tables: list[Any]) -> None:
    made = {path: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.rglob("*.json"))}
    told = {
        path: about["code"]
        for path, about in made.items()
        if "code" in about and not (path.parent / manifest.FILE).exists()
    }
    assert len(told) > len([row for game in tables for row in game.ranked])
    assert [path for path, code in told.items() if code.get("dirty") is not False] == []
