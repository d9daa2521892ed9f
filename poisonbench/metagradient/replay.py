"""Exact gradients through whole training runs, by REPLAY.

Training is `s[t+1] = h(s[t], t, z)` for `t = 0 … T-1` and the objective is `f(z) = φ(s[T])`. With
the adjoint `A[T] = ∇φ(s[T])`, going backwards,

    A[t] = A[t+1] · ∂h/∂s (s[t], t, z)        ∇f = Σ_t A[t+1] · ∂h/∂z (s[t], t, z)

so every state is needed once, in reverse. `schedule.py` says which to keep and which to replay;
this module runs that schedule on arrays.

Cost: `T` steps forward, `T` steps differentiated (a step and its vector-Jacobian product, two to
three steps' time), and the schedule's repeated steps. Memory: the schedule's kept states and the
residuals of one step.

When not to use it: where the gradient of a smoothed objective is wanted, or where training is so
unstable that the exact gradient says nothing about a step of useful size; the derivative is exact
either way. Measure that first.

References:
    Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
    https://arxiv.org/abs/2503.13751.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from poisonbench.errors import UserError
from poisonbench.metagradient.schedule import (
    Advance,
    Finish,
    Keep,
    Plan,
    Record,
    Restore,
    Reverse,
    fitting,
    plan,
)

PyTree = Any
Step = Callable[[PyTree, Array, PyTree], PyTree]
Objective = Callable[[PyTree], Float[Array, ""]]
DEFAULT_MEMORY = 2 * 2**30


def metagradient(
    step: Step,
    objective: Objective,
    state: PyTree,
    num_steps: int,
    z: PyTree,
    *,
    arity: int | None = None,
    leaf: int | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[Array, ""], PyTree]:
    """Differentiate the result of a whole training run with respect to what it was trained on.

    Args:
        step: one update, `step(state, t, z) -> state`; pure, differentiable in the floating-point
            leaves of `state` and `z`, and keeping the structure, shapes and dtypes of `state`.
            A callable that is itself a pytree (`jax.tree_util.Partial`, a registered dataclass)
            has its arrays passed as arguments of the compiled programs, which are then shared by
            all callables of the same structure; any other callable is compiled once per object.
        objective: scalar function of the final state. It may be a pytree like `step`.
        state: the state before step 0; any pytree. Integer, boolean and key leaves are carried
            and not differentiated.
        num_steps: how many times to apply `step`, with `t` from 0 (int32).
        z: what to differentiate with respect to; any pytree. Integer leaves get float0 zeros.
        arity: children of each node of REPLAY's tree. With `leaf`, overrides `memory`.
        leaf: the most steps that a leaf may have, all of whose states are kept.
        memory: bytes that kept states may take; the schedule with the fewest repeated steps
            within them is used. Ignored where `arity` or `leaf` is given.
        progress: called as `progress(done, total)` in steps, forward and differentiated alike.

    Returns:
        `(objective(s[T]), gradient)`, the gradient with the structure of `z`.

    Raises:
        UserError: a step that changes the structure, shapes or dtypes of the state; an objective
            that is not scalar; a memory bound that no schedule meets.

    Example:
        >>> step = lambda w, t, x: w - 0.5 * (w - x[t])
        >>> value, gradient = metagradient(step, lambda w: w, jnp.zeros(()), 2, jnp.ones(3))
        >>> print(value, gradient)
        0.75 [0.25 0.5  0.  ]
    """
    step, objective = _as_pytree(step), _as_pytree(objective)
    state = jax.tree.map(jnp.asarray, state)
    z = jax.tree.map(jnp.asarray, z)
    _check(step, objective, state, z)
    chosen = _choose(state, num_steps, arity, leaf, memory)

    kept: dict[int, PyTree] = {}
    recorded: PyTree = None
    cursor = state
    value: Array | None = None
    adjoint: list[Array] = []
    gradient = [jnp.zeros_like(x) for x in _split(z)[0]]
    done, total = 0, chosen.forward + chosen.differentiated
    for action in chosen.actions():
        match action:
            case Keep(at):
                kept[at] = cursor
            case Restore(at):
                cursor = kept.pop(at)
            case Advance(start, stop):
                cursor = _advance(step, cursor, jnp.int32(start), jnp.int32(stop), z)
                done += stop - start
            case Record(start, stop, final):
                capacity = min(chosen.leaf, num_steps)
                first, last = jnp.int32(start), jnp.int32(stop - (not final))
                recorded, cursor = _record(step, cursor, first, last, z, capacity)
                done += action.forward
            case Finish():
                value, adjoint = _finish(objective, cursor)
            case Reverse(start, stop):
                first, last = jnp.int32(start), jnp.int32(stop)
                adjoint, gradient = _reverse(step, recorded, first, last, z, adjoint, gradient)
                recorded = None
                done += stop - start
        if progress is not None:
            progress(done, total)
    assert value is not None, "every schedule finishes"
    return value, _gradient_like(z, gradient)


def _as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    leaves = jax.tree.leaves(function)
    holds_itself = len(leaves) == 1 and leaves[0] is function
    return jax.tree_util.Partial(function) if holds_itself else function


def _choose(state: PyTree, num_steps: int, arity: int | None, leaf: int | None, memory: int) -> Plan:
    if arity is not None or leaf is not None:
        return plan(num_steps, 4 if arity is None else arity, 1 if leaf is None else leaf)
    size = max(1, sum(_bytes(x) for x in jax.tree.leaves(state)))
    return fitting(num_steps, memory // size)


def _bytes(x: Array) -> int:
    data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return int(data.size * data.dtype.itemsize)


def _differentiable(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _split(tree: PyTree) -> tuple[list[Array], Callable[[list[Array]], PyTree]]:
    """The floating-point leaves, and how to put others in their place."""
    structure: Any
    leaves, structure = jax.tree.flatten(tree)

    def join(floating: list[Array]) -> PyTree:
        rest = iter(floating)
        return structure.unflatten([next(rest) if _differentiable(x) else x for x in leaves])

    return [x for x in leaves if _differentiable(x)], join


def _gradient_like(z: PyTree, floating: list[Array]) -> PyTree:
    rest = iter(floating)
    return jax.tree.map(
        lambda x: next(rest) if _differentiable(x) else np.zeros(x.shape, jax.dtypes.float0), z
    )


def _check(step: Step, objective: Objective, state: PyTree, z: PyTree) -> None:
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
    if getattr(value, "shape", None) != () or not _differentiable(value):
        raise UserError(
            f"objective must return one floating-point scalar, not {value}: reduce it, as by a mean"
        )


# Shapes are asked of jitted functions because those remember the answer.
_once = jax.jit(lambda step, state, t, z: step(state, t, z))
_evaluate = jax.jit(lambda objective, state: objective(state))


@jax.jit
def _advance(step: Step, state: PyTree, start: Array, stop: Array, z: PyTree) -> PyTree:
    # Bounds are arguments, so one compilation serves every segment of every run.
    return jax.lax.fori_loop(start, stop, lambda t, s: step(s, t, z), state)


@partial(jax.jit, static_argnums=5)
def _record(
    step: Step, state: PyTree, start: Array, stop: Array, z: PyTree, capacity: int
) -> tuple[PyTree, PyTree]:
    def body(t: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        states, state = carry
        state = step(state, t, z)
        # The last write of a final leaf falls outside and is dropped: s[T] needs no replay.
        return jax.tree.map(lambda b, x: b.at[t + 1 - start].set(x, mode="drop"), states, state), state

    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (capacity, *x.shape)), state)
    return jax.lax.fori_loop(start, stop, body, (states, state))


@partial(jax.jit, donate_argnums=(5, 6))
def _reverse(
    step: Step,
    states: PyTree,
    start: Array,
    stop: Array,
    z: PyTree,
    adjoint: list[Array],
    gradient: list[Array],
) -> tuple[list[Array], list[Array]]:
    z_floating, z_join = _split(z)

    def body(i: Array, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        adjoint, gradient = carry
        t = stop - 1 - i
        floating, join = _split(jax.tree.map(lambda x: x[t - start], states))

        def floating_step(floating: list[Array], z_floating: list[Array]) -> list[Array]:
            return _split(step(join(floating), t, z_join(z_floating)))[0]

        _, pull_back = jax.vjp(floating_step, floating, z_floating)
        adjoint, more = pull_back(adjoint)
        return adjoint, [a + b for a, b in zip(gradient, more, strict=True)]

    return jax.lax.fori_loop(jnp.int32(0), stop - start, body, (adjoint, gradient))


@jax.jit
def _finish(objective: Objective, state: PyTree) -> tuple[Array, list[Array]]:
    floating, join = _split(state)
    return jax.value_and_grad(lambda x: objective(join(x)))(floating)
