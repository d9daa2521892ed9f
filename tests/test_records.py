"""A record is whole and within its ranges, or it is refused in one line.

Claims of `poisonbench.records` tested here:

- what is saved is what is loaded, to the last digit, and saving it again gives the same bytes;
- scores become paired intervals, by seed, for the last and for the best epoch;
- a file that is missing, is no JSON, lacks a field or has one too many, has another schema version,
  lists of different lengths, fewer than two seeds, accuracies outside 0 to 100, or numbers that are
  not finite, is refused with a `UserError` of one line that names the file and the field;
- a record cannot be changed after it was made;
- `find` gives every record below a folder in order of path, whatever else lies there, and a new
  record does not reorder the old ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic
import pytest

from poisonbench import records
from poisonbench.data import DataSpec
from poisonbench.errors import UserError
from poisonbench.records import Record, VictimScores
from poisonbench.statistics import paired_drop
from poisonbench.stored import Hardware
from poisonbench.threat import Budget, LInf


def make(**changes: Any) -> Record:
    """A record of three seeds; drops of 1, 2 and 3 points, and half of that in the best epoch."""
    victim = VictimScores(
        recipe_name="smooth",
        recipe={"width": 16, "flip": False, "optimizer_options": {"momentum": 0.9}},
        seeds=[0, 1, 2],
        clean=[98.123457, 97.0, 100.0],
        poisoned=[97.123457, 95.0, 97.0],
        clean_best=[99.0, 98.0, 100.0],
        poisoned_best=[98.5, 97.0, 98.5],
    )
    values: dict[str, Any] = {
        "track": "digits",
        "attack": "mgd",
        "attack_config": {"steps": 40, "step_size": 0.1, "start": "auto", "source": None},
        "attack_seed": 0,
        "dataset": DataSpec(name="digits", train_size=500, val_size=500, test_size=797),
        "hashes": {"train": "a" * 64, "val": "b" * 64, "test": "c" * 64},
        "budget": Budget(fraction=0.025, pixels=LInf(radius=8)),
        "num_train": 500,
        "num_poison": 12,
        "surrogate": "smooth",
        "victims": [victim],
        "poison_hash": "d" * 64,
        "crafting_seconds": 312.5,
        "evaluation_seconds": 80.25,
        "created": datetime(2025, 3, 1, 12, 30, tzinfo=UTC),
        "command": "poisonbench run --attack mgd",
        "code": {"version": "0.1.0", "commit": None, "dirty": None},
        "libraries": {"numpy": "2.0.0"},
        "hardware": Hardware(system="Linux x86_64", processor="any", cores=2, device="cpu: cpu"),
    }
    return Record(**values | changes)


def test_round_trip(tmp_path: Path) -> None:
    record = make(custom=["smooth.width=16"], status="invalid", remark="wrong split; see 12 | ä")
    record.save(tmp_path / "a" / "record.json")
    loaded = Record.load(tmp_path / "a" / "record.json")
    assert loaded == record
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a" / "record.json").read_bytes()


def test_numbers_are_stored_as_numbers(tmp_path: Path) -> None:
    make().save(tmp_path / "record.json")
    stored = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert stored["victims"][0]["clean"] == [98.123457, 97.0, 100.0]
    assert stored["budget"]["fraction"] == 0.025
    assert stored["schema_version"] == records.SCHEMA_VERSION


def test_scores_become_paired_intervals() -> None:
    victim = make().victim("smooth")
    assert victim is not None
    assert victim.drop.mean == pytest.approx(2.0)
    assert victim.drop == paired_drop(victim.clean, victim.poisoned)
    assert victim.best_drop.mean == pytest.approx(1.0)
    assert victim.clean_accuracy.mean == pytest.approx(98.374486)
    assert victim.poisoned_accuracy.mean == pytest.approx(96.374486)
    assert make().victim("standard") is None


def test_nothing_changes_afterwards() -> None:
    record = make()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        record.num_poison = 1  # type: ignore[misc]


def at(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    """An edit that sets what lies at a path."""

    def edit(stored: dict[str, Any]) -> None:
        where: Any = stored
        for step in path[:-1]:
            where = where[step]
        where[path[-1]] = to

    return edit


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(stored: dict[str, Any]) -> None:
        del stored[name]

    return edit


def shortened(stored: dict[str, Any]) -> None:
    for name in ("seeds", "clean", "poisoned", "clean_best", "poisoned_best"):
        stored["victims"][0][name] = stored["victims"][0][name][:1]


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (at("schema_version", to=2), "schema_version"),
        (at("schema_version", to="1"), "schema_version"),
        (at("note", to="hello"), "note"),
        (at("budget", "note", to="hello"), "budget.note"),
        (at("victims", 0, "accuracy", to=12.0), "victims.0.accuracy"),
        (without("track"), "track"),
        (without("poison_hash"), "poison_hash"),
        (at("victims", to=[]), "victims"),
        (at("victims", 0, "clean", to=[98.0, 97.0]), "every seed needs one accuracy"),
        (at("victims", 0, "poisoned_best", to=[1.0] * 4), "every seed needs one accuracy"),
        (at("victims", 0, "seeds", to=[0, 1]), "every seed needs one accuracy"),
        (shortened, "victims.0.seeds"),
        (at("victims", 0, "clean", 1, to=100.5), "victims.0.clean.1"),
        (at("victims", 0, "poisoned", 0, to=-0.1), "victims.0.poisoned.0"),
        (at("victims", 0, "clean", 1, to="much"), "victims.0.clean.1"),
        (at("victims", 0, "clean", 1, to=float("nan")), "victims.0.clean.1"),
        (at("victims", 0, "poisoned_best", 2, to=float("inf")), "victims.0.poisoned_best.2"),
        (at("crafting_seconds", to=float("nan")), "crafting_seconds"),
        (at("evaluation_seconds", to=float("inf")), "evaluation_seconds"),
        (at("budget", "fraction", to=float("nan")), "budget.fraction"),
        (at("budget", "fraction", to=1.5), "budget.fraction"),
        (at("budget", "labels", to="some"), "budget.labels"),
        (at("created", to="2025-03-01T12:30:00"), "created"),
        (at("status", to="best"), "status"),
        (at("status", to="invalid"), "needs a remark"),
        (at("status", to="superseded"), "needs a remark"),
        (at("attack", to="../../x"), "attack"),
        (at("defense", to="a b"), "defense"),
        (at("track", to="x" * 65), "track"),
        (at("victims", 0, "recipe_name", to="<b>"), "victims.0.recipe_name"),
        (at("victims", 0, "seeds", to=[0, 0, 1]), "a seed is repeated"),
        (at("victims", 0, "clean", 1, to="98.5"), "victims.0.clean.1"),
        (at("victims", 0, "clean", 1, to=True), "victims.0.clean.1"),
        (at("surrogate", to="standard"), "surrogate"),
        (at("num_poison", to=13), "more images are poisoned than the budget allows"),
        (at("num_train", to=0), "num_train"),
        (at("hashes", to={}), "hashes"),
        (at("poison_hash", to=""), "poison_hash"),
        (at("evaluation_seconds", to=-1.0), "evaluation_seconds"),
        (at("attack_config", to={"step_size": float("nan")}), "attack_config"),
        (at("a\nb", to=1), "a b"),
    ],
)
def test_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None], where: str) -> None:
    path = tmp_path / "record.json"
    make().save(path)
    stored = json.loads(path.read_text("utf-8"))
    edit(stored)
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Record.load(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert where in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"{}"])
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*is not a valid record[^\n]*$"):
        Record.load(path)
    with pytest.raises(UserError, match="is not a valid record"):
        records.find(tmp_path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read [^\n]*none\.json: [^\n]*$"):
        Record.load(tmp_path / "none.json")


def test_find_is_in_order_of_path_and_append_only(tmp_path: Path) -> None:
    names = ["digits/noise/none/b", "digits/mgd/none/z", "digits/mgd/none/a", "b", "digits/mgd-2/x"]
    for name in names:
        make(command=name).save(tmp_path / name / "record.json")
    (tmp_path / "digits" / "mgd" / "none" / "a" / "crafting.json").write_text("{}")
    (tmp_path / "README.md").write_text("no record")
    found = records.find(tmp_path)
    assert [path for path, _ in found] == sorted(tmp_path / n / "record.json" for n in names)
    assert all(path == tmp_path / record.command / "record.json" for path, record in found)

    make(command="digits/mgd/none/m").save(tmp_path / "digits/mgd/none/m/record.json")
    later = records.find(tmp_path)
    assert len(later) == len(found) + 1
    assert [pair for pair in later if pair in found] == found


def test_find_in_an_empty_folder(tmp_path: Path) -> None:
    assert records.find(tmp_path) == []
