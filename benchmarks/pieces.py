"""Results kept as they come, so that a benchmark that was killed goes on where it was.

They lie in a hidden folder named by a hash of everything that decides them: settings, machine,
versions and source code. Other code or another machine starts anew; a finished benchmark removes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

import poisonbench
from poisonbench._files import replacing, write_text

T = TypeVar("T")


class Pieces:
    """The folder of one benchmark's results so far."""

    def __init__(self, out: Path, identity: dict[str, object]) -> None:
        text = json.dumps({**identity, "source": _source()}, sort_keys=True, default=str)
        self.folder = out / ".pieces" / hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(path.is_file() for path in self.folder.rglob("*"))

    def get(self, name: str, kind: type[T]) -> T | None:
        """A result of that name, if it is there and whole."""
        try:
            return TypeAdapter(kind).validate_json((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, name: str, result: object) -> None:
        """Keep a result."""
        adapter: TypeAdapter[object] = TypeAdapter(type(result))
        write_text(self.folder / f"{name}.json", adapter.dump_json(result).decode() + "\n")

    def once(self, name: str, kind: type[T], make: Callable[[], T]) -> T:
        """The result of that name, made if it is not there."""
        found = self.get(name, kind)
        if found is None:
            found = make()
            self.put(name, found)
        return found

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of that name, made if it is not there."""
        path = self.folder / f"{name}.npy"
        try:
            found: np.ndarray = np.load(path)
        except (OSError, ValueError, EOFError):
            found = make()
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, found)
        return found

    def clear(self) -> None:
        """Forget them all, and what other code or settings left unfinished."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def _source() -> str:
    """A hash of the code that is measured and of what measures it."""
    package = Path(poisonbench.__file__).parent
    names = ("metagradient", "victim", "optimizers", "metatraining")
    folders = [*(package / name for name in names), Path(__file__).parent]
    found = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
