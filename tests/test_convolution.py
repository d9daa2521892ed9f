"""All ways to convolve compute the same function, through second derivatives, in float64.

Claims of the docstrings of `poisonbench.victim.convolution` tested here: on maps of every shape near
where the way changes (whole map as one matrix up to 2×2, patches above), and with fewer, more and as
many channels going in as come out (patches are cut from the side that has fewer), the matrix products
and the library's convolution agree in value, in gradient, and in the gradient of a function of the
gradient, each to 1e-12 relative; on one case each, so do third derivatives and several seeds in one
`vmap`. So does a sum over taps written in NumPy, for the value, lest both be wrong alike.
"""

from __future__ import annotations

from typing import Any

import gradcheck
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from poisonbench.victim.convolution import Convolution, convolve, for_backend

MAPS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 2), (3, 3), (4, 5), (8, 8)]
OTHER_CHANNELS = [(2, 2, 3, 2), (2, 2, 2, 2), (4, 5, 3, 2), (4, 5, 2, 2), (2, 2, 1, 1), (3, 3, 1, 4)]
CASES = [*((*shape, 2, 3) for shape in MAPS), *OTHER_CHANNELS]
"""Height, width, channels in and channels out."""


def example(height: int, width: int, features_in: int, features_out: int) -> tuple[Array, Array]:
    """Images and a kernel."""
    image_key, kernel_key = jax.random.split(jax.random.key(0))
    images = jax.random.normal(image_key, (2, height, width, features_in))
    return images, jax.random.normal(kernel_key, (3, 3, features_in, features_out))


def by_hand(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The definition: a sum over taps, nothing beyond the border."""
    batch, height, width, _ = images.shape
    out = np.zeros((batch, height, width, kernel.shape[-1]))
    for y, x, i, j in np.ndindex(height, width, 3, 3):
        if 0 <= y + i - 1 < height and 0 <= x + j - 1 < width:
            out[:, y, x] += images[:, y + i - 1, x + j - 1] @ kernel[i, j]
    return out


def derivatives(how: Convolution, images: Array, kernel: Array) -> Any:
    """A convolution, the gradient of a function of it, and the gradient of a function of that."""

    def curved(arguments: tuple[Array, Array]) -> Array:
        return jnp.sin(convolve(*arguments, how)).sum()

    def steep(arguments: tuple[Array, Array]) -> Array:
        return sum(jnp.cos(g).sum() for g in jax.grad(curved)(arguments))

    arguments = images, kernel
    return convolve(images, kernel, how), jax.grad(curved)(arguments), jax.grad(steep)(arguments)


compiled = jax.jit(derivatives, static_argnums=0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_matrix_is_library(case: tuple[int, int, int, int]) -> None:
    images, kernel = example(*case)
    matrix, library = (compiled(how, images, kernel) for how in ("matrix", "library"))
    for found, expected in zip(matrix, library, strict=True):
        assert gradcheck.relative_error(found, expected) <= 1e-12
    expected = by_hand(np.asarray(images), np.asarray(kernel))
    np.testing.assert_allclose(matrix[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [(2, 2, 2, 3), (4, 3, 3, 2), (4, 3, 2, 3)])
def test_third_derivatives(case: tuple[int, int, int, int]) -> None:
    images, kernel = example(*case)

    def twice(kernel: Array, how: Convolution) -> Array:
        return sum(jnp.cos(g).sum() for g in derivatives(how, images, kernel)[2])

    third = jax.jit(jax.grad(twice), static_argnums=1)
    assert gradcheck.relative_error(third(kernel, "matrix"), third(kernel, "library")) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [(2, 2, 2, 3), (4, 3, 3, 2), (4, 3, 2, 3)])
def test_seeds_in_one_vmap(case: tuple[int, int, int, int]) -> None:
    images, kernel = example(*case)
    kernels = jnp.stack([kernel, 2 * kernel])
    together = jax.vmap(lambda k: derivatives("matrix", images, k))(kernels)
    apart = [compiled("matrix", images, k) for k in kernels]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    assert gradcheck.relative_error(together, stacked) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_derivatives_are_not_trivial() -> None:
    _, gradient, second = compiled("matrix", *example(3, 3, 2, 3))
    for part in jax.tree.leaves((gradient, second)):
        assert float(jnp.abs(part).min()) > 0


def test_backend_is_served() -> None:
    assert for_backend() == ("matrix" if jax.default_backend() == "cpu" else "library")
