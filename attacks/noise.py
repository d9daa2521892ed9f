"""Control: random images replaced by noise, labels kept.

Every pixel of a poisoned image is drawn uniformly from what the budget allows there, `U{low, …, high}`
in 8 bits. What this loses is what the missing images were worth; an attack that does not lose more has
achieved nothing by its choice of pixels.

Measured on `digits` (12 of 500 images, ten pairs of smooth victims): 0.13 to 0.35 points lost, over five
draws; on `cifar10-small` (100 of 4,000) 0.50 ± 0.48, and within 8/255 on all images (`availability`)
0.01 ± 0.28, of one draw each.

Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench.attacks import Attack, Task
from poisonbench.journal import Journal
from poisonbench.threat import PoisonSet


@dataclass(frozen=True)
class Noise(Attack):
    """Uniform noise in place of images drawn without replacement."""

    control = True

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Random images of the training set, drawn without replacement."""
        pick, draw = jax.random.split(key)
        rows = jax.random.choice(pick, len(task.train_labels), (task.num_poison,), replace=False)
        indices = np.asarray(rows)
        low, high = task.bounds(indices)
        images = jax.random.randint(draw, low.shape, low.astype(np.int32), high.astype(np.int32) + 1)
        return task.poison(indices, np.asarray(images), task.train_labels[indices])
