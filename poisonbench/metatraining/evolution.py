"""Evolution strategies: estimates of a metagradient that need no derivative.

With `L(θ)` the meta-loss of a run, of which the key fixes initial parameters and batches, and
`ε ~ N(0, σ²I)`:

- `ES`, over P antithetic pairs of whole runs: `(L(θ+ε) - L(θ-ε)) ε / 2σ²`. It is without bias for the
  gradient of the smoothed loss `E_ε L(θ+ε)`. With `signed`, the difference is replaced by its sign, as
  VeLO was trained: every pair then weighs the same, and neither direction nor scale is a gradient's any
  more.
- `PES`, persistent evolution strategies: the pair of runs is stepped `truncation` steps at a time with a
  fresh ε each, and the truncation's difference is weighed by the sum ξ of the run's ε so far,
  `ΔL ξ / 2σ²`, with ΔL of the truncation's mean loss. Where a run ends, ξ and the runs begin anew. The
  mean over a run's truncations is without bias where the mean over its steps is the meta-loss, and θ may
  change between them.

Both runs of a pair have the same data and initial parameters. A difference that is not finite becomes 0.

References:
    Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
    https://arxiv.org/abs/2211.09760; Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in
    Unrolled Computation Graphs with Persistent Evolution Strategies", 2021,
    https://arxiv.org/abs/2112.13835.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poisonbench.metatraining.estimate import Cost, Estimate, Position
from poisonbench.metatraining.unroll import InnerState, Problem, PyTree, Weights

DEFAULT_SIGMA = 0.01


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
        position: in the run, of both.
    """

    states: InnerState
    noise: PyTree
    position: Position


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
        noise = jax.tree.map(jnp.zeros_like, weights)
        return Particle(states, noise, Position(length, length, key))

    def __call__(
        self, problem: Problem, weights: Weights, num_steps: Any, key: Any, carry: Particle
    ) -> Estimate:
        """Estimate from the next truncation of both runs; `num_steps` is the next run's length."""
        draw, fresh = jax.random.split(key)
        epsilon = _noise(draw, weights, self.sigma)
        ended = carry.position.ended
        position = carry.position.or_new(ended, num_steps, self.truncation, fresh)
        noise = jax.tree.map(lambda old, new: jnp.where(ended, 0, old) + new, carry.noise, epsilon)
        run = problem.run(position.num_steps, position.key)

        def truncated(state: InnerState, sign: Array) -> tuple[InnerState, Array]:
            shifted = jax.tree.map(lambda w, e: w + sign * e, weights, epsilon)
            first = run.start(shifted)
            state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), first, state)
            after = jax.lax.fori_loop(
                0, self.truncation, lambda i, s: run.step(s, position.t + i, shifted), state
            )
            return after, (after.total - state.total) / self.truncation

        states, losses = jax.vmap(truncated)(carry.states, jnp.array([1.0, -1.0]))
        difference, broken = _finite(losses[:1] - losses[1:])
        weight = difference[0] / (2 * self.sigma**2)
        gradient = jax.tree.map(lambda xi: weight * xi, noise)
        after = Particle(states, noise, position._replace(t=position.t + self.truncation))
        return Estimate(losses.mean(), gradient, broken, after)

    def cost(self, num_steps: int) -> Cost:
        """Two truncations, however long the run."""
        return Cost(2 * self.truncation)


def _noise(key: Any, weights: Weights, sigma: float) -> PyTree:
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(key, len(leaves))
    drawn = [sigma * jax.random.normal(k, w.shape, w.dtype) for k, w in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def _finite(differences: Array) -> tuple[Array, Array]:
    """The differences with 0 for those that are not finite, and how many those are."""
    good = jnp.isfinite(differences)
    return jnp.where(good, differences, 0), (~good).sum().astype(jnp.int32)
