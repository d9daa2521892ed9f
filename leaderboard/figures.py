"""Pictures across records: drop against the cost of crafting, how crafting went, drop against fraction.

A picture's bytes depend on the library that draws it, so what is compared with the records is not the
pixels: each file carries a digest of the numbers in it and of the code that draws them.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from poisonbench.errors import UserError
from poisonbench.pictures import save

from .games import Game, Row, by_fraction, lines
from .grids import UNDEFENDED, Cell, DefenseTable
from .names import canonical

FOLDER = "figures"
DIGEST = "Description"
"""Of the text fields that a PNG may have."""
ENOUGH = 3
"""Checks on held-out seeds that make a curve."""
MOST = 24
"""Attacks, controls or defences that one figure can show apart: the first; the table has all."""
LINE = 90
"""Characters in a line of a legend, in a figure of one panel too."""
TICK = 35
"""Characters in a line of an attack's name below a column."""
SHARES = (-150, 150)
"""Percent won back that a figure shows; an arrow stands for what is below."""


@dataclass(frozen=True)
class Picture:
    """What a figure shows, and how it is drawn.

    Attributes:
        numbers: everything that is plotted, JSON-ready.
        draw: makes the figure of them.
    """

    numbers: dict[str, Any]
    draw: Callable[[dict[str, Any]], Figure]

    @property
    def digest(self) -> str:
        """Hash of the numbers and of how they are drawn, which the file carries."""
        drawn = canonical(self.numbers) + Path(__file__).read_text("utf-8")
        return hashlib.sha256(drawn.encode()).hexdigest()

    def is_in(self, path: Path) -> bool:
        """Whether the file shows these numbers, drawn as they would be now."""
        try:
            with Image.open(path) as image:
                return image.info.get(DIGEST) == self.digest
        except OSError:
            return False

    def save(self, path: Path) -> None:
        """Draw it to a file."""
        save(self.draw(self.numbers), path, **{DIGEST: self.digest})


def pictures(
    games: list[Game], results: Path, several: Sequence[DefenseTable] = ()
) -> dict[Path, Picture]:
    """All figures of these tables and their defences, by path relative to the results."""
    found: dict[Path, Picture] = {}
    for game in games:
        if game.frozen and (numbers := _costs(game, results)):
            found[of_game(game)] = Picture(numbers, _draw_costs)
    for defended in several:
        if len(defended.defenses) == 1:
            continue  # there is nothing to compare
        found[of_defenses(defended)] = Picture(_defense_numbers(defended), _draw_defenses)
    for slug, numbers in _fractions(games).items():
        found[Path(FOLDER, f"{slug}.png")] = Picture(numbers, _draw_fractions)
    return found


def of_game(game: Game) -> Path:
    """Where the figure of a table lies, relative to the results."""
    return Path(FOLDER, f"{game.slug}.png")


def of_defenses(defended: DefenseTable) -> Path:
    """Where the figure of a table's defences lies, relative to the results."""
    return Path(FOLDER, f"{defended.game.slug}-defences.png")


def _costs(game: Game, results: Path) -> dict[str, Any] | None:
    """Drop against cost, attack by attack; None where fewer than two attacks have a cost."""
    rows = [row for row in game.ranked if row.trainings is not None]
    if len({row.record.attack for row in rows if row.trainings}) < 2:
        return None
    attacks = [row for row in rows if row.control is None][:MOST]
    controls = [row for row in rows if row.control is not None][:MOST]
    shown = {row.folder for row in attacks + controls}
    rows = [row for row in rows if row.folder in shown]
    judge = game.recipes[0]
    points = [
        {
            "name": row.name,
            "control": row.control is not None,
            "trainings": round(row.trainings or 0, 1),
            **_drop(row, judge),
        }
        for row in rows
    ]
    climbs: dict[str, list[tuple[Row, list[list[float]]]]] = {}
    for row in rows:
        if curve := _curve(row, results):
            climbs.setdefault(_goal(row), []).append((row, curve))

    def compared(goal: str) -> tuple[int, int]:
        return len({row.record.attack for row, _ in climbs[goal]}), len(climbs[goal])

    # Values of two goals do not compare: the one that most attacks climbed, or the best of the table.
    goal = max(climbs, key=compared, default="")
    curves = [{"name": row.name, "points": curve} for row, curve in climbs.get(goal, [])]
    return {
        "title": game.title, "victims": judge, "points": points, "goal": goal, "curves": curves,
    }  # fmt: skip


def _drop(row: Row, recipe: str) -> dict[str, float]:
    drop = row.scores(recipe).drop
    return {"drop": round(drop.mean, 4), "half": round(drop.half, 4)}


def _goal(row: Row) -> str:
    """What a row's attack climbed, in words."""
    config = row.record.attack_config
    goals = {"error": "expected validation error", "margin": "validation margin"}
    loss = goals.get(config.get("goal", ""), "validation loss")
    if config.get("judged_on") == "all":
        loss = loss.replace("validation", "clean-image")
    temperature = config.get("temperature", 1)
    return loss if temperature == 1 else f"{loss} at temperature {temperature:g}"


def _curve(row: Row, results: Path) -> list[list[float]] | None:
    """Held-out loss against trainings spent, of an ascent: a log that begins with its start.

    As if all metasteps had cost the same, and the start nothing.

    Raises:
        UserError: the log beside the record cannot be read.
    """
    path = results / row.folder / "crafting.csv"
    if not path.is_file() or not row.trainings:
        return None
    try:
        log = pd.read_csv(path)
        if not {"metastep", "held_out_loss"} <= set(log.columns):
            return None
        checked = log.dropna(subset=["held_out_loss"]).astype(float)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if len(checked) < ENOUGH or checked["metastep"].iloc[0] != 0:
        return None
    last = max(1.0, float(log["metastep"].max()))
    return [
        [round(row.trainings * step / last, 1), round(float(loss), 5)]
        for step, loss in zip(checked["metastep"], checked["held_out_loss"], strict=True)
    ]


def _fractions(games: list[Game]) -> dict[str, dict[str, Any]]:
    """Drop against fraction, for tables that differ in nothing else; by the name of the figure."""
    found: dict[str, dict[str, Any]] = {}
    for group in by_fraction(game for game in games if game.frozen):
        judge = group[0].recipes[0]
        drawn = [
            {
                "name": name,
                "points": [{"fraction": fraction, **_drop(row, judge)} for fraction, row in line],
            }
            for name, line in lines(group)[:MOST]
        ]
        if drawn:
            title = group[0].title.rpartition(",")[0]
            slug = re.sub(r"-[0-9.]+(e-[0-9]+)?-of-the-set.*", "-by-fraction", group[0].slug)
            found[slug] = {"title": title, "victims": judge, "track": group[0].track, "lines": drawn}
    return found


def _draw_costs(numbers: dict[str, Any]) -> Figure:
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


def _looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each."""
    return {name: (f"C{i % 10}", "osD^v"[i // 10 % 5]) for i, name in enumerate(names)}


def _names(numbers: dict[str, Any]) -> list[str]:
    """Attacks, in order of rank."""
    return [point["name"] for point in numbers["points"] if not point["control"]]


def _draw_fractions(numbers: dict[str, Any]) -> Figure:
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


def _defense_numbers(defended: DefenseTable) -> dict[str, Any]:
    """Points won back by attack and defence; price of each defence, and the share that it wins back."""
    attacks, defenses = defended.attacks[:MOST], defended.defenses[:MOST]
    shares = [defended.won_back(defense) for defense in defenses]
    return {
        "title": defended.game.title, "victims": defended.judge,
        "attacks": attacks, "defenses": defenses,
        "won": [[_won(defended.cells.get((attack, d))) for d in defenses] for attack in attacks],
        "price": [[round(x, 4) for x in (p.mean, p.low, p.high)] for p in map(defended.price, defenses)],
        "share": [None if s is None else [round(x, 4) for x in (s.mean, s.low, s.high)] for s in shares],
        "front": [name for name in defended.front if name in (*defenses, UNDEFENDED)],
    }  # fmt: skip


def _won(cell: Cell | None) -> float | None:
    return None if cell is None else round(float(np.mean(cell.won)), 4)


def _draw_defenses(numbers: dict[str, Any]) -> Figure:
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
