"""Pictures of smoothness: gains against step size, the grid of recipes, landscapes.

The last two are those of the metagradient paper (https://arxiv.org/abs/2503.13751): smoothness
against accuracy over many recipes, and the loss over two perturbation directions. Drawn without a
display and without `pyplot`'s global state; the same record gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poisonbench.pictures import save
from poisonbench.smoothness.records import Landscape, SmoothnessRecord, Survey, array

PREDICTED, SAME, OTHER = "0.55", "#3b6ea5", "#c1432e"  # apart for the colour-blind too
MARKERS = "osD^vP*X<>ph"


def write(record: SmoothnessRecord, folder: Path) -> None:
    """Write `gains.png` and, where they were asked for, `grid.png` and `landscape.png`."""
    surveys = [survey for survey in record.recipes if survey.steps is not None]
    if surveys:
        figure = Figure(figsize=(4.2 * len(surveys), 3.6), layout="constrained")
        axes: Any = figure.subplots(1, len(surveys), squeeze=False, sharey=True)
        for one, survey in zip(axes[0], surveys, strict=True):
            _gains(one, survey)
        axes[0, 0].set_ylabel("gain in validation loss, nats")
        handles = {
            name: h for a in axes[0] for h, name in zip(*a.get_legend_handles_labels(), strict=True)
        }
        if handles:
            axes[0, 0].legend(handles.values(), handles, frameon=False, fontsize=8, loc="upper left")
        save(figure, folder / "gains.png")
    if record.grid:
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        _grid(figure.subplots(), record)
        save(figure, folder / "grid.png")
    if record.landscapes:
        count = len(record.landscapes)
        figure = Figure(figsize=(4.6 * count, 4), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False, subplot_kw={"projection": "3d"})
        for one, scape in zip(axes[0], record.landscapes, strict=True):
            _landscape(one, scape)
        save(figure, folder / "landscape.png")


def _gains(axes: Axes, survey: Survey) -> None:
    assert survey.steps is not None, "asked for"
    gains = survey.steps.gains
    series = (
        ("predicted", [g.promised for g in gains], PREDICTED, ":"),
        ("realised, same seed", [g.same_seed for g in gains], SAME, "--"),
        ("realised, other seeds", [g.other_seeds for g in gains], OTHER, "-"),
    )
    sizes = [g.step_size for g in gains]
    for name, intervals, color, style in series:
        known = [(s, i) for s, i in zip(sizes, intervals, strict=True) if i is not None]
        if known:
            x, y, error = (
                [s for s, _ in known],
                [i.mean for _, i in known],
                [interval.half for _, interval in known],
            )
            axes.errorbar(
                x, y, error, color=color, linestyle=style, marker="o", ms=3, capsize=2, label=name
            )
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)  # of a lone size no scale can be found
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=1e-3)  # predictions of rough recipes leave any linear scale
    axes.set_xlabel("size of the sign step, in pixel units")
    broken = f", {survey.steps.broken} metagradients not finite" if survey.steps.broken else ""
    axes.set_title(f"{survey.label}{broken}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _grid(axes: Axes, record: SmoothnessRecord) -> None:
    """Every recipe with its intervals: colour and marker say what is changed, text to what."""
    kinds = list(dict.fromkeys(_change(survey)[0] for survey in record.grid))
    missing, named = [], set()
    for survey in record.grid:
        if survey.smoothness is None:
            missing.append(survey.label)
            continue
        (kind, value), x, y = _change(survey), survey.smoothness, survey.mean_accuracy
        i = kinds.index(kind)
        color = f"C{i % 10}"
        axes.errorbar(
            x.mean, y.mean, y.half, x.half, color=color, marker=MARKERS[i % len(MARKERS)], ms=6,
            elinewidth=0.5, label=None if kind in named else kind, linestyle="none",
        )  # fmt: skip
        axes.annotate(
            value, (x.mean, y.mean), xytext=(4, 4), textcoords="offset points", fontsize=7, color=color
        )
        named.add(kind)
    axes.set_xlabel("metasmoothness, Definition 2 (right is smoother)")
    axes.set_ylabel("clean validation accuracy, %")
    title = f"One change at a time from '{record.base}' on {record.track}"
    axes.set_title(f"{title}; not finite: {', '.join(missing)}" if missing else title, fontsize=10)
    if named:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def _change(survey: Survey) -> tuple[str, str]:
    """What is changed and to what; a recipe with a name of its own is a kind of its own."""
    kind, equals, value = survey.label.partition("=")
    return kind, value if equals else ""


def _landscape(axes: Any, scape: Landscape) -> None:
    loss = array(scape.loss)
    first, second = np.meshgrid(scape.at, scape.at, indexing="ij")
    axes.set_title(scape.label, fontsize=10)
    axes.set_xlabel("along the first direction", fontsize=8)
    axes.set_ylabel("along the second", fontsize=8)
    axes.set_zlabel("validation loss", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.locator_params(nbins=4)
    axes.set_box_aspect(None, zoom=0.85)  # or the labels are cut off
    if np.isfinite(loss).sum() < 3:
        axes.text2D(0.5, 0.5, "not finite", transform=axes.transAxes, ha="center")
        return
    axes.plot_surface(first, second, loss, cmap="viridis", rstride=1, cstride=1, linewidth=0.2)
