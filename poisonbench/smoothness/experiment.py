"""A measurement of smoothness, from what was asked to what it leaves behind.

Everything lies in `<out>/<track>/smoothness-<identity>/`, whose name follows from what was asked and
from the code that answers: the record (`smoothness.json`), tables and pictures. Finished pieces lie
beside it, in `smoothness-pieces/`, and serve every later question that contains them: the same
command goes on where it was killed, and `--grid` after a plain call repeats nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poisonbench import __version__, runs
from poisonbench._files import digest, require_writable
from poisonbench.attacks import Task
from poisonbench.data import Dataset
from poisonbench.errors import unknown_name
from poisonbench.progress import Progress
from poisonbench.setting import Setting
from poisonbench.smoothness import grid, pictures, tables
from poisonbench.smoothness.pieces import Pieces, code
from poisonbench.smoothness.probe import Probe
from poisonbench.smoothness.records import FILE, SmoothnessRecord, Survey
from poisonbench.smoothness.survey import Surveyor, trainings
from poisonbench.stored import provenance
from poisonbench.victim.recipe import Recipe

PUBLISHED = (FILE, "[!.]*.png", "[!.]*.csv")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        setting: data, budget and the track's recipes; its seeds are not used.
        names: which of the recipes; empty for all that the track's attacks are measured on.
        probe: what is asked of each.
        grid: whether to survey the changes of the surrogate recipe too.
        landscape: whether to draw a landscape of each recipe.
        command: what the user typed.
    """

    setting: Setting
    names: tuple[str, ...]
    probe: Probe
    grid: bool
    landscape: bool
    command: str

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes that were asked for; those that poison is carried to may be asked for too.

        Raises:
            UserError: one of them is not in the track.
        """
        known = {**self.setting.track.transfer, **self.setting.recipes}
        for name in self.names:
            if name not in known:
                raise unknown_name("recipe", name, known)
        return {name: known[name] for name in dict.fromkeys(self.names or self.setting.recipes)}

    def varied(self, num_images: int) -> dict[str, Recipe]:
        """The recipes of the grid: the base, those asked for, and every change of the base."""
        if not self.grid:
            return {}
        base = {self.setting.track.surrogate: self.setting.surrogate}
        return {**base, **self.recipes, **grid.changes(self.setting.surrogate, num_images)}


@dataclass(frozen=True)
class Finished:
    """A record, and the folder that it, its tables and its pictures lie in."""

    record: SmoothnessRecord
    folder: Path


def run(request: Request, out: Path, *, fresh: bool = False) -> Finished:
    """Measure, and write the record, its tables and its pictures; or find them written.

    Raises:
        UserError: something that was asked cannot be, or nothing can be written.
    """
    dataset, varied = _prepare(request)
    track = out / request.setting.track.name
    about = {
        "data": _hashes(dataset),
        "fraction": request.setting.budget.fraction,
        "pixels": request.setting.budget.pixels.model_dump(),
    }
    folder = track / f"smoothness-{_identity(request, about)}"
    _open(folder, fresh)
    path = folder / FILE
    if path.exists():
        return Finished(SmoothnessRecord.load(path), folder)
    pieces = Pieces(track / "smoothness-pieces", about, reuse=not fresh)
    record = _measured(request, dataset, varied, pieces)
    tables.write(record, folder)
    pictures.write(record, folder)
    record.save(path)  # last: a measurement is finished where its record is there
    return Finished(record, folder)


def publish(folder: Path, results: Path) -> Path:
    """Copy a finished measurement to `<results>/smoothness/<track>/`, without its pieces.

    Raises:
        UserError: it is not finished, or is there already.
    """
    record = SmoothnessRecord.load(folder / FILE)
    target = results / "smoothness" / record.track / folder.resolve().name
    runs.copy_whole(folder, target, PUBLISHED)
    return target


def _prepare(request: Request) -> tuple[Dataset, dict[str, Recipe]]:
    """Everything that can be refused is refused here, before anything is written."""
    recipes = request.recipes
    dataset = runs.load_data(replace(request.setting, recipes=recipes))
    varied = request.varied(len(dataset.train_labels))
    if varied:
        runs.load_data(replace(request.setting, recipes=varied))
    request.setting.budget.count(len(dataset.train_labels))
    return dataset, varied


def _measured(
    request: Request, dataset: Dataset, varied: dict[str, Recipe], pieces: Pieces
) -> SmoothnessRecord:
    setting, probe, recipes = request.setting, request.probe, request.recipes
    with Progress("measuring smoothness, in trainings", _trainings(request, varied)) as bar:

        def surveyor(recipe: Recipe) -> Surveyor:
            return Surveyor(Task.of(dataset, setting.budget, recipe), probe, pieces, bar.advance)

        def surveys(named: dict[str, Recipe], *, steps: bool) -> list[Survey]:
            return [surveyor(recipe).survey(name, steps=steps) for name, recipe in named.items()]

        asked = surveys(recipes, steps=True)
        others = surveys(varied, steps=False)
        scapes = [
            surveyor(recipe).landscape(name) for name, recipe in recipes.items() if request.landscape
        ]
    return SmoothnessRecord(
        track=setting.track.name, custom=_custom(setting, recipes, request.grid),
        dataset=setting.dataset, hashes=_hashes(dataset), budget=setting.budget,
        num_train=len(dataset.train_labels),
        num_moved=setting.budget.count(len(dataset.train_labels)),
        probe=probe, base=setting.track.surrogate, recipes=asked, grid=others, landscapes=scapes,
        seconds=round(pieces.seconds, 1), **provenance(request.command),
    )  # fmt: skip


def _trainings(request: Request, varied: dict[str, Recipe]) -> int:
    total = len(request.recipes) * trainings(request.probe, steps=True)
    total += len(varied) * trainings(request.probe, steps=False)
    if request.landscape:
        total += len(request.recipes) * request.probe.points**2
    return total


def _custom(setting: Setting, recipes: dict[str, Recipe], grid: bool) -> list[str]:
    """What differs from the track, overrides of recipes that were not measured left out."""
    measured = {*recipes, *([setting.track.surrogate] if grid else [])}
    unmeasured = tuple(f"{name}." for name in setting.recipes if name not in measured)
    return [change for change in setting.custom if not change.startswith(unmeasured)]


def _hashes(dataset: Dataset) -> dict[str, str]:
    return {split: value for split, value in dataset.hashes().items() if split != "test"}


def _identity(request: Request, about: dict[str, Any]) -> str:
    everything = {
        "version": __version__,
        "code": code(),
        "recipes": {name: recipe.as_dict() for name, recipe in request.recipes.items()},
        "base": request.setting.surrogate.as_dict() if request.grid else None,
        "probe": vars(request.probe),
        "landscape": request.landscape,
        **about,
    }
    return digest(everything)[:8]


def _open(folder: Path, fresh: bool) -> None:
    require_writable(folder)
    if not fresh:
        return
    # The record goes first: a measurement is finished where its record is there.
    (folder / FILE).unlink(missing_ok=True)
    for path in _files(folder, PUBLISHED):
        path.unlink()


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]
