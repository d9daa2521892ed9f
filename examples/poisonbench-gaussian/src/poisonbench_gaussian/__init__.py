"""Images drawn from a Gaussian of another class, under the labels of those that they replace.

Every pixel of class c is taken to be normal and independent of the others,

    x' ~ N(μ_c, (s σ_c)²)    with c ≠ y,

where μ_c and σ_c are the mean and the standard deviation of that pixel over the class's training images.

Paper: none.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench.attacks import Attack, Task
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.threat import PoisonSet


@dataclass(frozen=True)
class Gaussian(Attack):
    """A cloud for each class.

    Attributes:
        spread: s, the width of the clouds in standard deviations; 0 is the mean image.
    """

    spread: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 100:
            raise UserError("--spread must lie in 0 to 100")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Random images of the training set, each replaced by a draw of the class after its own."""
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        indices = rng.choice(len(task.train_labels), task.num_poison, replace=False)
        labels = task.train_labels[indices]
        drawn = np.empty((len(indices), *task.train_images.shape[1:]))
        for label in range(task.num_classes):
            cloud = task.train_images[task.train_labels == (label + 1) % task.num_classes]
            rows = np.flatnonzero(labels == label)
            size = (len(rows), *cloud.shape[1:])
            drawn[rows] = rng.normal(cloud.mean(0), self.spread * cloud.std(0), size)
        images = np.clip(np.rint(drawn), *task.bounds(indices)).astype(np.uint8)
        return task.poison(indices, images, labels)
