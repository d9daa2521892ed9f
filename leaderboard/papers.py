"""What an entry is to be cited by: the attack's paper, and the entry itself, as BibTeX.

An attack of this repository names its paper in its docstring, in one form: `Paper: authors, "title",
venue year, address`. An entry that was handed in says in its `entry.json` who made it. Both are read as
text; nothing is imported or run.
"""

from __future__ import annotations

import ast
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from poisonbench import attacks
from poisonbench.records import Record
from poisonbench.submission.manifest import Manifest

from .games import Row
from .names import crafted

PAPER = re.compile(
    r'Paper: (?P<authors>[^"]+), "(?P<title>[^"]+)", (?:(?P<venue>[^",]+) )?(?P<year>\d{4}),'
    r" (?P<address>https?://[\w./-]*\w)"
)
JOURNALS = ("JMLR", "TMLR")
ARXIV = re.compile(r"https://arxiv\.org/abs/(\d+\.\d+)$")


def address(text: str | None) -> str | None:
    """The text where it is an address that a page may link to, http or https, and nothing else."""
    if text is None:
        return None
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


def of_entry(row: Row, entry: Manifest | None) -> str:
    """BibTeX of one entry of the board."""
    record = row.record
    authors = entry.authors if entry else ["The poisonbench authors"]
    fields = {
        "title": f"{{Entry {_tex(row.name)} of poisonbench, track {_tex(record.track)}}}",
        "author": " and ".join(f"{{{_tex(author)}}}" for author in authors),
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
