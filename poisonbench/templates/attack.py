"""One line that says what the attack does: `poisonbench list` shows it. TODO.

How it works, with its equation. TODO. As it stands, chosen images fade into images of other classes, and
keep their labels:

    x'_i = (1 - s) x_i + s x_j    with y_j ≠ y_i, clipped to what the budget allows around x_i.

Paper: TODO authors, "Title", venue and year, https://…
Published: TODO the number in the paper, and on what data and budget.
Measured on `digits`: TODO points lost with their interval, and the options that it took.
Cost: none. TODO in victim trainings.
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
class Template(Attack):
    """Fields are options on the command line: this one is `--strength`.

    Attributes:
        strength: share of the other image, above 0 and at most 1.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError("--strength must lie above 0 and at most at 1")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Random images of the training set, each with one of another class over it."""
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # of the key, and nothing else
        labels = task.train_labels
        indices = rng.choice(len(labels), task.num_poison, replace=False)
        others = np.empty_like(indices)
        with journal.progress("mixing", task.num_classes) as bar:
            for label in range(task.num_classes):
                rows = np.flatnonzero(labels[indices] == label)
                others[rows] = rng.choice(np.flatnonzero(labels != label), len(rows))
                bar.advance()
        mixed = (1 - self.strength) * task.train_images[indices] + self.strength * task.train_images[
            others
        ]
        images = np.clip(np.rint(mixed), *task.bounds(indices)).astype(np.uint8)
        return task.poison(indices, images, labels[indices])
