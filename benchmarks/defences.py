"""What every defence costs, in trainings of an undefended victim: `python -m benchmarks.defences`.

For each defence a victim is trained under it and one without it, in turn, in one process that is bound
to one core, every program compiled beforehand and the order reversed in every other round; what counts
is the ratio of the two processor times, filtering and training together. Processor time, since a wall on
a machine that does something else besides says more about that; ratios of neighbours, since caches and
clocks change too. `none`, which is a defence that does nothing, shows how far from 1 chance leads.

Each victim is scored on one image, so that the score costs nothing. Every run of a defence has the same
key, and so does the same. The set is clean: of a poisoned one a filter drops other images, and as many
steps follow.

*The count beside it* is of multiply-adds in all compiled programs (`benchmarks.counting`). It is exact
and the same on every machine, but it sees no clustering, no singular value decomposition and no JPEG,
nor that many small products are slower than few large ones. So it is not well-defined as the cost of
every defence: it is a floor, and the time is the cost.

Cost: on one core a quarter of an hour, most of it compiling and `metagradient_weights`. A run that was
killed goes on where it was when the same command is given again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from benchmarks.counting import counting
from benchmarks.pieces import Pieces
from poisonbench import compute, costs, data, defended, defenses, tracks
from poisonbench._files import require_writable
from poisonbench._options import command as recorded_command
from poisonbench.costs import Costs, DefenseCost, Round
from poisonbench.data import Dataset
from poisonbench.defenses import Composed, View
from poisonbench.errors import UserError, plain
from poisonbench.progress import Progress
from poisonbench.stored import now, provenance
from poisonbench.victim.evaluation import train_and_score
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import TrainingSet

OUT = Path("results", costs.FOLDER)


@dataclass(frozen=True)
class Bench:
    """Victims of one recipe on one clean training set.

    Attributes:
        dataset: the data.
        recipe: of the victims.
        allowed: images that filters are told may be poisoned.
    """

    dataset: Dataset
    recipe: Recipe
    allowed: int

    def bare(self) -> Callable[[], Any]:
        """Trains an undefended victim."""
        d = self.dataset
        keys, one = jax.random.split(jax.random.key(0), 1), (d.val_images[-1:], d.val_labels[-1:])

        def run() -> Any:
            data = TrainingSet.clean(d.train_images, d.train_labels, d.num_classes)
            return train_and_score(self.recipe, data, keys, *one)

        return run

    def defended(self, defense: Composed) -> Callable[[], Any]:
        """Trains a victim under a defence."""
        d = self.dataset
        keys, one = jax.random.split(jax.random.key(0), 1), (d.val_images[-1:], d.val_labels[-1:])
        told = np.arange(len(d.train_labels)) < self.allowed
        trusted = d.val_images[: defense.trusted], d.val_labels[: defense.trusted]
        view = View(
            d.train_images, d.train_labels, d.num_classes, self.recipe, self.allowed, *trusted,
            told if any(part.sees_poison for part in defense.defenses) else None,
        )  # fmt: skip
        return lambda: defended.train_and_score(defense, view, keys, *one)


def multiply_adds(run: Callable[[], Any]) -> int:
    """Of what a call does; compiles it on the way."""
    with counting() as count:
        run()
    return count.multiply_adds


def measured(bench: Bench, defense: Composed, rounds: int) -> DefenseCost:
    """One defence: counted, which compiles it, run once more, and then timed in turn."""
    bare, guarded = bench.bare(), bench.defended(defense)
    number = multiply_adds(guarded)
    guarded()
    bare()
    found: list[Round] = []
    for i in range(rounds):
        # The first to run need not always be the same one, in case it matters.
        order = [("bare", bare), ("defended", guarded)][:: 1 if i % 2 == 0 else -1]
        times: dict[str, float] = {}
        for name, run in order:
            times[name], times[f"{name}_wall"] = _timed(run)
        found.append(Round(**times))
    config = defenses.config(defense)
    return DefenseCost(
        defense="+".join(defense.names), config=config, rounds=found, multiply_adds=number
    )


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    processor, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(run())
    return time.process_time() - processor, time.perf_counter() - wall


def chosen(names: Sequence[str], also: Sequence[str]) -> list[Composed]:
    """The defences to measure: those named or else all, and some again with other options.

    Raises:
        UserError: no such defence or option.
    """
    several = [defenses.build(name) for name in names or defenses.names()]
    return several + [defenses.build(text.partition(".")[0], [text]) for text in also]


def one_core() -> None:
    """Bind the process to one core, before XLA has looked how many there are.

    Raises:
        UserError: the system cannot.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("this needs a system that binds processes to cores, such as Linux")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])


def measure(
    track: str, several: Sequence[Composed], rounds: int, out: Path, command: str
) -> tuple[Costs, Path]:
    """All of them on a track's surrogate recipe, and where the file lies.

    Raises:
        UserError: no such track.
    """
    preset = tracks.load(track)
    recipe = preset.recipes[preset.surrogate]
    dataset = data.load(preset.dataset)
    number = len(dataset.train_labels)
    bench = Bench(dataset, recipe, preset.budget.count(number))
    where = provenance(command)  # before pieces make the tree dirty
    one_core()
    about = {
        "track": track, "recipe": recipe.as_dict(), "rounds": rounds,
        "hardware": where["hardware"].model_dump(), "libraries": where["libraries"],
        "sources": [defenses.sources(d) for d in several],
        "configs": [defenses.config(d) for d in several],
    }  # fmt: skip
    pieces, found = Pieces(out, about), []
    with threadpool_limits(1), Progress("defences", len(several) + 1) as progress:
        whole = pieces.once("bare", int, lambda: multiply_adds(bench.bare()))
        for i, defense in enumerate(several):
            progress.advance(note="+".join(defense.names))
            found.append(pieces.once(f"{i}", DefenseCost, partial(measured, bench, defense, rounds)))
        progress.advance()
    result = Costs(
        track=track, dataset=preset.dataset, num_train=number, allowed=bench.allowed,
        recipe_name=preset.surrogate, recipe=recipe.as_dict(), multiply_adds=whole, cores=1,
        defenses=found, **where | {"created": now()},
    )  # fmt: skip
    result.save(out / f"{track}.json")
    pieces.clear()
    return result, out / f"{track}.json"


def show(result: Costs) -> None:
    """As a table on standard output."""
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{result.track}: trainings of a {result.recipe_name} victim"
    )
    for name in ("defence", "median", "least", "most", "by count"):
        table.add_column(name, justify="left" if name == "defence" else "right")
    for cost in result.defenses:
        numbers = (cost.trainings, min(cost.ratios), max(cost.ratios), result.counted(cost))
        table.add_row(cost.defense, *(f"{x:.2f}" for x in numbers))
    # A pipe or a file has no width of its own, and rich would take 80 columns.
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def main(
    track: Annotated[str, typer.Option(help="Preset whose data and surrogate recipe are taken.")] = (
        "digits"
    ),
    defense: Annotated[list[str] | None, typer.Option(help="Only this one. Repeatable.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="A defence again, as dpa.k=30. Repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of victims for each.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the file.")] = OUT,
) -> None:
    """Measure what defences cost, and write it where the leaderboard reads it."""
    compute.setup()
    command = recorded_command("python -m benchmarks.defences")
    try:
        require_writable(out)
        result, path = measure(track, chosen(defense or (), also or ()), rounds, out, command)
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from None
    show(result)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
