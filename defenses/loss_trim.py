"""Loss trimming: drop the images that a victim, trained on the rest, loses most on; and again.

    keep ← the images of the smallest losses at w,    w ← a victim trained on those kept

for a few rounds. What is wrong is learnt last, if the victim cannot learn everything by heart.

Paper: Shen and Sanghavi, "Learning with Bad Training Data via Iterative Trimmed Loss Minimization", ICML
2019, https://arxiv.org/abs/1810.11874, which keeps a share α slightly below that of the clean samples.

What is left open, and how it is settled here: every victim trains anew by the whole recipe; as many
images are dropped as an attacker may poison, times a factor, which is that of `spectral`; three rounds
are this project's.

Cost: 3.7 victim trainings on `digits`: its own and `rounds` more, those after the first on fewer images.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.arrays import highest
from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError


@dataclass(frozen=True)
class LossTrim(Defense):
    """Iterative trimmed loss.

    Attributes:
        rounds: of training and trimming.
        factor: images dropped, in multiples of what an attacker may poison.
    """

    rounds: int = 3
    factor: float = 1.5

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.factor < 1e9:
            raise UserError("loss_trim: rounds must be at least 1, and factor above 0 and below 1e9")

    def dropped(self, allowed: int) -> int:
        """In proportion to what may be poisoned."""
        return round(self.factor * allowed)

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """Zero for the largest losses of the last round."""
        weights = np.ones(len(view.labels))
        for i in range(self.rounds):
            said = view.trained(jax.random.fold_in(key, i), weights).probabilities(view.images)
            losses = -np.log(np.maximum(said[np.arange(len(said)), view.labels], 1e-30))
            weights = view.without(highest(losses, self.dropped(view.allowed)))
        return weights
