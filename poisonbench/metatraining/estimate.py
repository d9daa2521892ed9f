"""What an estimator of a metagradient is: its interface, its cost, and what its estimates share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poisonbench.metatraining.unroll import Problem, PyTree, Weights


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
        carry: what the next estimate goes on from; empty where each takes a whole run.
    """

    loss: Any
    gradient: PyTree
    broken: Any
    carry: PyTree


class Position(NamedTuple):
    """How far a run that is under way has come, and which it is.

    Attributes:
        t: steps taken, int32.
        num_steps: of this run, int32.
        key: of its data and initial parameters.
    """

    t: Any
    num_steps: Any
    key: Any

    @property
    def ended(self) -> Any:
        """Whether all its steps are taken, bool."""
        return self.t >= self.num_steps

    def or_new(self, ended: Array, num_steps: Any, truncation: int, key: Any) -> Position:
        """This, or where `ended`, the start of a run of `num_steps` rounded up to whole truncations."""
        whole = -(-jnp.asarray(num_steps, jnp.int32) // truncation) * truncation
        return jax.tree.map(partial(jnp.where, ended), Position(jnp.int32(0), whole, key), self)


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


def all_finite(tree: PyTree) -> Array:
    """Whether every entry of every array is."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
