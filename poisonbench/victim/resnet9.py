"""ResNet-9 in Flax NNX, at any resolution from 8×8 up.

Eight convolutions and a linear classifier: a stem, then three stages that double the channels
and halve the map, with a residual pair after the first and the third. The last map is pooled to
one pixel. A `Recipe` decides width, activation, pooling, the place of the batch norm and the
scale of the logits.
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from poisonbench.victim.convolution import Convolution, convolve, for_backend
from poisonbench.victim.recipe import Recipe


class BatchNorm(nnx.Module):
    """Batch normalisation whose tracked statistics carry gradients.

    `nnx.BatchNorm` puts a `stop_gradient` on what it tracks. Ordinary training never notices; a
    metagradient does, since the objective sees the poison through the statistics too: with it, the
    gradient of a 60-step run was wrong by a factor of up to seven.
    """

    def __init__(self, features: int, recipe: Recipe) -> None:
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.variance = nnx.BatchStat(jnp.ones(features))
        self.recipe = recipe

    def __call__(self, x: Float[Array, "batch height width features"], train: bool) -> Array:
        """Normalise by the batch and track its statistics, or normalise by what was tracked."""
        mean, variance = _spread(self.mean[...]), _spread(self.variance[...])
        if train:
            old_mean, old_variance, keep = mean, variance, self.recipe.norm_momentum
            mean = x.mean((0, 1, 2), keepdims=True)
            variance = jnp.square(x - mean).mean((0, 1, 2), keepdims=True)
            self.mean[...] = (keep * old_mean + (1 - keep) * mean).ravel()
            self.variance[...] = (keep * old_variance + (1 - keep) * variance).ravel()
        factor = _spread(self.scale[...]) * jax.lax.rsqrt(variance + self.recipe.norm_epsilon)
        return (x - mean) * factor + _spread(self.bias[...])


def _spread(vector: Float[Array, " features"]) -> Float[Array, "1 1 1 features"]:
    return vector.reshape(1, 1, 1, -1)


class ConvBlock(nnx.Module):
    """Convolution, batch norm and activation, and a 2×2 pooling where asked for."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        recipe: Recipe,
        *,
        pool: bool = False,
        how: Convolution,
        rngs: nnx.Rngs,
    ) -> None:
        initial = nnx.initializers.he_normal()
        self.kernel = nnx.Param(initial(rngs.params(), (3, 3, features_in, features_out)))
        self.norm = BatchNorm(features_out, recipe)
        self.recipe = recipe
        self.pool = pool
        self.how = how

    def __call__(self, x: Array, train: bool) -> Array:
        """Feature maps in, feature maps out."""
        activation = jax.nn.relu if self.recipe.activation == "relu" else jax.nn.gelu
        x = convolve(x, self.kernel[...], self.how)
        if self.recipe.norm == "before_activation":
            x = activation(self.norm(x, train))
        else:
            x = self.norm(activation(x), train)
        return halve(x, self.recipe) if self.pool else x


class ResNet9(nnx.Module):
    """The victim: images in, scaled logits out."""

    def __init__(
        self,
        recipe: Recipe,
        channels: int,
        num_classes: int,
        *,
        how: Convolution | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        how = how or for_backend()
        w = recipe.width

        def block(features_in: int, features_out: int, pool: bool = False) -> ConvBlock:
            return ConvBlock(features_in, features_out, recipe, pool=pool, how=how, rngs=rngs)

        self.stem = block(channels, w)
        self.stage1 = block(w, 2 * w, pool=True)
        self.residual1 = nnx.List([block(2 * w, 2 * w), block(2 * w, 2 * w)])
        self.stage2 = block(2 * w, 4 * w, pool=True)
        self.stage3 = block(4 * w, 8 * w, pool=True)
        self.residual3 = nnx.List([block(8 * w, 8 * w), block(8 * w, 8 * w)])
        self.classifier = nnx.Linear(8 * w, num_classes, rngs=rngs)
        self.recipe = recipe

    def __call__(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch classes"]:
        """Logits of images in [0, 1].

        Args:
            images: pixels in [0, 1].
            train: normalise by the batch and update the tracked statistics; otherwise
                normalise by what was tracked.
        """
        x = self.features(images, train)
        return self.classifier(x) * jnp.asarray(self.recipe.final_scale, x.dtype)

    def features(
        self, images: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch features"]:
        """What the classifier reads; arguments as above."""
        x = (images - self.recipe.input_mean) / self.recipe.input_std
        x = self.stage1(self.stem(x, train), train)
        x = x + self.residual1[1](self.residual1[0](x, train), train)
        x = self.stage3(self.stage2(x, train), train)
        x = x + self.residual3[1](self.residual3[0](x, train), train)
        return reduce_map(x, (1, 2), self.recipe)


def halve(x: Array, recipe: Recipe) -> Array:
    """Pool 2×2 pixels to one; an odd last row or column is dropped.

    Written as a reshape because XLA's windowed reductions, like its convolutions, are slow on a
    CPU in second derivatives.
    """
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return reduce_map(x.reshape(batch, height // 2, 2, width // 2, 2, channels), (2, 4), recipe)


def reduce_map(x: Array, axes: tuple[int, int], recipe: Recipe) -> Array:
    """The mean or the largest of each window, whose two axes these are."""
    if recipe.pooling == "average":
        return x.mean(axes)
    for axis in axes:
        x = reduce(_larger, jnp.split(x, x.shape[axis], axis))
    return x.squeeze(axes)


def _larger(a: Array, b: Array) -> Array:
    """The larger of two, by a choice between them.

    The derivative of `jnp.max` looks for the entries that equal the largest and divides by their
    number, and that of `jnp.maximum` is built alike. With `x.max` the metagradient of a
    whole run was NaN though each step was finite; the cause, which was not proved, is likely that
    XLA computes an entry twice in two ways, and then none is equal.
    """
    return jnp.where(a >= b, a, b)
