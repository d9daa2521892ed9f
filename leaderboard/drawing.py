"""How the figures across records are drawn, from their numbers alone; see `figures`."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .grids import UNDEFENDED

LINE = 90
"""Characters in a line of a legend, in a figure of one panel too."""
TICK = 35
"""Characters in a line of an attack's name below a column."""
SHARES = (-150, 150)
"""Percent won back that a figure shows; an arrow stands for what is below."""


def costs(numbers: dict[str, Any]) -> Figure:
    """Drop against the cost of crafting; and how climbing went, where anything climbed."""
    curves = numbers["curves"]
    looks = _looks(_names(numbers))
    figure = Figure(figsize=(11 if curves else 6, 4 + 0.17 * len(looks)), layout="constrained")
    panels: Any = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    figure.suptitle(numbers["title"], fontsize=10)
    labelled: set[str] = set()
    for point in numbers["points"]:
        color, marker = ("0.6", "o") if point["control"] else looks[point["name"]]
        label = "controls" if point["control"] else point["name"]
        panels[0].errorbar(
            point["trainings"], point["drop"], point["half"], fmt="none", ecolor=color, capsize=2
        )
        panels[0].plot(
            point["trainings"], point["drop"], linestyle="", color=color, marker=marker,
            label=None if label in labelled else textwrap.fill(label, LINE),
        )  # fmt: skip
        labelled.add(label)
    panels[0].set_xscale("symlog", linthresh=1)
    panels[0].set_xlim(left=-0.1)
    panels[0].set_ylabel(f"points lost, {numbers['victims']} victims")
    if curves:
        for curve in curves:
            color, marker = looks.get(curve["name"], ("0.6", "o"))
            panels[1].plot(*zip(*curve["points"], strict=True), color=color, marker=marker)
        panels[1].set_ylabel(f"{numbers['goal']},\nheld-out seeds")
    for axes in panels:
        _finish(axes, "crafting, in trainings of one victim", legend=False)
    # Below, and once for both panels: names can be longer than a panel is wide.
    figure.legend(frameon=False, fontsize=7, loc="outside lower center")
    return figure


def transfer(numbers: dict[str, Any]) -> Figure:
    """Drop of victims of every kind, attack by attack."""
    attacks = numbers["attacks"]
    figure = Figure(figsize=(9, 4 + 0.17 * len(attacks)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(numbers["title"], fontsize=10)
    looks = _looks([attack["name"] for attack in attacks])
    # Side by side, so that intervals do not hide each other.
    aside = np.linspace(-1, 1, len(attacks)) * min(0.35, 0.07 * (len(attacks) - 1))
    for attack, shift in zip(attacks, aside, strict=True):
        color, marker = looks[attack["name"]]
        y, half = ([drop[name] for drop in attack["drops"]] for name in ("drop", "half"))
        axes.errorbar(
            np.arange(len(y)) + shift, y, half,
            linestyle="", color=color, marker=marker, markersize=4, capsize=2,
            label=textwrap.fill(attack["name"], LINE),
        )  # fmt: skip
    axes.set_xticks(range(len(numbers["kinds"])), numbers["kinds"])
    axes.axvline(numbers["own"] - 0.5, color="0.8", linestyle="--", linewidth=1, zorder=0)
    axes.set_ylabel("points lost")
    _finish(axes, "victims; right of the line, those of transfer", legend=False)
    figure.legend(frameon=False, fontsize=7, loc="outside lower center")
    return figure


def fractions(numbers: dict[str, Any]) -> Figure:
    """Drop against the share of the training set that is poisoned."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(numbers["title"], fontsize=10)
    looks = _looks([line["name"] for line in numbers["lines"]])
    for line in numbers["lines"]:
        color, marker = looks[line["name"]]
        x = [100 * point["fraction"] for point in line["points"]]
        y, half = ([point[name] for point in line["points"]] for name in ("drop", "half"))
        axes.errorbar(x, y, half, color=color, marker=marker, label=line["name"], capsize=2)
    shares = sorted({100 * point["fraction"] for line in numbers["lines"] for point in line["points"]})
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.set_ylabel(f"points lost, {numbers['victims']} victims")
    _finish(axes, "share of the training set poisoned, %")
    return figure


def defenses(numbers: dict[str, Any]) -> Figure:
    """What defences win back of each attack; and the share of all that against their price."""
    attacks, defenses = numbers["attacks"], numbers["defenses"]
    figure = Figure(figsize=(14, 1.8 + 0.32 * max(10, len(defenses))), layout="constrained")
    figure.suptitle(
        f"{numbers['title']}: what defences win back, {numbers['victims']} victims", fontsize=10
    )
    left, right = figure.subplots(1, 2)
    points = np.array(numbers["won"], float).T  # None is NaN, and blank
    # One that ruins its victims would leave all others one colour.
    most = max(0.1, float(np.nanpercentile(np.abs(points), 90)))
    shown = left.imshow(points, cmap="RdYlGn", vmin=-most, vmax=most, aspect="auto")
    ticks = [textwrap.fill(attack, TICK) for attack in attacks]
    left.set_xticks(range(len(attacks)), ticks, rotation=30, ha="right", fontsize=8)
    left.set_yticks(range(len(defenses)), defenses, fontsize=8)
    for (i, j), value in np.ndenumerate(points):
        text = "" if np.isnan(value) else f"{round(value, 1) + 0:.1f}"
        color = "white" if abs(value) > 0.8 * most else "black"
        left.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(
        shown, ax=left, label="points of accuracy over no defence", shrink=0.6, extend="both"
    )
    prices, shares = (dict(zip(defenses, numbers[which], strict=True)) for which in ("price", "share"))
    for i, name in enumerate(defenses):
        if (won := shares[name]) is None:
            continue
        hue, percent = colormaps["tab20"](i % 20), 100 * won[0]
        if SHARES[0] <= percent <= SHARES[1]:
            right.errorbar(
                prices[name][0], percent, xerr=_arms(prices[name]), yerr=100 * _arms(won),
                fmt="osD^v"[i % 5], elinewidth=0.8, color=hue, label=name,
            )  # fmt: skip
        else:  # it would squeeze all others
            low = percent < SHARES[0]
            right.plot(
                prices[name][0], SHARES[0] + 12 if low else SHARES[1] - 12, linestyle="", markersize=12,
                marker=r"$\downarrow$" if low else r"$\uparrow$", color=hue,
                label=f"{name}: {percent:.0f} %",
            )  # fmt: skip
    right.plot(0, 0, "x", color="black", label=UNDEFENDED)
    right.plot(
        [0.0 if name == UNDEFENDED else prices[name][0] for name in numbers["front"]],
        [0.0 if name == UNDEFENDED else 100 * shares[name][0] for name in numbers["front"]],
        "--", color="0.5", linewidth=1, zorder=0,
        label="Pareto front" if len(numbers["front"]) > 1 else None,
    )  # fmt: skip
    right.set_ylim(max(right.get_ylim()[0], SHARES[0]), min(right.get_ylim()[1], SHARES[1]))
    right.set_ylabel("won back of all that was lost, %")
    _finish(right, "price: points of accuracy lost where there is no poison", beside=True)
    right.axvline(0, color="0.8", linewidth=1, zorder=0)
    return figure


def _looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each."""
    return {name: (f"C{i % 10}", "osD^v"[i // 10 % 5]) for i, name in enumerate(names)}


def _names(numbers: dict[str, Any]) -> list[str]:
    """Attacks, in order of rank."""
    return [point["name"] for point in numbers["points"] if not point["control"]]


def _arms(ends: list[float]) -> np.ndarray:
    """Mean, low and high as the lengths of an error bar's arms."""
    mean, low, high = ends
    return np.array([[mean - low], [high - mean]])


def _finish(axes: Axes, x: str, *, beside: bool = False, legend: bool = True) -> None:
    axes.set_xlabel(x)
    if axes.get_ylim()[0] <= 0:
        axes.axhline(0, color="0.8", linewidth=1, zorder=0)
    if legend and axes.get_legend_handles_labels()[0]:
        where: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}
        axes.legend(frameon=False, fontsize=7, **where)
    axes.spines[["top", "right"]].set_visible(False)
