"""Pictures of a run: what the poison looks like, how it was climbed to, and what it did.

Drawn without a display and without `pyplot`'s global state; the same data gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from poisonbench._files import replacing
from poisonbench.data import Dataset
from poisonbench.journal import LogRow
from poisonbench.records import Record
from poisonbench.threat import PoisonSet

SHOWN = 8
CLEAN, POISONED = "#3b6ea5", "#c1432e"  # apart for the colour-blind too


def write(record: Record, poison: PoisonSet, log: list[LogRow], dataset: Dataset, folder: Path) -> None:
    """Write `poisons.png`, `accuracy.png`, `summary.png` and, where there is a log, `crafting.png`."""
    accuracy = Figure(figsize=(5.5, 3.2), layout="constrained")
    _accuracy(accuracy.subplots(), record)
    save(accuracy, folder / "accuracy.png")
    if _curve(log):
        crafting = Figure(figsize=(5.5, 3.2), layout="constrained")
        _crafting(crafting.subplots(), log)
        save(crafting, folder / "crafting.png")
    if len(poison):
        poisons = Figure(figsize=(SHOWN * 1.1, 4.1), layout="constrained")
        _poisons(poisons, poison, dataset)
        save(poisons, folder / "poisons.png")
        summary = Figure(figsize=(13, 4.1), layout="constrained")
        left, right = np.asarray(summary.subfigures(1, 2, width_ratios=[2, 1]))
        _poisons(left, poison, dataset)
        _accuracy(right.subplots(), record)
        save(summary, folder / "summary.png")


def _poisons(figure: Figure | SubFigure, poison: PoisonSet, dataset: Dataset) -> None:
    """Rows: before, after, difference; one column for each of the first poisons."""
    count = min(SHOWN, len(poison))
    axes: Any = figure.subplots(3, count, squeeze=False)
    before = dataset.train_images[poison.indices[:count]].astype(int)
    after = poison.images[:count].astype(int)
    names = dataset.class_names
    figure.suptitle(f"The first {count} of {len(poison)} poisoned training images")
    for j in range(count):
        old = names[int(dataset.train_labels[poison.indices[j]])]
        new = names[int(poison.labels[j])]
        axes[0, j].set_title(old, fontsize=9)
        axes[1, j].set_title(new, fontsize=9, color="black" if old == new else POISONED)
        _image(axes[0, j], before[j])
        _image(axes[1, j], after[j])
        _image(axes[2, j], (after[j] - before[j]) // 2 + 128)
    for i, row in enumerate(("before", "after", "difference")):
        axes[i, 0].set_ylabel(row)


def _image(axes: Axes, pixels: np.ndarray) -> None:
    shown = pixels[..., 0] if pixels.shape[-1] == 1 else np.clip(pixels, 0, 255)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _accuracy(axes: Axes, record: Record) -> None:
    """Every seed as a pair of dots, joined."""
    victims = record.victims
    for i, victim in enumerate(victims):
        for clean, poisoned in zip(victim.clean, victim.poisoned, strict=True):
            axes.plot([i - 0.15, i + 0.15], [clean, poisoned], color="0.8", linewidth=1, zorder=1)
        for x, scores, color, label in (
            (i - 0.15, victim.clean, CLEAN, "clean"),
            (i + 0.15, victim.poisoned, POISONED, "poisoned"),
        ):
            axes.scatter(
                [x] * len(scores), scores, color=color, s=18, label=None if i else label, zorder=2
            )
    axes.set_xticks(
        range(len(victims)), [f"{v.recipe_name}\n−{v.drop} points".replace("−-", "+") for v in victims]
    )
    axes.set_xlim(-0.5, len(victims) - 0.5)
    axes.set_ylabel("test accuracy, %")
    under = "" if record.defense == "none" else f" under {record.defense}"
    axes.set_title(f"{len(victims[0].seeds)} pairs of victims{under}")
    axes.legend(frameon=False, loc="best")
    axes.spines[["top", "right"]].set_visible(False)


def _curve(log: list[LogRow]) -> list[str]:
    return [name for name in ("loss", "held_out_loss") if any(name in row for row in log)]


def _crafting(axes: Axes, log: list[LogRow]) -> None:
    labels = {"loss": "seeds of the metastep", "held_out_loss": "held-out seeds"}
    for name, marker, color in (("loss", "", "0.6"), ("held_out_loss", "o", POISONED)):
        points = [(row.get("metastep", i), row[name]) for i, row in enumerate(log) if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=labels[name])
    axes.set_xlabel("metastep")
    axes.set_ylabel("validation loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, **metadata: str) -> Path:
    """Write a figure as PNG, with this metadata and no other: the same figure gives the same bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None, **metadata})
    return path
