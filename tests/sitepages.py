"""Pages of the site as tests read them, and entries to put on them."""

from __future__ import annotations

import importlib
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from test_leaderboard import DIGITS, make

from poisonbench.records import Record
from poisonbench.verification import Dispute, Verification

tables: Any = importlib.import_module("poisonbench.leaderboard.tables")
site_module: Any = importlib.import_module("poisonbench.leaderboard.site")


VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """A page as a browser sees it: its elements, and its text without them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of every element of that name."""
        return [attributes for tag, attributes in self.elements if tag == name]


def built(results: Path) -> dict[str, str]:
    """Every page of the site of these records, by name."""
    site = results.parent / "board"
    tables.update(results, site=site)
    return {p.relative_to(site).as_posix(): p.read_text("utf-8") for p in site.rglob("*.html")}


def body(text: str) -> list[list[str]]:
    """Cells of the first table of a page, as text."""
    first = text.split('<table class="board">')[1].split("<tbody>")[1].split("</tbody>", maxsplit=1)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", first, re.DOTALL)
    return [
        [
            " ".join(Page(c).text.split())
            for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def headings(text: str) -> list[str]:
    first = text.split('<table class="board">')[1].split("<thead>")[1].split("</thead>", maxsplit=1)[0]
    return re.findall(r"<th[^>]*>(.*?)</th>", first)


def verified(record: Record, drop: float, seeds: int = DIGITS.seeds) -> Verification:
    """A verification that measured this drop, give or take what `make` gives."""
    again = make(record.attack, drop, seeds=seeds).victims
    hidden = [v.model_copy(update={"seeds": [seed + 10**6 for seed in v.seeds]}) for v in again]
    same = ("poison_hash", "evaluation_seconds", "created", "command", "code", "libraries", "hardware")
    return Verification(
        victims=hidden, secret_hash="c" * 64, **{name: getattr(record, name) for name in same}
    )


def dispute(record: Record, reason: str, **changes: Any) -> Dispute:
    values: dict[str, Any] = {
        "poison_hash": record.poison_hash, "reason": reason, "author": "someone",
        "created": datetime(2025, 4, 1, tzinfo=UTC),
    }  # fmt: skip
    return Dispute(**values | changes)


def folder_of(results: Path, attack: str) -> Path:
    (folder,) = (results / "digits" / attack / "none").iterdir()
    return folder
