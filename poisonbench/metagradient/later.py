"""The end or a part of a run, as a step of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from poisonbench.metagradient.programs import PyTree, Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Later:
    """A run's steps from one of them on, counted from 0.

    Attributes:
        run: the step of the whole run, a pytree.
        first: the step that is counted as 0, int32.
    """

    run: Step
    first: Any

    def __call__(self, state: PyTree, t: Any, z: PyTree) -> PyTree:
        """Step `first + t`."""
        return self.run(state, self.first + t, z)
