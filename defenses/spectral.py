"""Spectral signatures: drop what stands out along the main direction of its class's features.

The features of a class, centred, with R their matrix and v its first right singular vector; an image's
score is `⟨R_i, v⟩²`. Where a part of a class is alike in something that the rest is not, v points so.

Paper: Tran, Li and Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018,
https://arxiv.org/abs/1811.00636, whose algorithm removes, from every class, 1.5 times as many images as
may be poisoned.

What differs here: a backdoor's poison is all of one class, so the paper can afford that many of each.
Here scores are divided by their mean over the class, so that classes can be compared, and 1.5 times as
many as may be poisoned are dropped over all of them together.

Cost: 2.2 victim trainings on `digits`: its own, one for the features, and a singular value decomposition
for each class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.arrays import highest
from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError


@dataclass(frozen=True)
class Spectral(Defense):
    """Spectral signatures.

    Attributes:
        factor: images dropped, in multiples of what an attacker may poison.
    """

    factor: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1e9:
            raise UserError("spectral.factor must be above 0, and below 1e9")

    def dropped(self, allowed: int) -> int:
        """In proportion to what may be poisoned."""
        return round(self.factor * allowed)

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """Zero for the images with the highest scores."""
        features = view.trained(key).features(view.images)
        scores = np.zeros(len(features))
        for label in np.unique(view.labels):
            members = view.labels == label
            centred = features[members] - features[members].mean(0)
            _, _, directions = np.linalg.svd(centred, full_matrices=False)
            squares = (centred @ directions[0]) ** 2
            scores[members] = squares / max(squares.mean(), 1e-30)
        return view.without(highest(scores, self.dropped(view.allowed)))
