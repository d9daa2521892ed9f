"""Control: removes exactly the poison, which no defence can know.

What it does not win back was not the poison's doing but the missing images'. A defence that seems to do
better was lucky, or the measure is wrong.

Measured on `digits`, fixed labels: it leaves nothing that can be told from nothing of what four attacks
take. Of the 2.02 points of `mgd` made against mixup it leaves 0.62 ± 0.21, over ten pairs of smooth
victims: that attack takes the places of twelve images that matter.

Cost: nothing beside the victim's own training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.defenses import Defense, View


@dataclass(frozen=True)
class Oracle(Defense):
    """The only defence that is told which points are poisoned."""

    sees_poison = True

    def dropped(self, allowed: int) -> int:
        """All that may be poisoned."""
        return allowed

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """Nothing of the poison, and all of the rest."""
        assert view.poisoned is not None
        return 1.0 - view.poisoned
