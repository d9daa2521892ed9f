"""A run's result on standard output: one table, and what was written where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poisonbench.records import Record, VictimScores


def show(record: Record, folder: Path) -> None:
    """Print the record's table and the paths of its files."""
    console = Console(highlight=False)
    what = f"{record.num_poison} of {record.num_train} training images"
    who = record.attack if record.defense == "none" else f"{record.attack} under {record.defense}"
    show_victims(record.victims, f"{who} on {record.track}: {what}; {record.budget.game()}")
    if record.defense != "none":
        for victim in record.victims:
            if told := _defended(victim, record.num_poison):
                console.print(f"{victim.recipe_name}: {told}", soft_wrap=True)
        console.print(
            "What it costs and wins back is told beside the run without a defence, by the leaderboard: 5"
            " seeds or more",
            soft_wrap=True,
        )
    if record.custom:
        console.print(f"custom, not ranked with the track: {escape(', '.join(record.custom))}")
    for path in sorted(folder.glob("*")):
        if path.is_file() and "checkpoint" not in path.name:
            console.print(escape(str(path)), soft_wrap=True)


def _defended(victim: VictimScores, poison: int) -> str:
    """What a filter dropped of the poisoned set, and what was certified."""
    told = []
    if (filtering := victim.filtering) is not None:
        dropped, found = (np.mean(each) for each in (filtering.poisoned_run, filtering.poison))
        told.append(f"{dropped:.1f} images dropped, among them {found:.1f} of {poison} poisoned ones")
    if (given := victim.certificate) is not None:
        told.append(
            f"{given.curve[0]:.1f} % right without an attack, {given.promised:.1f} % certified against"
            f" this poison's {given.changes} additions and removals"
        )
    return "; ".join(told)


def show_victims(victims: Sequence[VictimScores], title: str) -> None:
    """Print what victims scored, recipe by recipe."""
    count = len(victims[0].seeds)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(title),
        caption=f"Means over {count} paired seeds with 95 % intervals; accuracy in %, drops in points.",
    )
    table.add_column("victim", no_wrap=True)
    for column in ("clean", "poisoned", "drop", "best-epoch drop"):
        table.add_column(column, justify="right", no_wrap=True)
    for victim in victims:
        table.add_row(
            victim.recipe_name, str(victim.clean_accuracy), str(victim.poisoned_accuracy),
            str(victim.drop), str(victim.best_drop),
        )  # fmt: skip
    Console(highlight=False).print(table)
