"""Finished pieces of a measurement, each in a file of its own, so that killing it loses one at most.

A piece is found by the hash of all that decides it: what is asked, of which recipe, on which data,
by which code, libraries and machine. Whoever asks the same again, in whatever combination with other
questions, finds the answer. A file that is damaged or foreign is measured anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from poisonbench import harness
from poisonbench._files import digest, write_text
from poisonbench.stored import Frozen

Piece = TypeVar("Piece", bound=Frozen)
SOURCES = ("attacks/__init__.py", "data.py", "threat.py", "metagradient/*.py")
OURS = ("definitions.py", "survey.py", "probe.py")


class Pieces:
    """A folder of answers."""

    def __init__(self, folder: Path, about: dict[str, Any], *, reuse: bool = True) -> None:
        """Answers that share `about`, JSON-ready; those in `folder` are used where `reuse` is set."""
        self._folder = folder
        self._about = {**about, "code": code()}
        self._reuse = reuse
        self._given: dict[str, tuple[Frozen, float]] = {}
        self._lap = 0.0

    @property
    def seconds(self) -> float:
        """What measuring all answers took that were given so far, whenever that was."""
        return sum(seconds for _, seconds in self._given.values())

    def lap(self) -> float:
        """The same for the answers given since this was last asked."""
        lap, self._lap = self._lap, 0.0
        return lap

    def get(self, kind: type[Piece], what: dict[str, Any], measure: Callable[[], Piece]) -> Piece:
        """The answer to `what`: given before, from its file, or measured and put there."""
        identity = digest({**self._about, "kind": kind.__name__, **what})
        path = self._folder / f"{identity[:24]}.json"
        if identity not in self._given:
            found = _read(path, identity, kind) if self._reuse else None
            if found is None:
                began = time.monotonic()
                piece = measure()
                found = piece, time.monotonic() - began
                answer = {"identity": identity, "answer": piece.model_dump(), "seconds": found[1]}
                write_text(path, json.dumps(answer, allow_nan=False))
            self._given[identity] = found
        answered, seconds = self._given[identity]
        self._lap += seconds
        assert isinstance(answered, kind), "the kind is part of the identity"
        return answered


@cache
def code() -> str:
    """Hash of all that decides an answer besides the question."""
    package = Path(__file__).parent
    paths = [p for name in SOURCES for p in sorted(package.parent.glob(name))]
    text = "".join(p.read_text("utf-8") for p in [*paths, *(package / name for name in OURS)])
    return digest({"source": text, "victims": harness.victim_code()})


def _read(path: Path, identity: str, kind: type[Piece]) -> tuple[Piece, float] | None:
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["identity"] == identity:
            return kind.model_validate(stored["answer"]), float(stored["seconds"])
    except (OSError, ValueError, KeyError, TypeError):  # a ValidationError is a ValueError
        pass
    return None
