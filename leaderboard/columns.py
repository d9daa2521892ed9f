"""The columns of the site's tables: what each is called, what it means, and what it shows of a row.

A cell knows the number that it is sorted by, so that 10 comes after 9 whatever is written in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from poisonbench.statistics import CERTAIN, Interval

from .games import Game, Row

UNKNOWN = "–"
SHORT = 90
"""Characters of a dispute that a table shows; the entry's page has the rest."""


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
        text: what is shown.
        order: what it is sorted by; None where there is nothing to sort.
    """

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its heading.
        meaning: in a sentence or two.
        cell: what it shows of a row.
        numeric: it holds numbers, and is aligned and sorted as such.
    """

    name: str
    meaning: str
    cell: Callable[[Row], Cell]
    numeric: bool = True


def columns(game: Game) -> list[Column]:
    """Those of one table between its attacks and its links."""
    judge = game.recipes[0]
    return [
        *(_drop(recipe) for recipe in game.recipes),
        Column(
            f"above controls, {judge}",
            f"Whether it costs {judge} victims more than every control of its table, tested apart from"
            " the ranks. What does not is not shown to work, whatever its rank.",
            lambda row: Cell(row.works), numeric=False,
        ),
        Column(
            f"claimed → re-measured, {judge}",
            "The drop that the entry's author measured, and the one that a maintainer measured on hidden"
            " seeds, which decides its rank where there is one.",
            lambda row: _remeasured(row, judge),
        ),
        Column(
            "standing",
            "Whether the claim was measured again and held, and what was found against it.",
            lambda row: Cell("; ".join(standing(row, SHORT))), numeric=False,
        ),
        *(_transfer(recipe) for recipe in game.transfer),
        Column(
            f"best-epoch drop, {judge}",
            "The drop between the best epoch of the clean and of the poisoned victim, found on the test"
            " set.",
            lambda row: _interval(row.scores(judge).best_drop),
        ),
        Column("fraction", "Share of the training set that may be poisoned.", _fraction),
        Column(
            "game", "What the attacker may do: replace images or add some, labels and pixels.", _rules,
            numeric=False,
        ),
        Column("crafting, s", "Wall time of crafting on the hardware that the record names.", _seconds),
        Column(
            "crafting, trainings",
            "The same in trainings of one victim, as long as those of the record, or the median of the"
            " table's on such hardware where that is shorter.",
            _trainings,
        ),
        Column("date", "Of the measurement, in UTC.", lambda row: Cell(row.date), numeric=False),
    ]  # fmt: skip


def marks(row: Row) -> list[str]:
    """One word for each thing that was found against a row."""
    return [*(["flagged"] if row.flagged else []), *(["disputed"] if row.disputes else [])]


def standing(row: Row, longest: int | None = None) -> list[str]:
    """What became of a row's claim, a sentence each.

    Args:
        row: of a table.
        longest: characters of a dispute's reason.
    """
    said = [
        f"flagged: {name} victims lost {row.excess[name].mean:.2f} points less when measured again"
        f" ({CERTAIN:.0%} interval {row.excess[name].low:.2f} to {row.excess[name].high:.2f})".replace(
            "%", " %"
        )
        for name in row.flagged
    ]
    if not said:
        said.append("re-measured, and holds" if row.excess else "not re-measured")
    for dispute in row.disputes:
        reason = dispute.reason
        if longest is not None and len(reason) > longest:
            reason = reason[: longest - 1] + "…"
        said.append(f"disputed: {reason}")
    return said


def _drop(recipe: str) -> Column:
    return Column(
        f"drop, {recipe}",
        "Test accuracy lost to the poison, in percentage points: mean of paired differences over seeds,"
        " with Student's 95 % interval.",
        lambda row: _interval(row.scores(recipe).drop),
    )


def _transfer(recipe: str) -> Column:
    def cell(row: Row) -> Cell:
        return _interval(row.transfer[recipe].drop) if recipe in row.transfer else Cell(UNKNOWN)

    return Column(
        f"transfer, {recipe}", "Drop of victims that the attack was not crafted against.", cell
    )


def _interval(interval: Interval) -> Cell:
    # Rounded, to more digits than a mean of accuracies with six can end in: the last bits differ between
    # machines, and pages must not.
    return Cell(str(interval), round(interval.mean, 9) + 0.0)


def _remeasured(row: Row, judge: str) -> Cell:
    mine = row.verification.victim(judge) if row.verification else None
    if mine is None:
        return Cell(UNKNOWN)
    again = _interval(mine.drop)
    return Cell(f"{row.scores(judge).drop} → {again.text}", again.order)


def _fraction(row: Row) -> Cell:
    record = row.record
    share = f"{100 * record.budget.fraction:.4g} %"
    return Cell(f"{share} ({record.num_poison} of {record.num_train})", record.budget.fraction)


def _rules(row: Row) -> Cell:
    budget = row.record.budget
    return Cell(f"{budget.mode}, {budget.labels} labels, {budget.pixels}")


def _seconds(row: Row) -> Cell:
    seconds = row.record.crafting_seconds
    return Cell(UNKNOWN) if seconds is None else Cell(f"{seconds:,.0f}", seconds)


def _trainings(row: Row) -> Cell:
    return (
        Cell(UNKNOWN)
        if row.trainings is None
        else Cell(f"{row.trainings:,.0f}", round(row.trainings, 1))
    )
