"""What the committed records have in common.

Claims of `results/` tested here:

- the valid records of a table, entries by others apart, were measured beside the same clean victims, so
  that a drop of one row can be held against that of another on every kind of victim;
- each was made from committed code.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from poisonbench.submission import manifest

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


def test_rows_were_made_from_committed_code(tables: list[Any]) -> None:
    dirty = [
        row.folder
        for game in tables
        for row in game.ranked
        if manifest.FILE not in row.beside and row.record.code.get("dirty") is not False
    ]
    assert dirty == []
