"""Weights by metagradients: learn how much each image should count, for the sake of trusted ones.

With w the weights of the training images in the loss and A(w, ω) the victim after a whole training run,

    g = ∇_w φ(A(w, ω)),    w ← max(0, w - η m ⊙ sign(g)),    m_i ~ Bernoulli(p),

φ the loss on trusted images, exact and through every step of training, with a fresh ω at each metastep.
An image that harms what is trusted loses its weight. The attack's own engine, turned round.

Paper: Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
https://arxiv.org/abs/2503.13751, which selects data so, by counts; nobody seems to have defended with
it.

What is left open, and how it is settled here:

- *Weights, not counts*, from 1 for every image, so that a weight is learnt in steps smaller than an
  image.
- *The step* falls linearly to a tenth; a weight below a half of one step at the end is zero.
- *Trusted images are few*, and weights are many: the mask keeps any one metastep from fitting them
  all.

Cost: `steps` metagradients, of three to four victim trainings each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.defenses import Defense, View
from poisonbench.errors import UserError
from poisonbench.metagradient import NonFiniteError, metagradient
from poisonbench.victim.evaluation import ValidationLoss
from poisonbench.victim.training import TrainingRun, TrainingSet, TrainState


@dataclass(frozen=True)
class MetagradientWeights(Defense):
    """Learnt weights.

    Attributes:
        trusted: clean images for whose sake weights are learnt.
        steps: metasteps.
        step_size: of the first, where an image begins with weight 1.
        share: p, of the weights that a metastep moves.
    """

    trusted: int = 100
    steps: int = 10
    step_size: float = 0.4
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.trusted < 1 or self.steps < 1 or not self.step_size > 0 or not 0 < self.share <= 1:
            raise UserError(
                "metagradient_weights: trusted and steps must be at least 1, step_size above 0 and"
                " share in (0, 1]"
            )

    def filter(self, view: View, key: PRNGKeyArray) -> Float[np.ndarray, " n"] | None:
        """The weights after the last metastep, of mean 1 over the images that are left."""
        learnt = self.learnt(view, key)
        learnt[learnt < self.step_size / 20] = 0
        return learnt / learnt[learnt > 0].mean() if learnt.any() else learnt

    def learnt(
        self, view: View, key: PRNGKeyArray, advance: Callable[[], None] = lambda: None
    ) -> Float[np.ndarray, " n"]:
        """The weights as they come out of the last metastep, float64; `advance` is called after each."""
        weights = jnp.ones(len(view.labels))
        for i in range(self.steps):
            run_key, mask_key = jax.random.split(jax.random.fold_in(key, i))
            gradient = weight_metagradient(view, weights, run_key)
            size = self.step_size * (1 - 0.9 * i / self.steps)
            mask = jax.random.bernoulli(mask_key, self.share, weights.shape)
            weights = jnp.maximum(0, weights - size * mask * jnp.sign(gradient))
            advance()
        return np.array(weights, float)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _ByWeights:
    """A training run as a function of its images' weights."""

    run: TrainingRun
    pixels: Array

    def __call__(self, state: TrainState, t: Array, weights: Array) -> TrainState:
        return replace(self.run, weights=weights[None])(state, t, self.pixels)


def weight_metagradient(
    view: View, weights: Float[Array, " n"], key: PRNGKeyArray
) -> Float[Array, " n"]:
    """The exact gradient of the trusted loss after a training run by the weights of the images.

    Raises:
        UserError: it is not finite.
    """
    data = TrainingSet.clean(view.images, view.labels, view.num_classes)
    run, state = TrainingRun.start(view.recipe, data, key[None])
    loss = ValidationLoss(
        view.recipe, view.num_classes, "cross_entropy",
        jnp.asarray(view.trusted_images), jnp.asarray(view.trusted_labels),
    )  # fmt: skip
    step = _ByWeights(run, jnp.zeros((0, *view.images.shape[1:])))
    gradient: Array
    try:
        _, gradient = metagradient(step, loss, state, run.num_steps, weights)
    except NonFiniteError as error:
        raise UserError(f"metagradient_weights: {error}; as by --set learning_rate=…") from None
    return gradient
