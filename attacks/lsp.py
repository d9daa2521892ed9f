"""Linearly separable perturbations: a pattern of blocks for each class, which says the label by itself.

Every class has a point in a space of few dimensions, and an image gets the point of its class plus a
little noise, drawn as a grid of square blocks of one colour each and added to the pixels. A victim that
learns to read the pattern needs nothing of the image, and on clean images finds no pattern. Neither
victim nor gradient is needed to make it. Of an image x of class y

    x' = x + r · U(v / max |v|),    v = s μ_y + ε,    ε ~ N(0, 1) per block and channel,

with r the radius, μ_y the point of the class, s how far the classes are apart, and U drawing each block.

Paper: Yu, Zhang, Chen, Yin and Liu, "Availability Attacks Create Shortcuts", KDD 2022,
https://arxiv.org/abs/2111.00898.

Published: on all of CIFAR-10, a victim that has 94.68 % on clean data is left with 19.07 %, as a later
paper measured it (Liu et al., "Image Shortcut Squeezing", 2023, https://arxiv.org/abs/2301.13838).

What is left open, and how it is settled here:

- *The norm.* The paper bounds the Euclidean norm; within a radius for each pixel the pattern is scaled
  so that its largest block is at the radius.
- *The blocks*: 8×8 pixels of a 32×32 image in the paper, a quarter of the side here at any
  resolution.
- *The points* are corners of a cube, each class its own, ten times as far from the centre as the noise
  within a class goes, where the authors' generator of data has a noise of about four: within a radius,
  noise takes from the pattern.

Measured on `availability` (4,000 images of 16×16 within 8/255, ten pairs): 17.62 ± 1.28 points of 49.71
lost by smooth victims and 24.70 ± 1.24 of 51.45 by standard ones.

Cost: none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from poisonbench.attacks import Attack, Task, require_at_least_one, require_positive
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.perturb import require_radius
from poisonbench.threat import Budget, LInf, PoisonSet


@dataclass(frozen=True)
class LSP(Attack):
    """Blocks of colour that tell the class.

    Attributes:
        blocks: along a side of the image.
        separation: of a class from the centre in every coordinate, in standard deviations of the noise.
    """

    blocks: int = 4
    separation: float = 10.0

    def __post_init__(self) -> None:
        require_at_least_one(self, "blocks")
        require_positive(self, "separation")

    def require(self, budget: Budget) -> None:
        """A perturbation needs a radius."""
        require_radius(budget, "lsp")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Add the pattern of its class to every image that may be changed."""
        assert isinstance(task.budget.pixels, LInf)
        pick, class_key, noise_key = jax.random.split(key, 3)
        indices = task.random_indices(pick)
        images, labels = task.train_images[indices], task.train_labels[indices]
        _, height, width, channels = images.shape
        grid = (min(self.blocks, height), min(self.blocks, width), channels)
        centres = _corners(class_key, task.num_classes, grid)
        within = np.asarray(jax.random.normal(noise_key, (len(images), *grid)))
        points = self.separation * centres[labels] + within
        points /= np.abs(points).max((1, 2, 3), keepdims=True)
        rows, columns = (
            np.arange(side) * n // side for side, n in ((height, grid[0]), (width, grid[1]))
        )
        pattern = np.rint(points * task.budget.pixels.radius)[:, rows][:, :, columns]
        moved = np.clip(images + pattern, *task.bounds(indices)).astype(np.uint8)
        return task.poison(indices, moved, labels)


def _corners(
    key: PRNGKeyArray, classes: int, grid: tuple[int, int, int]
) -> Float[np.ndarray, "classes rows columns channels"]:
    """As many corners of the cube from -1 to 1 as there are classes, all different.

    Raises:
        UserError: it has fewer.
    """
    if 2 ** math.prod(grid) < classes:
        raise UserError(f"{math.prod(grid)} colours cannot tell {classes} classes apart: raise --blocks")
    taken: list[np.ndarray] = []
    draw = 0
    while len(taken) < classes:
        corner = np.asarray(jax.random.rademacher(jax.random.fold_in(key, draw), grid, np.float32))
        draw += 1
        if not any(np.array_equal(corner, other) for other in taken):
            taken.append(corner)
    return np.stack(taken)
