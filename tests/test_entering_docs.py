"""The commands of `docs/entering.md` run, in their order, and lead to a row on the board.

They are the page's own, word for word, in a folder like a checkout, on a digits track of a hundred
images with victims of width 2 and two seeds. Those of a verb that is not there are not run, and that is
said.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import typer
from commandline import Run, cli
from docpages import DOCS, commands, filled_in

from poisonbench import attacks, tracks
from poisonbench.conformance import CHECKS
from poisonbench.records import Record
from poisonbench.threat import Budget
from poisonbench.tracks import DIGITS

VERBS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, and the digits track at a size at which a test can train its victims."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "README.md").write_text("<!-- leaderboard: begin -->\n<!-- leaderboard: end -->\n")
    for folder in ("attacks", "results"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path / "attacks")])
    monkeypatch.setitem(sys.modules, "poisonbench.attacks.my_attack", None)
    monkeypatch.delitem(sys.modules, "poisonbench.attacks.my_attack")
    small = DIGITS.dataset.model_copy(update={"train_size": 100, "val_size": 50, "test_size": 50})
    victims = {
        name: r.replace(network="cnn", width=2, epochs=1, batch_size=50)
        for name, r in DIGITS.recipes.items()
    }
    tiny = replace(
        DIGITS, dataset=small, budget=Budget(fraction=0.1), recipes=MappingProxyType(victims), seeds=2
    )
    monkeypatch.setattr(tracks, "TRACKS", MappingProxyType({"digits": tiny}))
    monkeypatch.setenv("POISONBENCH_SECRET", str(tmp_path / "private" / "secret"))
    return tmp_path


@pytest.mark.slow
def test_the_commands_run(command: Run, checkout: Path) -> None:
    typed, missing = commands("entering.md"), set()
    assert {words[0] for words in typed} >= {"new", "check", "show", "run", "submit", "leaderboard"}
    for words in typed:
        if words[0] not in VERBS:
            missing.add(words[0])
            continue
        code, out, err = command(*filled_in(words, checkout))
        assert code == 0, (words, out, err)
    (record,) = (checkout / "results/digits/my_attack/none").glob("*/record.json")
    assert Record.load(record).attack == "my_attack"
    for page in ("README.md", "results/README.md"):
        assert "my\\_attack" in (checkout / page).read_text("utf-8")
    if missing:
        pytest.skip(f"NOT TESTED: docs/entering.md: there is no verb {', '.join(sorted(missing))}")


def test_every_point_of_a_check_is_on_the_page() -> None:
    commands("entering.md")
    page = (DOCS / "entering.md").read_text("utf-8")
    points = {check.title.partition(":")[0] for check in CHECKS}
    (table,) = [part for part in page.split("\n\n") if part.startswith("| point |")]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    told = {name.strip() for row in rows for name in row.split(", ")}
    assert told | {"same key, same bytes"} == points | {"same key", "same bytes"}
    assert all(len(line) <= 110 or line.startswith("|") for line in page.splitlines())
