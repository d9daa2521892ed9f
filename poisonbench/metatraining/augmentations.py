"""Variations of inner tasks, so that few tasks teach an optimizer as many would.

Each wraps a task and is one: frozen, hashable, and fixed by numbers that are drawn from a key. What it
trains is the same function, written otherwise:

- `Reparameterised`: parameters are divided by scales and multiplied again inside the loss, so that every
  sensible learning rate changes. Scales are log-uniform: one for all, for each tensor or for each entry.
- `SmallerBatch`: a share of the batch, so that gradients have another noise.
- `Subspace`: parameters are a fixed initialisation plus a few random directions times what is trained.
- `NormalisedGradient`: the optimizer is given gradients of length 1. The loss stays as it is, for exact
  metagradients differentiate through it: only `value_and_grad` is another.

`augment` draws them with the chances that VeLO's meta-training used, as far as they are here.

References:
    Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022,
    https://arxiv.org/abs/2211.09760.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.metatraining.images import TaskData
from poisonbench.metatraining.tasks import Batch, Task

Scope = Literal["global", "tensor", "parameter"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DECADES = (3, 2, 1)
REPARAMETERISED, SMALLER, NORMALISED, SUBSPACE = 5 / 7, 0.2, 0.05, 0.08
SHARES = (0.01, 1.0)
DIRECTIONS = (2, 64)
SMALLEST = 1e-30
"""Squared length of a gradient below which it is no longer scaled up."""


@dataclass(frozen=True)
class Augmented:
    """A task that leaves everything to another; what derives from it changes some of it."""

    task: Task

    @property
    def name(self) -> str:
        """The task's, and what was done to it."""
        return self.task.name

    def init(self, key: PRNGKeyArray) -> Any:
        """Fresh parameters."""
        return self.task.init(key)

    def loss(self, params: Any, batch: Batch) -> Float[Array, ""]:
        """Mean loss of a batch."""
        return self.task.loss(params, batch)

    def value_and_grad(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Any]:
        """The loss, and the gradient that an optimizer is given."""
        return jax.value_and_grad(self.loss)(params, batch)

    def batch(self, data: TaskData, key: PRNGKeyArray) -> Batch:
        """A batch drawn with replacement."""
        return self.task.batch(data, key)

    def normalised(self, loss: Float[Array, "..."]) -> Float[Array, "..."]:
        """A loss on the scale that tasks share."""
        return self.task.normalised(loss)


@dataclass(frozen=True)
class Reparameterised(Augmented):
    """Parameters in other units.

    Attributes:
        scope: what has a scale of its own: everything together, each tensor, or each entry.
        decades: scales are 10^u, u uniform in ± so many.
        seed: of the scales.
    """

    scope: Scope
    decades: int
    seed: int

    @property
    def name(self) -> str:
        """The task's, the scope, and the range."""
        return f"{self.task.name}+{self.scope}{self.decades}-{self.seed}"

    def init(self, key: PRNGKeyArray) -> Any:
        """The task's fresh parameters, divided by the scales."""
        params = self.task.init(key)
        return jax.tree.map(jnp.divide, params, self._scales(params))

    def loss(self, params: Any, batch: Batch) -> Float[Array, ""]:
        """The task's loss of the parameters times the scales."""
        return self.task.loss(jax.tree.map(jnp.multiply, params, self._scales(params)), batch)

    def value_and_grad(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Any]:
        """The loss, and the task's gradient times the scales, by the chain rule."""
        scales = self._scales(params)
        loss, slope = self.task.value_and_grad(jax.tree.map(jnp.multiply, params, scales), batch)
        return loss, jax.tree.map(jnp.multiply, slope, scales)

    def _scales(self, params: Any) -> Any:
        """One array for each of `params`, of its shape."""
        leaves, tree = jax.tree.flatten(params)
        count = 1 if self.scope == "global" else len(leaves)
        keys = jax.random.split(jax.random.key(self.seed), count)
        scales = []
        for i, leaf in enumerate(leaves):
            shape = leaf.shape if self.scope == "parameter" else ()
            exponent = jax.random.uniform(keys[i % count], shape, leaf.dtype, -1, 1) * self.decades
            scales.append(jnp.broadcast_to(10**exponent, leaf.shape))
        return jax.tree.unflatten(tree, scales)


@dataclass(frozen=True)
class SmallerBatch(Augmented):
    """A share of the batch, at least one image."""

    share: float

    @property
    def name(self) -> str:
        """The task's, and the share."""
        return f"{self.task.name}+batch{self.share:g}"

    def batch(self, data: TaskData, key: PRNGKeyArray) -> Batch:
        """The first of the task's batch."""
        whole = self.task.batch(data, key)
        count = max(1, round(self.share * len(whole.labels)))
        return Batch(whole.images[:count], whole.labels[:count])


@dataclass(frozen=True)
class Subspace(Augmented):
    """Training along few random directions from one initialisation.

    Attributes:
        directions: how many; their entries are normal with variance 1 / directions, so that coordinates
            of 1 move every parameter by about 1.
        seed: of the initialisation and the directions.
    """

    directions: int
    seed: int

    @property
    def name(self) -> str:
        """The task's, and the number of directions."""
        return f"{self.task.name}+subspace{self.directions}-{self.seed}"

    def init(self, key: PRNGKeyArray) -> Any:  # noqa: ARG002 - the initialisation is part of the task
        """Coordinates, `[directions]`, all zero."""
        return jnp.zeros(self.directions, jnp.float32)

    def loss(self, params: Float[Array, " directions"], batch: Batch) -> Float[Array, ""]:
        """The task's loss at these coordinates."""
        return self.task.loss(self.place(params), batch)

    def value_and_grad(
        self, params: Float[Array, " directions"], batch: Batch
    ) -> tuple[Float[Array, ""], Any]:
        """The loss, and what the task's gradient is along the directions."""
        place, pull = jax.vjp(self.place, params)
        loss, slope = self.task.value_and_grad(place, batch)
        return loss, pull(slope)[0]

    def place(self, coordinates: Float[Array, " directions"]) -> Any:
        """The task's parameters at these coordinates."""
        base, keys = jax.random.split(jax.random.key(self.seed))
        leaves, tree = jax.tree.flatten(self.task.init(base))
        moved = [
            leaf + jnp.tensordot(coordinates, jax.random.normal(own, (self.directions, *leaf.shape)), 1)
            / math.sqrt(self.directions)
            for leaf, own in zip(leaves, jax.random.split(keys, len(leaves)), strict=True)
        ]  # fmt: skip
        return jax.tree.unflatten(tree, moved)


@dataclass(frozen=True)
class NormalisedGradient(Augmented):
    """Steps along gradients of length 1, over all parameters together; zero stays zero."""

    @property
    def name(self) -> str:
        """The task's, and that gradients are normalised."""
        return f"{self.task.name}+normalised"

    def value_and_grad(self, params: Any, batch: Batch) -> tuple[Float[Array, ""], Any]:
        """The loss, and its gradient divided by its length."""
        loss, slope = self.task.value_and_grad(params, batch)
        squares = optax.tree.norm(slope, squared=True)
        shrink = jax.lax.rsqrt(jnp.maximum(squares, SMALLEST))
        return loss, jax.tree.map(lambda x: x * shrink, slope)


def augment(key: PRNGKeyArray, task: Task) -> Task:
    """A task as it is met in meta-training: each variation comes or stays away by a chance of its own.

    The chances: 5/7 for other units (scope and range alike likely), 8 % for a subspace of 2 to 64
    directions, 20 % for a smaller batch (uniform share from 1 %), 5 % for normalised gradients.

    Args:
        key: decides everything.
        task: what is varied.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    varied = task
    if rng.random() < SUBSPACE:
        directions = round(math.exp(rng.uniform(math.log(DIRECTIONS[0]), math.log(DIRECTIONS[1]))))
        varied = Subspace(varied, directions, int(rng.integers(2**31)))
    if rng.random() < REPARAMETERISED:
        scope, decades = SCOPES[int(rng.integers(3))], DECADES[int(rng.integers(3))]
        varied = Reparameterised(varied, scope, decades, int(rng.integers(2**31)))
    if rng.random() < SMALLER:
        varied = SmallerBatch(varied, round(rng.uniform(*SHARES), 3))
    if rng.random() < NORMALISED:
        varied = NormalisedGradient(varied)
    return varied
