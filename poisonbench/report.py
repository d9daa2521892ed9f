"""A run's result on standard output: one table, and what was written where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poisonbench.records import Record, VictimScores


def show(record: Record, folder: Path) -> None:
    """Print the record's table and the paths of its files."""
    console = Console(highlight=False)
    what = f"{record.num_poison} of {record.num_train} training images"
    show_victims(record.victims, f"{record.attack} on {record.track}: {what}; {record.budget.game()}")
    if record.custom:
        console.print(f"custom, not ranked with the track: {escape(', '.join(record.custom))}")
    for path in sorted(folder.glob("*")):
        if path.is_file() and "checkpoint" not in path.name:
            console.print(escape(str(path)), soft_wrap=True)


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
