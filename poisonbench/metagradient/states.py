"""Where kept states live: in one buffer on the device, in host memory, or in files.

Schedules keep and restore states as on a stack, so a place is a stack too. Leaves are always recorded
in the buffer on the device, above whatever is kept there.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poisonbench import _checkpoint
from poisonbench._files import require_writable
from poisonbench.errors import UserError
from poisonbench.metagradient import programs
from poisonbench.metagradient.planning import Plan
from poisonbench.metagradient.programs import PyTree

Raw = list[np.ndarray]
"""The leaves of a pytree as bytes, each `[nbytes]`, uint8."""


def state_bytes(state: PyTree, read: tuple[bool, ...] | None = None) -> int:
    """Bytes that one state takes, or those of its leaves that are `read`."""
    leaves = jax.tree.leaves(state)
    return sum(
        _nbytes(x)
        for x, wanted in zip(leaves, _all(leaves) if read is None else read, strict=True)
        if wanted
    )


def to_raw(tree: PyTree) -> Raw:
    """The leaves' bytes, in host memory."""
    arrays = [np.asarray(_data(jnp.asarray(x))) for x in jax.tree.leaves(tree)]
    return [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays]


def from_raw(raw: Raw, like: PyTree) -> PyTree:
    """The pytree with these bytes, and the shapes, dtypes and shardings of `like`."""

    def leaf(stored: np.ndarray, x: Any) -> Array:
        shape = x if not _is_key(x) else jax.eval_shape(jax.random.key_data, x)
        data = jnp.asarray(np.ascontiguousarray(stored).view(shape.dtype).reshape(shape.shape))
        whole = jax.random.wrap_key_data(data, impl=jax.random.key_impl(x)) if _is_key(x) else data
        sharding = getattr(x, "sharding", None)
        return whole if sharding is None else jax.device_put(whole, sharding)

    structure: Any
    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten([leaf(*pair) for pair in zip(raw, leaves, strict=True)])


class Kept(ABC):
    """A stack of kept states.

    Attributes:
        buffer: `capacity` states on the device; leaves are recorded from `top` on.
        top: the first slot of the buffer that is free.
        like: a state, for its shapes.
    """

    def __init__(self, state: PyTree, capacity: int, read: tuple[bool, ...]) -> None:
        self.buffer = programs.allocate(state, capacity, read)
        self.top = 0
        self.like = state

    @abstractmethod
    def keep(self, state: PyTree) -> None:
        """Push."""

    @abstractmethod
    def restore(self) -> PyTree:
        """Pop."""

    @abstractmethod
    def raw(self) -> list[Raw]:
        """Copies of all that is kept, the first kept first."""


class OnDevice(Kept):
    """States kept in the buffer itself."""

    def keep(self, state: PyTree) -> None:
        """Push."""
        self.buffer = programs.keep(self.buffer, state, jnp.int32(self.top))
        self.top += 1

    def restore(self) -> PyTree:
        """Pop."""
        self.top -= 1
        return self._at(self.top)

    def raw(self) -> list[Raw]:
        """Copies of all that is kept."""
        return [to_raw(self._at(slot)) for slot in range(self.top)]

    def _at(self, slot: int) -> PyTree:
        return programs.restore(self.buffer, jnp.int32(slot), self.like)


class OnHost(Kept):
    """States kept in host memory; the buffer on the device holds one leaf."""

    def __init__(self, state: PyTree, capacity: int, read: tuple[bool, ...]) -> None:
        super().__init__(state, capacity, read)
        self._kept: list[Raw] = []

    def keep(self, state: PyTree) -> None:
        """Push."""
        self._kept.append(to_raw(state))

    def restore(self) -> PyTree:
        """Pop."""
        return from_raw(self._kept.pop(), self.like)

    def raw(self) -> list[Raw]:
        """Copies of all that is kept."""
        return list(self._kept)


class InFolder(Kept):
    """States kept in a folder, a file for each; files are gone when their states are restored.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, state: PyTree, capacity: int, read: tuple[bool, ...], folder: Path) -> None:
        super().__init__(state, capacity, read)
        require_writable(folder)
        self._folder = folder
        self._count = 0

    def keep(self, state: PyTree) -> None:
        """Push."""
        _checkpoint.write(self._path(self._count), named(to_raw(state)), {})
        self._count += 1

    def restore(self) -> PyTree:
        """Pop."""
        self._count -= 1
        state = from_raw(self._read(self._count), self.like)
        self._path(self._count).unlink()
        return state

    def raw(self) -> list[Raw]:
        """Copies of all that is kept."""
        return [self._read(number) for number in range(self._count)]

    def _read(self, number: int) -> Raw:
        stored = _checkpoint.read(self._path(number))
        if stored is None:
            raise UserError(
                f"the kept state {self._path(number)} was lost while it was needed: leave the folder"
                " alone while a run uses it"
            )
        return unnamed(stored[0])

    def _path(self, number: int) -> Path:
        # The process is in the name, so that two runs may share a folder.
        return self._folder / f"state-{os.getpid()}-{number}.safetensors"


def make(
    offload: str | os.PathLike[str], state: PyTree, chosen: Plan, read: tuple[bool, ...] | None
) -> Kept:
    """The place that `offload` names, `device`, `host` or a folder, with room for what is planned.

    Args:
        offload: as `metagradient` has it.
        state: any of the run.
        chosen: the schedule.
        read: the leaves of a state that its derivative reads, None for all. Where nothing but
            leaves is recorded on the device, no others are.
    """
    every = _all(jax.tree.leaves(state))
    read = every if read is None else read
    if offload == "host":
        return OnHost(state, chosen.longest, read)
    if offload != "device":
        return InFolder(state, chosen.longest, read, Path(offload))
    return OnDevice(state, chosen.kept, read if chosen.one_leaf else every)


def named(raw: Raw, prefix: str = "") -> dict[str, np.ndarray]:
    """Names for leaves, which sort as the leaves do."""
    return {f"{prefix}{i:06}": x for i, x in enumerate(raw)}


def unnamed(arrays: dict[str, np.ndarray], prefix: str = "") -> Raw:
    """The leaves that `named` named with that prefix."""
    return [arrays[name] for name in sorted(arrays) if name.startswith(prefix)]


def _all(leaves: list[Any]) -> tuple[bool, ...]:
    return (True,) * len(leaves)


def _is_key(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def _data(x: Array) -> Array:
    return jax.random.key_data(x) if _is_key(x) else x


def _nbytes(x: Any) -> int:
    data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    return int(np.prod(data.shape, dtype=np.int64)) * data.dtype.itemsize
