"""One inner training run, as its learned optimizer is judged by it.

`s[t+1] = h(s[t], t, θ)` with θ the optimizer's weights: a batch that the key and `t` fix, the loss and
its gradient, one update. The run's meta-loss is either

- `mean`: the mean over the steps of the batch's loss before each update, or
- `final`: the mean loss of `FRESH` further training batches at the end, as in the release of VeLO;

each loss through the task's normaliser, so that tasks of differing scale can be averaged.

The optimizer's first state is part of the function of θ (VeLO learns its first recurrent state), so it
is made within step 0 and not before: whatever differentiates steps then differentiates that too.

References:
    Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
    https://arxiv.org/abs/2211.09760.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

PyTree = Any
Weights = Any
Objective = Literal["mean", "final"]
FRESH = 10
"""Batches that a final meta-loss is the mean of; the release takes 100, each as dear as half a step."""

INIT, BATCHES, JUDGE = range(3)
"""What a run's key is for: streams of it that never meet."""


class InnerState(NamedTuple):
    """Parameters, the optimizer's state, and the normalised losses so far, summed."""

    params: PyTree
    optimizer: PyTree
    total: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Problem:
    """What an estimator differentiates: an optimizer's meta-loss on one task.

    Attributes:
        optimizer: whose weights are learnt, a `poisonbench.optimizers.LearnedOptimizer`.
        task: what it trains, a `metatraining.tasks.Task`.
        objective: `mean` or `final`.
        data: the task's data, a pytree of arrays.
    """

    optimizer: Any = field(metadata={"static": True})
    task: Any = field(metadata={"static": True})
    objective: Any = field(metadata={"static": True})
    data: Any

    def run(self, num_steps: Any, key: Any) -> Run:
        """The training run of this length whose initial parameters and batches this key fixes."""
        return Run(self, jnp.asarray(num_steps, jnp.int32), key)

    def loss(self, weights: Weights, num_steps: Any, key: Any) -> Array:
        """Meta-loss of one whole run, a scalar; `num_steps` may be traced, but not differentiated."""
        run = self.run(num_steps, key)
        state = run.advance(run.start(weights), 0, run.num_steps, weights)
        return run.loss(state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Run:
    """One training run; callable as a step of the metagradient engine, `run(state, t, weights)`.

    Attributes:
        problem: optimizer, task and data.
        num_steps: int32 `[]`; also what the optimizer is told.
        key: of initial parameters and batches.
    """

    problem: Problem
    num_steps: Any
    key: Any

    def start(self, weights: Weights) -> InnerState:
        """The state before step 0."""
        params = self.problem.task.init(jax.random.fold_in(self.key, INIT))
        return InnerState(params, self._transformation(weights).init(params), jnp.zeros(()))

    def __call__(self, state: InnerState, t: Any, weights: Weights) -> InnerState:
        """Step `t`; at step 0 the optimizer's state is made anew, as a function of the weights."""
        first = self._transformation(weights).init
        held = jax.lax.cond(t == 0, lambda: first(state.params), lambda: state.optimizer)
        return self.step(state._replace(optimizer=held), t, weights)

    def step(self, state: InnerState, t: Any, weights: Weights) -> InnerState:
        """One step from a state that is as it should be."""
        task = self.problem.task
        key = jax.random.fold_in(jax.random.fold_in(self.key, BATCHES), t)
        batch = task.batch(self.problem.data, key)
        loss, gradient = task.value_and_grad(state.params, batch)
        updates, held = self._transformation(weights).update(
            gradient, state.optimizer, state.params, value=loss
        )
        params = optax.apply_updates(state.params, updates)
        return InnerState(params, held, state.total + task.normalised(loss))

    def advance(self, state: InnerState, start: Any, stop: Any, weights: Weights) -> InnerState:
        """Steps `start … stop - 1`."""
        return jax.lax.fori_loop(start, stop, lambda t, s: self.step(s, t, weights), state)

    def loss(self, state: InnerState) -> Array:
        """The meta-loss of a finished run, a scalar."""
        if self.problem.objective == "mean":
            return state.total / self.num_steps
        task, data = self.problem.task, self.problem.data
        keys = jax.random.split(jax.random.fold_in(self.key, JUDGE), FRESH)
        losses = jax.lax.map(lambda key: task.loss(state.params, task.batch(data, key)), keys)
        return task.normalised(losses.mean())

    def _transformation(self, weights: Weights) -> optax.GradientTransformationExtraArgs:
        return self.problem.optimizer.transformation(self.num_steps, weights)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stopping:
    """A run's step that does nothing once the run has ended."""

    run: Run

    def __call__(self, state: InnerState, t: Any, weights: Weights) -> InnerState:
        """Step `t`, or the state as it is."""
        return jax.lax.cond(
            t < self.run.num_steps, lambda s: self.run(s, t, weights), lambda s: s, state
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WindowLoss:
    """Mean of the losses of the last `num_steps` steps, and the state, as an objective with aux.

    Attributes:
        before: the state's `total` where they began.
        num_steps: of them.
    """

    before: Any
    num_steps: int = field(metadata={"static": True})

    def __call__(self, state: InnerState) -> tuple[Array, InnerState]:
        """The mean loss, and the state as it is."""
        return (state.total - self.before) / self.num_steps, state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MetaLoss:
    """`run.loss` as an objective of the metagradient engine."""

    run: Run

    def __call__(self, state: InnerState) -> Array:
        """The meta-loss of the final state."""
        return self.run.loss(state)
