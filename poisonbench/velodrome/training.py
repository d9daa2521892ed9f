"""Trainings of one optimizer on one task: every setting, every seed.

A seed decides initialisation and batches, and is the same for every optimizer and setting, so that their
losses are paired. Seeds are trained side by side (`vmap`) and settings one after another within the
compiled program, where a training stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.errors import UserError
from poisonbench.metatraining.images import TaskData
from poisonbench.metatraining.tasks import Batch, InnerTask
from poisonbench.velodrome.contenders import ADAM, Contender

POINTS = 50
"""Times that the loss is measured in the course of a training."""
MEASURED = 512
"""Training images that it is measured on, the same for all."""
INITIAL, BATCHES, IMAGES = range(3)


@dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Attributes:
        steps: of a training, a multiple of `POINTS`.
        seeds: trainings of a setting, at least 3.
        reference: how many times longer Adam trains, which scores are read off.
    """

    steps: int = 1000
    seeds: int = 5
    reference: int = 3

    def __post_init__(self) -> None:
        if self.steps < POINTS or self.steps % POINTS:
            raise UserError(
                f"--steps {self.steps}: a training takes {POINTS} steps or a multiple of that"
            )
        if self.seeds < 3:
            raise UserError(f"--seeds {self.seeds}: an interval needs at least 3")

    def points(self, contender: str) -> int:
        """How often an optimizer's loss is measured after the start."""
        return POINTS * (self.reference if contender == ADAM else 1)


def train(
    task: InnerTask,
    data: TaskData,
    contender: Contender,
    protocol: Protocol,
    advance: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, "settings seeds points"]:
    """Losses on the measured images: at the start, and `POINTS` times in `protocol.steps` steps.

    A training whose loss leaves the numbers is NaN or infinite from there on.

    Args:
        task: what is trained.
        data: its images.
        contender: the optimizer.
        protocol: how long; Adam takes `reference` times as many steps.
        advance: called after each measurement.
    """
    seeds = jnp.arange(protocol.seeds)
    settings = jnp.asarray(contender.settings, jnp.float32)
    params = jax.vmap(lambda seed: task.init(_key(INITIAL, seed)))(seeds)
    batch = measured(data)

    @partial(jax.jit, donate_argnums=0)
    def stretch(carry: Any, weights: Any, data: TaskData, first: Array) -> tuple[Any, Array]:
        def one(setting_and_carry: Any) -> tuple[Any, Array]:
            setting, carry = setting_and_carry
            t = contender.build(setting, protocol.steps, weights)

            def step(i: Array, carry: Any) -> Any:
                return jax.vmap(partial(_step, task, t, data, first + i))(seeds, *carry)

            carry = jax.lax.fori_loop(0, protocol.steps // POINTS, step, carry)
            return carry, _losses(task, carry[0], batch)

        return jax.lax.map(one, (settings, carry))

    def begin(setting: Array, params: Any) -> Any:
        return params, contender.build(setting, protocol.steps, contender.weights).init(params)

    carry = jax.jit(jax.vmap(jax.vmap(begin, (None, 0)), (0, None)))(settings, params)
    start = np.asarray(_losses(task, params, batch))
    curves = [np.broadcast_to(start, (len(settings), protocol.seeds))]
    for point in range(protocol.points(contender.name)):
        first = jnp.int32(point * (protocol.steps // POINTS))
        carry, losses = stretch(carry, contender.weights, data, first)
        curves.append(np.asarray(losses))
        advance()
    return np.stack(curves, axis=-1)


def measured(data: TaskData) -> Batch:
    """The images that losses are measured on."""
    count = min(MEASURED, len(data.labels))
    rows = jax.random.choice(_key(IMAGES, 0), len(data.labels), (count,), replace=False)
    return Batch(data.images[rows], data.labels[rows])


def _step(
    task: InnerTask,
    t: optax.GradientTransformationExtraArgs,
    data: TaskData,
    number: Array,
    seed: Array,
    params: Any,
    state: Any,
) -> tuple[Any, Any]:
    batch = task.batch(data, jax.random.fold_in(_key(BATCHES, seed), number))
    loss, gradient = task.value_and_grad(params, batch)
    updates, state = t.update(gradient, state, params, value=loss)
    return optax.apply_updates(params, updates), state


def _losses(task: InnerTask, params: Any, batch: Batch) -> Array:
    """Of each seed's parameters, one after another: all at once would take too much memory."""
    return jax.lax.map(lambda own: task.loss(own, batch), params)


def _key(purpose: int, seed: Array | int) -> PRNGKeyArray:
    return jax.random.fold_in(jax.random.key(purpose), seed)
