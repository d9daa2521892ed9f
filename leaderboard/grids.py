"""Tables of defences: attack by defence, what is left, what was won back, and at what price.

What stands in them, `poisonbench.leaderboard.defended` finds and works out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from poisonbench.costs import Costs, DefenseCost
from poisonbench.records import Certificate, Record
from poisonbench.statistics import Interval, mean_interval, ratio_interval

from .games import Game

CONTROLS = ("oracle", "random_filter")
"""The defences that every table should have."""
UNDEFENDED = "undefended"
"""Victims without a defence, which costs nothing and wins nothing back."""
WIDEST = 2.0
"""Width of a share's interval from which on points are shown instead."""
ELSEWHERE = "†"
"""Marks what was measured on another kind of processor than the undefended victims."""


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
        elsewhere: the undefended victims were trained on another kind of processor, which rounds
            otherwise: the pairs share their seeds, but where training is chaotic not much more. The
            intervals hold, and are wider than they might be.
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
    elsewhere: bool

    @property
    def trusted(self) -> int:
        """Clean images that the defence was given."""
        return sum(int(options.get("trusted", 0)) for options in self.record.defense_config.values())

    @property
    def back(self) -> str:
        """The share won back, or else the points."""
        return _share_or_points(self.won_back, self.won)

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
        unmeasured: names of defences that stand in other tables of these results.
        others: the same of the victims' other recipes.
    """

    game: Game
    judge: str
    attacks: list[str]
    defenses: list[str]
    cells: dict[tuple[str, str], Cell]
    costs: dict[str, tuple[Costs, DefenseCost]]
    unmeasured: tuple[str, ...] = ()
    others: tuple[DefenseTable, ...] = ()

    @property
    def by_recipe(self) -> tuple[DefenseTable, ...]:
        """This table, and the same of each other recipe."""
        return (self, *self.others)

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
        left = f"{cell.poisoned.mean:.2f}{ELSEWHERE if cell.elsewhere else ''}"
        return f"{left} ({cell.back})" if cell.record.num_poison else left

    def undefended(self, attack: str) -> str:
        """The accuracy that an attack leaves of undefended victims, over the most pairs of its row."""
        cells = [self.cells[attack, d] for d in self.defenses if (attack, d) in self.cells]
        return f"{max(cells, key=lambda cell: cell.bare.n).bare.mean:.2f}"

    def price(self, defense: str) -> Interval:
        """Its price, of the most pairs there are: clean victims never meet an attack."""
        return self._dearest(defense).price

    def priced(self, defense: str) -> str:
        """The same, marked where it compares two kinds of processor."""
        cell = self._dearest(defense)
        return f"{cell.price}{ELSEWHERE if cell.elsewhere else ''}"

    def _dearest(self, defense: str) -> Cell:
        """The first of the cells with the most pairs of victims."""
        return max(self.of(defense), key=lambda cell: cell.price.n)

    def trusted(self, defense: str) -> int:
        """Clean images that it is given."""
        return self.of(defense)[0].trusted

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
        """Attacks that all controls met, or where there are none all defences.

        Weak ones too: against them a defence's price shows. Without those made against a defence, which
        are beside the point of all others.
        """
        met = [name for name in self.defenses if name in CONTROLS] or self.defenses
        rows = {attack: [self.cells.get((attack, name)) for name in met] for attack in self.attacks}
        return [
            attack
            for attack, cells in rows.items()
            if all(c is not None and c.record.num_poison and not c.adaptive for c in cells)
        ]

    @cached_property
    def adaptive(self) -> list[str]:
        """Attacks that were made against a defence."""
        return [a for a in self.attacks if any(c.adaptive for (b, _), c in self.cells.items() if a == b)]

    def won_back(self, defense: str) -> Interval | None:
        """Share won back of all that was lost to the pooled attacks, together.

        Sums, not a mean of shares: a share of next to nothing may be anything. None for a defence that
        has not met all of these attacks, so that shares of one column can be compared, and where it
        cannot be told whether anything was lost.
        """
        sums = self._together(defense)
        return None if sums is None else ratio_interval(*sums)

    def won(self, defense: str) -> str:
        """The same for the page, or else the points that it wins."""
        sums = self._together(defense)
        return "–" if sums is None else _share_or_points(ratio_interval(*sums), sums[0])

    @property
    def told_apart(self) -> Interval | None:
        """By how many points the oracle is better than the random filter, over the pooled attacks.

        What the table can tell is worth no more than that. None where a control is missing.
        """
        sums = [self._together(control) for control in CONTROLS]
        if any(one is None for one in sums):
            return None
        oracle, chance = (one[0] for one in sums if one is not None)
        pairs = min(len(oracle), len(chance))
        return mean_interval(np.subtract(oracle[:pairs], chance[:pairs]).tolist())

    def _together(self, defense: str) -> tuple[list[float], list[float]] | None:
        """Points won and lost to the pooled attacks, summed seed by seed."""
        cells = [self.cells[a, defense] for a in self.pooled if (a, defense) in self.cells]
        if not cells or len(cells) < len(self.pooled):
            return None
        pairs = min(len(cell.lost) for cell in cells)
        won, lost = (
            np.sum([getattr(cell, which)[:pairs] for cell in cells], axis=0).tolist()
            for which in ("won", "lost")
        )
        return won, lost

    @property
    def front(self) -> list[str]:
        """The Pareto front, in order of price: nothing that costs less wins back as much.

        Controls aside; to go undefended is one of the choices.
        """
        shares = {d: self.won_back(d) for d in self.defenses if d not in CONTROLS}
        points = [(self.price(d).mean, -share.mean, d) for d, share in shares.items() if share]
        points.insert(0, (0.0, 0.0, UNDEFENDED))  # first of equals, as sorting keeps their order
        best, kept = math.inf, []
        for _, lost, defense in sorted(points, key=lambda point: point[:2]):
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
        steps = sorted({round(x) for x in np.linspace(0, len(curve) - 1, min(8, len(curve)))})
        promised = ", ".join(f"{curve[r]:.1f} % against {r}" for r in steps)
        beyond = " and ".join(map(str, sorted({c.changes for c in kept if not c.promised})))
        return (
            "accuracy certified to stay, whatever images are added or removed, one replaced being one of"
            f" each: {promised}."
            f"{f' Against poisons of {beyond} changes it promises nothing.' if beyond else ''}"
            f" Promises broken: {sum(c.violations for c in kept)}"
        )

    def tried(self, defense: str) -> list[tuple[str, str]]:
        """The attacks that try a certificate, each with what was promised and what was left."""
        cells = [(cell, cell.certificate) for cell in self.of(defense)]
        return [
            (
                cell.attack,
                f"{given.changes} changes: {given.promised:.1f} % promised,"
                f" {cell.poisoned.mean:.1f} % left",
            )
            for cell, given in cells
            if given is not None and given.changes and given.promised > 0
        ]


def _share_or_points(share_of: Interval | None, won: Sequence[float]) -> str:
    """A share where its interval says something, or else points."""
    if share_of is not None and share_of.high - share_of.low <= WIDEST:
        return share(share_of)
    return f"{mean_interval(won)} points"


def share(interval: Interval) -> str:
    """A share in percent with its ends, which need not lie alike."""
    mean, low, high = (round(100 * x) for x in (interval.mean, interval.low, interval.high))
    return f"{mean} %, {low} to {high}"
