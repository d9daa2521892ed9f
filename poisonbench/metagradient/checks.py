"""What is refused, and what is said of a gradient that is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poisonbench.errors import UserError
from poisonbench.metagradient import programs
from poisonbench.metagradient.programs import Cotangents, Objective, PyTree, Step

CURE = "a smaller learning rate or final_scale is the usual cure"


class NonFiniteError(UserError):
    """A run whose value or metagradient is not finite.

    Attributes:
        step: where a NaN or an infinity first appeared: going forwards for a value, backwards for
            a gradient; None where every state is finite and the objective itself is not.
    """

    def __init__(self, message: str, step: int | None) -> None:
        super().__init__(message)
        self.step = step


class AdamWithoutEpsRoot(UserWarning):
    """A step takes the root of a second moment, which has no derivative at zero."""


# Asked of a jitted function because that remembers the answer.
_once = jax.jit(lambda step, state, t, z: step(state, t, z))


def check(step: Step, objective: Objective, state: PyTree, z: PyTree, has_aux: bool) -> None:
    """Refuse what cannot be differentiated, and warn of Adam without `eps_root`.

    Raises:
        UserError: a step that changes the structure, shapes or dtypes of the state; an objective
            that is not one floating-point scalar.
    """
    after = _once.eval_shape(step, state, jnp.int32(0), z)
    before_structure: Any = jax.tree.structure(state)
    after_structure: Any = jax.tree.structure(after)
    if before_structure != after_structure:
        raise UserError(
            "step changes the structure of the state: return the same containers and keys from"
            f" {before_structure}, not {after_structure}"
        )
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    for (path, before), then in zip(paths, jax.tree.leaves(after), strict=True):
        if before.shape != then.shape or before.dtype != then.dtype:
            raise UserError(
                f"step changes leaf '{jax.tree_util.keystr(path)}' of the state from"
                f" {before.dtype}{list(before.shape)} to {then.dtype}{list(then.shape)}: keep both"
            )
    value = _evaluate.eval_shape(objective, state)
    if has_aux:
        if not isinstance(value, tuple) or len(value) != 2:
            raise UserError("objective must return (value, aux) where has_aux is set")
        value = value[0]
    if getattr(value, "shape", None) != () or not programs.differentiable(value):
        raise UserError(
            f"objective must return one floating-point scalar, not {value}: reduce it, as by a mean"
        )
    if _holds_second_moment(state) and _roots_of_bare_moments(step, state, z):
        warnings.warn(
            "step takes the root of Adam's second moment with eps_root = 0: its derivative at zero is"
            " infinite, and a parameter whose gradient vanishes makes the metagradient NaN; use"
            " optax.adam(…, eps_root=1e-8)",
            AdamWithoutEpsRoot,
            stacklevel=3,
        )


_evaluate = jax.jit(lambda objective, state: objective(state))


def check_finite(
    step: Step, state: PyTree, num_steps: int, z: PyTree, value: Array, cotangents: Cotangents
) -> None:
    """Say where a run or its derivative ceased to be finite.

    Raises:
        NonFiniteError: it did.
    """
    if not bool(jnp.isfinite(value)):
        at = int(programs.first_broken(step, state, jnp.int32(num_steps), z))
        if at == num_steps:
            raise NonFiniteError(
                f"the objective is {float(value)} of a finite final state: check the objective", None
            )
        raise NonFiniteError(
            f"training breaks down: its state is first NaN or infinite after step {at} of"
            f" {num_steps}; {CURE}",
            at,
        )
    if (at := int(cotangents.broken_at)) >= 0:
        raise NonFiniteError(
            f"the metagradient is first NaN or infinite at step {at} of {num_steps}, going backwards;"
            f" {CURE}; with Adam, set eps_root",
            at,
        )


def _holds_second_moment(state: PyTree) -> bool:
    def is_adam(node: Any) -> bool:
        return hasattr(node, "mu") and hasattr(node, "nu")

    return any(is_adam(node) for node in jax.tree.leaves(state, is_leaf=is_adam))


def _roots_of_bare_moments(step: Step, state: PyTree, z: PyTree) -> bool:
    """Whether a root is taken of something to which zero was added, as optax writes no `eps_root`."""
    closed = _once.trace(step, state, jnp.int32(0), z).jaxpr
    return any(_has_bare_root(jaxpr) for jaxpr in _with_inner(closed.jaxpr))


def _with_inner(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _with_inner(inner)


def _has_bare_root(jaxpr: Any) -> bool:
    bare: set[int] = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        literals = [x.val for x in equation.invars if hasattr(x, "val")]
        if name in {"add", "add_any"} and any(jnp.ndim(x) == 0 and x == 0 for x in literals):
            bare |= {id(x) for x in equation.outvars}
        elif name == "sqrt" and any(id(x) in bare for x in equation.invars):
            return True
    return False
