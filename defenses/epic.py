"""EPIC: every few epochs, drop images whose gradient has no other near it.

Poison that works well does so by a gradient unlike those of its class. For every class, medoids are
chosen greedily in the space of last-layer gradients, every image belongs to its nearest medoid, and
those that are alone are dropped for good.

Paper: Yang, Liu and Mirzasoleiman, "Not All Poisons are Created Equal: Robust Training against Data
Poisoning", ICML 2022, https://arxiv.org/abs/2210.09671. The authors' scripts take medoids for 10 to 30 %
of a class and drop at every second epoch after the tenth of 40, or every tenth after the thirtieth of
200.

What is left open, and how it is settled here: the victims' runs are of some ten epochs, so images are
looked at after every third. The gradient is that of the last layer's weights, errors times features; the
authors' code goes by the errors alone. All that is alone goes, unless that is the whole of a class.

Cost: 1.4 victim trainings on `digits`: its own, and every third epoch a forward pass over the set, the
distances within each class, and for each of its medoids a pass over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError
from poisonbench.trained import TrainedVictim


@dataclass(frozen=True)
class EPIC(Defense):
    """Isolated gradients are dropped.

    Attributes:
        every: epochs between two looks.
        share: medoids, as a share of each class.
    """

    every: int = 3
    share: float = 0.2

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.share < 1:
            raise UserError("epic: every must be at least 1, and share lie in (0, 1)")

    def revise(
        self, view: View, victim: TrainedVictim, epoch: int, weights: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"] | None:
        """Zero for the images that are a medoid of nothing but themselves, among those still there."""
        features = victim.features(view.images)
        errors = victim.probabilities(view.images) - np.eye(view.num_classes)[view.labels]
        alone: list[int] = []
        for label in np.unique(view.labels):
            members = np.flatnonzero((view.labels == label) & (weights > 0))
            if not len(members):
                continue
            # The gradient is an outer product, so inner products are products of inner products.
            inner = (errors[members] @ errors[members].T) * (features[members] @ features[members].T)
            squares = np.diag(inner)
            distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * inner, 0))
            nearest = medoids(distances, max(1, round(self.share * len(members))))
            sizes = np.bincount(nearest, minlength=len(members))
            gone = members[sizes[nearest] == 1]
            alone.extend(gone if len(gone) < len(members) else [])
        return view.without(np.array(alone, np.int64))


def medoids(distances: Float[np.ndarray, "n n"], count: int) -> Int[np.ndarray, " n"]:
    """The medoid of each point, of so many, each chosen to lower the sum of distances most."""
    least = np.full(len(distances), distances.max() + 1)
    chosen: list[int] = []
    for _ in range(count):
        gains = np.maximum(least[:, None] - distances, 0).sum(0)
        chosen.append(int(gains.argmax()))
        least = np.minimum(least, distances[:, chosen[-1]])
    return np.array(chosen)[distances[:, chosen].argmin(1)]
