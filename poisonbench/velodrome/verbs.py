"""The verb `optimizers`, which `poisonbench.cli` takes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from poisonbench._options import DataDirOption, FreshOption, JsonOption, command
from poisonbench.errors import UserError


def optimizers(
    task: Annotated[
        list[str] | None, typer.Option(help="Held-out task. Repeatable. [default: all of them]")
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help="sgdm, adam, adamw or nadamw, tuned; velo or mlp_opt, learned. Repeatable."
            " [default: the four]"
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights of the learned optimizer. [default: those of poisonbench]"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call it in tables. [default: velo or mlp_opt]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of a training, a multiple of 50.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Trainings of each setting, at least 3.")] = 5,
    local: Annotated[
        bool, typer.Option("--local", help="Only tasks whose data come with the dependencies.")
    ] = False,
    data_dir: DataDirOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the records and tables.")] = Path(
        "runs", "optimizers"
    ),
    table: Annotated[
        bool, typer.Option("--table", help="Measure nothing: tables and pictures of what is there.")
    ] = False,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say how fast an optimizer trains held-out tasks, against Adam with its learning rate tuned.

    A small VeLOdrome: tuned baselines take 15 learning rates each, learned optimizers are run as they
    are, told the right number of steps and two wrong ones. What has a record is not measured again.
    """
    if table and (task or optimizer or weights or name or fresh):
        raise UserError("--table is about the records that are there: leave the other options out")
    from poisonbench import compute

    compute.setup()
    from poisonbench.velodrome import experiment, tables
    from poisonbench.velodrome.training import Protocol

    if table:
        scores = experiment.derive(out)
    else:
        protocol = Protocol(steps, seeds)
        request = experiment.Request(
            experiment.chosen_tasks(task or [], local=local),
            experiment.chosen_optimizers(optimizer or [], weights, name),
            protocol, data_dir, command(),
        )  # fmt: skip
        scores = experiment.run(request, out, fresh=fresh)
    if as_json:
        print(json.dumps({"folder": str(out), "scores": tables.flat(scores)}, indent=1))
        return
    print(tables.page(scores))
    for path in sorted(out.glob("*.*")):
        print(path)
