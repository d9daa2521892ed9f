"""Defences: what each wins back of each attack, and what it costs where there is none.

A defended record is held against the undefended one of the same poison, seed by seed, for as many seeds
as it has, which may be fewer: defences are many, and some train slowly. With C and P the accuracy of
clean and of poisoned victims and a prime for the defended ones,

    price = C - C',    won back = (P' - P) / (C - P),

the first with Student's interval, the second with Fieller's. Where what an attack takes of those pairs
cannot be told from nothing, no share of it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from poisonbench import costs, records
from poisonbench.costs import Costs
from poisonbench.records import Record, VictimScores
from poisonbench.statistics import mean_interval, paired_drop, ratio_interval
from poisonbench.tracks import TRACKS

from .games import Found, Game, Row
from .grids import CONTROLS, Cell, DefenseTable
from .names import canonical, telling_name

FEWEST = 5
"""Pairs of victims below which a defended record stands in no table."""


def left_out(
    results: Path, games: Sequence[Game], found: Found | None = None
) -> list[tuple[str, Record, str]]:
    """Defended records that no table shows: their folder, themselves, and why."""
    rows = _by_poison(row for game in games if game.frozen for row in game.ranked)
    left: list[tuple[str, Record, str]] = []
    for path, record in records.find(results) if found is None else found:
        folder = path.parent.relative_to(results).as_posix()
        if record.defense == "none":
            continue
        if record.status != "valid":
            left.append((folder, record, record.remark))
        elif _twin(record, rows) is None:
            left.append((folder, record, _why(record)))
    return left


def _why(record: Record) -> str:
    """Why a valid record stands in no table of defences."""
    if (pairs := min(len(v.seeds) for v in record.victims)) < FEWEST:
        return f"{pairs} pairs of victims, and a table takes {FEWEST} or more"
    if record.track not in TRACKS or [name for name in record.custom if name != "seeds"]:
        return "a custom game, and tables of defences are those of frozen tracks"
    return "no valid undefended record of the same poison and victims"


def defense_tables(
    results: Path, games: Sequence[Game], found: Found | None = None
) -> list[DefenseTable]:
    """One for each table that has defended records, in order of tables.

    Args:
        results: where the records are.
        games: their tables.
        found: the records, where they have been read already.
    """
    defended = [
        (path.parent, record)
        for path, record in (records.find(results) if found is None else found)
        if record.defense != "none" and record.status == "valid"
    ]
    configs: dict[str, dict[str, dict[str, Any]]] = {}
    for _, record in defended:
        configs.setdefault(record.defense, {})[canonical(record.defense_config)] = record.defense_config
    known = costs.read(results)
    found_tables: list[DefenseTable] = []
    for game in games:
        if not game.frozen:
            continue
        rows = _by_poison(game.ranked)
        twins = [(folder, r, _twin(r, rows)) for folder, r in defended]
        several = [(folder, r, twin) for folder, r, twin in twins if twin is not None]
        if several:
            first, *others = (
                _defense_table(game, judge, several, results, known, configs) for judge in game.recipes
            )
            found_tables.append(replace(first, others=tuple(others)))
    alone = [_alone(table) for table in found_tables]
    everywhere = set().union(*alone)
    return [
        replace(table, unmeasured=tuple(sorted(everywhere - here)))
        for table, here in zip(found_tables, alone, strict=True)
    ]


def _alone(table: DefenseTable) -> set[str]:
    """The defences that stand in it by themselves, not composed with others."""
    return {cell.record.defense for cell in table.cells.values() if "+" not in cell.record.defense}


def _by_poison(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the hash of their poison, so that nobody looks through all of them for a twin."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.record.poison_hash, []).append(row)
    return found


def _twin(record: Record, rows: Mapping[str, Sequence[Row]]) -> Row | None:
    """The undefended row of the same poison and victims; of several, the same attack's."""
    twins = [row for row in rows.get(record.poison_hash, ()) if _belongs(record, row)]
    return min(
        twins,
        key=lambda row: (row.record.attack != record.attack, _elsewhere(record, row)),
        default=None,
    )


def _elsewhere(record: Record, row: Row) -> bool:
    """Whether the two were measured on different kinds of processor, or numbers of cores."""
    ours, theirs = record.hardware, row.record.hardware
    return (ours.processor, ours.cores) != (theirs.processor, theirs.cores)


def _belongs(record: Record, row: Row) -> bool:
    """Whether a row of the same poison is this record's twin, seed by seed and victim by victim."""
    if (record.track, record.hashes) != (row.record.track, row.record.hashes):
        return False
    twin = {v.recipe_name: v for v in row.record.victims}
    return record.track in TRACKS and all(
        v.recipe_name in twin
        and len(v.seeds) >= FEWEST
        and (v.seeds, canonical(v.whole_recipe))
        == (twin[v.recipe_name].seeds[: len(v.seeds)], canonical(twin[v.recipe_name].whole_recipe))
        for v in record.victims
    )


def _defense_table(
    game: Game,
    judge: str,
    several: list[tuple[Path, Record, Row]],
    results: Path,
    known: Sequence[Costs],
    configs: Mapping[str, Mapping[str, dict[str, Any]]],
) -> DefenseTable:
    shared = Counter(row.name for row in game.ranked)
    names = {  # two poisons of one name are told apart by their content
        row.folder: row.name if shared[row.name] == 1 else f"{row.name} {row.record.poison_hash[:6]}"
        for row in game.ranked
    }
    cells: dict[tuple[str, str], Cell] = {}
    for folder, record, row in several:
        defense = telling_name(
            record.defense, record.defense_config, configs[record.defense].values()
        )  # fmt: skip
        scores = record.victim(judge)
        if scores is None:
            continue
        name = names[row.folder]
        cell = _cell(record, folder.relative_to(results).as_posix(), row, name, defense, scores, judge)
        older = cells.get((name, defense))
        if older is None or _weight(older.record) <= _weight(record):
            cells[name, defense] = cell
    order = dict.fromkeys(names[row.folder] for row in game.ranked)
    measured = {d: costs.cost_of(cell.record, judge, known) for (_, d), cell in cells.items()}
    return DefenseTable(
        game, judge, [name for name in order if any(attack == name for attack, _ in cells)],
        sorted({defense for _, defense in cells}, key=lambda name: (name not in CONTROLS, name)), cells,
        {defense: cost for defense, cost in measured.items() if cost is not None},
    )  # fmt: skip


def _weight(record: Record) -> tuple[int, datetime]:
    """Of two records of one cell the one with more seeds is shown, or else the later one."""
    return min(len(v.seeds) for v in record.victims), record.created


def _cell(
    record: Record,
    folder: str,
    row: Row,
    name: str,
    defense: str,
    scores: VictimScores,
    judge: str,
) -> Cell:
    bare, number = row.scores(judge), len(scores.seeds)
    clean, poisoned = bare.clean[:number], bare.poisoned[:number]
    lost = np.subtract(clean, poisoned)
    won = np.subtract(scores.poisoned, poisoned)
    sure = mean_interval(lost.tolist()).low > 0
    precision = recall = clean_lost = None
    if (filtering := scores.filtering) is not None:
        dropped, poison = sum(filtering.poisoned_run), sum(filtering.poison)
        precision = poison / dropped if dropped else None
        recall = poison / (record.num_poison * number) if record.num_poison else None
        clean_lost = (dropped - poison) / number
    return Cell(
        record, folder, name, defense,
        mean_interval(scores.clean), mean_interval(scores.poisoned), mean_interval(poisoned),
        paired_drop(clean, scores.clean), tuple(lost.tolist()), tuple(won.tolist()),
        ratio_interval(won.tolist(), lost.tolist()) if sure else None,
        precision, recall, clean_lost, scores.certificate,
        bool(row.record.attack_config.get("against")), _elsewhere(record, row),
    )  # fmt: skip
