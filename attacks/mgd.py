"""Metagradient descent: climb the victim's validation loss along exact metagradients.

The ascent of `poisonbench.ascent` on `F(z) = E_ω φ(A(z, ω))`, the expected loss on held-out data after a
whole training run with the poison `z`, along `∇_z φ(A(z, ω))`: exact, and through every step of
training (REPLAY), with a fresh `ω` (initialisation, order, augmentation) at each metastep.

Paper: Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
https://arxiv.org/abs/2503.13751: CIFAR-10, 1,000 of 40,000 images, about 800 metasteps, test
accuracy 92 % to 78 %.

What the paper leaves open, and how it is settled here:

- *Which images, and which labels.* One pass that differentiates with respect to every training
  image, on clean data, ranks them. Fixed labels: by the sum of the metagradient's magnitude over
  the pixels, the gain that a small sign step on that image would bring. Free labels: each label is a
  distribution, and moving it from its class y to class c gains `∂φ/∂c - ∂φ/∂y` to first order; the
  images with the largest gains get those labels, and then their pixels climb.
- *The step.* Adam on the pixels, its size falling linearly. A plain sign step moves every pixel
  equally far, those with no signal too, and seeds agree too little for that.
- *The projection.* Clipping to the allowed 8-bit range after each step, rounding at the end.

Cost: a metagradient is three to four victim trainings. There are `steps × runs_per_step` of them and
`start_seeds` for the ranking; and `check_seeds` trainings at every check.

Measured on `digits` (12 of 500 images, 60 metasteps, ten pairs of smooth victims): 2.43 ± 0.38
points lost with fixed labels, 3.67 ± 0.36 with free ones, of which the labels alone (`--steps 0`) take
2.52 ± 0.29; see `results/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

from poisonbench.ascent import Ascent, Problem, require_at_least_one
from poisonbench.attacks import Task
from poisonbench.errors import UserError
from poisonbench.flips import Flips
from poisonbench.journal import Journal
from poisonbench.metagradient import NonFiniteError, metagradient
from poisonbench.victim.training import Poison, TrainingRun


@dataclass(frozen=True)
class MGD(Ascent):
    """The attack of the metagradient paper; the other options are those of `Ascent`.

    Attributes:
        runs_per_step: metagradients averaged in a metastep, each of a run of its own randomness.
        start: `influence` ranks images by metagradients, labels too where those are free, over
            `start_seeds` runs; `random` or `flips` otherwise.
    """

    runs_per_step: int = 1
    start: Literal["influence", "random", "flips"] = "influence"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "runs_per_step")

    def started(self, task: Task, key: PRNGKeyArray, journal: Journal) -> Flips:
        """The images that the start names, and the labels that they get."""
        if self.start == "influence":
            return self._most_influential(task, jax.random.split(key, self.start_seeds), journal)
        return super().started(task, key, journal)

    def gradient(
        self, problem: Problem, z: Float[Array, "p h w c"], key: PRNGKeyArray, when: str
    ) -> tuple[float, Float[Array, "p h w c"]]:
        """The mean loss of `runs_per_step` runs, and their mean metagradient."""
        value, gradient = 0.0, jnp.zeros_like(z)
        for one_key in jax.random.split(key, self.runs_per_step):
            one_value, one_gradient = _metagradient(problem, z, one_key, when)
            value += float(one_value) / self.runs_per_step
            gradient += one_gradient / self.runs_per_step
        return value, gradient

    def _most_influential(self, task: Task, keys: Key[Array, " seeds"], journal: Journal) -> Flips:
        """The images through which the victim is hurt most, and the labels that do it."""
        labels = task.train_labels
        problem = Problem.of(task, np.arange(len(labels)), labels, self.goal)
        targets = jax.nn.one_hot(labels, task.num_classes)
        z = Poison(jnp.asarray(task.train_images, jnp.float32) / 255, targets)
        total = jax.tree.map(jnp.zeros_like, z)
        with journal.progress("ranking images", len(keys)) as bar:
            for key in keys:
                total = jax.tree.map(jnp.add, total, _metagradient(problem, z, key, "in the ranking")[1])
                bar.advance()
        if task.budget.labels == "free":
            gains = np.asarray(total.targets)
            gains = gains - gains[np.arange(len(labels)), labels][:, None]
            influence, labels = gains.max(1), gains.argmax(1).astype(np.int32)
        else:
            influence = np.asarray(jnp.abs(total.pixels).sum((1, 2, 3)))
        most = np.sort(np.argsort(-influence, kind="stable")[: task.num_poison])
        return Flips(most.astype(np.int64), labels[most])


def _metagradient(
    problem: Problem, z: jax.Array | Poison, key: PRNGKeyArray, when: str
) -> tuple[jax.Array, Any]:
    """The loss after one training run on the poison `z`, and its exact gradient.

    Raises:
        UserError: either is not finite; it says `when`.
    """
    run, state = TrainingRun.start(problem.recipe, problem.data, key[None])
    try:
        return metagradient(run, problem.loss, state, run.num_steps, z)
    except NonFiniteError as error:
        raise UserError(f"{when}, {error}; as by --set smooth.learning_rate=…") from None
