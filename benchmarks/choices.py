"""What each choice in `mgd` is worth, one change at a time: `python -m benchmarks.choices`.

Each row is the track's preset of `mgd` with one thing changed. Its poison is crafted as ever; then
victims of every recipe train on it and are scored on *validation* images, with seeds of their own: what
is chosen by this table has seen neither the test split nor an evaluation seed. The attack has climbed on
those images, so its drops compare with each other and not with those of the leaderboard.

*What chance does.* The intervals are over victims alone; another crafting seed gives another poison. The
preset is crafted with several seeds, which say where one more of its poisons would be found with 95 %
confidence: the band, wide as it is where they are few. What lies in it is not told from chance, and of
twenty changes that are worth nothing one leaves it.

*Cost.* A change may make crafting dearer or cheaper; seconds are shown beside the drop. Where more runs
are averaged in a metastep, as many fewer metasteps are taken.

A benchmark that was killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import typer
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import choice_pictures
from poisonbench import attacks, harness, runs, setting
from poisonbench._files import require_writable
from poisonbench._options import command as recorded_command
from poisonbench.data import DataSpec
from poisonbench.errors import UserError, plain
from poisonbench.setting import Setting
from poisonbench.statistics import Interval, paired_drop, quantile
from poisonbench.stored import Config, Count, Frozen, Measured, Name, provenance
from poisonbench.threat import Budget

OUT = Path("benchmarks", "results", "choices")
SEEDS_FROM = 1000
"""The first seed of the victims that choose: far from those that evaluate, which count from 0."""
PRESET = "preset"


@dataclass(frozen=True)
class Change:
    """One thing that is done otherwise.

    Attributes:
        group: what kind of choice it is.
        options: hyperparameters of `mgd`, as typed.
        widths: by how much the surrogate is wider than the victims.
        seed: of the attack.
    """

    group: str
    options: Mapping[str, str] = field(default_factory=dict)
    widths: int = 1
    seed: int = 0

    @property
    def title(self) -> str:
        """What is changed, in the words of the command line."""
        changed = [f"{name}={value}" for name, value in self.options.items()]
        changed += [f"seed={self.seed}"] * (self.seed != 0)
        changed += [f"surrogate {self.widths} times as wide"] * (self.widths != 1)
        return ", ".join(changed) or PRESET

    def attack(self, preset: Mapping[str, str]) -> attacks.Attack:
        """The attack, with these options on top of a track's."""
        return attacks.build("mgd", list({**preset, **self.options}.items()))


def changes(preset: Any) -> list[Change]:
    """The preset first, again with other seeds, and then what is tried of a preset of `mgd`."""
    other = "cross_entropy" if preset.goal == "error" else "error"
    starts = ("influence", "pixels", "flips", "pair", "random")
    tried: dict[str, list[dict[str, str]]] = {
        "start": [{"start": start} for start in starts if start != preset.start],
        "goal": [
            {"goal": other},
            {"goal": "margin"},
            {"temperature": _number(0.5 if preset.temperature == 1 else 1)},
            {"goal": other, "temperature": _number(0.5 if preset.temperature == 1 else 1)},
        ],
        "update": [
            {"update": "sign"},
            {"update": "sign", "step-size": _number(preset.step_size / 4)},
            {"momentum": "0"},
            {"momentum": "0.95"},
        ],
        "step": [
            {"step-size": _number(preset.step_size / 3)},
            {"step-size": _number(preset.step_size * 3)},
            {"last-step": "1"},
            {"last-step": "0"},
            {"restarts": "2"},
        ],
        "runs": [
            {"runs-per-step": f"{k}", "steps": f"{max(1, round(preset.steps / k))}"} for k in (2, 4)
        ],
        "truncated": [
            *({"differentiated": f"{share:g}"} for share in (0.5, 0.25)),
            *({"differentiated": f"{share:g}", "full-from": "0.5"} for share in (0.5, 0.25)),
        ],
        # Another of ten classes gains 4.4 on the label by the least of these only if all metasteps
        # agree: falling steps add up to half of `steps` full ones, up for it and down for the label.
        "labels": [{"label-step": _number(4.5 * k / max(1, preset.steps))} for k in (1, 3, 10)],
        "length": [
            {"steps": "0"},
            {"steps": f"{preset.steps // 2}"},
            {"steps": f"{2 * preset.steps}"},
        ],
    }
    return [
        *(Change(PRESET, seed=seed) for seed in range(3)),
        *(Change(group, options) for group, several in tried.items() for options in several),
        Change("surrogate", widths=2),
    ]


class Row(Frozen):
    """One change, measured.

    Attributes:
        group, title: see `Change`.
        config: all hyperparameters of the attack.
        crafting_seconds: wall time.
        poisoned: accuracies in percent, by recipe, seed by seed.
    """

    group: Name
    title: Annotated[str, Field(max_length=200)]
    config: Config
    crafting_seconds: float = Field(ge=0)
    poisoned: dict[Name, list[float]]


class Choices(Measured):
    """What the choices in `mgd` are worth on one track.

    Attributes:
        track: whose data, victims and preset these are.
        dataset: data, sizes and split.
        budget: the game.
        num_poison: images that may be poisoned.
        seeds: of the victims.
        clean: accuracies of clean victims in percent, by recipe, seed by seed.
        rows: the preset first, with its several crafting seeds.
    """

    kind: ClassVar[str] = "file of choices"
    schema_version: Literal[1] = 1
    track: Name
    dataset: DataSpec
    budget: Budget
    num_poison: Count
    seeds: list[int]
    clean: dict[Name, list[float]]
    rows: list[Row] = Field(min_length=1)

    def drop(self, row: Row, recipe: str) -> Interval:
        """Accuracy lost to a row's poison, in points."""
        return paired_drop(self.clean[recipe], row.poisoned[recipe])

    def gain(self, row: Row, recipe: str) -> float:
        """By how much that exceeds the mean over the preset's poisons, in points."""
        return self.drop(row, recipe).mean - float(np.mean(self._preset(recipe)))

    def chance(self, recipe: str) -> tuple[float, float]:
        """Where the drop of one more of the preset's poisons would lie, with 95 % confidence."""
        drops = self._preset(recipe)
        half = quantile(len(drops) - 1) * float(np.std(drops, ddof=1)) * (1 + 1 / len(drops)) ** 0.5
        return float(np.mean(drops)) - half, float(np.mean(drops)) + half

    def told(self, row: Row, recipe: str) -> bool:
        """Whether its drop lies outside of that."""
        low, high = self.chance(recipe)
        return not low <= self.drop(row, recipe).mean <= high

    def _preset(self, recipe: str) -> list[float]:
        return [self.drop(row, recipe).mean for row in self.rows if row.group == PRESET]


def measure(game: Setting, several: Sequence[Change], out: Path, command: str) -> Choices:
    """Craft and judge them all.

    Args:
        game: track, data and budget; its seeds are how many victims judge a poison.
        several: the preset first.
        out: where crafted poisons and finished victims are kept.
        command: what was typed.

    Raises:
        UserError: an attack does not suit the budget, or the poison breaks it.
    """
    dataset = runs.load_data(game)
    judged = replace(dataset, test_images=dataset.val_images, test_labels=dataset.val_labels)
    seeds = [SEEDS_FROM + seed for seed in game.seeds]
    preset = game.track.options("mgd", game.budget.labels)
    clean: dict[str, list[float]] = {}
    rows: list[Row] = []
    for i, change in enumerate(several):
        print(f"{i + 1} of {len(several)}: {change.title}", file=sys.stderr)
        attack = change.attack(preset)
        request = runs.Request(_wider(game, change.widths), "mgd", attack, change.seed, command)
        crafted = runs.craft(request, out)
        victims = harness.evaluate(
            judged, crafted.poison, game.recipes, seeds, out / game.track.name / "victims"
        ).victims
        clean = {v.recipe_name: v.clean for v in victims}
        rows.append(
            Row(
                group=change.group, title=change.title, config=attacks.config(attack),
                crafting_seconds=round(crafted.seconds, 1),
                poisoned={v.recipe_name: v.poisoned for v in victims},
            )
        )  # fmt: skip
    return Choices(
        track=game.track.name, dataset=game.dataset, budget=game.budget,
        num_poison=game.budget.count(len(dataset.train_labels)), seeds=seeds, clean=clean, rows=rows,
        **provenance(command),
    )  # fmt: skip


def chosen(game: Setting, groups: Sequence[str]) -> list[Change]:
    """The preset and its changes of these kinds, or of all, as far as the game allows them.

    Raises:
        UserError: there is no such kind.
    """
    options = game.track.options("mgd", game.budget.labels)
    known = changes(Change(PRESET).attack(options))
    kinds = sorted({change.group for change in known})
    for name in groups:
        if name not in kinds:
            raise UserError(f"--group {name}: known are {', '.join(kinds)}")
    wanted = [c for c in known if c.group == PRESET or not groups or c.group in groups]
    return [change for change in wanted if _allowed(change, options, game.budget)]


def _allowed(change: Change, options: Mapping[str, str], budget: Budget) -> bool:
    try:
        change.attack(options).require(budget)
    except UserError:
        return False
    return True


def _wider(game: Setting, times: int) -> Setting:
    """The same with a wider surrogate; the victims that judge are others."""
    surrogate = game.surrogate.replace(width=times * game.surrogate.width)
    return replace(game, recipes={**game.recipes, game.track.surrogate: surrogate})


def _number(value: float) -> str:
    return f"{value:.2g}"


def show(result: Choices) -> None:
    """As a table on standard output."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{result.track}: {result.budget.game()}")
    table.add_column("changed")
    for name in result.clean:
        table.add_column(f"drop, {name}", justify="right")
        table.add_column("over the preset's", justify="right")
        table.add_column("", justify="left")
    table.add_column("crafting", justify="right")
    for row in result.rows:
        cells = [
            cell
            for name in result.clean
            for cell in (
                str(result.drop(row, name)),
                f"{result.gain(row, name):+.2f}",
                "outside the band" if row.group != PRESET and result.told(row, name) else "",
            )
        ]
        table.add_row(row.title, *cells, f"{row.crafting_seconds:,.0f} s")
    # A pipe or a file has no width of its own, and rich would take 80 columns.
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def main(
    track: Annotated[str, typer.Option(help="Preset of data, victims and mgd.")] = "digits",
    labels: Annotated[str | None, typer.Option(help="`fixed` or `free`.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="TFDS data directory.")] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="Only choices of this kind, such as `start`. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Victims of each recipe that judge a poison.")] = 10,
    runs_: Annotated[Path, typer.Option("--runs", help="Folder of crafted poisons.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="Folder of the file and its picture.")] = OUT,
) -> None:
    """Measure what choices in mgd are worth, and draw it."""
    command = recorded_command("python -m benchmarks.choices")
    try:
        require_writable(out)
        game = setting.resolve(
            track=track, dataset=None, data_dir=data_dir, sizes={}, fraction=None, labels=labels,
            radius=None, overrides=(), seeds=seeds,
        )  # fmt: skip
        wanted = chosen(game, group or ())
        # A part never takes the place of the whole.
        name = "-".join([track, game.budget.labels, *sorted(set(group or ()))])
        name += "" if seeds == game.track.seeds else f"-{seeds}-seeds"
        result = measure(game, wanted, runs_, command)
        result.save(out / f"{name}.json")
        choice_pictures.write(result, out / f"{name}.png")
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from None
    show(result)
    print(f"wrote {out / name}.json and .png", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
