"""The compiled programs that a schedule's actions run; each compiles once per step, not per length.

Bounds and slots are arguments, so one compilation serves every segment of every run. The states
that are kept lie in one buffer of `capacity` states, donated from program to program, so that no
more memory is taken than the schedule promises. A buffer in which nothing but a leaf is recorded leaves
out what of a state the derivative does not read, such as a momentum: see `leaves_read`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Bool, Int

PyTree = Any
Step = Callable[[PyTree, Array, PyTree], PyTree]
Objective = Callable[[PyTree], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cotangents:
    """What the backward pass carries from step to step.

    Attributes:
        adjoint: derivative of the objective by each floating leaf of the state before the step.
        gradient: by each floating leaf of `z`, summed over the steps so far.
        broken_at: the step at which either first ceased to be finite, or -1.
    """

    adjoint: list[Array]
    gradient: list[Array]
    broken_at: Int[Array, ""]


def differentiable(x: Any) -> bool:
    """Whether a leaf is of floating point; all others are carried."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def split(tree: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """The floating-point leaves, and how to put others in their place."""
    structure: Any
    leaves, structure = jax.tree.flatten(tree)

    def join(floating: list[Array]) -> PyTree:
        rest = iter(floating)
        return structure.unflatten([next(rest) if differentiable(x) else x for x in leaves])

    return [x for x in leaves if differentiable(x)], join


def all_finite(leaves: list[Array]) -> Bool[Array, ""]:
    """Whether no leaf has a NaN or an infinity."""
    return jnp.array([jnp.isfinite(x).all() for x in leaves], bool).all()


@partial(jax.jit, static_argnums=(1, 2))
def allocate(state: PyTree, capacity: int, read: tuple[bool, ...]) -> PyTree:
    """A buffer for `capacity` states; None in place of every leaf that is not `read`."""
    structure: Any
    leaves, structure = jax.tree.flatten(state)
    return structure.unflatten(
        [
            jnp.broadcast_to(x, (capacity, *x.shape)) if wanted else None
            for x, wanted in zip(leaves, read, strict=True)
        ]
    )


@partial(jax.jit, donate_argnums=0)
def keep(buffer: PyTree, state: PyTree, slot: Int[Array, ""]) -> PyTree:
    """The buffer with `state` in a slot; written nowhere where there is no such slot."""
    return _paired(lambda b, x: None if b is None else b.at[slot].set(x, mode="drop"), buffer, state)


@jax.jit
def restore(buffer: PyTree, slot: Int[Array, ""], like: PyTree) -> PyTree:
    """The state in a slot, with the leaves of `like` for those that the buffer leaves out."""
    return _paired(lambda b, x: x if b is None else b[slot], buffer, like)


def _paired(function: Callable[[Any, Any], Any], buffer: PyTree, state: PyTree) -> PyTree:
    return jax.tree.map(function, buffer, state, is_leaf=lambda x: x is None)


def leaves_read(step: Step, state: PyTree, z: PyTree) -> tuple[bool, ...]:
    """Which leaves of a state the derivative of a step reads, in the order of `jax.tree.leaves`.

    An update that is linear in part of the state, as in its momentum, has the same derivative
    whatever that part is.
    """
    adjoint = split(state)[0]
    traced = _pull_back.trace(step, state, jnp.int32(0), z, adjoint).jaxpr
    # One variable for each leaf of the arguments; the state's follow those of the step.
    before, count = len(jax.tree.leaves(step)), len(jax.tree.leaves(state))
    return _inputs_used(traced)[before : before + count]


@lru_cache(maxsize=64)
def _inputs_used(traced: Any) -> tuple[bool, ...]:
    used = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))[1]
    return tuple(bool(x) for x in used)


@jax.jit
def advance(step: Step, state: PyTree, start: Array, stop: Array, z: PyTree) -> PyTree:
    """Steps `start … stop - 1`."""
    return jax.lax.fori_loop(start, stop, lambda t, s: step(s, t, z), state)


@partial(jax.jit, donate_argnums=1)
def record(
    step: Step,
    buffer: PyTree,
    state: PyTree,
    slot: Int[Array, ""],
    start: Int[Array, ""],
    last: Int[Array, ""],
    z: PyTree,
) -> tuple[PyTree, PyTree]:
    """Steps `start … last - 1`; the states before each of them, and the last, from `slot` on."""

    def body(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        buffer, state = carry
        return keep(buffer, state, slot + t - start), step(state, t, z)

    buffer, state = jax.lax.fori_loop(start, last, body, (buffer, state))
    # After a run's last leaf this slot may lie past the end, where the write is dropped: s[T] is
    # in the cursor, and needs no replay.
    return keep(buffer, state, slot + last - start), state


@partial(jax.jit, donate_argnums=6)
def reverse(
    step: Step,
    buffer: PyTree,
    slot: Int[Array, ""],
    start: Int[Array, ""],
    stop: Int[Array, ""],
    z: PyTree,
    cotangents: Cotangents,
    like: PyTree,
) -> Cotangents:
    """Pull cotangents back through the steps `stop - 1 … start`, whose states lie from `slot` on."""

    def body(i: Array, so_far: Cotangents) -> Cotangents:
        t = stop - 1 - i
        state = restore(buffer, slot + t - start, like)
        adjoint, more = _pull_back(step, state, t, z, so_far.adjoint)
        gradient = [a + b for a, b in zip(so_far.gradient, more, strict=True)]
        broke_here = (so_far.broken_at < 0) & ~(all_finite(adjoint) & all_finite(more))
        return Cotangents(adjoint, gradient, jnp.where(broke_here, t, so_far.broken_at))

    return jax.lax.fori_loop(jnp.int32(0), stop - start, body, cotangents)


@jax.jit
def _pull_back(
    step: Step, state: PyTree, t: Array, z: PyTree, adjoint: list[Array]
) -> tuple[list[Array], list[Array]]:
    """The adjoint before step `t`, and what the step adds to the gradient."""
    floating, join = split(state)
    z_floating, z_join = split(z)

    def floating_step(floating: list[Array], z_floating: list[Array]) -> list[Array]:
        return split(step(join(floating), t, z_join(z_floating)))[0]

    before, more = jax.vjp(floating_step, floating, z_floating)[1](adjoint)
    return before, more


@partial(jax.jit, static_argnums=2)
def finish(objective: Objective, state: PyTree, has_aux: bool) -> tuple[Any, list[Array]]:
    """What `objective` returns, and its derivative by the floating leaves of the state."""
    floating, join = split(state)
    return jax.value_and_grad(lambda x: objective(join(x)), has_aux=has_aux)(floating)


@jax.jit
def first_broken(step: Step, state: PyTree, num_steps: Int[Array, ""], z: PyTree) -> Int[Array, ""]:
    """The first step after which the state is not finite, or `num_steps`."""

    def whole(carry: tuple[Array, PyTree]) -> Array:
        t, state = carry
        return (t < num_steps) & all_finite(split(state)[0])

    def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        t, state = carry
        return t + 1, step(state, t, z)

    t, state = jax.lax.while_loop(whole, body, (jnp.int32(0), state))
    return jnp.where(all_finite(split(state)[0]), num_steps, t - 1)
