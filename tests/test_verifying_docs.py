"""The commands of `docs/verifying.md` run, in their order, and leave what the page says.

They are the page's own, word for word, in an empty folder, on a digits track of a hundred images with
victims of width 2 and two seeds; stars are filled in as a shell would. Which files an entry has and
which limits the page names is held against the code.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import bundles
import pytest
from commandline import Run

from poisonbench.records import Record
from poisonbench.submission import bundle
from poisonbench.submission.manifest import entry_of
from poisonbench.verification import Verification, disputes_of

PAGE = Path(__file__).parents[1] / "docs" / "verifying.md"


@pytest.fixture
def page() -> str:
    if not PAGE.is_file():
        pytest.skip(f"no {PAGE}: the pages are in a checkout only")
    return PAGE.read_text("utf-8")


def commands(page: str) -> list[list[str]]:
    """The words of every command of the page."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def filled_in(words: list[str], folder: Path) -> list[str]:
    """The words with their stars replaced by the first path that matches."""
    found = [sorted(folder.glob(word)) if "*" in word else [] for word in words]
    assert all(paths for paths, word in zip(found, words, strict=True) if "*" in word), words
    return [
        str(paths[0].relative_to(folder)) if paths else word
        for paths, word in zip(found, words, strict=True)
    ]


@pytest.mark.slow
def test_the_commands_run(
    page: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles.shrink(monkeypatch, seeds=2)
    monkeypatch.setenv("POISONBENCH_SECRET", str(tmp_path / "private" / "secret"))
    (tmp_path / "their.bib").write_text("@misc{noise, title = {Noise}}\n")
    typed = commands(page)
    assert {words[1] for words in typed} >= {"submit", "verify", "dispute", "evaluate"}
    for words in typed:
        assert words[0] == "poisonbench"
        code, _, err = command(*filled_in(words[1:], tmp_path))
        assert code == 0, (words, err)
    (entry,) = (tmp_path / "results/digits/their_noise/none").iterdir()
    said, claim = entry_of(entry), Record.load(entry / "record.json")
    assert said is not None
    assert said.authors == ["Ada Lovelace", "Grace Hopper"]
    assert Verification.load(entry / "verification.json").poison_hash == claim.poison_hash
    assert [d.author for d in disputes_of(entry, claim)] == ["Mary Somerville"]
    assert "their\\_noise (from a file) (submitted)" in (tmp_path / "results/README.md").read_text()
    (published,) = (tmp_path / "results/digits/noise/none").iterdir()
    assert (published / "verification.json").is_file()
    named = set(re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", page, re.MULTILINE))
    kept = {"dispute-1.json", "evidence-1.json"}
    assert {path.name for path in entry.iterdir()} == named | kept


def test_the_limits_are_those_of_the_reader(page: str) -> None:
    assert list(bundle.LIMITS.values()) == [2**16, 2**20, 2**28]
    assert "64 KiB, 1 MiB and 256 MiB" in page
    for line in page.splitlines():
        assert len(line) <= 110 or line.startswith("|"), line
