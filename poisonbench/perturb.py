"""Small perturbations of many images: signed gradient steps on what a victim loses, in a ball.

What attacks on whole training sets share. They move every pixel a little, within the radius that the
budget sets, and differ in whose loss they descend and under which labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from poisonbench.arrays import chunks
from poisonbench.attacks import Task
from poisonbench.errors import UserError
from poisonbench.threat import Budget, LInf
from poisonbench.trained import TrainedVictim
from poisonbench.victim.training import augment


def require_radius(budget: Budget, name: str) -> None:
    """Refuse a budget in which a perturbation has no size.

    Raises:
        UserError: naming the option to give.
    """
    if not isinstance(budget.pixels, LInf):
        raise UserError(f"{name} perturbs images within a radius: give --radius, as --radius 8")


def radius(task: Task) -> float:
    """How far a pixel may move, in pixel units (1 is the whole range)."""
    assert isinstance(task.budget.pixels, LInf)  # since `require_radius` has passed
    return task.budget.pixels.radius / 255


def descended(
    victim: TrainedVictim,
    z: Float[np.ndarray, "p h w c"],
    labels: Int[np.ndarray, " p"],
    bounds: tuple[UInt8[np.ndarray, "p h w c"], UInt8[np.ndarray, "p h w c"]],
    key: PRNGKeyArray,
    *,
    steps: int,
    size: float,
    augmented: bool = False,
) -> Float[np.ndarray, "p h w c"]:
    """Images moved down the victim's loss under these labels, by projected signed steps.

    Args:
        victim: what is differentiated; its weights stay.
        z: pixels in [0, 1], where the descent begins.
        labels: that the victim is to find likely.
        bounds: lowest and highest pixels, in 8-bit levels.
        key: of the augmentation.
        steps: how many.
        size: of a step, in pixel units.
        augmented: let the victim see the images as its recipe augments them, anew at each step.

    Returns:
        Pixels in [0, 1], float32, within the bounds.
    """
    low, high = (bound.astype(np.float32) / 255 for bound in bounds)
    moved = np.empty_like(z)
    for where, rows in chunks(len(z)):
        parts = [jnp.asarray(array[rows]) for array in (z, labels, low, high)]
        keys = jax.random.split(jax.random.fold_in(key, where.start), steps)
        part = np.asarray(_descended(victim, *parts, jnp.float32(size), keys, augmented))
        moved[where] = part[: where.stop - where.start]
    return moved


@jax.jit(static_argnums=7)
def _descended(
    victim: TrainedVictim,
    z: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    low: Float[Array, "b h w c"],
    high: Float[Array, "b h w c"],
    size: Float[Array, ""],
    keys: Array,
    augmented: bool,
) -> Float[Array, "b h w c"]:
    weights, ones = victim.weights, jnp.ones(len(labels))

    def loss(z: Array, key: PRNGKeyArray) -> Array:
        seen = augment(victim.recipe, z, key) if augmented else z
        return victim.loss(weights, seen, labels, ones)

    def one_step(i: Array, z: Array) -> Array:
        return jnp.clip(z - size * jnp.sign(jax.grad(loss)(z, keys[i])), low, high)

    return jax.lax.fori_loop(0, len(keys), one_step, z)
