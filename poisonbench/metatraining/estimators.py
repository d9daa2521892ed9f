"""Ways to estimate the gradient of an optimizer's meta-loss, interchangeable.

With `L(θ)` the meta-loss of a run (`unroll.py`), of which the key fixes initial parameters and batches,
and `ε ~ N(0, σ²I)`:

- `ES`, evolution strategies, over P antithetic pairs of whole runs: `(L(θ+ε) - L(θ-ε)) ε / 2σ²`. It is
  without bias for the gradient of the smoothed loss `E_ε L(θ+ε)`. With `signed`, the difference is
  replaced by its sign, as VeLO was trained: every pair then weighs the same, and neither direction nor
  scale is a gradient's any more.
- `PES`, persistent evolution strategies: the pair of runs is stepped `truncation` steps at a time with a
  fresh ε each, and the truncation's difference is weighed by the sum ξ of the run's ε so far,
  `ΔL ξ / 2σ²`, with ΔL of the truncation's mean loss. Where a run ends, ξ and the runs begin anew. The
  mean over a run's truncations is without bias where the mean over its steps is the meta-loss, and θ may
  change between them.
- `Exact`, a metagradient of the unsmoothed loss by this package's engine.
- `Truncated`, the same of `truncation` steps of a run at a time, with the state that they begin from
  taken as given. No gradient passes through more steps than that, so none explodes with the length of
  the run; but what the weights do to losses beyond the window goes unseen, a bias towards haste.

Both runs of a pair have the same data and initial parameters. What is not finite is no evidence: a
difference becomes 0, and so do all entries of an exact gradient that has one that is not.

References:
    Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
    https://arxiv.org/abs/2211.09760; Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in
    Unrolled Computation Graphs with Persistent Evolution Strategies", 2021,
    https://arxiv.org/abs/2112.13835.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poisonbench.errors import UserError
from poisonbench.metagradient import metagradient, plan, state_bytes
from poisonbench.metatraining.unroll import (
    InnerState,
    Later,
    MetaLoss,
    Problem,
    PyTree,
    Stopping,
    Weights,
    WindowLoss,
)

DEFAULT_SIGMA = 0.01
Name = Literal["es", "es-sign", "pes", "exact", "truncated"]


@dataclass(frozen=True)
class Cost:
    """What an estimate takes, in inner steps.

    Attributes:
        forward: steps that are only taken.
        differentiated: steps that are taken and pulled back through.
    """

    forward: int
    differentiated: int = 0

    def in_steps(self, factor: float) -> float:
        """All of it in forward steps, where a differentiated one is worth `factor` of them."""
        return self.forward + factor * self.differentiated


class Estimate(NamedTuple):
    """A gradient and what came with it.

    Attributes:
        loss: meta-loss, scalar; the mean of a pair's two.
        gradient: by the weights, with their structure.
        broken: how many differences or gradients were not finite, int32; they count as 0.
        carry: what the next estimate goes on from; empty but for PES.
    """

    loss: Any
    gradient: PyTree
    broken: Any
    carry: PyTree


class Estimator(Protocol):
    """A strategy; hashable. A call may be transformed by `jax.vmap`."""

    @property
    def static_length(self) -> bool:
        """Whether a run's length must be a Python int: one compiled program for each."""
        ...

    def begin(self, problem: Problem, weights: Weights, key: Any) -> PyTree:
        """What a first estimate goes on from."""
        ...

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: PyTree
    ) -> Estimate:
        """Estimate from runs of `num_steps` steps that `key` fixes."""
        ...

    def cost(self, num_steps: int) -> Cost:
        """What one estimate takes."""
        ...


@dataclass(frozen=True)
class ES:
    """Antithetic evolution strategies over whole runs.

    Attributes:
        sigma: standard deviation of what is added to each weight.
        pairs: antithetic pairs on the same run.
        signed: take the sign of each pair's difference.
    """

    sigma: float = DEFAULT_SIGMA
    pairs: int = 1
    signed: bool = False
    static_length: ClassVar[bool] = False

    def begin(self, problem: Problem, weights: Weights, key: Any) -> PyTree:
        """Nothing."""
        return ()

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: PyTree
    ) -> Estimate:
        """Estimate from `2 * pairs` whole runs."""
        draw, run = jax.random.split(key)
        noise = jax.vmap(lambda k: _noise(k, weights, self.sigma))(jax.random.split(draw, self.pairs))

        def loss(shift: PyTree, sign: Array) -> Array:
            shifted = jax.tree.map(lambda w, e: w + sign * e, weights, shift)
            return problem.loss(shifted, num_steps, run)

        both = jax.vmap(jax.vmap(loss, in_axes=(None, 0)), in_axes=(0, None))
        losses = both(noise, jnp.array([1.0, -1.0]))  # [pairs, 2]
        difference, broken = _finite(losses[:, 0] - losses[:, 1])
        weight = (jnp.sign(difference) if self.signed else difference) / (2 * self.sigma**2)
        gradient = jax.tree.map(lambda e: jnp.tensordot(weight, e, 1) / self.pairs, noise)
        return Estimate(losses.mean(), gradient, broken, carry)

    def cost(self, num_steps: int) -> Cost:
        """Two runs a pair."""
        return Cost(2 * self.pairs * num_steps)


class Particle(NamedTuple):
    """A pair of runs under way.

    Attributes:
        states: of the two runs, with a leading axis of 2.
        noise: ξ, the sum of the run's perturbations.
        t: steps taken, int32.
        num_steps: of this run, int32.
        key: of its data and initial parameters.
    """

    states: InnerState
    noise: PyTree
    t: Any
    num_steps: Any
    key: Any


@dataclass(frozen=True)
class PES:
    """Persistent evolution strategies, one pair, `truncation` steps an estimate.

    The meta-loss is always the mean over steps. A run's length is rounded up to whole truncations, so
    that runs end with them. (The library of VeLO lets a run end within one, and weighs its last step's
    loss by the newest perturbation alone.)

    Attributes:
        sigma: standard deviation of what is added to each weight in each truncation.
        truncation: steps.
    """

    sigma: float = DEFAULT_SIGMA
    truncation: int = 10
    static_length: ClassVar[bool] = False

    def begin(self, problem: Problem, weights: Weights, key: Any) -> Particle:
        """A run that has ended, so that the first estimate begins a new one."""
        one = problem.run(self.truncation, key).start(weights)
        states = jax.tree.map(lambda x: jnp.stack([x, x]), one)
        length = jnp.int32(self.truncation)
        return Particle(states, jax.tree.map(jnp.zeros_like, weights), length, length, key)

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: Particle
    ) -> Estimate:
        """Estimate from the next truncation of both runs; `num_steps` is the next run's length."""
        draw, fresh = jax.random.split(key)
        epsilon = _noise(draw, weights, self.sigma)
        ended = carry.t >= carry.num_steps
        length, identity, t = _going_on(carry, ended, num_steps, self.truncation, fresh)
        noise = jax.tree.map(lambda old, new: jnp.where(ended, 0, old) + new, carry.noise, epsilon)
        run = problem.run(length, identity)

        def truncated(state: InnerState, sign: Array) -> tuple[InnerState, Array]:
            shifted = jax.tree.map(lambda w, e: w + sign * e, weights, epsilon)
            first = run.start(shifted)
            state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), first, state)
            after = jax.lax.fori_loop(
                0, self.truncation, lambda i, s: run.step(s, t + i, shifted), state
            )
            return after, (after.total - state.total) / self.truncation

        states, losses = jax.vmap(truncated)(carry.states, jnp.array([1.0, -1.0]))
        difference, broken = _finite(losses[:1] - losses[1:])
        weight = difference[0] / (2 * self.sigma**2)
        gradient = jax.tree.map(lambda xi: weight * xi, noise)
        after = Particle(states, noise, t + self.truncation, length, identity)
        return Estimate(losses.mean(), gradient, broken, after)

    def cost(self, num_steps: int) -> Cost:
        """Two truncations, however long the run."""
        return Cost(2 * self.truncation)


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
        finite = _all_finite((loss, gradient))
        gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
        return Estimate(loss, gradient, (~finite).astype(jnp.int32), carry)

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
        t: steps taken, int32.
        num_steps: of this run, int32.
        key: of its data and initial parameters.
    """

    state: InnerState
    t: Any
    num_steps: Any
    key: Any


@dataclass(frozen=True)
class Truncated:
    """The gradient of a window of a run, which begins where the last one ended.

    The meta-loss is always the mean over steps, and a run's length is rounded up to whole windows. A run
    whose parameters are no longer finite is given up, and the next window begins another.

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
        return UnderWay(problem.run(length, key).start(weights), length, length, key)

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: UnderWay
    ) -> Estimate:
        """Differentiate the next window; `num_steps` is the next run's length."""
        ended = (carry.t >= carry.num_steps) | ~_all_finite(carry.state.params)
        length, identity, t = _going_on(carry, ended, num_steps, self.truncation, key)
        run = problem.run(length, identity)
        state = jax.tree.map(partial(jnp.where, ended), run.start(weights), carry.state)
        (loss, state), gradient = metagradient(
            Later(run, t), WindowLoss(state.total, self.truncation), state, self.truncation, weights,
            memory=self.memory, has_aux=True,
        )  # fmt: skip
        finite = _all_finite((loss, gradient))
        gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
        after = UnderWay(state, t + self.truncation, length, identity)
        return Estimate(loss, gradient, (~finite).astype(jnp.int32), after)

    def cost(self, num_steps: int) -> Cost:
        """One window forward and differentiated, however long the run."""
        return Cost(self.truncation, self.truncation)


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


def _noise(key: Any, weights: Weights, sigma: float) -> PyTree:
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(key, len(leaves))
    drawn = [sigma * jax.random.normal(k, w.shape, w.dtype) for k, w in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _going_on(
    carry: Particle | UnderWay, ended: Array, num_steps: Any, truncation: int, fresh: Any
) -> tuple[Array, Any, Array]:
    """Length, key and first step of the next truncation, of a new run where the last has ended."""
    whole = -(-jnp.asarray(num_steps, jnp.int32) // truncation) * truncation
    return (
        jnp.where(ended, whole, carry.num_steps),
        jnp.where(ended, fresh, carry.key),
        jnp.where(ended, 0, carry.t),
    )


def _all_finite(tree: PyTree) -> Array:
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _finite(differences: Array) -> tuple[Array, Array]:
    """The differences with 0 for those that are not finite, and how many those are."""
    good = jnp.isfinite(differences)
    return jnp.where(good, differences, 0), (~good).sum().astype(jnp.int32)
