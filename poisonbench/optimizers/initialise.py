"""Weights of a learned optimizer before any meta-training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

Weights = dict[str, Any]
"""Nested dictionaries of float32 arrays."""


def normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Array:
    """A truncated normal (within two σ) with σ = fan_in^-½."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) * fan_in**-0.5


def linear(key: PRNGKeyArray, inputs: int, outputs: int) -> Weights:
    """A layer's weights and zero biases."""
    return {"w": normal(key, (inputs, outputs), inputs), "b": jnp.zeros(outputs)}
