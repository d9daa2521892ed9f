"""Ways to estimate the gradient of an optimizer's meta-loss, interchangeable.

With `L(θ)` the meta-loss of a run (`unroll.py`), of which the key fixes initial parameters and batches:
evolution strategies over pairs of runs, antithetic, by signs, or persistent (`evolution.py`), and exact
metagradients of whole runs or of windows of them (`exact.py`). What is not finite is no evidence and
counts as 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from poisonbench.errors import UserError
from poisonbench.metatraining.estimate import Cost, Estimate, Estimator
from poisonbench.metatraining.evolution import DEFAULT_SIGMA, ES, PES
from poisonbench.metatraining.exact import Exact, Truncated
from poisonbench.metatraining.unroll import Problem, PyTree, Weights

__all__ = [
    "ES",
    "PES",
    "Cost",
    "Estimate",
    "Estimator",
    "Exact",
    "Truncated",
    "begin",
    "estimates",
    "make",
]

Name = Literal["es", "es-sign", "pes", "exact", "truncated"]


def make(
    name: str,
    *,
    sigma: float = DEFAULT_SIGMA,
    pairs: int = 1,
    truncation: int = 10,
    longest: int | None = None,
) -> ES | PES | Exact | Truncated:
    """The estimator of this name, one of `Name`; `longest` is for `exact`.

    Raises:
        UserError: a size that cannot be.
    """
    if not 0 < sigma < float("inf"):
        raise UserError(f"--sigma must be positive, not {sigma:g}; 0.01 is usual")
    if pairs < 1 or truncation < 1:
        raise UserError("--pairs and --truncation must be at least 1")
    if name == "exact":
        return Exact(longest)
    if name == "pes":
        return PES(sigma, truncation)
    if name == "truncated":
        return Truncated(truncation)
    return ES(sigma, pairs, signed=name == "es-sign")


def estimates(
    estimator: Any, problem: Problem, weights: Weights, num_steps: int, keys: Any, carry: PyTree
) -> Estimate:
    """One estimate for each key, in one compiled program; every part has a leading axis.

    Compiled once for each task, and for a `static_length` once for each length too.
    """
    if estimator.static_length:
        return _of_length(estimator, num_steps, problem, weights, keys, carry)
    return _of_any_length(estimator, problem, weights, jnp.int32(num_steps), keys, carry)


@partial(jax.jit, static_argnums=0)
def begin(estimator: Any, problem: Problem, weights: Weights, keys: Any) -> PyTree:
    """What the first estimates go on from, one for each key."""
    return jax.vmap(lambda key: estimator.begin(problem, weights, key))(keys)


@partial(jax.jit, static_argnums=0)
def _of_any_length(
    estimator: Any, problem: Problem, weights: Weights, num_steps: Any, keys: Any, carry: PyTree
) -> Estimate:
    call = partial(estimator, problem, weights, num_steps)
    return jax.vmap(call)(keys, carry)


@partial(jax.jit, static_argnums=(0, 1))
def _of_length(
    estimator: Any, num_steps: int, problem: Problem, weights: Weights, keys: Any, carry: PyTree
) -> Estimate:
    call = partial(estimator, problem, weights, num_steps)
    return jax.vmap(call)(keys, carry)
