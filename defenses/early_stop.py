"""Early stopping: keep the victim of the epoch that does best on trusted images.

A poison need not be learnt when the images are; whoever has some clean images can keep the victim of
the epoch at which it did best. It bounds what a poison that acts late can do.

Paper: Sandoval-Segura, Singla, Fowl, Geiping, Goldblum, Jacobs and Goldstein, "Poisons that are learned
faster are more effective", 2022, https://arxiv.org/abs/2204.08615.

What is left open, and how it is settled here: the recipe's schedule is that of a whole run, so a victim
that is stopped early has not cooled down; the first epoch of the best ones is kept. The trusted images
are as many as seemed little to ask, and tell few epochs apart: on `digits` the price is 0.97 ± 0.77
points.

Cost: 1.1 victim trainings on `digits`: its own, with a score on the trusted images after every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from poisonbench.defenses import Defense
from poisonbench.errors import UserError


@dataclass(frozen=True)
class EarlyStop(Defense):
    """The best epoch by trusted accuracy.

    Attributes:
        trusted: clean images to judge by.
    """

    trusted: int = 100

    def __post_init__(self) -> None:
        if self.trusted < 1:
            raise UserError("early_stop.trusted must be at least 1")

    def pick(self, right: Bool[np.ndarray, "epochs m"]) -> int | None:
        """The first of the best."""
        return int(np.argmax(right.mean(1)))
