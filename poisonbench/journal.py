"""Where a long attack keeps its place, so that killing it loses at most one step.

A checkpoint is a safetensors file with the attack's arrays and the log so far, written whole or
not at all. One that cannot be read is set aside under another name, never deleted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from poisonbench import _checkpoint
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
        stored = None if self._path is None else _checkpoint.read(self._path)
        if stored is None:
            return None
        arrays, header = stored
        self.rows = list(header["rows"])
        self._before, self._began = float(header["seconds"]), time.monotonic()
        return arrays

    def save(self, arrays: dict[str, np.ndarray], row: LogRow | None = None) -> None:
        """Log a row, if any, and write the checkpoint."""
        if row is not None:
            self.rows.append(row)
        if self._path is not None:
            _checkpoint.write(self._path, arrays, {"rows": self.rows, "seconds": self.seconds})

    def forget(self) -> None:
        """Remove the checkpoint."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def aside(self, name: str) -> Path | None:
        """Where one long step may keep its own place, between two checkpoints; None without a folder."""
        return None if self._path is None else self._path.with_stem(f"{self._path.stem}-{name}")

    def progress(self, title: str, total: int, done: int = 0) -> Progress:
        """A bar on standard error."""
        return Progress(title, total, done)


def pack(tree: Any, name: str) -> dict[str, np.ndarray]:
    """A pytree as arrays of a checkpoint, under names that begin with `name`."""
    import jax

    return {f"{name}.{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}


def unpack(arrays: dict[str, np.ndarray], name: str, like: Any) -> Any:
    """The pytree that `pack` stored under this name, in the structure of another."""
    import jax
    import jax.numpy as jnp

    stored = [jnp.asarray(arrays[key]) for key in sorted(arrays) if key.startswith(f"{name}.")]
    structure: Any = jax.tree.structure(like)
    return structure.unflatten(stored)
