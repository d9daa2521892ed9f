"""Control: changes nothing.

A victim and its clean twin are then the same, so the drop is exactly zero, as measured on every track;
what differs from it tells of a fault of the harness. Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench.attacks import Attack, Task
from poisonbench.journal import Journal
from poisonbench.threat import PoisonSet


@dataclass(frozen=True)
class NoAttack(Attack):
    """An empty poison set."""

    control = True

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """No indices at all."""
        nothing = np.zeros(0, np.int64)
        return task.poison(nothing, task.train_images[nothing], task.train_labels[nothing])
