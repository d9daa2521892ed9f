"""A meta-training from its options to its files: weights, record, picture.

    weights.safetensors    the best weights by validation
    metatraining.json      how they came about, and what every meta-step measured
    loss.png               the same as a picture

Validation has a yardstick: Adam at its usual rate of 1e-3, untuned, on the same held-out tasks and runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from poisonbench import compute, runs
from poisonbench._files import digest, require_writable
from poisonbench.errors import UserError
from poisonbench.metatraining import augmentations, pictures
from poisonbench.metatraining.loop import COLUMNS, ELSEWHERE, Schedule, Trained, Trainer
from poisonbench.metatraining.tasks import DATASETS, FAMILIES, Family, InnerTask, draw, load_data
from poisonbench.metatraining.unroll import Objective
from poisonbench.optimizers import LearnedOptimizer, weights
from poisonbench.progress import say
from poisonbench.stored import Config, Measured, code_version, provenance

WEIGHTS, RECORD, PICTURE, CHECKPOINT = (
    "weights.safetensors", "metatraining.json", "loss.png", "checkpoint.safetensors"
)  # fmt: skip
BANK, HELD_OUT, AUGMENTED = range(3)
"""What the key of tasks is for: streams of it that never meet."""
ADAM_RATE = 1e-3


class MetaTraining(Measured):
    """How weights came about.

    Attributes:
        identity: hash of everything that decides the weights but the code.
        optimizer, estimator, schedule: names and sizes.
        objective: meta-loss of a run: `mean` over its steps, or `final`.
        start: hash of the weights begun with, where a file was named.
        augmented: chance that a task of the bank is varied.
        tasks, held_out: names.
        columns: what each row of `steps` holds.
        steps: one row a meta-step.
        validation: meta-steps done, and the mean normalised final loss on the held-out tasks.
        judged_lengths: inner steps of the runs that it is the mean of.
        scores: of the best weights, `[held-out tasks][lengths]`.
        adam: the same of Adam at 1e-3.
        seconds: taken, all sittings together.
    """

    kind = "record of a meta-training"
    schema_version: Literal[1] = 1
    identity: str
    optimizer: Config
    estimator: Config
    schedule: Config
    objective: Objective
    start: str | None
    augmented: float
    tasks: list[str]
    held_out: list[str]
    columns: list[str]
    steps: list[list[float]]
    validation: list[tuple[int, float]]
    judged_lengths: list[int]
    scores: list[list[float]]
    adam: list[list[float]]
    inner_steps: int
    broken: int
    seconds: float


@dataclass(frozen=True)
class Adam:
    """Adam at a fixed rate, with the interface of a learned optimizer and nothing learnt."""

    rate: float = ADAM_RATE
    name: str = "adam"

    def init(self, key: Any) -> dict[str, Any]:  # noqa: ARG002 - nothing is drawn
        """No weights."""
        return {}

    def transformation(self, num_steps: Any, weights: Any) -> Any:  # noqa: ARG002
        """Plain Adam."""
        return optax.with_extra_args_support(optax.adam(self.rate))


@dataclass(frozen=True)
class Request:
    """What to meta-train.

    Attributes:
        optimizer: family and sizes.
        estimator: by its name, for the record.
        strategy: the estimator itself.
        schedule: lengths, rates, seed.
        objective: `mean` or `final`.
        tasks: of the bank.
        held_out: of the same distribution, without variations.
        augmented: chance that a task of the bank is varied.
        datasets: `digits`, `teacher`, `tfds:<name>`.
        families: of networks.
        data_dir: TFDS data directory.
        start: file of weights to begin with.
        command: what the user typed.
    """

    optimizer: LearnedOptimizer
    estimator: str
    strategy: Any
    schedule: Schedule
    objective: Objective = "mean"
    tasks: int = 16
    held_out: int = 4
    augmented: float = 0.5
    datasets: tuple[str, ...] = DATASETS
    families: tuple[Family, ...] = FAMILIES
    data_dir: str | None = None
    start: Path | None = None
    command: str = "poisonbench metatrain"

    def __post_init__(self) -> None:
        if self.tasks < 1 or self.held_out < 1:
            raise UserError("--tasks and --held-out must be at least 1")
        if not 0 <= self.augmented <= 1:
            raise UserError(f"--augmented is a chance between 0 and 1, not {self.augmented:g}")
        if self.estimator in ("pes", "truncated"):
            if self.objective == "final":
                raise UserError(
                    f"{self.estimator} estimates the mean loss of a run: leave out --objective final"
                )
            if self.strategy.truncation > self.schedule.max_unroll:
                raise UserError(
                    f"--truncation {self.strategy.truncation} is more than the longest run has steps:"
                    f" at most --max-unroll {self.schedule.max_unroll}"
                )


def run(request: Request, out: Path, *, fresh: bool = False) -> tuple[MetaTraining, Path]:
    """Meta-train into a folder; what is finished there is not done again.

    Raises:
        UserError: the folder holds another meta-training or cannot be written; weights to begin with of
            another optimizer; data that cannot be had.
    """
    code_version()  # as in a run: what is committed meanwhile is not what runs
    compute.setup()
    start = None if request.start is None else _start(request)
    require_writable(out)
    if fresh:
        for name in (CHECKPOINT, RECORD, WEIGHTS, PICTURE):
            (out / name).unlink(missing_ok=True)
    bank, held_out = _drawn(request)
    identity = _identity(request, start, [task.name for task, _ in (*bank, *held_out)])
    if (out / RECORD).exists():
        found = MetaTraining.load(out / RECORD)
        if found.identity != identity:
            raise UserError(f"{out} holds another meta-training: {ELSEWHERE}")
        return found, out
    trainer = Trainer(
        request.optimizer, request.strategy, request.objective, bank, held_out, request.schedule, start
    )
    trained = trainer.train(out / CHECKPOINT, identity)
    record = _recorded(request, identity, start, trainer, trained, bank, held_out)
    ours, adams = np.mean(record.scores), np.mean(record.adam)
    about = {
        "command": request.command,
        "made": f"in {len(trained.steps)} meta-steps of {request.estimator}",
        "score": f"{ours:.4f} on held-out tasks; Adam at 1e-3 {adams:.4f}",
    }
    weights.save_weights(out / WEIGHTS, request.optimizer, trained.weights, about)
    pictures.write(record, out / PICTURE)
    record.save(out / RECORD)
    return record, out


def publish(folder: Path, results: Path) -> Path:
    """Copy a finished meta-training to `<results>/metatraining/<its folder>/`: weights, record, picture.

    Raises:
        UserError: it is not finished, or is there already.
    """
    MetaTraining.load(folder / RECORD)
    target = results / "metatraining" / folder.resolve().name
    runs.copy_whole(folder, target, (WEIGHTS, RECORD, PICTURE))
    return target


def _drawn(request: Request) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
    """The bank and the held-out tasks, each with its data."""
    root = jax.random.key(request.schedule.seed)

    def drawn(stream: int, count: int) -> list[InnerTask]:
        key = jax.random.fold_in(root, stream)
        return draw(key, count, request.datasets, request.families, request.data_dir)

    loaded: dict[Any, Any] = {}

    def with_data(task: InnerTask, varied: Any) -> tuple[Any, Any]:
        kind = (task.data, task.resolution, task.channels)
        if kind not in loaded:
            loaded[kind] = load_data(task, request.data_dir)
        return varied, loaded[kind]

    bank = []
    for i, task in enumerate(drawn(BANK, request.tasks)):
        key = jax.random.fold_in(jax.random.fold_in(root, AUGMENTED), i)
        vary = float(jax.random.uniform(jax.random.fold_in(key, 1))) < request.augmented
        bank.append(with_data(task, augmentations.augment(key, task) if vary else task))
    return bank, [with_data(task, task) for task in drawn(HELD_OUT, request.held_out)]


def _start(request: Request) -> Any:
    """The weights to begin with.

    Raises:
        UserError: they cannot be read, or are of another optimizer.
    """
    optimizer, found = weights.load_weights(request.start)  # type: ignore[arg-type]
    if optimizer != request.optimizer:
        raise UserError(
            f"{request.start} holds weights of {optimizer}, and {request.optimizer} is to be trained:"
            " give the sizes of the file"
        )
    return found


def _identity(request: Request, start: Any, names: Sequence[str]) -> str:
    decides = [
        str(request.optimizer), request.estimator, str(request.strategy), asdict(request.schedule),
        request.objective, names, None if start is None else weights.digest(start),
    ]  # fmt: skip
    return digest(decides)


def _sizes(optimizer: Any) -> dict[str, Any]:
    return asdict(optimizer)


def _recorded(
    request: Request,
    identity: str,
    start: Any,
    trainer: Trainer,
    trained: Trained,
    bank: Sequence[tuple[Any, Any]],
    held_out: Sequence[tuple[Any, Any]],
) -> MetaTraining:
    columns = dict(zip(COLUMNS, np.asarray(trained.steps).T, strict=True))
    record = MetaTraining(
        identity=identity,
        optimizer={"name": request.optimizer.name, **_sizes(request.optimizer)},
        estimator={"name": request.estimator, **asdict(request.strategy)},
        schedule=asdict(request.schedule),
        objective=request.objective,
        start=None if start is None else weights.digest(start),
        augmented=request.augmented,
        tasks=[task.name for task, _ in bank],
        held_out=[task.name for task, _ in held_out],
        columns=list(COLUMNS),
        steps=trained.steps.tolist(),
        validation=[(int(done), float(score)) for done, score in trained.validation],
        judged_lengths=list(trainer.judged_lengths),
        scores=trainer.score(request.optimizer, trained.weights).tolist(),
        adam=trainer.score(Adam(), {}).tolist(),
        inner_steps=int(columns["inner_steps"].sum()),
        broken=int(columns["broken"].sum()),
        seconds=round(trained.seconds, 1),
        **provenance(request.command),
    )
    if record.broken:
        say(f"{record.broken} differences or gradients were not finite and counted as 0")
    return record


def show(record: MetaTraining, folder: Path) -> None:
    """Print what the weights score, beside Adam, and where they lie."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{record.optimizer['name']} after {len(record.steps)} meta-steps",
        caption=f"Normalised final loss, the lower the better; runs of {record.judged_lengths} steps.",
    )
    table.add_column("held-out task")
    for title in ("learnt", "Adam at 1e-3"):
        table.add_column(title, justify="right")

    def brief(scores: list[float]) -> str:
        return " ".join(f"{x:.2f}" if math.isfinite(x) else "–" for x in scores)

    for name, ours, adams in zip(record.held_out, record.scores, record.adam, strict=True):
        table.add_row(name, brief(ours), brief(adams))
    table.add_row("mean", f"{np.mean(record.scores):.3f}", f"{np.mean(record.adam):.3f}")
    console = Console(highlight=False)
    console.print(table)
    for name in (WEIGHTS, RECORD, PICTURE):
        console.print(str(folder / name), soft_wrap=True)
