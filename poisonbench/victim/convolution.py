"""The 3×3 convolution, written so that its second derivatives are fast on a CPU.

A metagradient differentiates the backward pass once more. On a GPU the library's convolution is
the right one for that; on a CPU, XLA's convolutions that appear only in second derivatives take
three times as long as the matrix products they could be. There a convolution is written as

- one product of all 3×3 patches with the kernel (im2col), on maps larger than 2×2;
- one product of the whole flattened map with the matrix of the convolution, on maps of 2×2 and
  1×1, where most taps of the kernel meet nothing but padding: 4/9 and 1/9 of the operations.

All three compute the same function; `tests/test_convolution.py` holds them against each other
through second derivatives.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Convolution = Literal["matrix", "library"]


def for_backend() -> Convolution:
    """The way to convolve that is fast on JAX's default backend."""
    return "matrix" if jax.default_backend() == "cpu" else "library"


def convolve(
    x: Float[Array, "batch height width in"],
    kernel: Float[Array, "3 3 in out"],
    how: Convolution,
) -> Float[Array, "batch height width out"]:
    """Convolve with stride 1 and zero padding that keeps the size of the map."""
    if how == "library":
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    batch, height, width, _ = x.shape
    if height <= 2 and width <= 2:
        matrix = _matrix_of(kernel, height, width)
        return (x.reshape(batch, -1) @ matrix).reshape(batch, height, width, -1)
    return _patches(x) @ kernel.reshape(-1, kernel.shape[-1])


def _patches(
    x: Float[Array, "batch height width in"],
) -> Float[Array, "batch height width taps"]:
    """Each pixel's 3×3 neighbourhood, zero beyond the border, row by row."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def _matrix_of(
    kernel: Float[Array, "3 3 in out"], height: int, width: int
) -> Float[Array, "pixels_in pixels_out"]:
    """The convolution of a map of at most 2×2 as a matrix between flattened maps.

    Such a map is within one tap of itself everywhere, so the block from input pixel (i, j) to
    output pixel (k, l) is the tap at (1 + i - k, 1 + j - l), always inside the kernel.
    """
    pixels = [(i, j) for i in range(height) for j in range(width)]
    blocks = [[kernel[1 + i - k, 1 + j - l] for k, l in pixels] for i, j in pixels]
    return jnp.block(blocks)
