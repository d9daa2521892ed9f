"""Friendly noise: for each image the largest noise that its victim does not mind, and random noise.

    ε_i = argmin over ‖ε‖_∞ ≤ r of KL(f(x_i + ε) ‖ f(x_i)) - λ ‖ε‖₂ / √d,

found once, for a victim trained on the suspect set. Training then sees `x_i + ε_i` and, in every step,
uniform noise: a perturbation that works by sharp features drowns, and what the class is remains.

Paper: Liu, Yang and Mirzasoleiman, "Friendly Noise against Adversarial Noise: A Powerful Defense
against Data Poisoning Attacks", NeurIPS 2022, https://arxiv.org/abs/2208.10224: r of 16/255, uniform
noise within 8/255.

What is left open, and how it is settled here: the paper finds the noise after five epochs of a long
run; here it is found for a victim of a whole run, and another one then trains from scratch. `steps` and
`weight` are the defaults of the authors' code, which differs otherwise: its divergence is the other way
round, its measure of size the mean square, its descent that of SGD, and its example draws Bernoulli
noise. Here the descent is by Adam, at a fifth of r, from uniform noise within a tenth of r. At each of
its steps the noise is cut to what leaves pixels in their range, so that what was found is what is
trained on.

Cost: 4.3 victim trainings on `digits`: its own, the one that minds, and `steps` forward and backward
passes over the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from poisonbench.arrays import chunks
from poisonbench.defenses import Defense, Loss, View
from poisonbench.errors import UserError
from poisonbench.trained import TrainedVictim
from poisonbench.victim.training import logits


@dataclass(frozen=True)
class FriendlyNoise(Defense):
    """Noise that the victim does not mind.

    Attributes:
        radius: of the friendly noise, in 8-bit levels.
        uniform: largest change by the uniform noise, in 8-bit levels.
        steps: of the descent.
        weight: λ, of the noise's size against the divergence.
    """

    radius: int = 16
    uniform: int = 8
    steps: int = 30
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (1 <= self.radius <= 255 and 0 <= self.uniform <= 255 and self.steps >= 1):
            raise UserError(
                "friendly_noise: radius from 1 to 255, uniform from 0 to 255, steps at least 1"
            )

    def preprocess(self, view: View, key: PRNGKeyArray) -> UInt8[np.ndarray, "n h w c"]:
        """The images with their friendly noise, in 8 bits."""
        train, draw = jax.random.split(key)
        victim, radius = view.trained(train), jnp.float32(self.radius / 255)
        moved = np.empty_like(view.images)
        for where, rows in chunks(len(moved)):
            images = jnp.asarray(view.images[rows], jnp.float32) / 255
            own = jax.random.fold_in(draw, where.start)
            start = jax.random.uniform(own, images.shape, minval=-1) * radius / 10
            friendly = _friendly(victim, images, start, radius, jnp.float32(self.weight), self.steps)
            part = np.rint(np.asarray(friendly) * 255).astype(np.uint8)
            moved[where] = part[: where.stop - where.start]
        return moved

    def augment(
        self, images: Array, targets: Array, key: PRNGKeyArray, loss: Loss
    ) -> tuple[Array, Array]:
        """Add the uniform noise."""
        most = self.uniform / 255
        return images + jax.random.uniform(key, images.shape, minval=-most, maxval=most), targets


@jax.jit(static_argnums=5)
def _friendly(
    victim: TrainedVictim,
    images: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    radius: Float[Array, ""],
    weight: Float[Array, ""],
    steps: int,
) -> Float[Array, "b h w c"]:
    def said(x: Array) -> Array:
        return jax.nn.log_softmax(logits(victim.recipe, victim.num_classes, victim.state, x))

    calm = said(images)
    adam = optax.adam(radius / 5)

    def unfriendliness(noise: Array) -> Array:
        stirred = said(images + noise)
        divergence = (jnp.exp(stirred) * (stirred - calm)).sum(-1)
        size = jnp.sqrt(jnp.square(noise).mean((1, 2, 3)) + 1e-12)
        return (divergence - weight * size).sum()

    def one_step(_: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        noise, state = carry
        updates, state = adam.update(jax.grad(unfriendliness)(noise), state)
        noise = jnp.clip(noise + updates, -radius, radius)
        return jnp.clip(images + noise, 0, 1) - images, state

    noise, _ = jax.lax.fori_loop(0, steps, one_step, (noise, adam.init(noise)))
    return images + noise
