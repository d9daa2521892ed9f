"""Data selection by metagradients: which part of a training set to train on, for some images' sake.

The weights of `defenses/metagradient_weights.py`, learnt on clean data for one half of the validation
images; the images that weigh most are kept. What that is worth is measured on the other half, against as
many images drawn at random and against all of them, by victims of the same seeds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from poisonbench import harness
from poisonbench._files import digest, require_writable, write_text
from poisonbench.arrays import highest
from poisonbench.data import DataSpec
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.progress import Progress
from poisonbench.runs import load_data
from poisonbench.setting import Setting
from poisonbench.statistics import Interval, mean_interval, paired_drop
from poisonbench.stored import Config, Hash, Measured, Name, Percent, provenance

FILE = "selection.json"


class Selection(Measured):
    """What was kept, and what victims that trained on it scored.

    Attributes:
        track, custom: the preset, and what was changed in it.
        dataset, hashes: the data, and the content hash of each split.
        recipe_name, recipe: of the victims.
        method: hyperparameters by which weights were learnt.
        keep: share of the training set that was kept.
        kept: the images, by index.
        seeds: of the victims; the lists below follow their order.
        whole, selected, random: accuracy on the held-out half of validation data, in percent: of victims
            that trained on everything, on the selection, and on as many images drawn for each seed.
    """

    schema_version: Literal[1] = 1
    track: Name
    custom: list[str]
    dataset: DataSpec
    hashes: dict[str, Hash]
    recipe_name: Name
    recipe: Config
    method: Config
    keep: float = Field(gt=0, lt=1)
    kept: list[int]
    seeds: list[int] = Field(min_length=2)
    whole: list[Percent]
    selected: list[Percent]
    random: list[Percent]

    @property
    def gain(self) -> Interval:
        """What the selection is worth over a random one, in points, seed by seed."""
        return paired_drop(self.selected, self.random)


@dataclass(frozen=True)
class Request:
    """What to select.

    Attributes:
        setting: data and victims.
        keep: share of the training set to keep, in (0, 1).
        steps: metasteps.
        seed: of the selection.
        command: what the user typed.
    """

    setting: Setting
    keep: float
    steps: int
    seed: int
    command: str


def run(request: Request, out: Path, *, fresh: bool = False) -> tuple[Selection, Path]:
    """Select, measure, and write `selection.json`; what is there already is not measured again.

    Raises:
        UserError: a share outside (0, 1) or one that selects nothing, or no data.
    """
    import jax.numpy as jnp

    from poisonbench.defenses import Composed, View, load, sources
    from poisonbench.victim.evaluation import train_and_score
    from poisonbench.victim.training import TrainingSet

    if not 0 < request.keep < 1:
        raise UserError(f"--keep must lie strictly between 0 and 1, not {request.keep:g}")
    setting = request.setting
    dataset, recipe = load_data(setting), setting.surrogate
    number = len(dataset.train_labels)
    count = int(request.keep * number + 1e-9)
    recipe.steps_per_epoch(count)  # refuses a selection smaller than a batch
    half = len(dataset.val_labels) // 2
    weighing: Any = load("metagradient_weights")
    method = weighing(trusted=half, steps=request.steps)
    decides = [dataset.hashes(), asdict(method), sources(Composed((method,))), harness.victim_code()]
    folder = out / setting.track.name / f"select-{_identity(request, decides)}"
    require_writable(folder)
    if (folder / FILE).exists() and not fresh:
        return Selection.load(folder / FILE), folder
    journal = Journal(folder)
    if fresh:
        (folder / FILE).unlink(missing_ok=True)
        journal.forget()
    view = View(
        dataset.train_images, dataset.train_labels, dataset.num_classes, recipe, 0,
        dataset.val_images[:half], dataset.val_labels[:half],
    )  # fmt: skip
    done = journal.restore() or {"done": np.array(0)}
    with Progress("learning weights", request.steps, int(done["done"])) as bar:
        weights = method.learnt(view, harness.crafting_key(request.seed), journal, bar.advance)
    kept = highest(weights, count)
    arrays = journal.restore() or {}
    held_out = (dataset.val_images[half:], dataset.val_labels[half:])
    jobs = [
        (seed, which, rows)
        for seed in setting.seeds
        for which, rows in (
            ("whole", np.arange(number)), ("selected", kept),
            ("random", np.random.default_rng([request.seed, seed]).permutation(number)[:count]),
        )
    ]  # fmt: skip
    scored = np.array(arrays.get("scored", ()), float).tolist()
    with Progress("training victims", len(jobs), len(scored)) as bar:
        for seed, which, rows in jobs[len(scored) :]:
            part = (dataset.train_images[rows], dataset.train_labels[rows])
            data = TrainingSet.clean(*part, dataset.num_classes)
            keys = jnp.stack([harness.evaluation_key(seed)])
            scored.append(float(train_and_score(recipe, data, keys, *held_out)[0, -1]))
            journal.save(arrays | {"scored": np.array(scored)})
            bar.advance(note=which)
    scores = dict(zip(("whole", "selected", "random"), (scored[i::3] for i in range(3)), strict=True))
    selection = Selection(
        track=setting.track.name, custom=list(setting.custom), dataset=setting.dataset,
        hashes=dataset.hashes(), recipe_name=setting.track.surrogate, recipe=recipe.as_dict(),
        method={**asdict(method), "seed": request.seed}, keep=request.keep,
        kept=kept.tolist(), seeds=list(setting.seeds), **scores, **provenance(request.command),
    )  # fmt: skip
    write_text(folder / "kept.txt", "".join(f"{index}\n" for index in kept))
    selection.save(folder / FILE)  # a selection is finished where it is there
    journal.forget()
    return selection, folder


def show(selection: Selection, folder: Path) -> None:
    """Print what victims scored, and where the selection lies."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{len(selection.kept)} images selected by metagradients",
        caption=f"Means over {len(selection.seeds)} seeds with 95 % intervals, on validation images that"
        " the selection never saw.",
    )
    table.add_column("trained on")
    table.add_column("accuracy, %", justify="right")
    for name, scores in (
        ("everything", selection.whole), ("the selection", selection.selected),
        ("as many at random", selection.random),
    ):  # fmt: skip
        table.add_row(name, str(mean_interval(scores)))
    table.add_row("selection over random", str(selection.gain))
    console = Console(highlight=False)
    console.print(table)
    for path in sorted(folder.glob("*")):
        console.print(str(path), soft_wrap=True)


def _identity(request: Request, decides: list[Any]) -> str:
    setting = request.setting
    recipe, seeds = setting.surrogate.as_dict(), list(setting.seeds)
    return digest([decides, recipe, seeds, request.keep, request.seed])[:8]
