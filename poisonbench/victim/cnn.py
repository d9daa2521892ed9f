"""A small plain network: three convolutions without batch norm or shortcuts, and a linear classifier.

A victim unlike the one that attacks are crafted against: a poison that harms it too does not owe its
harm to batch norm, to residual connections, or to the shape of a ResNet-9.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from poisonbench.victim.convolution import convolve, for_backend
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.resnet9 import halve, reduce_map


class PlainCNN(nnx.Module):
    """Convolutions of `width`, two and four times as many channels, each halving the map."""

    def __init__(self, recipe: Recipe, channels: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        initial = nnx.initializers.he_normal()
        w = recipe.width
        sizes = [(channels, w), (w, 2 * w), (2 * w, 4 * w)]
        self.kernels = nnx.List([nnx.Param(initial(rngs.params(), (3, 3, a, b))) for a, b in sizes])
        self.biases = nnx.List([nnx.Param(jnp.zeros(b)) for _, b in sizes])
        self.classifier = nnx.Linear(4 * w, num_classes, rngs=rngs)
        self.recipe = recipe

    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """Logits of images in [0, 1]; training makes no difference, since nothing is tracked."""
        x = self.features(images, train)
        return self.classifier(x) * jnp.asarray(self.recipe.final_scale, x.dtype)

    def features(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch features"]:
        """What the classifier reads."""
        activation = jax.nn.relu if self.recipe.activation == "relu" else jax.nn.gelu
        how = for_backend()
        x = (images - self.recipe.input_mean) / self.recipe.input_std
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = activation(convolve(x, kernel[...], how) + bias[...].reshape(1, 1, 1, -1))
            x = halve(x, self.recipe)
        return reduce_map(x, (1, 2), self.recipe)
