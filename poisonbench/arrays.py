"""Small functions of arrays that attacks and defences share."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from poisonbench.errors import UserError

CHUNK = 500
"""Images that go through a network at a time."""


def highest(
    values: Float[np.ndarray, " n"], count: int, among: Int[np.ndarray, " m"] | None = None
) -> Int[np.ndarray, " some"]:
    """The indices of the largest values, in ascending order; the first of equal ones."""
    rows = np.arange(len(values)) if among is None else among
    return np.sort(rows[np.argsort(-values[rows], kind="stable")[:count]]).astype(np.int64)


def drawn(rows: Int[np.ndarray, " m"], count: int, key: PRNGKeyArray) -> Int[np.ndarray, " count"]:
    """So many of them without replacement, in ascending order."""
    return np.sort(np.asarray(jax.random.choice(key, rows, (count,), replace=False), np.int64))


def to_pixels(z: Float[Array | np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Pixels in [0, 1] as they are stored, with 8 bits.

    Raises:
        UserError: one is no number, as after a step along a victim's gradient that is none.
    """
    levels = np.asarray(jnp.rint(z * 255))
    if not np.isfinite(levels).all():
        raise UserError(
            "the poison's pixels are not finite: lower the victim's learning rate, as by"
            " --set smooth.learning_rate=…"
        )
    return levels.astype(np.uint8)


def chunks(count: int) -> Iterator[tuple[slice, Int[np.ndarray, " rows"]]]:
    """Where results go, and the rows they are of; the last chunk is filled up with the first rows.

    So one program serves them all.
    """
    size = min(CHUNK, count)
    for first in range(0, count, CHUNK):
        yield slice(first, min(first + size, count)), np.arange(first, first + size) % count


def boxes(
    key: PRNGKeyArray, side: Float[Array, " b"], height: int, width: int
) -> Bool[Array, "b height width"]:
    """Which pixels lie in a box around a random centre, whose sides are a share of the image's."""
    centre = jax.random.uniform(key, (2, len(side), 1))
    rows, columns = ((jnp.arange(n) + 0.5)[None] / n for n in (height, width))
    half = side[:, None] / 2
    tall, wide = jnp.abs(rows - centre[0]) <= half, jnp.abs(columns - centre[1]) <= half
    return tall[:, :, None] & wide[:, None, :]
