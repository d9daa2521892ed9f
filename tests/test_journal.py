"""A killed attack goes on where it was, and no checkpoint can mislead it.

Claims of `poisonbench.journal` tested here:

- arrays, log and seconds of a checkpoint come back as they were saved, and logging goes on; one that
  is read by the process that wrote it counts no second twice;
- a checkpoint that cannot be read, or was changed by a bit, is set aside under a name of its own,
  said so on standard error and kept to the byte, however often that happens;
- a write that is interrupted leaves the old checkpoint whole and no other file;
- without a folder nothing is written, and nothing is restored.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from poisonbench import _checkpoint
from poisonbench import journal as journal_module
from poisonbench.journal import Journal

ARRAYS = {
    "z": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4),
    "done": np.array(7),
    "empty": np.zeros((0, 2), np.int64),
    "best": np.array([-np.inf]),
}
NAME = "checkpoint.safetensors"


def same(arrays: dict[str, np.ndarray] | None) -> bool:
    assert arrays is not None
    return arrays.keys() == ARRAYS.keys() and all(
        arrays[n].dtype == a.dtype and arrays[n].shape == a.shape and np.array_equal(arrays[n], a)
        for n, a in ARRAYS.items()
    )


def test_a_checkpoint_comes_back_with_its_log_and_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now)
    first = Journal(tmp_path)
    assert first.restore() is None
    now = 107.5
    first.save(ARRAYS, {"metastep": 0, "loss": 0.1 + 0.2})
    now = 110.0
    first.save(ARRAYS, {"metastep": 1, "loss": 2.5})
    now = 500.0  # lost with the kill

    second = Journal(tmp_path)
    assert second.seconds == 0
    assert same(second.restore())
    assert (
        second.rows == first.rows == [{"metastep": 0, "loss": 0.1 + 0.2}, {"metastep": 1, "loss": 2.5}]
    )
    assert second.seconds == 10
    now = 503.0
    assert second.seconds == 13
    second.save(ARRAYS, {"metastep": 2})
    third = Journal(tmp_path)
    third.restore()
    assert [row["metastep"] for row in third.rows] == [0, 1, 2]
    assert third.seconds == 13
    now = 504.0
    third.save(ARRAYS)
    third.restore()
    assert third.seconds == 14
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_save_without_a_row_logs_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.save(ARRAYS)
    assert journal.rows == []
    assert same(Journal(tmp_path).restore())


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: b"no checkpoint at all" * 10, id="text"),
        pytest.param(lambda data: b"\xff" * 8 + data[8:], id="header length"),
        pytest.param(flip, id="one bit"),
        pytest.param(lambda data: data.replace(b"poisonbench", b"poisonbunch"), id="no header"),
        pytest.param(lambda data: data.replace(b'\\"rows\\"', b'\\"cows\\"'), id="no rows"),
    ],
)
def test_a_corrupt_checkpoint_is_set_aside_and_kept(
    spoil: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(spoil)
    Journal(tmp_path).save(ARRAYS, {"metastep": 0})
    path = tmp_path / NAME
    spoilt = spoil(path.read_bytes())
    assert spoilt != path.read_bytes()
    for number in (1, 2):
        path.write_bytes(spoilt)
        journal = Journal(tmp_path)
        assert journal.restore() is None
        assert journal.rows == []
        said = capsys.readouterr()
        aside = tmp_path / f"checkpoint.corrupt-{number}.safetensors"
        assert said.out == ""
        assert said.err.startswith(f"warning: {NAME} is corrupt")
        assert str(aside) in said.err
        assert len(said.err.splitlines()) == 1
        assert aside.read_bytes() == spoilt
        assert not path.exists()
    journal.save(ARRAYS)
    assert same(Journal(tmp_path).restore())
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_checkpoint(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(tmp_path).save(ARRAYS, {"metastep": 0})
    write = _checkpoint.save_file

    def half(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        write(arrays, path, metadata)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint, "save_file", half)
        with pytest.raises((error, ValueError)):
            Journal(tmp_path).save({"z": np.ones(3)}, {"metastep": 1})
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    journal = Journal(tmp_path)
    assert same(journal.restore())
    assert journal.rows == [{"metastep": 0}]


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    Journal(tmp_path).save(ARRAYS)
    left, fresh = (tmp_path / f".{Path(NAME).stem}-{end}.safetensors" for end in ("abc", "def"))
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (time.time() - 2 * _checkpoint.STALE,) * 2)
    assert same(Journal(tmp_path).restore())
    assert {path.name for path in tmp_path.iterdir()} == {NAME, fresh.name}, "another may be writing"


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.save(ARRAYS, {"metastep": 0})
    assert journal.rows == [{"metastep": 0}]
    assert journal.restore() is None
    assert list(tmp_path.iterdir()) == []
