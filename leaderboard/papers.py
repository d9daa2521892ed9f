"""What an entry is to be cited by: the attack's paper, and the entry itself, as BibTeX.

An attack of this repository names its paper in its docstring, in one form: `Paper: authors, "title",
venue year, address`. An entry that was handed in says in its `entry.json` who made it. Both are read as
text; nothing is imported or run.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from poisonbench import attacks
from poisonbench.errors import UserError
from poisonbench.records import Record

from .games import Row, crafted

FILE = "entry.json"
LARGEST = 2**16
"""Bytes of an `entry.json` that are read."""
PAPER = re.compile(
    r'Paper: (?P<authors>[^"]+), "(?P<title>[^"]+)", (?:(?P<venue>[^",]+) )?(?P<year>\d{4}),'
    r" (?P<address>https?://[\w./-]*\w)"
)
JOURNALS = ("JMLR", "TMLR")
ARXIV = re.compile(r"https://arxiv\.org/abs/(\d+\.\d+)$")


@dataclass(frozen=True)
class Entry:
    """What its author says of an entry; every text may be empty.

    Attributes:
        author: who made it.
        description: of the attack, in a few sentences.
        paper: where it is described: a title or an address.
        bibtex: of that paper, as its author wrote it.
        code: address of the code.
    """

    author: str = ""
    description: str = ""
    paper: str = ""
    bibtex: str = ""
    code: str = ""


def entry_of(folder: Path, beside: frozenset[str]) -> Entry:
    """What lies beside a record in `entry.json`; empty where there is none.

    Args:
        folder: of the record.
        beside: names of the files in it.

    Raises:
        UserError: the file is not valid.
    """
    if FILE not in beside:
        return Entry()
    path = folder / FILE
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST} bytes: shorten its texts")
        said = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a valid description of an entry") from None
    if not isinstance(said, dict):
        raise UserError(f"{path} is not a valid description of an entry")
    fields = Entry.__dataclass_fields__
    return Entry(**{name: said[name] for name in fields if isinstance(said.get(name), str)})


def address(text: str) -> str | None:
    """The text where it is an address that a page may link to, http or https, and nothing else."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    plain = re.fullmatch(r"[!-~]{1,500}", text) is not None
    return text if plain and parts.scheme in ("http", "https") and parts.hostname else None


def of_attack(record: Record) -> str:
    """BibTeX of the paper that the record's attack names, where it was crafted by one of ours."""
    found = PAPER.search(" ".join(docstring(record.attack).split())) if crafted(record) else None
    if found is None:
        return ""
    authors = re.split(r", | and ", found["authors"].replace(" et al.", ", others"))
    fields = {
        "title": f"{{{_tex(found['title'])}}}", "author": " and ".join(map(_tex, authors)),
        "year": found["year"],
    }  # fmt: skip
    kind = "misc"
    if venue := found["venue"]:
        kind, where = ("article", "journal") if venue in JOURNALS else ("inproceedings", "booktitle")
        fields[where] = _tex(venue)
    if arxiv := ARXIV.match(found["address"]):
        fields |= {"eprint": arxiv[1], "archiveprefix": "arXiv"}
    fields["url"] = found["address"]
    return _bibtex(kind, _key(authors[0], found["year"], found["title"].split()[0]), fields)


def of_entry(row: Row, entry: Entry) -> str:
    """BibTeX of one entry of the board."""
    record = row.record
    fields = {
        "title": f"{{Entry {_tex(row.name)} of poisonbench, track {_tex(record.track)}}}",
        "author": f"{{{_tex(entry.author or 'The poisonbench authors')}}}",
        "year": row.date[:4],
        "note": _tex(
            f"poisonbench {record.code.get('version') or '?'}, measured {row.date},"
            f" poison SHA-256 {record.poison_hash}"
        ),
    }
    return _bibtex("misc", _key("poisonbench", record.track, record.poison_hash[:8]), fields)


def summary(record: Record) -> str:
    """The first line of the docstring of the record's attack, where it was crafted by one of ours."""
    lines = docstring(record.attack).splitlines() if crafted(record) else []
    return lines[0] if lines else ""


@cache
def docstring(attack: str) -> str:
    """The docstring of an attack of this repository, read without importing it.

    Attacks that other packages bring are not looked at: the same records must give the same pages
    whatever else is installed.
    """
    for module in pkgutil.iter_modules(attacks.__path__):
        spec = module.module_finder.find_spec(module.name, None) if module.name == attack else None
        if spec is not None and spec.origin is not None:
            return ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    return ""


def _bibtex(kind: str, key: str, fields: dict[str, Any]) -> str:
    width = max(map(len, fields))
    lines = ",\n".join(f"  {name:{width}} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}\n}}"


def _key(*parts: str) -> str:
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)


def _tex(text: str) -> str:
    """Text that TeX prints as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "{}%&#_$" else c) for c in " ".join(text.split()))
