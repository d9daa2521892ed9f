"""Deep k-NN: drop images whose label is not the commonest among their neighbours in feature space.

Paper: Peri, Gupta, Huang, Fowl, Zhu, Feizi, Goldstein and Dickerson, "Deep k-NN Defense against
Clean-label Data Poisoning Attacks", 2019, https://arxiv.org/abs/1909.13374, which finds k between one
and two times the images of a class to do well.

What is left open, and how it is settled here: features are those that the classifier reads, of a victim
trained on the suspect set, by Euclidean distance; k is the images of a class, the least of the
paper's range. With half as many it does the same on `digits`, within the noise.

Cost: 2.1 victim trainings on `digits`: its own, one for the features, and all distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError


@dataclass(frozen=True)
class DeepKNN(Defense):
    """Deep k-NN.

    Attributes:
        share: neighbours asked, as a share of the mean number of images of a class.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.share > 0:
            raise UserError("deep_knn.share must be above 0")

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """Zero for images in the minority among their neighbours."""
        from sklearn.neighbors import NearestNeighbors

        features = view.trained(key).features(view.images)
        number = len(features)
        k = int(np.clip(round(self.share * number / view.num_classes), 1, number - 1))
        _, near = NearestNeighbors(n_neighbors=k + 1).fit(features).kneighbors(features)
        others = [row[row != i][:k] for i, row in enumerate(near)]
        votes = np.stack([np.bincount(view.labels[row], minlength=view.num_classes) for row in others])
        agrees = votes[np.arange(number), view.labels] == votes.max(1)
        return view.without(np.flatnonzero(~agrees))
