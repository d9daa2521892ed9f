"""Targeted adversarial poisoning: images that a clean victim takes for another class, labels kept.

    min over δ_i of ℓ(θ; x_i + δ_i, g(y_i)),    ‖δ_i‖_∞ ≤ r,

with θ a victim trained on clean data and g a permutation of the classes without a fixed point, so that
all images of a class carry features of one and the same other class. Victims that train on them learn
those features under the wrong name.

Paper: Fowl, Goldblum, Chiang, Geiping, Czaja and Goldstein, "Adversarial Examples Make Strong Poisons",
NeurIPS 2021, https://arxiv.org/abs/2106.10807 (the class-targeted variant, its strongest).

Published: on all of CIFAR-10 within 8/255, a victim that has 94.68 % on clean data is left with 8.17 %,
as a later paper measured it (Liu et al., "Image Shortcut Squeezing", 2023, https://arxiv.org/abs/2301.13838).

What is left open, and how it is settled here:

- *The permutation* is a cyclic shift of the classes, by an option.
- *The start*: anywhere within the radius, at random, once; the authors' code starts eight times and
  keeps the best.
- *The steps*: signed, of a tenth of the radius each, all alike; through the augmentation of the
  victim's recipe, if it has one, drawn anew at each step.
- *A part of the set.* Under a fraction below 1, images drawn at random.

Measured on `availability` (4,000 images of 16×16 within 8/255, ten pairs): 18.09 ± 1.76 points of 49.71
lost by smooth victims and 15.69 ± 1.27 of 51.45 by standard ones. The clean victim takes 49 % of the
images for their targets, from the fiftieth step on.

Cost: one victim training, and `steps` backward passes over the poison.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench.arrays import to_pixels
from poisonbench.attacks import Attack, Task, require_at_least_one, require_positive
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.perturb import descended, radius, require_radius
from poisonbench.problem import clean_victim
from poisonbench.threat import Budget, PoisonSet


@dataclass(frozen=True)
class TAP(Attack):
    """Class-targeted adversarial poisoning.

    Attributes:
        steps: on the pixels.
        step_size: of each, as a share of the radius.
        check_every: steps between two checkpoints.
        shift: an image of class y is made to look like class y + shift, modulo their number.
    """

    steps: int = 250
    step_size: float = 0.1
    check_every: int = 25
    shift: int = 1

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "check_every", "shift")
        require_positive(self, "step_size")

    def require(self, budget: Budget) -> None:
        """A perturbation needs a radius."""
        require_radius(budget, "tap")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Perturb images against one victim trained on clean data."""
        if self.shift % task.num_classes == 0:
            raise UserError(f"--shift {self.shift} moves no class of {task.num_classes} to another")
        pick, clean_key, step_key, start_key = jax.random.split(key, 4)
        indices = task.random_indices(pick)
        labels = task.train_labels[indices]
        targets = ((labels + self.shift % task.num_classes) % task.num_classes).astype(np.int32)
        low, high = (bound.astype(np.float32) / 255 for bound in task.bounds(indices))
        z, done = low + (high - low) * np.asarray(jax.random.uniform(start_key, low.shape)), 0
        if (arrays := journal.restore()) is not None:
            z, done = arrays["z"], int(arrays["done"])
        with journal.progress("crafting tap", self.steps, done) as bar:
            victim = clean_victim(task, clean_key)
            while done < self.steps:
                steps = min(self.check_every, self.steps - done)
                z = descended(
                    victim, z, targets, task.bounds(indices), jax.random.fold_in(step_key, done),
                    steps=steps, size=self.step_size * radius(task), augmented=True,
                )  # fmt: skip
                done += steps
                taken = float(np.mean(victim.classes(z) == targets))
                journal.save({"z": z, "done": np.array(done)}, {"metastep": done, "mistaken": taken})
                bar.advance(steps, f"{taken:.0%} look like their target")
        return task.poison(indices, to_pixels(z), labels)
