"""Control: removes as many images at random as an attacker may poison.

What it wins back is chance; what it costs is what so many images are worth.

Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.defenses import Defense, View


@dataclass(frozen=True)
class RandomFilter(Defense):
    """Drops without looking."""

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """One for all images but those drawn."""
        number = len(view.labels)
        drawn = jax.random.permutation(key, number)[: min(view.allowed, number - 1)]
        weights = np.ones(number)
        weights[np.asarray(drawn)] = 0
        return weights
