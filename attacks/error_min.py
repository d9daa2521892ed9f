"""Error-minimising noise: make every image so easy that there is nothing left to learn from it.

With θ the weights of a victim in training, images are perturbed to lose as little as possible under
their own labels, by turns with the training itself,

    min over θ of Σ_i  min over δ_i of ℓ(θ; x_i + δ_i, y_i),    ‖δ_i‖_∞ ≤ r:

a few steps of training on the images as they now are, then twenty signed steps on the pixels of each,
down the loss of the victim as it now is. A network that trains on them finds the noise, not the image.

Paper: Huang, Ma, Erfani, Bailey and Wang, "Unlearnable Examples: Making Personal Data Unexploitable",
ICLR 2021, https://arxiv.org/abs/2101.04898 (the noise for each sample, not for each class).

Published: on all of CIFAR-10 within 8/255, a victim that has 94.68 % on clean data is left with 21.05 %,
as a later paper measured it (Liu et al., "Image Shortcut Squeezing", 2023, https://arxiv.org/abs/2301.13838).

What is left open, and how it is settled here:

- *When to stop.* As in the paper, once the victim errs on less than 1 % of the images as they then are;
  or else at the end of the victim's own training run, which is gone through with its schedule.
- *The turns.* Ten steps of training each in the paper; four here, since the victims' runs are short, and
  noise made against young victims carries better (200 digits within 80/255, a run of 64 steps: expected
  error 0.73 after turns of four, 0.57 after turns of ten, 0.40 on clean images; not on record).
- *Batch norm* normalises by tracked statistics while pixels move.
- *Augmentation* is that of the victim's recipe in training; pixels move against images as they are.
- *A part of the set.* Under a fraction below 1, the victim trains on all images and the poisoned ones,
  drawn at random, are perturbed.

Measured on `availability` (4,000 images of 16×16 within 8/255, ten pairs): 24.91 ± 1.75 points of 49.71
lost by smooth victims and 25.10 ± 1.50 of 51.45 by standard ones. After 72 steps of training of the 128
of a whole run the victim errs on 0.6 % of the images as they then are, and the attack stops.

Cost: at most one victim training, and twenty backward passes over the poison for each four of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from poisonbench.arrays import to_pixels
from poisonbench.attacks import Attack, Task, require_at_least_one, require_positive
from poisonbench.journal import Journal, pack, unpack
from poisonbench.perturb import descended, radius, require_radius
from poisonbench.threat import Budget, PoisonSet
from poisonbench.trained import TrainedVictim
from poisonbench.victim.evaluation import train_some
from poisonbench.victim.training import TrainingRun, TrainingSet

LEARNT = 0.01
"""Share of errors on the poison below which nothing is left to do."""


@dataclass(frozen=True)
class ErrorMin(Attack):
    """Error-minimising noise for each sample.

    Attributes:
        train_steps: of the victim in a turn.
        steps: on the pixels in a turn.
        step_size: of each, as a share of the radius.
    """

    train_steps: int = 4
    steps: int = 20
    step_size: float = 0.1

    def __post_init__(self) -> None:
        require_at_least_one(self, "train_steps", "steps")
        require_positive(self, "step_size")

    def require(self, budget: Budget) -> None:
        """Noise needs a radius."""
        require_radius(budget, "error_min")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Train and perturb by turns, through one training run of the victim."""
        pick, run_key = jax.random.split(key)
        indices = task.random_indices(pick)
        labels = task.train_labels[indices]
        clean = TrainingSet.clean(task.train_images, task.train_labels, task.num_classes)
        data = clean.with_poison(indices, labels, add=task.budget.mode == "add")
        run, state = TrainingRun.start(task.recipe, data, run_key[None])
        arrays = journal.restore()
        z, done, error = task.train_images[indices] / np.float32(255), 0, 1.0
        if arrays is not None:
            state, z = unpack(arrays, "victim", state), arrays["z"]
            done, error = int(arrays["done"]), float(arrays["error"])
        with journal.progress("crafting error_min", run.num_steps, done) as bar:
            while done < run.num_steps and error >= LEARNT:
                steps = min(self.train_steps, run.num_steps - done)
                state = train_some(run, state, jnp.asarray(z), jnp.int32(done), jnp.int32(done + steps))
                victim = TrainedVictim(
                    task.recipe, task.num_classes, "all", jax.tree.map(lambda x: x[0], state)
                )
                z = descended(
                    victim, z, labels, task.bounds(indices), run_key,
                    steps=self.steps, size=self.step_size * radius(task),
                )  # fmt: skip
                done += steps
                error = float(np.mean(victim.classes(z) != labels))
                arrays = {"z": z, "done": np.array(done), "error": np.array(error)}
                journal.save(arrays | pack(state, "victim"), {"metastep": done, "error": error})
                bar.advance(steps, f"error {error:.1%}")
            bar.advance(run.num_steps - done)  # all is learnt before the end
        return task.poison(indices, to_pixels(z), labels)
