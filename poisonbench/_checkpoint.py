"""Arrays and a header in one safetensors file, whole or not there; a corrupt one is set aside."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from poisonbench._files import content_hash, replacing

Arrays = dict[str, np.ndarray]
STALE = 3600.0
"""Seconds after which nobody is still writing a file: it was left by a process that was killed."""


def write(path: Path, arrays: Arrays, header: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`.

    Raises:
        UserError: it cannot be written.
    """
    arrays = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    text = json.dumps(header)
    metadata = {"poisonbench": text, "hash": _hash(arrays, text)}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata)


def read(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """What was written, or None where there is nothing.

    A file that cannot be read, or whose content does not have its hash, is renamed and not deleted; a
    warning on standard error names it. What a killed process left half written goes.
    """
    for left in path.parent.glob(f".{path.stem}-*{path.suffix}"):
        with suppress(OSError):  # whoever writes it may just have renamed it
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        text = metadata["poisonbench"]
        if metadata["hash"] != _hash(arrays, text):
            raise ValueError("its content does not have the hash it states")
        return arrays, json.loads(text)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        aside = _free_name(path)
        path.rename(aside)
        print(
            f"warning: {path.name} is corrupt ({error}); set aside as {aside}, starting over",
            file=sys.stderr,
        )
        return None


def _hash(arrays: Arrays, text: str) -> str:
    return content_hash(np.frombuffer(text.encode(), np.uint8), *arrays.values())


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.corrupt-{number}{path.suffix}")).exists():
        number += 1
    return aside
