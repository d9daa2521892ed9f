"""What the benchmark leaves behind: the schema of its JSON file, and the numbers that follow from it."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from benchmarks.operations import Operations
from benchmarks.problems import Setting
from poisonbench._files import write_text
from poisonbench.stored import Hardware

SAME = 1e-3
"""Relative error above which a gradient is not the same one; float32 alone makes about 1e-6."""
STEP_SECONDS = 0.02


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Round(_Frozen):
    """One run, and the training alone just before it, in seconds."""

    seconds: float = Field(gt=0)
    training_seconds: float = Field(gt=0)

    @property
    def ratio(self) -> float:
        """Time over training time."""
        return self.seconds / self.training_seconds


class Row(_Frozen):
    """One way on one problem.

    Attributes:
        way, title: which.
        status: `measured`, or why not, with the reason in `remark`.
        remark: what the reader should know.
        rounds: in order.
        memory: peak of a run beyond the problem itself, bytes; None where the system does not tell.
        temporary: bytes that XLA sets aside, for a way that is one program.
        kept: the most states alive at once, for ours.
        value: of the objective.
        error: of the gradient, relative to the reference in the Euclidean norm.
    """

    way: str
    title: str
    status: Literal["measured", "not installed", "refused", "failed"] = "measured"
    remark: str = ""
    rounds: tuple[Round, ...] = ()
    memory: int | None = None
    temporary: int | None = None
    kept: int | None = None
    value: float | None = None
    error: float | None = None

    @property
    def ratio(self) -> float:
        """Median over the rounds of time over training time."""
        return median(r.ratio for r in self.rounds)

    @property
    def agrees(self) -> bool:
        """Whether its gradient is the reference's."""
        return self.error is not None and self.error <= SAME


class Comparison(_Frozen):
    """Every way on one problem.

    Attributes:
        name: `8x8` or `16x16`.
        setting: the problem.
        reference: what errors are relative to.
        operations: multiply-adds of a step.
        state_bytes: size of one state.
        rows: in the order of the table.
        torch_training: the training alone in PyTorch, seconds, one for each round.
        matrix_rates: floating-point operations per second of a large product, one for each round.
    """

    name: str
    setting: Setting
    reference: str
    operations: Operations
    state_bytes: int
    rows: tuple[Row, ...]
    torch_training: tuple[float, ...] = ()
    matrix_rates: tuple[float, ...] = ()

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows with numbers."""
        return tuple(row for row in self.rows if row.status == "measured")

    @property
    def training_seconds(self) -> float:
        """Median over all rounds of all ways; NaN where nothing was measured."""
        found = [r.training_seconds for row in self.measured for r in row.rounds]
        return median(found) if found else float("nan")

    @property
    def training_rate(self) -> float:
        """Floating-point operations per second of the training alone."""
        return 2 * self.operations.step * self.setting.steps / self.training_seconds

    def rate(self, row: Row) -> float:
        """Floating-point operations per second of a way: those of the floor, over its time.

        Steps that a way repeats are its own loss, so they do not count as work done.
        """
        work = 2 * (self.operations.step + self.operations.vjp) * self.setting.steps
        return work / median(r.seconds for r in row.rounds)


class Point(_Frozen):
    """One way at one length or one number of states.

    Attributes:
        way, title: which.
        steps: length of the run.
        states: kept at most, where the way says so.
        forward, differentiated: steps that the plan counts, for ours.
        rounds: in order.
    """

    way: str
    title: str
    steps: int
    states: int | None = None
    forward: int | None = None
    differentiated: int | None = None
    rounds: tuple[Round, ...] = ()

    @property
    def ratio(self) -> float:
        """Median over the rounds of time over training time."""
        return median(r.ratio for r in self.rounds)


class Sweep(_Frozen):
    """Cost against the length of the run, or against the states kept."""

    setting: Setting
    points: tuple[Point, ...]

    @property
    def vjp(self) -> float:
        """What differentiating a step costs, in steps, from the longest run that repeats least.

        The only number in the predicted curves that is measured; all else is counted.
        """
        ours = [p for p in self.points if p.forward is not None]
        if not ours:
            return float("nan")
        longest = max(p.steps for p in ours)
        least = min((p for p in ours if p.steps == longest), key=lambda p: p.forward or 0)
        return least.ratio - (least.forward or 0) / least.steps

    def predicted(self, forward: int, differentiated: int, steps: int) -> float:
        """Time over training time by the plan's count."""
        return (forward + self.vjp * differentiated) / steps


class Dispatch(_Frozen):
    """What the engine takes for a step that does next to nothing.

    Attributes:
        way: which schedule.
        setting: the problem `leaves`.
        seconds: of whole metagradients, one for each round.
        forward, differentiated: steps that the plan counts.
    """

    way: str
    setting: Setting
    seconds: tuple[float, ...]
    forward: int
    differentiated: int

    def share(self, vjp: float) -> float:
        """Of the time of the same schedule with steps of 20 ms, each VJP costing `vjp` steps."""
        work = STEP_SECONDS * (self.forward + vjp * self.differentiated)
        spent = median(self.seconds)
        return spent / (spent + work)


class Report(_Frozen):
    """The whole file.

    Attributes:
        quick: a smoke run, whose numbers mean nothing.
        threads: cores that everything ran on.
        memory_bytes: of the machine.
        environment: variables that decide how threads behave.
    """

    schema_version: Literal[1] = 1
    created: AwareDatetime
    command: str
    quick: bool
    rounds: int
    threads: int
    hardware: Hardware
    memory_bytes: int
    environment: dict[str, str] = {}
    code: dict[str, str | bool | None]
    libraries: dict[str, str | None]
    comparisons: tuple[Comparison, ...] = ()
    lengths: Sweep | None = None
    states: Sweep | None = None
    dispatch: tuple[Dispatch, ...] = ()

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text(path, self.model_dump_json(indent=1) + "\n")
