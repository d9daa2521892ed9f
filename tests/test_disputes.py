"""A dispute is written beside the record that it is about, and changes nothing else.

Claims of `poisonbench.submission.disputes` tested here:

- disputes are numbered and kept beside the record, which stays as it is, byte for byte;
- evidence is an address, or a measurement of the same poison, of which a copy is kept;
- texts that are missing, too long or not plain, and evidence of another poison, are refused in one line,
  with nothing written.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import bundles
import pytest
from commandline import Run, refused

from poisonbench.errors import UserError
from poisonbench.records import Record
from poisonbench.verification import Dispute, disputes_of


@pytest.fixture(autouse=True)
def secret(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret").write_text("no record")


def test_a_dispute_marks_and_deletes_nothing(command: Run, tmp_path: Path) -> None:
    folder = bundles.run_folder(tmp_path / "results" / "digits" / "theirs" / "none" / "theirs-1")
    claim = Record.load(folder / "record.json")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    again = bundles.run_folder(tmp_path / "again", drops=[0.1, 0.2] * 5)
    words = ["dispute", str(folder), "--author", "Grace Hopper", "--reason"]
    code, out, err = command(*words, "No drop here.", "--evidence", "again/record.json")
    assert code == 0, err
    assert out.strip() == str(folder / "dispute-1.json")
    code, out, _ = command(*words, "Nor there.", "--evidence", "https://example.org/12", "--json")
    assert code == 0
    assert json.loads(out)["dispute"] == str(folder / "dispute-2.json")
    assert command(*words, "Nowhere.")[0] == 0
    found = disputes_of(folder, claim)
    assert [d.reason for d in found] == ["No drop here.", "Nor there.", "Nowhere."]
    assert [d.evidence for d in found] == ["evidence-1.json", "https://example.org/12", ""]
    assert Record.load(folder / "evidence-1.json") == Record.load(again / "record.json")
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["nowhere", "--reason", "x", "--author", "A"], "cannot read nowhere"),
        (["run", "--reason", "", "--author", "A"], "--reason: "),
        (["run", "--reason", "x" * 2001, "--author", "A"], "--reason: "),
        (["run", "--reason", "<img src=x>", "--author", "A"], "--reason: .*HTML"),
        (["run", "--reason", "x", "--author", "A\nB"], "--author: "),
        (
            ["run", "--reason", "x", "--author", "A", "--evidence", "javascript:1"],
            "neither an address nor",
        ),
        (["run", "--reason", "x", "--author", "A", "--evidence", "other/record.json"], "another poison"),
        (
            ["run", "--reason", "x", "--author", "A", "--evidence", "private/secret"],
            "not a valid record",
        ),
    ],
)
def test_a_dispute_that_says_nothing(words: list[str], hint: str, command: Run, tmp_path: Path) -> None:
    bundles.run_folder(tmp_path / "run")
    bundles.run_folder(tmp_path / "other", bundles.poison(images=bundles.poison().images + 1))
    before = bundles.everything(tmp_path)
    message = refused(command, "dispute", *words)
    assert re.search(hint, message), message
    assert bundles.everything(tmp_path) == before


def test_a_dispute_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dispute-1.json").write_text('{"reason": "x"}')
    with pytest.raises(UserError, match="is not a valid dispute"):
        Dispute.load(tmp_path / "dispute-1.json")
