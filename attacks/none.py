"""Control: changes nothing, so every drop that is measured for it is chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench.attacks import Attack, Task
from poisonbench.journal import Journal
from poisonbench.threat import PoisonSet


@dataclass(frozen=True)
class NoAttack(Attack):
    """An empty poison set. Paired victims are then the same, and the drop is exactly zero."""

    control = True

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """No indices at all."""
        nothing = np.zeros(0, np.int64)
        return task.poison(nothing, task.train_images[nothing], task.train_labels[nothing])
