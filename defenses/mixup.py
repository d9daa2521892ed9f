"""Mixup: train on blends of pairs of images, under blends of their labels.

    x ← λ x + (1 - λ) x',    y ← λ y + (1 - λ) y',    λ ~ Beta(α, α), one for each image.

Paper: Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018,
https://arxiv.org/abs/1710.09412; as a defence against poisoning: Borgnia et al., "Strong Data
Augmentation Sanitizes Poisoning and Backdoor Attacks without an Accuracy Tradeoff", 2021,
https://arxiv.org/abs/2011.09527. The second image comes from the same batch; α is 1, as for CIFAR-10.
One λ for each image, where the authors' code draws one for each batch.

Cost: 1.0 victim trainings on `digits`: its own, and what it takes to draw from a Beta distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, PRNGKeyArray

from poisonbench.defenses import Defense, Loss
from poisonbench.errors import UserError


@dataclass(frozen=True)
class Mixup(Defense):
    """Mixup within a batch.

    Attributes:
        alpha: of the Beta distribution; small ones leave most images nearly alone.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError("mixup.alpha must be above 0")

    def augment(
        self, images: Array, targets: Array, key: PRNGKeyArray, loss: Loss
    ) -> tuple[Array, Array]:
        """Blend each image with another of the batch."""
        draw, order = jax.random.split(key)
        share = jax.random.beta(draw, self.alpha, self.alpha, (len(images), 1))
        other = jax.random.permutation(order, len(images))
        wide = share[:, :, None, None]
        mixed = wide * images + (1 - wide) * images[other]
        return mixed, share * targets + (1 - share) * targets[other]
