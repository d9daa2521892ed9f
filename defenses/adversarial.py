"""Adversarial training: every batch is first perturbed against the victim, then learnt.

    min over θ of Σ max over ‖δ‖_∞ ≤ r of ℓ(θ; x + δ, y),

the inner maximum by a few signed steps from a random start.

Papers: Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards Deep Learning Models Resistant to
Adversarial Attacks", ICLR 2018, https://arxiv.org/abs/1706.06083; as a defence against poisoning of
whole sets: Tao, Feng, Yi, Huang and Chen, "Better Safe Than Sorry: Preventing Delusive Adversaries
with Adversarial Training", NeurIPS 2021, https://arxiv.org/abs/2102.04716. The radius of 8/255 is the
first's for CIFAR-10. Its seven steps are three here, for the sake of cost, of 2.5 r / steps each.

Cost: 3.5 victim trainings on `digits`, with three steps: each takes a gradient by the images alone,
which is two thirds of a training.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from poisonbench.defenses import Defense, Loss
from poisonbench.errors import UserError


@dataclass(frozen=True)
class Adversarial(Defense):
    """Training on perturbed images.

    Attributes:
        radius: largest change of a pixel, in 8-bit levels.
        steps: of the perturbation.
    """

    radius: int = 8
    steps: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.radius <= 255 or self.steps < 1:
            raise UserError("adversarial: radius must lie between 1 and 255, steps be at least 1")

    def augment(
        self, images: Array, targets: Array, key: PRNGKeyArray, loss: Loss
    ) -> tuple[Array, Array]:
        """Climb the victim's loss within the radius."""
        radius = self.radius / 255
        size = 2.5 * radius / self.steps
        low, high = jnp.maximum(images - radius, 0), jnp.minimum(images + radius, 1)
        start = images + jax.random.uniform(key, images.shape, minval=-radius, maxval=radius)

        def climb(_: Array, x: Array) -> Array:
            return jnp.clip(x + size * jnp.sign(jax.grad(loss)(x, targets)), low, high)

        moved = jax.lax.fori_loop(0, self.steps, climb, jnp.clip(start, low, high))
        # The perturbation is a constant, but the image that it is added to is not.
        return images + jax.lax.stop_gradient(moved - images), targets
