"""A record of smoothness on standard output: one table, recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poisonbench.smoothness.records import SmoothnessRecord, Survey, unfinite
from poisonbench.statistics import Interval


def show(record: SmoothnessRecord, folder: Path) -> None:
    """Print the table, what it is of, and the paths of the files."""
    console = Console(highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"smoothness on {record.track}: {record.num_moved} of {record.num_train} training images"
        f" move, {record.budget.pixels}",
    )
    table.add_column("", no_wrap=True)
    for survey in record.recipes:
        table.add_column(escape(survey.label), justify="right", no_wrap=True)
    for name, cells in rows(record.recipes):
        table.add_row(escape(name), *cells)
    console.print(table)
    for line in stated(record):
        console.print(escape(line), soft_wrap=True)
    if record.custom:
        console.print(f"custom: {escape(', '.join(record.custom))}", soft_wrap=True)
    for path in sorted(folder.glob("*")):
        if path.is_file():
            console.print(escape(str(path)), soft_wrap=True)


def rows(surveys: Sequence[Survey]) -> list[tuple[str, list[str]]]:
    """What is said of every recipe: the name of a quantity, and its text for each of them."""
    asked = [survey.steps for survey in surveys if survey.steps is not None]
    table = [
        ("clean accuracy, %", [_text(s.mean_accuracy, s.accuracy) for s in surveys]),
        ("Definition 1, lower is smoother", [_text(s.curvature, s.definition1) for s in surveys]),
        ("Definition 2, at most 1", [_text(s.smoothness, s.definition2) for s in surveys]),
        ("cosine between seeds", [_text(s.agreement, [s.norms]) for s in asked]),
    ]
    for i, first in enumerate(asked[0].gains if asked else []):
        gains, size = [steps.gains[i] for steps in asked], f"step of {first.step_size:g}"
        table += [
            (f"{size}: predicted", [_text(g.promised, g.predicted) for g in gains]),
            ("  gain on the same seed", [_text(g.same_seed, g.realised) for g in gains]),
            ("  gain on other seeds", [_text(g.other_seeds, g.realised) for g in gains]),
        ]
    largest = ["none" if s.largest is None else f"{s.largest:g}" for s in asked]
    return [*table, ("largest step that gains", largest)]


def stated(record: SmoothnessRecord) -> list[str]:
    """What the numbers are of, in sentences."""
    probe, moved = record.probe, record.num_moved
    return [
        f"Means with 95 % intervals over {probe.seeds} seeds and, for the definitions,"
        f" {probe.directions} directions; gains in nats of validation loss; never the test split.",
        f"Directions: random signs on all pixels of {moved} random training images, h = {probe.h:g} of"
        f" the pixel range. Cosine and steps: {_images(record)}; a step adds the metagradient's sign and"
        " is clipped to the pixels that the budget allows.",
        "A step size gains if the whole interval of its gain on other seeds lies above 0; the largest"
        f" of {', '.join(f'{size:g}' for size in probe.step_sizes)} is shown.",
        *_advice(record),
    ]


def _images(record: SmoothnessRecord) -> str:
    """Which images the metagradients are of, and for which recipes that was not as asked."""
    moved, seeds = record.num_moved, record.probe.seeds
    if record.probe.images == "random":
        return f"{moved} random images"
    ranked = f"the {moved} most influential images of each recipe, by {seeds} other seeds"
    fewer = [
        f"{survey.label} {survey.steps.ranked_by}" if survey.steps.ranked_by else f"{survey.label} none"
        for survey in record.recipes
        if survey.steps is not None and survey.steps.ranked_by < seeds
    ]
    if not fewer:
        return ranked
    return f"{ranked} (finite: {', '.join(fewer)}; random images where none is)"


def _advice(record: SmoothnessRecord) -> list[str]:
    base = next((s for s in record.recipes if s.label == record.base), None)
    if base is None or base.steps is None:
        return []
    if base.steps.best is None:
        return [
            f"No step gains on other seeds of {base.label}: metagradients of this recipe will hardly"
            " carry over; try more width, a larger batch, or a lower learning_rate or final_scale."
        ]
    start = "pixels" if base.steps.ranked_by else "random"
    command = f"poisonbench run --attack mgd --start {start} --step-size {base.steps.best:g} …"
    return [f"To climb from images chosen as these were, by the step that gains most: {command}"]


def _text(interval: Interval | None, values: Sequence[Any]) -> str:
    """A mean and half its interval, to the digits that the interval leaves."""
    if interval is None:
        return unfinite(values)
    half = interval.half
    if half == 0:
        return f"{interval.mean:.3g} ± 0"
    places = 1 - floor(log10(half))
    if -4 < places <= 6:
        return f"{round(interval.mean, places) + 0:.{max(0, places)}f} ± {half:.{max(0, places)}f}"
    return f"{interval.mean:.2e} ± {half:.1e}"
