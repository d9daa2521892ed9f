"""What every attack must keep, as checks: `poisonbench check` runs them on one, the tests on all.

A check is a function of an `Entry`. It returns a remark, or raises `Failed` with what is wrong and how
to fix it, or `Inapplicable` where the attack does not claim what the check is about. There is no
special case by name, and every problem is tiny: what an attack is worth is for a run to say.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, get_type_hints

import numpy as np
from pydantic import TypeAdapter

from poisonbench import _described, attacks, data, harness, runs
from poisonbench._entry import (
    ENOUGH,
    GAMES,
    KEEP_TO_IT,
    SHAPES,
    TINY,
    Entry,
    Failed,
    Inapplicable,
    Interrupting,
    Killed,
    Peeked,
    Watched,
    only,
    require_described,
    tiny,
)
from poisonbench._plugins import options
from poisonbench.attacks import Attack, Task
from poisonbench.data import DataSpec
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.setting import Setting
from poisonbench.threat import Budget, LInf, PoisonSet
from poisonbench.tracks import DIGITS

__all__ = [
    "CHECKS",
    "TINY",
    "Check",
    "Entry",
    "Failed",
    "Inapplicable",
    "Point",
    "judge",
    "require_described",
    "tiny",
]

HARM = (
    Budget(fraction=0.2, labels="free"),
    Budget(fraction=1, pixels=LInf(radius=80)),
    Budget(fraction=0.2),
    Budget(fraction=0.2, labels="free", pixels=LInf(radius=80)),
    Budget(fraction=0.2, pixels=LInf(radius=80)),
    Budget(fraction=0.2, mode="add"),
)
"""The first of these that an attack accepts is where it has to show an effect."""
HUNDRED = DataSpec(name="digits", train_size=100, val_size=200, test_size=200)
LEARNS = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=12, norm_momentum=0.8)
FLOOR = 2.0
"""Test error that an attack adds, in points, on a hundred digits of which a fifth is poisoned."""


@dataclass(frozen=True)
class Check:
    """A rule.

    Attributes:
        title: what is checked.
        run: the function of an entry.
        slow: it takes many seconds for some attacks.
    """

    title: str
    run: Callable[[Entry], str]
    slow: bool = False


@dataclass(frozen=True)
class Point:
    """How an entry stands on one check.

    Attributes:
        title: of the check.
        status: `skipped` where the attack does not claim what the check is about.
        said: what is wrong, or why it was skipped, or a remark; may be empty.
        fix: what to change, where it failed.
        seconds: that the check took.
    """

    title: str
    status: Literal["passed", "failed", "skipped"]
    said: str = ""
    fix: str = ""
    seconds: float = 0.0


def interface(entry: Entry) -> str:
    """One frozen dataclass, documented, that can be built and plays a game."""
    require_described(entry.cls, sys.modules[entry.cls.__module__].__doc__ or "", Attack)
    entry.built()
    played = sum(entry.accepts(game) for game in GAMES if entry.game)
    return f"plays {played} of {len(GAMES)} games"


def metadata(entry: Entry) -> str:
    """The docstrings name the paper, with its address, and the cost."""
    said = _described.described(entry.cls)
    if entry.cls.control:
        raise Inapplicable("a control needs no paper")
    if not re.search(r"https?://|\bdoi:|\barXiv:|Paper: none", said):
        raise Failed(
            "the docstring names no paper",
            "add `Paper: authors, title, year, address`, or `Paper: none`",
        )
    if "Cost:" not in said:
        raise Failed("the docstring does not state the cost", "add `Cost: …` in victim trainings")
    left = len(re.findall(r"\bTODO\b", said))
    return f"{left} × TODO in the docstring, to be filled in before it is submitted" if left else ""


def readable_options(entry: Entry) -> str:
    """Every option can be typed, none hides behind one of the verbs, and a record can hold them."""
    attack, hints = entry.built({}), get_type_hints(entry.cls)
    taken = _options_of_verbs()
    for field in options(entry.cls):
        option, value = f"--{field.name.replace('_', '-')}", getattr(attack, field.name)
        if option in taken:
            raise Failed(f"{option} is an option of `poisonbench run`", f"rename the field {field.name}")
        if value is None:
            continue
        try:
            read = TypeAdapter(hints[field.name]).validate_strings(str(value))
        except Exception:  # whatever pydantic says of a type that it cannot read
            read = None
        if read != value:
            raise Failed(
                f"{option} {value} cannot be typed on the command line",
                f"give {field.name} a type of one word: int, float, bool, str, or a Literal",
            )
    json.dumps(attacks.config(attack))
    return " ".join(f"--{option} {value}" for option, value in entry.typed().items())


def refused_options(entry: Entry) -> str:
    """A number that makes no sense is refused in one line that names the option, or works."""
    hints, refused = get_type_hints(entry.cls), 0
    for field in options(entry.cls):
        option = f"--{field.name.replace('_', '-')}"
        numbers = {int, float} & {hints[field.name], *getattr(hints[field.name], "__args__", ())}
        if not numbers:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # what is no number is cast to one
                bad = attacks.build(entry.name, [*entry.typed().items(), (option[2:], "-1")])
                entry.craft(entry.game, bad)
        except UserError as refusal:
            refused += 1
            if option not in str(refusal) or "\n" in str(refusal):
                raise Failed(
                    f"{option} -1 is refused with: {refusal}",
                    f"name {option} in that line, and what it may be",
                ) from None
        except Exception as error:
            raise Failed(
                f"{option} -1 ends with {_line(error)}",
                f'refuse it in __post_init__: raise UserError("{option} must be …")',
            ) from error
    return f"{refused} refused"


def keeps_budget(entry: Entry, game: Budget) -> str:
    """The poison, stored and read back, is within the budget and for the data it was made for."""
    try:
        entry.built().require(game)
    except UserError as refusal:
        raise Inapplicable(f"not played: {refusal}") from None
    poison, problem = entry.crafted(game), tiny()
    try:
        stored, _ = _stored(poison)
        stored.check(problem.train_images, problem.train_labels, problem.num_classes)
    except UserError as refusal:
        raise Failed(str(refusal), KEEP_TO_IT) from None
    if stored.hash != poison.hash or stored.budget != game:
        raise Failed("the poison is not for the budget that was given", KEEP_TO_IT)
    return f"{len(poison)} of {game.count(len(problem.train_labels))} images"


def is_deterministic(entry: Entry, game: Budget) -> str:
    """The same key gives the same file, byte for byte."""
    if not entry.accepts(game):
        raise Inapplicable("not played")
    if _stored(entry.crafted(game))[1] != _stored(entry.craft(game))[1]:
        raise Failed(
            "two runs with the same key made different poisons",
            "draw from `key` alone, as by np.random.default_rng(np.asarray(jax.random.key_data(key)))",
        )
    return ""


def ignores_test_split(entry: Entry) -> str:
    """White images of classes that there are not: whoever looked at them would do otherwise, or fail."""
    problem = tiny()
    pills = replace(
        problem,
        test_images=np.full_like(problem.test_images, 255),
        test_labels=np.full_like(problem.test_labels, 99),
    )
    victims = {"smooth": TINY, "standard": TINY}
    setting = Setting(DIGITS, (), problem.spec, None, entry.game, victims, (0, 1))
    request = runs.Request(setting, entry.name, entry.built(), 3, "")
    fix = "use nothing but the task: what an attacker may know is in it, and the test split is not"
    hashes = []
    for split in (problem, pills):
        with tempfile.TemporaryDirectory() as folder, only(split):
            try:
                hashes.append(runs.craft(request, Path(folder)).poison.hash)
            except Peeked:
                raise Failed("it reads the data by itself", fix) from None
            except Exception as error:
                if split is problem:
                    raise
                raise Failed(f"on other test images it ends with {_line(error)}", fix) from error
    if hashes[0] != hashes[1]:
        raise Failed("it makes another poison where test images differ", fix)
    return ""


def reports_progress(entry: Entry) -> str:
    """An attack that trains or climbs says how far it has come; one that does neither need not."""
    attack, journal = entry.built(), Watched()
    entry.craft(entry.game, attack, journal)
    long = journal.rows or {"steps", "rounds"} & {field.name for field in options(entry.cls)}
    fix = "open `with journal.progress(title, total) as bar:`; bar.advance() once a step, to the end"
    if long and not journal.bars:
        raise Failed("it takes steps and shows no progress", fix)
    for total, moved in journal.bars:
        if moved[0] != total:
            raise Failed(f"a bar of {total} steps ended at {moved[0]}", fix)
    return "" if journal.bars else "no bar, which an attack that takes seconds would need"


def survives_interruption(entry: Entry) -> str:
    """Killed after any checkpoint and started again, it ends with the same bytes."""
    game = entry.game
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "whole").mkdir()
        whole = Journal(folder / "whole")
        expected = entry.craft(game, journal=whole).hash
        # After each of the first checkpoints, and then ever more seldom.
        for saves in [*range(1, 10), *(9 * 2**i for i in range(1, 9))]:
            place = folder / str(saves)
            place.mkdir()
            try:
                entry.craft(game, journal=Interrupting(place, saves))
            except Killed:
                _require_resumed(entry, place, whole, expected)
            else:
                return f"{saves - 1} checkpoints" if saves > 1 else "keeps no checkpoint"
    raise Failed("it never ends", "count what is done in the checkpoint, and go on from there")


def does_harm(entry: Entry) -> str:
    """Victims that it was not fitted to err more often, by the floor, than on clean data.

    What it does beyond noise, or beyond its own start, is for the records to say.
    """
    attack = entry.built(ENOUGH)
    if attack.control:
        raise Inapplicable("a control does no harm by its choices")
    digits = data.load(HUNDRED)
    game = next((game for game in HARM if entry.accepts(game)), entry.game)
    view = Task.of(digits, game, LEARNS)
    poison = attack.craft(view, harness.crafting_key(0), Journal())
    clean = _clean_error()
    if clean >= 40:
        raise RuntimeError("victims that have learnt nothing would prove nothing")
    poisoned = _error(*poison.apply(digits.train_images, digits.train_labels))
    said = f"victims of 100 digits err on {clean:.1f} % of others, and poisoned on {poisoned:.1f} %"
    if not poisoned > clean + FLOOR:
        raise Failed(
            said,
            f"it must cost {FLOOR:g} points under {view.budget.game()}: look for a sign that is wrong,"
            " or poison that is clipped away; a control says `control = True`",
        )
    return said


def judge(entry: Entry, check: Check) -> Point:
    """How an entry stands on a check, whatever its code does."""
    began = time.monotonic()
    fix = ""
    status: Literal["passed", "failed", "skipped"] = "failed"
    try:
        status, said = "passed", check.run(entry)
    except Inapplicable as why:
        status, said = "skipped", str(why)
    except Failed as failure:
        said, fix = str(failure), failure.fix
    except UserError as refusal:
        said, fix = str(refusal), "fix the attack, or give it options that it takes"
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        said, fix = _line(error), "fix the error; --verbose shows where it comes from"
    return Point(check.title, status, said, fix, round(time.monotonic() - began, 1))


def _options_of_verbs() -> set[str]:
    import typer

    from poisonbench.cli import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {option for verb in ("run", "craft") for p in verbs[verb].params for option in p.opts}


def _stored(poison: PoisonSet) -> tuple[PoisonSet, bytes]:
    """As it is read back, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "poison.safetensors"
        poison.save(path)
        return PoisonSet.load(path), path.read_bytes()


def _require_resumed(entry: Entry, folder: Path, whole: Journal, expected: str) -> None:
    """Gone on with from the checkpoint, it ends as if nothing had been."""
    journal = Journal(folder)
    poison = entry.craft(entry.game, journal=journal)
    if poison.hash != expected:
        raise Failed(
            "interrupted and started again, it makes another poison",
            "save all that the next step needs, and draw its randomness by jax.random.fold_in(key, i)",
        )
    steps = [row["metastep"] for row in journal.rows if "metastep" in row]
    if len(journal.rows) != len(whole.rows) or len(set(steps)) != len(steps):
        raise Failed(
            f"interrupted and started again, it logs {len(journal.rows)} rows and not {len(whole.rows)}",
            "log a step's row in the journal.save that ends the step",
        )


@cache
def _clean_error() -> float:
    digits = data.load(HUNDRED)
    return _error(digits.train_images, digits.train_labels)


def _error(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of test images that victims get wrong, in percent: the mean of five."""
    import jax.numpy as jnp

    from poisonbench.victim.evaluation import train_and_score
    from poisonbench.victim.training import TrainingSet

    digits = data.load(HUNDRED)
    keys = jnp.stack([harness.evaluation_key(seed) for seed in range(5)])
    training = TrainingSet.clean(images, labels, digits.num_classes)
    scores = train_and_score(LEARNS, training, keys, digits.test_images, digits.test_labels)
    return 100 - float(scores[:, -1].mean())


def _line(error: BaseException) -> str:
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])


CHECKS = (
    Check("interface", interface),
    Check("metadata", metadata),
    Check("options", readable_options),
    Check("bad options", refused_options),
    *(Check(f"budget: {game.game()}", partial(keeps_budget, game=game), i >= SHAPES)
      for i, game in enumerate(GAMES)),
    *(Check(f"same key, same bytes: {game.game()}", partial(is_deterministic, game=game), i >= SHAPES)
      for i, game in enumerate(GAMES)),
    Check("test data untouched", ignores_test_split),
    Check("progress", reports_progress),
    Check("interruption", survives_interruption),
    Check("effect", does_harm, slow=True),
)  # fmt: skip
"""All of them, in the order in which they are worth fixing."""
