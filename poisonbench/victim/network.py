"""Which network a recipe names."""

from __future__ import annotations

from functools import lru_cache

from flax import nnx

from poisonbench.errors import UserError
from poisonbench.victim.cnn import PlainCNN
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.resnet9 import ResNet9

MIN_RESOLUTION = 8
"""Both networks halve the map three times."""


def build(recipe: Recipe, channels: int, num_classes: int, rngs: nnx.Rngs) -> ResNet9 | PlainCNN:
    """The recipe's network with fresh parameters."""
    network = ResNet9 if recipe.network == "resnet9" else PlainCNN
    return network(recipe, channels, num_classes, rngs=rngs)


@lru_cache(maxsize=64)
def architecture(
    recipe: Recipe, image_shape: tuple[int, int, int], num_classes: int
) -> nnx.GraphDef[ResNet9 | PlainCNN]:
    """The network without its numbers: what `nnx.merge` needs beside parameters and statistics.

    Raises:
        UserError: images too small for three halvings.
    """
    height, width, channels = image_shape
    if min(height, width) < MIN_RESOLUTION:
        raise UserError(
            f"victims need images of at least {MIN_RESOLUTION}×{MIN_RESOLUTION}, not"
            f" {height}×{width}: choose a larger --resolution"
        )
    return nnx.graphdef(nnx.eval_shape(lambda: build(recipe, channels, num_classes, nnx.Rngs(0))))
