"""Pictures across records: drop against the cost of crafting, how crafting went, drop against fraction,
and on victims of other kinds.

A picture's bytes depend on the library that draws it, so what is compared with the records is not the
pixels: each file carries a digest of the numbers in it and of the code that draws them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from poisonbench.errors import UserError
from poisonbench.pictures import save
from poisonbench.statistics import Interval
from poisonbench.submission import manifest

from . import drawing
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
        drawn = canonical(self.numbers) + Path(drawing.__file__).read_text("utf-8")
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
            found[of_game(game)] = Picture(numbers, drawing.costs)
        if game.frozen and (numbers := _transfer(game)):
            found[of_transfer(game)] = Picture(numbers, drawing.transfer)
    for defended in several:
        if len(defended.defenses) == 1:
            continue  # there is nothing to compare
        found[of_defenses(defended)] = Picture(_defense_numbers(defended), drawing.defenses)
    for slug, numbers in _fractions(games).items():
        found[Path(FOLDER, f"{slug}.png")] = Picture(numbers, drawing.fractions)
    return found


def of_game(game: Game) -> Path:
    """Where the figure of a table lies, relative to the results."""
    return Path(FOLDER, f"{game.slug}.png")


def of_transfer(game: Game) -> Path:
    """Where the figure of a table's transfer victims lies, relative to the results."""
    return Path(FOLDER, f"{game.slug}-transfer.png")


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
    return _rounded(row.scores(recipe).drop)


def _rounded(drop: Interval) -> dict[str, float]:
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


def _transfer(game: Game) -> dict[str, Any] | None:
    """Drop of victims of every kind, by the first row of each attack; None for fewer than two."""
    # What was handed in may be called like an attack of ours, and is another.
    first: dict[tuple[str, bool], Row] = {}
    for row in game.ranked:
        if row.transfer and row.control != "none":
            first.setdefault((row.record.attack, manifest.FILE in row.beside), row)
    if len(first) < 2:
        return None

    def drops(row: Row) -> list[dict[str, float]]:
        others = [_rounded(row.transfer[name].drop) for name in game.transfer]
        return [*(_drop(row, name) for name in game.recipes), *others]

    return {
        "title": game.title, "kinds": [*game.recipes, *game.transfer], "own": len(game.recipes),
        "attacks": [{"name": row.name, "drops": drops(row)} for row in list(first.values())[:MOST]],
    }  # fmt: skip


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
