"""A run, from what was asked to what it leaves behind, continued wherever it was stopped.

What a run makes lies in one folder, `runs/<track>/<attack>-<identity>/`, whose name follows from what
was asked for, and finished victims beside it in `victims/`, since clean ones serve every attack. The
same command finds the same folder and goes on from what is there: checkpoint, poison file, record.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from poisonbench import __version__, attacks, compute, data, harness
from poisonbench._files import digest, replacing, require_writable, write_text
from poisonbench.errors import UserError
from poisonbench.journal import Journal, LogRow
from poisonbench.records import Record
from poisonbench.setting import Setting
from poisonbench.stored import NAME, code_version, provenance
from poisonbench.threat import Budget, PoisonSet

OURS = ("*.safetensors", "*.json", "*.png", "*.csv")
PUBLISHED = ("record.json", "transfer.json", "poison.safetensors", "[!.]*.csv")
PICTURES = "[!.]*.png"


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        setting: data, game and victims.
        name: the attack's name.
        attack: the attack with its hyperparameters.
        seed: of the attack.
        command: what the user typed.
    """

    setting: Setting
    name: str
    attack: attacks.Attack
    seed: int
    command: str

    def identity(self, dataset: data.Dataset) -> str:
        """Short hash of all that decides the poison, the code that crafts it included."""
        source, config = _source(type(self.attack)), attacks.config(self.attack)
        rest = {"config": config, "seed": self.seed, "source": source, "library": _crafting_sources()}
        if config.get("against"):
            from poisonbench import defenses

            rest["against"] = defenses.sources(defenses.build(config["against"]))
        return _identity(self.setting, dataset, rest)


@dataclass(frozen=True)
class Crafted:
    """A poison file, as read back, and what crafting it took.

    Attributes:
        path: the file.
        poison: what it holds.
        seconds: crafting time.
        log: what the attack measured on its way.
    """

    path: Path
    poison: PoisonSet
    seconds: float
    log: list[LogRow]


@dataclass(frozen=True)
class Finished:
    """A record, and the folder that it and its pictures lie in."""

    record: Record
    folder: Path


def craft(request: Request, out: Path, *, fresh: bool = False) -> Crafted:
    """Craft a poison and store it, or find the one that is there.

    Raises:
        UserError: the budget does not suit the attack or the data, or nothing can be written.
    """
    dataset, folder = _prepare(request, out, fresh)
    return _craft(request, dataset, folder)


def run(request: Request, out: Path, *, fresh: bool = False) -> Finished:
    """Craft, retrain victims in pairs, and write the record and its pictures.

    Raises:
        UserError: as `craft`.
    """
    # A defence is measured anew; the poison, and what undefended victims scored, stay.
    dataset, folder = _prepare(request, out, fresh and request.setting.defense is None)
    crafted = _craft(request, dataset, folder)
    if request.setting.defense is not None:
        # The poison is the undefended run's, and stays there; what defended victims scored lies beside.
        folder = folder.with_name(f"{folder.name}-{_defense_identity(request.setting)}")
        _open(folder, fresh)
        crafted.poison.save(folder / "poison.safetensors")
    about = {
        "attack": request.name,
        "attack_config": attacks.config(request.attack),
        "attack_seed": request.seed,
        "crafting_seconds": round(crafted.seconds, 1),
    }
    return _measure(request.setting, dataset, crafted, folder, request.command, about, reuse=not fresh)


def evaluate(
    source: Path, setting: Setting, name: str | None, command: str, out: Path, *, fresh: bool = False
) -> Finished:
    """Retrain victims on a poison that is there already.

    Args:
        source: a poison file, which may come from anybody, or the folder of a run, whose attack, options
            and crafting time the new record takes over.
        setting: data and victims.
        name: whose poison it is; None for the run's attack, or else the file's name.
        command: what the user typed.
        out: folder for runs.
        fresh: train victims anew.

    Raises:
        UserError: the file is not valid, breaks its budget, or is for other data; or the defence cannot
            work.
    """
    file = source / "poison.safetensors" if source.is_dir() else source
    poison = PoisonSet.load(file)
    about = _about(source, poison, name)
    name = about["attack"]
    if not re.fullmatch(NAME, name):  # `match` would let a last line end pass
        raise UserError(
            f"--name {name[:80]!r}: use up to 64 letters, digits, '-' and '_', a letter or digit first"
        )
    dataset = load_data(setting)
    poison.check(dataset.train_images, dataset.train_labels, dataset.num_classes)
    _require_defense(setting, dataset, poison.budget)
    decides = {"poison": poison.hash, "victims": harness.victim_code(), "about": about}
    folder = out / setting.track.name / f"{name}-{_identity(setting, dataset, decides)}"
    if setting.defense is not None:
        folder = folder.with_name(f"{folder.name}-{_defense_identity(setting)}")
    _open(folder, fresh)
    kept = folder / "poison.safetensors"
    poison.save(kept)
    crafted = Crafted(kept, PoisonSet.load(kept), 0.0, [])
    return _measure(setting, dataset, crafted, folder, command, about, reuse=not fresh)


def data_of(source: Path) -> dict[str, Any]:
    """The track and data of a run, as options of the command line; none for a poison file.

    Raises:
        UserError: the folder is not that of a finished run.
    """
    if not source.is_dir():
        return {}
    record = Record.load(source / "record.json")
    sizes = record.dataset.model_dump()
    return {"track": record.track, "dataset": sizes.pop("name"), **sizes}


def _about(source: Path, poison: PoisonSet, name: str | None) -> dict[str, Any]:
    """Whose poison it is: as the run's record says, unless another name is given."""
    if name is not None or not source.is_dir():
        whose = source.stem if name is None else name
        return {"attack": whose, "attack_config": {}, "attack_seed": 0, "crafting_seconds": None}
    record = Record.load(source / "record.json")
    record.require(poison, source)
    kept = ("attack", "attack_config", "attack_seed", "crafting_seconds")
    return {field: getattr(record, field) for field in kept}


def publish(folder: Path, results: Path) -> Path:
    """Copy a finished run to where committed records live: `<track>/<attack>/<defence>/<run>`.

    Raises:
        UserError: the run is not finished, or is there already: records are never overwritten.
    """
    record = Record.load(folder / "record.json")
    record.require(PoisonSet.load(folder / "poison.safetensors"), folder)
    target = results / record.track / record.attack / record.defense / folder.resolve().name
    # A poison meets many defences, and its pictures are the same each time.
    copy_whole(folder, target, PUBLISHED if record.defense != "none" else (*PUBLISHED, PICTURES))
    return target


def copy_whole(folder: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files that match to a new folder, which appears when all of them are in it.

    Raises:
        UserError: the new folder is there already, or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} is there already, and records are never overwritten")
    require_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            shutil.copyfile(path, partial / path.name)
    partial.rename(target)


def _prepare(request: Request, out: Path, fresh: bool) -> tuple[data.Dataset, Path]:
    """Everything that can be refused is refused here, before anything is written."""
    setting = request.setting
    request.attack.require(setting.budget)
    dataset = load_data(setting)
    setting.budget.count(len(dataset.train_labels))  # refuses a fraction that selects no image
    harness.victim_code()  # kept from here on: of the code that runs, whatever is edited meanwhile
    _require_defense(setting, dataset, setting.budget)
    folder = out / setting.track.name / f"{request.name}-{request.identity(dataset)}"
    _open(folder, fresh)
    return dataset, folder


def _require_defense(setting: Setting, dataset: data.Dataset, budget: Budget) -> None:
    """Refuse a defence that cannot work on these victims.

    Raises:
        UserError: naming what to change.
    """
    if setting.defense is None:
        return
    number = len(dataset.train_labels)
    for recipe in setting.recipes.values():
        setting.defense.require(recipe, number, budget.count(number), len(dataset.val_labels))


def load_data(setting: Setting) -> data.Dataset:
    """The data, once it is sure that every victim can be trained on it.

    Raises:
        UserError: there is no such data, or a recipe does not suit it.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from poisonbench.victim.network import architecture
    from poisonbench.victim.optimizer import make_optimizer

    code_version()  # kept from here on: that of the code that runs, whatever is committed meanwhile
    compute.setup()
    dataset = data.load(setting.dataset, setting.data_dir)
    height, width, channels = dataset.train_images.shape[1:]
    for recipe in setting.recipes.values():
        architecture(recipe, (height, width, channels), dataset.num_classes)
        plain = make_optimizer(recipe, recipe.num_steps(len(dataset.train_labels)))
        o = optax.with_extra_args_support(plain)
        try:
            jax.eval_shape(lambda w, o=o: o.update(w, o.init(w), w, value=0.0), {"w": jnp.zeros((2, 2))})
        except Exception as error:  # whatever an optimizer with other needs raises
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"optimizer {recipe.optimizer} cannot train a victim: {why}") from None
    return dataset


@cache  # of the code that runs, whatever is edited meanwhile
def _source(attack: type[attacks.Attack]) -> str:
    return Path(inspect.getfile(attack)).read_text("utf-8")


@cache
def _crafting_sources() -> str:
    """The library's code that decides a poison."""
    root = Path(__file__).parent
    names = (
        "arrays.py", "ascent.py", "attacks/__init__.py", "compute.py", "data.py", "flips.py",
        "perturb.py", "problem.py", "threat.py", "trained.py", "metagradient/*.py", "optimizers/*.py",
        "victim/*.py",
    )  # fmt: skip
    return "".join(path.read_text("utf-8") for name in names for path in sorted(root.glob(name)))


def _open(folder: Path, fresh: bool) -> None:
    require_writable(folder)
    if not fresh:
        return
    # The record goes first: a run is finished where its record is there.
    (folder / "record.json").unlink(missing_ok=True)
    for path in [path for pattern in OURS for path in folder.glob(pattern)]:
        if ".corrupt-" not in path.name:
            path.unlink()


def _craft(request: Request, dataset: data.Dataset, folder: Path) -> Crafted:
    path, about = folder / "poison.safetensors", folder / "crafting.json"
    if not (path.exists() and about.exists()):
        task = attacks.Task.of(dataset, request.setting.budget, request.setting.surrogate)
        journal = Journal(folder)
        poison = request.attack.craft(task, harness.crafting_key(request.seed), journal)
        poison.check(dataset.train_images, dataset.train_labels, dataset.num_classes)
        write_text(about, json.dumps({"seconds": journal.seconds, "log": journal.rows}, indent=1))
        poison.save(path)
    stored = json.loads(about.read_text("utf-8"))
    return Crafted(path, PoisonSet.load(path), float(stored["seconds"]), stored["log"])


def _measure(
    setting: Setting,
    dataset: data.Dataset,
    crafted: Crafted,
    folder: Path,
    command: str,
    about: dict[str, Any],
    *,
    reuse: bool,
) -> Finished:
    path = folder / "record.json"
    if path.exists():
        record = Record.load(path)
        same_seeds = all(tuple(v.seeds) == setting.seeds for v in record.victims)
        if same_seeds and record.poison_hash == crafted.poison.hash:
            return Finished(record, folder)
    done = harness.evaluate(
        dataset,
        crafted.poison,
        setting.recipes,
        setting.seeds,
        folder.parent / "victims",
        reuse=reuse,
        defense=setting.defense,
    )
    record = Record(
        track=setting.track.name, custom=list(setting.custom), **about,
        dataset=setting.dataset, hashes=dataset.hashes(), budget=crafted.poison.budget,
        num_train=len(dataset.train_labels), num_poison=len(crafted.poison),
        surrogate=setting.track.surrogate, victims=done.victims,
        defense=setting.defense_name, defense_config=_defense_config(setting),
        poison_hash=crafted.poison.hash, evaluation_seconds=round(done.seconds, 1),
        **provenance(command),
    )  # fmt: skip
    path.unlink(missing_ok=True)  # of other seeds; kept until it can be replaced
    _write_tables(record, crafted, folder)
    from poisonbench import pictures

    pictures.write(record, crafted.poison, crafted.log, dataset, folder)
    record.save(path)  # last: a run is finished where its record is there
    return Finished(record, folder)


def _write_tables(record: Record, crafted: Crafted, folder: Path) -> None:
    import pandas as pd

    accuracies = pd.DataFrame(
        {
            "recipe": victim.recipe_name, "seed": victim.seeds,
            "clean": victim.clean, "poisoned": victim.poisoned,
            "clean_best": victim.clean_best, "poisoned_best": victim.poisoned_best,
        }
        for victim in record.victims
    ).explode(["seed", "clean", "poisoned", "clean_best", "poisoned_best"])  # fmt: skip
    for name, table in (("accuracies", accuracies), ("crafting", pd.DataFrame(crafted.log))):
        if len(table):
            with replacing(folder / f"{name}.csv") as temporary:
                table.to_csv(temporary, index=False, lineterminator="\n")


def _defense_config(setting: Setting) -> dict[str, Any]:
    if setting.defense is None:
        return {}
    from poisonbench import defenses

    return defenses.config(setting.defense)


def _defense_identity(setting: Setting) -> str:
    from poisonbench import defenses

    assert setting.defense is not None
    decides = [setting.defense_name, _defense_config(setting), defenses.sources(setting.defense)]
    return f"{setting.defense_name}-{digest(decides)[:8]}"


def _identity(setting: Setting, dataset: data.Dataset, rest: dict[str, Any]) -> str:
    everything = {
        "version": __version__,
        "data": dataset.hashes(),
        "dataset": setting.dataset.model_dump(),
        "budget": setting.budget.model_dump(),
        "recipes": {name: recipe.as_dict() for name, recipe in setting.recipes.items()},
        **rest,
    }
    return digest(everything)[:8]
