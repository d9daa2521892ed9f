"""Options of the command line that several verbs share."""

from __future__ import annotations

import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

AttackOption = Annotated[str, typer.Option(help="Attack to craft with; see `poisonbench list`.")]
TrackOption = Annotated[
    str | None, typer.Option(help="Preset of data, budget and victims. [default: by data set]")
]
DatasetOption = Annotated[str | None, typer.Option(help="`digits` or `tfds:<name>`.")]
DataDirOption = Annotated[str | None, typer.Option(help="TFDS data directory. [default: TFDS's own]")]
TrainSizeOption = Annotated[int | None, typer.Option(min=1, help="Training images.")]
ValSizeOption = Annotated[int | None, typer.Option(min=1, help="Validation images.")]
TestSizeOption = Annotated[int | None, typer.Option(min=1, help="Test images.")]
ResolutionOption = Annotated[
    int | None, typer.Option(min=1, help="Side of the images, by area averaging.")
]
SplitSeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the data split.")
]
FractionOption = Annotated[
    float | None, typer.Option(help="Share of the training set that may be poisoned.")
]
LabelsOption = Annotated[str | None, typer.Option(help="`fixed` or `free`.")]
RadiusOption = Annotated[
    int | None, typer.Option(help="Largest change of a pixel, in 8-bit levels. [default: any]")
]
ModeOption = Annotated[
    str | None, typer.Option(help="`replace` clean images by poison, or `add` it beside them.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a recipe: `width=32` for all, `smooth.width=32` for one. Repeatable.",
    ),
]
DefenseOption = Annotated[
    str | None,
    typer.Option(
        help="Defence of the victims, or several with a comma between; see `poisonbench list`."
    ),
]
DefenseSetOption = Annotated[
    list[str] | None,
    typer.Option("--defense-set", help="A defence's option: `spectral.factor=2`. Repeatable."),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the attack or selection.")]
SeedsOption = Annotated[int | None, typer.Option(help="Evaluation seeds per recipe, at least 2.")]
OutOption = Annotated[Path, typer.Option(help="Folder for runs.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_PRIVATE = {"--data-dir": "DIR", "--secret": "FILE"}
"""Where data and secrets lie on this machine is nobody else's business."""


def command(program: str = "poisonbench") -> str:
    """What was typed, for the record: of a path of this machine no more than its last name."""
    told: list[str] = []
    for before, word in pairwise(["", *sys.argv[1:]]):
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            told.append(f"{option}={_private(option, value)}")
        else:
            told.append(_private(before, word))
    return f"{program} {shlex.join(told)}"


def _private(option: str, value: str) -> str:
    if option in _PRIVATE:
        return _PRIVATE[option]
    return f"PATH/{Path(value).name}" if Path(value).is_absolute() else value
