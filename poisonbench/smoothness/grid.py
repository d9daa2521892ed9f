"""Which recipes stand in the picture of smoothness against accuracy: one change at a time.

Every change is one that the metagradient paper or its replications name as making training smoother
or rougher: width, place of the batch norm, pooling, scale of the logits, activation, learning rate,
batch. A number is multiplied by the factors below; a choice takes each of its other values.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import get_args

from poisonbench.victim.recipe import Activation, NormPlacement, Pooling, Recipe

FACTORS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "width": (0.5, 2),
        "final_scale": (0.5, 2, 8),
        "learning_rate": (0.25, 0.5, 2, 4),
        "batch_size": (0.5, 2.5),
    }
)
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "norm": get_args(NormPlacement),
        "pooling": get_args(Pooling),
        "activation": get_args(Activation),
    }
)


def changes(base: Recipe, num_images: int) -> dict[str, Recipe]:
    """Recipes that differ from `base` in one field, by what is changed, e.g. `width=8`.

    Args:
        base: what is changed.
        num_images: training images; a batch of more is left out.
    """
    found: dict[str, Recipe] = {}
    for name, factors in FACTORS.items():
        before = getattr(base, name)
        for factor in factors:
            after = max(1, round(before * factor)) if isinstance(before, int) else before * factor
            if after == before or (name == "batch_size" and after > num_images):
                continue
            found[f"{name}={after:g}"] = base.replace(**{name: after})
    for name, values in CHOICES.items():
        for value in values:
            if value != getattr(base, name):
                found[f"{name}={value}"] = base.replace(**{name: value})
    return found
