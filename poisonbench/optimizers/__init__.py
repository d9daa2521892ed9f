"""Optimizers that were learnt: what all of them can do, and which there are."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import optax
from jaxtyping import Array, PRNGKeyArray

from poisonbench.errors import unknown_name
from poisonbench.optimizers.initialise import Weights
from poisonbench.optimizers.mlp_opt import MLPOptimizer, mlp_opt
from poisonbench.optimizers.velo import VeLO, velo


@runtime_checkable
class LearnedOptimizer(Protocol):
    """A family of optimizers with weights; a frozen dataclass of their sizes, hashable."""

    @property
    def name(self) -> str:
        """Of the family."""

    def shapes(self) -> dict[str, Any]:
        """The shape of every array of the weights, nested as they are."""

    def init(self, key: PRNGKeyArray) -> Weights:
        """Weights before any meta-training: nested dictionaries of float32 arrays."""

    def transformation(
        self, num_steps: int | Array, weights: Weights
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer with these weights, for a training of `num_steps` steps.

        Its `update(gradients, state, params, value=loss)` is pure, and differentiable in everything.
        """


FAMILIES: dict[str, type[VeLO] | type[MLPOptimizer]] = {f.name: f for f in (VeLO, MLPOptimizer)}


def family(name: str) -> type[VeLO] | type[MLPOptimizer]:
    """The family of that name.

    Raises:
        UserError: there is none.
    """
    if name not in FAMILIES:
        raise unknown_name("learned optimizer", name, FAMILIES)
    return FAMILIES[name]


__all__ = [
    "FAMILIES",
    "LearnedOptimizer",
    "MLPOptimizer",
    "VeLO",
    "Weights",
    "family",
    "mlp_opt",
    "velo",
]
