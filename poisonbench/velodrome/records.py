"""What a measurement of an optimizer on a task leaves behind: every seed's curve at every setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field, model_validator

from poisonbench._files import write_text
from poisonbench.errors import UserError
from poisonbench.stored import Config, Count, Hash, Long, Measured, Name, Seconds
from poisonbench.velodrome.contenders import ADAM, Knob

DIGITS = 6
"""Of a stored loss."""


class OptimizerRecord(Measured):
    """One optimizer on one task.

    Attributes:
        task, task_config: the held-out task, by its name and whole.
        data_hash: of its images and labels.
        optimizer: name of the baseline, or what the learned optimizer was called.
        optimizer_config: its constants; of a learned optimizer family, sizes and hash of the weights.
        knob, settings: what was varied, and how.
        steps: of a training.
        every: steps between two losses.
        losses: `[settings][seeds][points]`, mean loss on fixed training images at steps 0, `every`, …;
            `null` where it was not finite. Adam's go on beyond `steps`: scores are read off them.
        seconds: wall time on `hardware`.
        status: `valid`, or `invalid` with the reason in `remark`.
    """

    schema_version: Literal[1] = 1
    task: Name
    task_config: Config
    data_hash: Hash
    optimizer: Name
    optimizer_config: Config
    knob: Knob
    settings: list[float] = Field(min_length=1)
    steps: Count = Field(gt=0)
    every: Count = Field(gt=0)
    losses: list[list[list[float | None]]]
    seconds: Seconds
    status: Literal["valid", "invalid"] = "valid"
    remark: Long = ""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerRecord:
        if self.steps % self.every:
            raise ValueError("a loss is missing at the last step")
        if len(self.losses) != len(self.settings):
            raise ValueError("every setting needs its curves")
        seeds, points = {len(curves) for curves in self.losses}, {len(c) for s in self.losses for c in s}
        if len(seeds) != 1 or min(seeds) < 3:
            raise ValueError("every setting needs the same number of seeds, at least 3")
        if len(points) != 1 or min(points) < self.points + 1:
            raise ValueError("every curve needs the same points, from the start to the last step")
        if self.status != "valid" and not self.remark:
            raise ValueError("an invalid record needs a remark that says why")
        return self

    @property
    def points(self) -> int:
        """Losses of a training, its start left out."""
        return self.steps // self.every

    @property
    def is_adam(self) -> bool:
        """Whether scores are read off it."""
        return self.optimizer == ADAM

    def curves(self) -> Float[np.ndarray, "settings seeds points"]:
        """Float64, with infinity for what was not finite."""
        found = np.array(self.losses, np.float64)
        return np.where(np.isfinite(found), found, np.inf)

    def save(self, path: Path) -> None:
        """Write the record, whole or not at all; without line breaks, for it holds long lists."""
        write_text(path, self.model_dump_json() + "\n")

    def differs(self, other: dict[str, Any]) -> str | None:
        """The first field of `other` that is not the same here, None where all are."""
        return next((name for name, value in other.items() if getattr(self, name) != value), None)


def stored(curves: Float[np.ndarray, "settings seeds points"]) -> list[list[list[float | None]]]:
    """Losses as they are stored, to six digits."""
    return [
        [[float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in row] for row in rows]
        for rows in curves.tolist()
    ]


def find(folder: Path) -> list[OptimizerRecord]:
    """Every valid record below a folder, by task and optimizer.

    Raises:
        UserError: one cannot be read, or lies under another name.
    """
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name.startswith("."):
            continue
        record = OptimizerRecord.load(path)
        if place(folder, record.task, record.optimizer) != path:
            raise UserError(f"{path} is the record of {record.optimizer} on {record.task}: rename it")
        if record.status == "valid":
            found.append(record)
    return found


def place(folder: Path, task: str, optimizer: str) -> Path:
    """Where a record belongs."""
    return folder / task / f"{optimizer}.json"
