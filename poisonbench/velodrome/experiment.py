"""Optimizers on the held-out tasks, from what was asked to the tables.

Everything lies in one folder: a record for each task and optimizer, `<task>/<optimizer>.json`, and
beside them the tables and pictures of all records that are there. A record that is there is not
measured again, so the same command goes on where it was killed, and another optimizer is compared with
those of earlier calls.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poisonbench._files import content_hash, require_writable
from poisonbench.errors import UserError, unknown_name
from poisonbench.metatraining.images import TaskData
from poisonbench.metatraining.tasks import InnerTask, load_data
from poisonbench.progress import Progress, say
from poisonbench.stored import now, provenance
from poisonbench.velodrome import scores, suite, tables
from poisonbench.velodrome.contenders import ADAM, BASELINES, Contender, baseline, learned
from poisonbench.velodrome.records import OptimizerRecord, find, place, stored
from poisonbench.velodrome.training import POINTS, Protocol, train

FOLDER = "optimizers"


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        tasks: held-out tasks, by name.
        contenders: optimizers.
        protocol: how long and how often.
        data_dir: TFDS data directory; None for TFDS's own.
        command: what the user typed.
    """

    tasks: Mapping[str, InnerTask]
    contenders: Sequence[Contender]
    protocol: Protocol
    data_dir: str | None
    command: str


def chosen_tasks(names: Sequence[str], *, local: bool) -> dict[str, InnerTask]:
    """Held-out tasks by name, all of them where none is named.

    Raises:
        UserError: there is none of a name, or `local` leaves none.
    """
    for name in names:
        if name not in suite.HELD_OUT:
            raise unknown_name("held-out task", name, suite.HELD_OUT)
    found = {name: suite.HELD_OUT[name] for name in names or suite.HELD_OUT}
    if local:
        found = {name: task for name, task in found.items() if not suite.needs_download(task)}
    if not found:
        raise UserError("--local leaves none of these tasks: name others, or leave --local out")
    return found


def chosen_optimizers(names: Sequence[str], weights: Path | None, label: str | None) -> list[Contender]:
    """Optimizers by name, the baselines where none is named.

    Raises:
        UserError: no such optimizer, or weights that are no learned optimizer's or cannot be read.
    """
    from poisonbench.optimizers import FAMILIES

    asked = list(dict.fromkeys(names or BASELINES))
    for name in asked:
        if name not in BASELINES and name not in FAMILIES:
            raise unknown_name("optimizer", name, [*BASELINES, *FAMILIES])
    families = [name for name in asked if name in FAMILIES]
    if (weights is not None or label is not None) and len(families) != 1:
        raise UserError(
            "--weights and --name are for one learned optimizer: name it, e.g. --optimizer velo"
        )
    if label in BASELINES:
        raise UserError(f"--name {label} is a baseline's: choose another")
    return [learned(name, weights, label) if name in FAMILIES else baseline(name) for name in asked]


def run(request: Request, out: Path, *, fresh: bool = False) -> list[scores.Score]:
    """Measure what has no record yet, and write tables and pictures of all records.

    Raises:
        UserError: data cannot be had, a record is of something else, or nothing can be written.
    """
    data = {name: _data(name, task, request.data_dir) for name, task in request.tasks.items()}
    where = provenance(request.command)  # before records make the tree dirty
    require_writable(out)
    missing = [
        (name, contender)
        for name in request.tasks
        for contender in request.contenders
        if fresh or not _there(request, name, contender, data[name], out)
    ]
    points = sum(request.protocol.points(contender.name) for _, contender in missing)
    if missing:
        with Progress(f"training on {len(request.tasks)} tasks", points) as bar:
            for name, contender in missing:
                _measure(request, name, contender, data[name], out, where, bar)
    return derive(out)


def derive(out: Path) -> list[scores.Score]:
    """Write tables and pictures of the records in a folder; measures nothing.

    Raises:
        UserError: there is none, or one is corrupt.
    """
    from poisonbench.velodrome import pictures

    found = find(out)
    if not found:
        raise UserError(f"{out} holds no records of optimizers: leave --table out to measure some")
    judged = scores.of_records(found)
    lonely = sorted({s.task for s in judged if s.score is None})
    if lonely:
        say(
            f"no scores on {', '.join(lonely)}: Adam's record is missing or of other trainings;"
            f" --optimizer {ADAM} makes it"
        )
    tables.write(judged, out)
    pictures.write(judged, out)
    return judged


def publish(folder: Path, results: Path) -> Path:
    """Copy the records of a folder to `<results>/optimizers/`, and make the tables there anew.

    Raises:
        UserError: there is none, one is corrupt, or another one is there under its name.
    """
    target, found = results / FOLDER, find(folder)
    if not found:
        raise UserError(f"{folder} holds no records of optimizers")
    for record in found:
        path = place(target, record.task, record.optimizer)
        if path.exists() and OptimizerRecord.load(path) != record:
            raise UserError(f"{path} is there already, and records are never overwritten")
    require_writable(target)
    for record in found:
        record.save(place(target, record.task, record.optimizer))
    derive(target)
    return target


def _data(name: str, task: InnerTask, data_dir: str | None) -> TaskData:
    try:
        return load_data(task, data_dir)
    except UserError as error:
        if not suite.needs_download(task):
            raise
        raise UserError(
            f"{name} needs {task.data.removeprefix('tfds:')}: {error};"
            " or leave such tasks out with --local"
        ) from None


def _about(request: Request, name: str, contender: Contender, data: TaskData) -> dict[str, Any]:
    """What decides a record besides the code."""
    return {
        "task": name,
        "task_config": asdict(request.tasks[name]),
        "data_hash": content_hash(np.asarray(data.images), np.asarray(data.labels)),
        "optimizer": contender.name,
        "optimizer_config": contender.config,
        "knob": contender.knob,
        "settings": list(contender.settings),
        "steps": request.protocol.steps,
        "every": request.protocol.steps // POINTS,
    }


def _there(request: Request, name: str, contender: Contender, data: TaskData, out: Path) -> bool:
    """Whether its record is there.

    Raises:
        UserError: one is, of other trainings.
    """
    path = place(out, name, contender.name)
    if not path.exists():
        return False
    record = OptimizerRecord.load(path)
    field = record.differs(_about(request, name, contender, data))
    if field is None and len(record.losses[0]) != request.protocol.seeds:
        field = "seeds"
    if field is None and len(record.losses[0][0]) != request.protocol.points(contender.name) + 1:
        field = "length"
    if field is not None:
        raise UserError(
            f"{path} is of other trainings (its {field} differs): choose another --out, another --name"
            " for other weights, or --fresh to replace it"
        )
    return True


def _measure(
    request: Request, name: str, contender: Contender, data: TaskData, out: Path,
    where: dict[str, Any], bar: Progress,
) -> None:  # fmt: skip
    began, task = time.monotonic(), request.tasks[name]
    note = f"{contender.name} on {name}"
    curves = train(task, data, contender, request.protocol, lambda: bar.advance(note=note))
    record = OptimizerRecord(
        **_about(request, name, contender, data),
        losses=stored(curves), seconds=round(time.monotonic() - began, 1),
        **where | {"created": now()},
    )  # fmt: skip
    record.save(place(out, name, contender.name))
