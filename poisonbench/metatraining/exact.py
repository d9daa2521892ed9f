"""Metagradients of the unsmoothed meta-loss by this package's engine.

- `Exact`, of whole runs.
- `Truncated`, of `truncation` steps of a run at a time, with the state that they begin from taken as
  given. No gradient passes through more steps than that, so none explodes with the length of the run;
  but what the weights do to losses beyond the window goes unseen, a bias towards haste.

A gradient that has an entry that is not finite is no evidence: all of it becomes 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from poisonbench.metagradient import Later, metagradient, plan, state_bytes
from poisonbench.metatraining.estimate import Cost, Estimate, Position, all_finite
from poisonbench.metatraining.unroll import (
    InnerState,
    MetaLoss,
    Problem,
    PyTree,
    Stopping,
    Weights,
    WindowLoss,
)


@dataclass(frozen=True)
class Exact:
    """The gradient itself, of the loss as it is, through the whole run.

    Attributes:
        longest: most steps of a run. Runs of any length up to it then share a compiled program, in which
            the steps past a run's end do nothing; None compiles one for each length.
        memory: bytes that the states kept for the way back may take; past it, steps are repeated.
    """

    longest: int | None = None
    memory: int = 2**28

    @property
    def static_length(self) -> bool:
        """Whether each length has a program of its own."""
        return self.longest is None

    def begin(self, problem: Problem, weights: Weights, key: Any) -> PyTree:
        """Nothing."""
        return ()

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: PyTree
    ) -> Estimate:
        """Differentiate one whole run."""
        run, last = problem.run(num_steps, key), self.longest or num_steps
        step = run if self.longest is None else Stopping(run)
        loss, gradient = metagradient(
            step, MetaLoss(run), run.start(weights), last, weights, memory=self.memory
        )
        return _where_finite(loss, gradient, carry)

    def cost(self, num_steps: int) -> Cost:
        """A run forward and a run differentiated, without what memory makes the engine repeat."""
        return Cost(num_steps, num_steps)

    def counted(self, problem: Problem, weights: Weights, num_steps: int) -> Cost:
        """The cost with the steps that memory makes the engine repeat."""
        size = state_bytes(jax.eval_shape(problem.run(num_steps, jax.random.key(0)).start, weights))
        planned = plan(num_steps, memory=self.memory, state_bytes=size)
        return Cost(planned.forward, planned.differentiated)


class UnderWay(NamedTuple):
    """A run under way.

    Attributes:
        state: of the run.
        position: in it.
    """

    state: InnerState
    position: Position


@dataclass(frozen=True)
class Truncated:
    """The gradient of a window of a run, which begins where the last one ended.

    The meta-loss is always the mean over steps, and a run's length is rounded up to whole windows. A run
    whose parameters are no longer finite is given up, and the next window begins another. One that has
    diverged to finite ones goes on to its end, with gradients of 0 where its clipped loss is flat.

    Attributes:
        truncation: steps of a window.
        memory: bytes that the states kept for the way back may take; past it, steps are repeated.
    """

    truncation: int = 10
    memory: int = 2**28
    static_length: ClassVar[bool] = False

    def begin(self, problem: Problem, weights: Weights, key: Any) -> UnderWay:
        """A run that has ended, so that the first estimate begins a new one."""
        length = jnp.int32(self.truncation)
        return UnderWay(problem.run(length, key).start(weights), Position(length, length, key))

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: UnderWay
    ) -> Estimate:
        """Differentiate the next window; `num_steps` is the next run's length."""
        ended = carry.position.ended | ~all_finite(carry.state.params)
        position = carry.position.or_new(ended, num_steps, self.truncation, key)
        run = problem.run(position.num_steps, position.key)
        state = jax.tree.map(partial(jnp.where, ended), run.start(weights), carry.state)
        step, loss_of = Later(run, position.t), WindowLoss(state.total, self.truncation)
        (loss, state), gradient = metagradient(
            step, loss_of, state, self.truncation, weights, memory=self.memory, has_aux=True
        )
        after = UnderWay(state, position._replace(t=position.t + self.truncation))
        return _where_finite(loss, gradient, after)

    def cost(self, num_steps: int) -> Cost:
        """One window forward and differentiated, however long the run."""
        return Cost(self.truncation, self.truncation)


def _where_finite(loss: Any, gradient: PyTree, carry: PyTree) -> Estimate:
    """The estimate, with a gradient of 0 where it or the loss is not finite."""
    finite = all_finite((loss, gradient))
    kept = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
    return Estimate(loss, kept, (~finite).astype(jnp.int32), carry)
