"""What an author says of an entry, beside what was measured.

The manifest travels in the bundle, and is kept as `entry.json` beside the entry's record: a record with
that file beside it came in by submission.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from poisonbench.stored import Frozen, Hash, Name, Stored
from poisonbench.texts import Address, BibTeX, Licence, Line, Text

FILE = "entry.json"


class Member(Frozen):
    """A file of a bundle: its bytes, and SHA-256 over them."""

    size: Annotated[int, Field(ge=0, strict=True)]
    sha256: Hash


class Manifest(Stored):
    """An entry, in its author's words. No field may be missing; those that say nothing are empty.

    Attributes:
        name: of the entry, as in the record; it becomes a folder and a row.
        title: the same for people.
        authors: who made it.
        description: what it does.
        paper: where it is described.
        bibtex: how to cite it.
        code: where its code is public; None for a poison that enters alone.
        licence: that the poison may be kept and shown under, as an SPDX identifier.
        files: the other members of the bundle.
    """

    kind: ClassVar[str] = "manifest"
    schema_version: Literal[1]
    name: Name
    title: Line
    authors: Annotated[list[Line], Field(min_length=1, max_length=100)]
    description: Text
    paper: Address | None
    bibtex: BibTeX
    code: Address | None
    licence: Licence
    files: Annotated[dict[Literal["record.json", "poison.safetensors"], Member], Field(min_length=2)]


def entry_of(folder: Path) -> Manifest | None:
    """What the author of an entry says of it; None where a record did not come by submission.

    Raises:
        UserError: the file is not valid.
    """
    path = folder / FILE
    return Manifest.load(path) if path.is_file() else None
