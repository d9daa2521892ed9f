"""The commands of a page of `docs/`, to be run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def commands(name: str) -> list[list[str]]:
    """The words of every command in a page's `sh` blocks, in order, without `poisonbench` itself."""
    page = DOCS / name
    if not page.is_file():
        pytest.skip(f"no {page}: the pages are in a checkout only")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    typed = [shlex.split(line, comments=True) for line in lines if line.strip()]
    assert all(words[0] == "poisonbench" for words in typed)
    return [words[1:] for words in typed]


def filled_in(words: list[str], folder: Path) -> list[str]:
    """The words with their stars filled in as a shell would."""
    filled: list[str] = []
    for word in words:
        found = (
            sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else []
        )
        assert found or "*" not in word, f"nothing matches {word}"
        filled += found or [word]
    return filled
