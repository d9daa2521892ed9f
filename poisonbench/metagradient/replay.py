"""Exact gradients through whole training runs, by REPLAY.

Training is `s[t+1] = h(s[t], t, z)` for `t = 0 … T-1` and the objective is `f(z) = φ(s[T])`. With
the adjoint `A[T] = ∇φ(s[T])`, going backwards,

    A[t] = A[t+1] · ∂h/∂s (s[t], t, z)        ∇f = Σ_t A[t+1] · ∂h/∂z (s[t], t, z)

so every state is needed once, in reverse. `schedule.py` says which to keep and which to replay,
`planning.py` what that costs, `states.py` where they are kept, and `programs.py` is what is compiled;
this module runs a schedule.

Cost: `T` steps forward, `T` steps differentiated (a step and its vector-Jacobian product, two to
three steps' time), and the schedule's repeated steps. Memory: the schedule's kept states and the
residuals of one step. A run that fits in one leaf keeps only what its derivative reads of a state,
which leaves out a momentum.

When not to use it: where the gradient of a smoothed objective is wanted, or where training is so
unstable that the exact gradient says nothing about a step of useful size; the derivative is exact
either way. Measure that first.

References:
    Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
    https://arxiv.org/abs/2503.13751.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poisonbench.errors import UserError
from poisonbench.metagradient import programs, states
from poisonbench.metagradient.checks import check, check_finite
from poisonbench.metagradient.planning import Plan, plan
from poisonbench.metagradient.programs import Cotangents, Objective, PyTree, Step
from poisonbench.metagradient.resume import Resume, identity
from poisonbench.metagradient.schedule import (
    Action,
    Advance,
    Finish,
    Keep,
    Record,
    Restore,
    Reverse,
    Schedule,
)

DEFAULT_MEMORY = "2GiB"


def metagradient(
    step: Step,
    objective: Objective,
    state: PyTree,
    num_steps: int,
    z: PyTree,
    *,
    schedule: Schedule = "auto",
    arity: int = 4,
    leaf: int | None = None,
    max_states: int | None = None,
    memory: int | str | None = None,
    offload: str | os.PathLike[str] = "device",
    has_aux: bool = False,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> tuple[Any, PyTree]:
    """Differentiate the result of a whole training run with respect to what it was trained on.

    Args:
        step: one update, `step(state, t, z) -> state`; pure, differentiable in the floating-point
            leaves of `state` and `z`, and keeping the structure, shapes and dtypes of `state`.
            A callable that is itself a pytree (`jax.tree_util.Partial`, a registered dataclass)
            has its arrays passed as arguments of the compiled programs, which are then shared by
            all callables of the same structure; any other callable is compiled once per object.
        objective: scalar function of the final state, or, with `has_aux`, `(scalar, anything)`. It
            may be a pytree like `step`.
        state: the state before step 0; any pytree. Integer, boolean and key leaves are carried
            and not differentiated.
        num_steps: how many times to apply `step`, with `t` from 0 (int32).
        z: what to differentiate with respect to; any pytree. Integer leaves get float0 zeros.
        schedule: which states to keep: `store_all`, `tree`, `binomial`, or `auto`, the fewest
            repeated steps within the bound; see `plan`.
        arity: children of each node of a tree.
        leaf: the most steps that a leaf may have, all of whose states are on the device at once.
            Left out, it is as long as fits; one step where states are kept elsewhere.
        max_states: bound on the kept states; or
        memory: the same in bytes, or as `"2GiB"`, which is the default but for trees and
            `store_all`.
        offload: where kept states live: `device`, `host` (host memory), or a folder.
        has_aux: whether `objective` returns something beside its value.
        progress: called as `progress(done, total)` in steps, forward and differentiated alike.
        checkpoint: file from which an interrupted backward pass goes on when it is called again
            with the same arguments. It is written at most every `checkpoint_every` seconds and
            removed at the end. The code of `step` is not checked.
        checkpoint_every: seconds.

    Returns:
        `(value, gradient)`: what `objective` returned for the final state, and its gradient with
        the structure of `z`. The same whatever the schedule.

    Raises:
        UserError: a step that changes the structure, shapes or dtypes of the state; an objective
            that is not scalar; a bound that no schedule meets; a folder or checkpoint that cannot be
            written.
        OtherRunError: the checkpoint belongs to a run with other arguments.
        NonFiniteError: NaN or infinity in value or gradient; it says at which step.

    Warns:
        AdamWithoutEpsRoot: see there.

    The call may itself be transformed by `jax.vmap` over `state`, `z` and arrays in `step`; nothing
    is then checked for NaN, and states can be neither offloaded nor resumed.

    Example:
        >>> step = lambda w, t, x: w - 0.5 * (w - x[t])
        >>> value, gradient = metagradient(step, lambda w: w, jnp.zeros(()), 2, jnp.ones(3))
        >>> print(value, gradient)
        0.75 [0.25 0.5  0.  ]
    """
    step, objective = _as_pytree(step), _as_pytree(objective)
    state = jax.tree.map(jnp.asarray, state)
    z = jax.tree.map(jnp.asarray, z)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((step, objective, state, z)))
    if traced and (offload != "device" or checkpoint is not None):
        raise UserError("inside a transformation states cannot be offloaded or resumed: leave both out")
    check(step, objective, state, z, has_aux)
    if max_states is None and memory is None and schedule in ("auto", "binomial"):
        memory = DEFAULT_MEMORY
    read = None if traced else programs.leaves_read(step, state, z)
    chosen = plan(
        num_steps, schedule, arity=arity, max_states=max_states, memory=memory,
        leaf=1 if leaf is None and offload != "device" else leaf,
        state_bytes=states.state_bytes(state), recorded_bytes=states.state_bytes(state, read),
    )  # fmt: skip
    resume = None
    if checkpoint is not None:
        who = identity(chosen, step, objective, state, z)
        resume = Resume(Path(checkpoint), checkpoint_every, who)
    kept = states.make(offload, state, chosen, read)
    run = _Run(step, objective, has_aux, z, chosen, kept, state, progress)
    with warnings.catch_warnings():
        if traced:  # what is batched may then grow as it goes, and a donated buffer go unused
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        value, cotangents = run.play(state, resume)
    if not traced:
        check_finite(step, state, num_steps, z, value[0] if has_aux else value, cotangents)
    if resume is not None:
        resume.remove()
    return value, _gradient_like(z, cotangents.gradient)


@dataclass
class _Run:
    """A schedule being played on arrays.

    Attributes:
        cursor: the state that is being stepped.
    """

    step: Step
    objective: Objective
    has_aux: bool
    z: PyTree
    plan: Plan
    kept: states.Kept
    cursor: PyTree
    progress: Callable[[int, int], None] | None

    def play(self, state: PyTree, resume: Resume | None) -> tuple[Any, Cotangents]:
        """What the objective returned, and the cotangents before step 0."""
        value, cotangents, skip = None, None, 0
        if resume is not None and resume.path.exists():
            # The objective of the first state has the structure of that of the last.
            stored = resume.load(self.kept, state, *self._finish(state))
            if stored is not None:
                skip, value, cotangents = stored
        done, total = 0, self.plan.forward + self.plan.differentiated
        for number, action in enumerate(self.plan.actions()):
            done += _steps(action)
            if number < skip:
                continue
            if isinstance(action, Finish):
                value, cotangents = self._finish(self.cursor)
            elif isinstance(action, Reverse):
                assert cotangents is not None, "every schedule finishes before it reverses"
                cotangents = self._reverse(action, cotangents)
                if resume is not None:
                    resume.save(number + 1, self.kept, value, cotangents)
            else:
                self._forward(action)
            if self.progress is not None:
                jax.block_until_ready((self.cursor, cotangents))
                self.progress(done, total)
        assert cotangents is not None
        return value, cotangents

    def _forward(self, action: Keep | Restore | Advance | Record) -> None:
        match action:
            case Keep():
                self.kept.keep(self.cursor)
            case Restore():
                self.cursor = self.kept.restore()
            case Advance(start, stop):
                first, last = jnp.int32(start), jnp.int32(stop)
                self.cursor = programs.advance(self.step, self.cursor, first, last, self.z)
            case Record(start, stop, final):
                bounds = (jnp.int32(x) for x in (self.kept.top, start, stop - (not final)))
                self.kept.buffer, self.cursor = programs.record(
                    self.step, self.kept.buffer, self.cursor, *bounds, self.z
                )

    def _finish(self, state: PyTree) -> tuple[Any, Cotangents]:
        value, adjoint = programs.finish(self.objective, state, self.has_aux)
        gradient = [jnp.zeros_like(x) for x in programs.split(self.z)[0]]
        broken = jnp.where(programs.all_finite(adjoint), -1, self.plan.num_steps).astype(jnp.int32)
        return value, Cotangents(adjoint, gradient, broken)

    def _reverse(self, action: Reverse, cotangents: Cotangents) -> Cotangents:
        bounds = (jnp.int32(x) for x in (self.kept.top, action.start, action.stop))
        return programs.reverse(self.step, self.kept.buffer, *bounds, self.z, cotangents, self.kept.like)


def _steps(action: Action) -> int:
    match action:
        case Advance(start, stop) | Reverse(start, stop):
            return stop - start
        case Record():
            return action.forward
        case _:
            return 0


def _as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    leaves = jax.tree.leaves(function)
    holds_itself = len(leaves) == 1 and leaves[0] is function
    return jax.tree_util.Partial(function) if holds_itself else function


def _gradient_like(z: PyTree, floating: list[Array]) -> PyTree:
    rest = iter(floating)
    return jax.tree.map(
        lambda x: next(rest) if programs.differentiable(x) else np.zeros(x.shape, jax.dtypes.float0),
        z,
    )
