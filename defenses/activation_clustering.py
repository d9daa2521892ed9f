"""Activation clustering: cut each class's features in two, and drop the smaller part where it is small.

Features are reduced to a few components and cut by 2-means. A clean class falls into halves of about one
size; poison that reached the class by another way makes a small part of its own.

Paper: Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy and Srivastava, "Detecting Backdoor
Attacks on Deep Neural Networks by Activation Clustering", 2018, https://arxiv.org/abs/1811.03728: ten
independent components, and parts are judged by their size, by their silhouettes, or by what a victim
trained without them takes them for.

What is left open, and how it is settled here: parts are judged by size alone. That less than 35 % of a
class is suspect is the default of the Adversarial Robustness Toolbox. Independent components need not
converge on so few images; principal ones take their place, not whitened, which would make as much of the
last of them as of the one along which a part stands apart.

Cost: 2.2 victim trainings on `digits`: its own, one for the features, and a clustering for each class.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError


@dataclass(frozen=True)
class ActivationClustering(Defense):
    """Activation clustering.

    Attributes:
        components: that features are reduced to.
        threshold: share of its class below which a part is dropped.
    """

    components: int = 10
    threshold: float = 0.35

    def __post_init__(self) -> None:
        if self.components < 1 or not 0 < self.threshold <= 0.5:
            raise UserError(
                "activation_clustering: components must be at least 1, threshold in (0, 0.5]"
            )

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """Zero for small parts of classes."""
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA

        features = view.trained(key).features(view.images)
        seed = int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**31 - 1))
        suspects: list[int] = []
        for label in np.unique(view.labels):
            members = np.flatnonzero(view.labels == label)
            count = min(self.components, len(members) - 1, features.shape[1])
            if count < 1 or not np.ptp(features[members], axis=0).any():
                continue  # nothing can stand apart
            reduced = PCA(count, random_state=seed).fit_transform(features[members])
            part = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)
            small = int(part.sum() * 2 < len(part))
            if np.mean(part == small) < self.threshold:
                suspects.extend(members[part == small])
        return view.without(np.array(suspects, np.int64))
