"""What the choices in an attack are worth, as a picture: a drop for each change, recipe by recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poisonbench.pictures import save

if TYPE_CHECKING:
    from benchmarks.choices import Choices

PRESET, CHANGED = "#c1432e", "#3b6ea5"  # apart for the colour-blind too


def write(choices: Choices, path: Path) -> Path:
    """Write the figure: one panel for each recipe, one line for each change."""
    recipes = list(choices.clean)
    size = (4 + 3.4 * len(recipes), 1.2 + 0.26 * len(choices.rows))
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(1, len(recipes), sharey=True, squeeze=False)
    for axes, recipe in zip(panels[0], recipes, strict=True):
        _drops(axes, choices, recipe)
    title = f"{choices.track}, {choices.budget.labels} labels: mgd with one thing changed"
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def _drops(axes: Axes, choices: Choices, recipe: str) -> None:
    heights = range(len(choices.rows), 0, -1)
    for height, row in zip(heights, choices.rows, strict=True):
        drop = choices.drop(row, recipe)
        color = PRESET if row.group == choices.rows[0].group else CHANGED
        axes.errorbar(drop.mean, height, xerr=drop.half, fmt="o", color=color, markersize=4, lw=1)
    low, high = choices.chance(recipe)
    axes.axvspan(low, high, color=PRESET, alpha=0.12, linewidth=0)
    names = [f"{row.title}  ({row.crafting_seconds / 60:.0f} min)" for row in choices.rows]
    axes.set_yticks(list(heights), names, fontsize=8)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    clean = choices.clean[recipe]
    axes.set_title(f"{recipe} victims, {sum(clean) / len(clean):.1f} % where clean", fontsize=9)
    axes.set_xlabel("validation accuracy lost, points", fontsize=9)
