"""Running averages of a tensor's gradients, and what learned optimizers read of them.

For each tensor, with gradient g and decays β:

    m ← βm + (1-β) g           v ← βv + (1-β) g²           without bias correction
    R, C ← averages of g² + 1e-30 over the largest and the second-largest axis

as in Adam and, for R and C, as in Adafactor, whose outer product of the two stands for the whole second
moment. A tensor of rank below two keeps the whole, D, in their place. With `ρ(x) = max(x, 1e-9)^-½`
the factored preconditioner is `P = ρ(R / mean R) ρ(C)`.

References:
    Shazeer and Stern, "Adafactor", 2018, https://arxiv.org/abs/1804.04235. Metz et al., "VeLO", 2022,
    https://arxiv.org/abs/2211.09760.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

DERIVATIVE_FLOOR = 1e-18
"""Below it the derivative of `x^-½` is that at the floor: exact ones overflow in float32 at 1e-26."""


class Moments(NamedTuple):
    """Averages of one tensor's gradients; scalars count as tensors of shape (1,).

    Attributes:
        m: `[…, decays]`, first moments.
        v: `[…, decays]`, second moments.
        row: `[… without the largest axis, decays]`, factored second moments; `[n, decays]`, whole
            ones, for a tensor of rank one.
        column: `[… without the second-largest axis, decays]`; None for a tensor of rank one.
    """

    m: Array
    v: Array
    row: Array
    column: Array | None


class Decays(NamedTuple):
    """How much of the old each average keeps: `[decays]` for first, second and factored moments."""

    m: Array
    v: Array
    factored: Array


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """The second-largest axis and the largest, of equals the later as larger; None below rank two."""
    if len(shape) < 2:
        return None
    order = np.argsort(shape, kind="stable")
    return int(order[-2]), int(order[-1])


def zeros(tensor: Float[Array, "..."], decays: Decays) -> Moments:
    """Where every average starts; `tensor` has rank one at least."""

    def like(shape: Sequence[int], count: int) -> Array:
        return jnp.zeros((*shape, count), tensor.dtype)

    shape, (m, v, factored) = tensor.shape, (len(d) for d in decays)
    axes = factored_axes(shape)
    if axes is None:
        return Moments(like(shape, m), like(shape, v), like(shape, factored), None)
    second, largest = axes
    return Moments(
        like(shape, m),
        like(shape, v),
        like([n for axis, n in enumerate(shape) if axis != largest], factored),
        like([n for axis, n in enumerate(shape) if axis != second], factored),
    )


def update(moments: Moments, gradient: Float[Array, "..."], decays: Decays) -> Moments:
    """The averages after one more gradient."""

    def average(old: Array, new: Array, decay: Array) -> Array:
        decay = decay.reshape((1,) * new.ndim + (-1,))
        return decay * old + (1 - decay) * new[..., None]

    square = gradient**2
    axes = factored_axes(gradient.shape)
    row = column = square + 1e-30
    if axes is not None:
        second, largest = axes
        row, column = row.mean(largest), column.mean(second)
    return Moments(
        average(moments.m, gradient, decays.m),
        average(moments.v, square, decays.v),
        average(moments.row, row, decays.factored),
        None if moments.column is None else average(moments.column, column, decays.factored),
    )


def features(
    moments: Moments, gradient: Float[Array, "..."], tensor: Float[Array, "..."]
) -> dict[str, Float[Array, "... channels"]]:
    """What a learned optimizer may read of each parameter, group by group, not yet normalised.

    Args:
        moments: the averages, this gradient included.
        gradient: of rank one at least.
        tensor: the parameters, of the same shape.

    Returns:
        Groups of one or three channels on a last axis, in the order of VeLO.
    """
    m, v = moments.m, moments.v
    g = gradient[..., None]
    root = jax.lax.rsqrt(v + 1e-6)
    axes = factored_axes(gradient.shape)
    if axes is None:
        row = column = moments.row
        preconditioned = g * _rho(row + 1e-9)
        last = m * rsqrt(row)
    else:
        second, largest = axes
        short, long = moments.row, moments.column
        assert long is not None
        # In `short` the largest axis is missing, which moves the other where it came after.
        mean = short.mean(second - (second > largest), keepdims=True)
        row = jnp.expand_dims(short, largest)
        column = jnp.expand_dims(long, second)
        factor = jnp.expand_dims(_rho(short / (mean + 1e-9)), largest) * _rho(column)
        preconditioned, last = g * factor, m * factor
    shape = gradient.shape

    def whole(x: Array) -> Array:
        return jnp.broadcast_to(x, (*shape, x.shape[-1]))

    return {
        "gradient": g,
        "clipped": jnp.clip(g, -0.1, 0.1),
        "parameter": tensor[..., None],
        "momentum": m,
        "second_moment": v,
        "adam": m * root,
        "inverse_root": root,
        "adafactor": preconditioned,
        "rms_normalised": g * root,
        "row": whole(row),
        "column": whole(column),
        "inverse_root_row": whole(jax.lax.rsqrt(row + 1e-8)),
        "inverse_root_column": whole(jax.lax.rsqrt(column + 1e-8)),
        "adafactor_momentum": last,
    }


def normalised(channels: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
    """Each channel divided by its root mean square over the tensor."""
    axes = tuple(range(channels.ndim - 1))
    return channels * jax.lax.rsqrt(1e-5 + jnp.mean(channels**2, axes, keepdims=True))


@jax.custom_jvp
def rsqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x^-½`, with a derivative that stays finite where x is nearly nothing.

    A parameter whose gradient has always been zero has D of about 1e-31. There `m D^-½` is zero, but
    `D^-3/2` overflows, and zero times infinity would make every metagradient NaN.
    """
    return jax.lax.rsqrt(x)


@rsqrt.defjvp
def _rsqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    floored = jnp.maximum(x, DERIVATIVE_FLOOR)
    return rsqrt(x), -0.5 * jax.lax.rsqrt(floored) / floored * dx


def _rho(x: Array) -> Array:
    return jax.lax.rsqrt(jnp.maximum(x, 1e-9))
