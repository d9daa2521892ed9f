"""Defences: what each wins back of each attack, and what it costs where there is none.

A defended record is held against the undefended one of the same poison, seed by seed, for as many seeds
as it has, which may be fewer: defences are many, and some train slowly. With C and P the accuracy of
clean and of poisoned victims and a prime for the defended ones,

    price = C - C',    won back = (P' - P) / (C - P),

the first with Student's interval, the second with Fieller's. Where what an attack takes of those pairs
cannot be told from nothing, no share of it is given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from poisonbench import costs, records
from poisonbench.costs import Costs, DefenseCost
from poisonbench.records import Certificate, Record, VictimScores
from poisonbench.statistics import Interval, mean_interval, paired_drop, ratio_interval
from poisonbench.tracks import TRACKS

from .games import Found, Game, Row, canonical, telling_name

CONTROLS = ("oracle", "random_filter")
"""The defences that every table should have."""
FEWEST = 5
"""Pairs of victims below which a defended record stands in no table."""


@dataclass(frozen=True)
class Cell:
    """One attack under one defence, by victims of one recipe.

    Attributes:
        record: of the defended victims.
        folder: where it lies, relative to the results.
        attack: the attack, as its undefended row is called.
        defense: with its options, where two records of a defence differ in them, in whatever table.
        clean, poisoned: accuracy of defended victims without and with the poison, in percent.
        bare: that of undefended victims of the same seeds with the poison, in percent.
        price: accuracy that the defence costs clean victims, in points.
        lost: what the attack takes of undefended victims, in points, seed by seed.
        won: by how much defended victims on the poisoned set are better, in points, seed by seed.
        won_back: the one as a share of the other; None where nothing was lost for sure.
        precision: share of poison among what was dropped; None where nothing was dropped.
        recall: share of the poison that was dropped; None where nothing is ever dropped.
        clean_lost: clean images dropped of the poisoned set, on average.
        certificate: what a certified defence promised these victims.
        adaptive: the attack was made against a defence.
    """

    record: Record
    folder: str
    attack: str
    defense: str
    clean: Interval
    poisoned: Interval
    bare: Interval
    price: Interval
    lost: tuple[float, ...]
    won: tuple[float, ...]
    won_back: Interval | None
    precision: float | None
    recall: float | None
    clean_lost: float | None
    certificate: Certificate | None
    adaptive: bool

    @property
    def filtered(self) -> str:
        """Precision and recall in percent, and clean images lost, where a filter was at work."""
        if self.clean_lost is None:
            return "–"
        shares = ["–" if x is None else f"{100 * x:.0f}" for x in (self.precision, self.recall)]
        return f"{shares[0]} / {shares[1]} / {self.clean_lost:.1f}"


@dataclass(frozen=True)
class DefenseTable:
    """All defended records of one table's attacks.

    Attributes:
        game: the table of the undefended ones.
        judge: the recipe of the victims; that which decides the ranks.
        attacks: names of its rows, in their order, that some defence stood against.
        defenses: in order: controls, then by name.
        cells: by attack and defence.
        costs: by defence, with the file that says so; without those that were not measured.
        others: the same of the victims' other recipes.
    """

    game: Game
    judge: str
    attacks: list[str]
    defenses: list[str]
    cells: dict[tuple[str, str], Cell]
    costs: dict[str, tuple[Costs, DefenseCost]]
    others: tuple[DefenseTable, ...] = ()

    @property
    def missing(self) -> list[str]:
        """Controls that are not there."""
        return [name for name in CONTROLS if name not in self.defenses]

    @property
    def pairs(self) -> str:
        """How many pairs of victims the cells rest on."""
        several = sorted({cell.price.n for cell in self.cells.values()})
        return " to ".join(str(n) for n in several[:: max(1, len(several) - 1)])

    def shown(self, attack: str, defense: str) -> str:
        """A cell of the page: accuracy left, and the share won back or else the points."""
        cell = self.cells.get((attack, defense))
        if cell is None:
            return "–"
        left = f"{cell.poisoned.mean:.2f}"
        if cell.won_back is not None:
            return f"{left} ({share(cell.won_back)})"
        return f"{left} ({mean_interval(cell.won)} points)" if cell.record.num_poison else left

    def undefended(self, attack: str) -> str:
        """The accuracy that an attack leaves of undefended victims, over the most pairs of its row."""
        cells = [self.cells[attack, d] for d in self.defenses if (attack, d) in self.cells]
        return f"{max(cells, key=lambda cell: cell.bare.n).bare.mean:.2f}"

    def price(self, defense: str) -> Interval:
        """Its price, which is the same whatever the attack: clean victims never meet one."""
        return self.of(defense)[0].price

    def trainings(self, defense: str) -> float | None:
        """What a victim under it costs, in trainings of one without; None where it was not measured."""
        found = self.costs.get(defense)
        return None if found is None else found[1].trainings

    def cost(self, defense: str) -> str:
        """The same, with what counting its multiply-adds gives."""
        found = self.costs.get(defense)
        if found is None:
            return "–"
        return f"{found[1].trainings:.1f} ({found[0].counted(found[1]):.2f})"

    def of(self, defense: str) -> list[Cell]:
        """The cells of one defence, in order of attacks."""
        return [self.cells[a, defense] for a in self.attacks if (a, defense) in self.cells]

    @cached_property
    def pooled(self) -> list[str]:
        """Attacks that took something for sure, of those that all controls met.

        Where there are no controls, that all defences met; without those made against a defence.
        """
        met = [name for name in self.defenses if name in CONTROLS] or self.defenses
        rows = {attack: [self.cells.get((attack, name)) for name in met] for attack in self.attacks}
        return [
            attack
            for attack, cells in rows.items()
            if all(c is not None and c.won_back is not None and not c.adaptive for c in cells)
        ]

    def won_back(self, defense: str) -> Interval | None:
        """Share won back of all that was lost to the attacks that took something for sure, together.

        Sums, not a mean of shares: a share of next to nothing may be anything. None for a defence that
        has not met all of these attacks, so that shares of one column can be compared.
        """
        cells = [self.cells[a, defense] for a in self.pooled if (a, defense) in self.cells]
        if not cells or len(cells) < len(self.pooled):
            return None
        pairs = min(len(cell.lost) for cell in cells)
        won, lost = (
            np.sum([getattr(cell, which)[:pairs] for cell in cells], axis=0).tolist()
            for which in ("won", "lost")
        )
        return ratio_interval(won, lost)

    @property
    def front(self) -> list[str]:
        """The Pareto front: no other but a control costs less and wins back more. In order of price."""
        shares = {d: self.won_back(d) for d in self.defenses if d not in CONTROLS}
        points = [(self.price(d).mean, -share.mean, d) for d, share in shares.items() if share]
        best, kept = math.inf, []
        for _, lost, defense in sorted(points):
            if lost < best:
                best = lost
                kept.append(defense)
        return kept

    @property
    def filters(self) -> list[str]:
        """The defences that drop images."""
        return [d for d in self.defenses if any(c.clean_lost is not None for c in self.of(d))]

    def certified(self, defense: str) -> str | None:
        """What a certified defence promises, where attacks are beyond it, and how often one broke it."""
        kept = [c.certificate for c in self.of(defense) if c.certificate is not None]
        if not kept:
            return None
        curve = kept[0].curve
        steps = sorted({0, *(round(x) for x in np.linspace(0, len(curve) - 1, 5))})
        promised = ", ".join(f"{curve[r]:.1f} % against {r}" for r in steps)
        beyond = " and ".join(map(str, sorted({c.changes for c in kept if not promise(c)})))
        return (
            f"accuracy certified to stay, whatever images are added or removed: {promised}."
            f"{f' Against poisons of {beyond} changes it promises nothing.' if beyond else ''}"
            f" Promises broken: {sum(c.violations for c in kept)}"
        )

    def tried(self, defense: str) -> list[tuple[str, str]]:
        """The attacks that try a certificate, each with what was promised and what was left."""
        cells = [(cell, cell.certificate) for cell in self.of(defense)]
        return [
            (
                cell.attack,
                f"{given.changes} changes: {promise(given):.1f} % promised,"
                f" {cell.poisoned.mean:.1f} % left",
            )
            for cell, given in cells
            if given is not None and given.changes and promise(given) > 0
        ]


def promise(certificate: Certificate) -> float:
    """Accuracy certified to stay under as many changes as the poison makes, in percent."""
    curve, changes = certificate.curve, certificate.changes
    return curve[changes] if changes < len(curve) else 0.0


def share(interval: Interval | None) -> str:
    """A share in percent with its ends, which need not lie alike."""
    if interval is None:
        return "–"
    mean, low, high = (round(100 * x) for x in (interval.mean, interval.low, interval.high))
    return f"{mean} %, {low} to {high}"


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
            left.append((folder, record, "no valid undefended record of the same poison and victims"))
    return left


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
    return found_tables


def _by_poison(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the hash of their poison, so that nobody looks through all of them for a twin."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.record.poison_hash, []).append(row)
    return found


def _twin(record: Record, rows: Mapping[str, Sequence[Row]]) -> Row | None:
    """The undefended row of the same poison and victims; of several, that of the same attack."""
    twins = [row for row in rows.get(record.poison_hash, ()) if _belongs(record, row)]
    return min(twins, key=lambda row: row.record.attack != record.attack, default=None)


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
        bool(row.record.attack_config.get("against")),
    )  # fmt: skip
