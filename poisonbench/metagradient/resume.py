"""A backward pass that was killed goes on from a file.

What it needs is little: the states that are kept, the adjoint, the gradient so far, the value, and
how many actions of the schedule are done. It is written between two leaves, at most every so many
seconds, and removed at the end.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import jax

from poisonbench import _checkpoint
from poisonbench.errors import UserError
from poisonbench.metagradient.programs import Cotangents, PyTree
from poisonbench.metagradient.states import Kept, from_raw, named, to_raw, unnamed


class OtherRunError(UserError):
    """A checkpoint belongs to a run with other arguments."""


class Resume:
    """The file of one backward pass.

    Attributes:
        path: where it is.
        every: least seconds between two writes.
    """

    def __init__(self, path: Path, every: float, identity: str) -> None:
        self.path = path
        self.every = every
        self._identity = identity
        self._written = time.monotonic()

    def save(self, done: int, kept: Kept, value: PyTree, cotangents: Cotangents) -> None:
        """Write, if it is time, that `done` actions are done."""
        if time.monotonic() - self._written < self.every:
            return
        states = kept.raw()
        arrays = named(to_raw((value, cotangents)), "result-")
        for i, state in enumerate(states):
            arrays |= named(state, f"state-{i:06}-")
        header = {"identity": self._identity, "done": done, "states": len(states)}
        _checkpoint.write(self.path, arrays, header)
        self._written = time.monotonic()

    def load(
        self, kept: Kept, state: PyTree, value: PyTree, cotangents: Cotangents
    ) -> tuple[int, PyTree, Cotangents] | None:
        """Put kept states back; how many actions are done, the value and the cotangents then.

        Args:
            kept: where to put them; empty.
            state: any with the right structure, shapes and dtypes; so the next two.
            value: what the objective returns.
            cotangents: before any step.

        Raises:
            OtherRunError: the file belongs to another run.
        """
        stored = _checkpoint.read(self.path)
        if stored is None:
            return None
        arrays, header = stored
        if header.get("identity") != self._identity:
            raise OtherRunError(
                f"checkpoint {self.path} belongs to a run with other arguments: remove it, or name"
                " another"
            )
        for i in range(header["states"]):
            kept.keep(from_raw(unnamed(arrays, f"state-{i:06}-"), state))
        value, cotangents = from_raw(unnamed(arrays, "result-"), (value, cotangents))
        return header["done"], value, cotangents

    def remove(self) -> None:
        """The pass has ended."""
        self.path.unlink(missing_ok=True)


def identity(plan: Any, *trees: PyTree) -> str:
    """A hash of a plan and of everything in pytrees but the code of their functions."""
    digest = hashlib.sha256(repr(plan).encode())
    for tree in trees:
        leaves = jax.tree.leaves(tree)
        digest.update(repr([(x.shape, str(x.dtype)) for x in leaves]).encode())
        for raw in to_raw(tree):
            digest.update(raw.tobytes())
    return digest.hexdigest()
