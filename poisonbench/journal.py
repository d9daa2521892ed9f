"""Where a long attack keeps its place, so that killing it loses at most one step.

A checkpoint is a safetensors file with the attack's arrays and the log so far, written whole or
not at all. One that cannot be read is set aside under another name, never deleted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from poisonbench._files import content_hash, replacing
from poisonbench.progress import Progress

LogRow = dict[str, float | int]


class Journal:
    """An attack's checkpoint, log and progress bar.

    Without a folder, as in tests, it remembers nothing beyond the process.

    Attributes:
        rows: what was logged, oldest first; restored with the checkpoint.
        seconds: time spent crafting, that of interrupted sessions up to their last checkpoint
            included.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.rows: list[LogRow] = []
        self._path = None if folder is None else folder / "checkpoint.safetensors"
        self._began = time.monotonic()
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of crafting so far."""
        return self._before + time.monotonic() - self._began

    def restore(self) -> dict[str, np.ndarray] | None:
        """The arrays of the last checkpoint, or None to start from the beginning."""
        if self._path is None or not self._path.exists():
            return None
        try:
            with safe_open(self._path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})["poisonbench"])
                arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if header["hash"] != content_hash(*arrays.values()):
                raise ValueError("its content does not have the hash it states")
            self.rows = list(header["rows"])
            self._before = float(header["seconds"])
            return arrays
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            aside = _free_name(self._path)
            self._path.rename(aside)
            print(
                f"warning: {self._path.name} is corrupt ({error}); set aside as {aside}, starting over",
                file=sys.stderr,
            )
            return None

    def save(self, arrays: dict[str, np.ndarray], row: LogRow | None = None) -> None:
        """Log a row, if any, and write the checkpoint."""
        if row is not None:
            self.rows.append(row)
        if self._path is None:
            return
        arrays = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
        header = {"rows": self.rows, "seconds": self.seconds, "hash": content_hash(*arrays.values())}
        with replacing(self._path) as temporary:
            temporary.write_bytes(save(arrays, {"poisonbench": json.dumps(header)}))

    def progress(self, title: str, total: int, done: int = 0) -> Progress:
        """A bar on standard error."""
        return Progress(title, total, done)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.corrupt-{number}{path.suffix}")).exists():
        number += 1
    return aside
