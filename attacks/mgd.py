"""Metagradient descent: climb the victim's validation loss along exact metagradients.

With `A(z, ω)` the parameters after a whole training run on the set that holds the poison `z`, and
`ω` its initialisation, data order and augmentation, the attack maximises

    F(z) = E_ω φ(A(z, ω)),    φ the loss on held-out data,

by ascent along `∇_z φ(A(z, ω))`, exact and through every step of training (REPLAY), with a fresh
`ω` at each metastep so that the poison works on victims never seen. Pixels are projected to the
budget after each step, and what is handed in is the 8-bit poison that did best on held-out `ω`.

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

Cost: a metagradient is about four victim trainings. There are `steps × runs_per_step` of them and
`start_seeds` for the ranking; and `check_seeds` trainings at every check.

Measured on `digits` (12 of 500 images, 60 metasteps, ten pairs of smooth victims): 2.43 ± 0.38
points lost with fixed labels, 3.67 ± 0.36 with free ones, of which the labels alone (`--steps 0`) take
2.52 ± 0.29; see `results/README.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PRNGKeyArray

from poisonbench.attacks import Attack, Task
from poisonbench.errors import UserError
from poisonbench.flips import Flips, best_concentrated_flips
from poisonbench.journal import Journal
from poisonbench.metagradient import NonFiniteError, metagradient
from poisonbench.threat import Budget, PoisonSet
from poisonbench.victim.evaluation import Goal, ValidationLoss, train
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import Poison, TrainingRun, TrainingSet


@dataclass(frozen=True)
class _Climb:
    """Where the ascent stands.

    Attributes:
        indices, labels: `[p]`, which images are poisoned, and their labels; fixed from the start.
        z: `[p, height, width, channels]`, float32 pixels in [0, 1].
        optimizer: state of the pixel optimizer, as a list of arrays.
        done: metasteps taken.
        best: `[p, height, width, channels]`, uint8, the best poison at any check.
        best_value: its mean loss over the held-out seeds; minus infinity before the first check.
    """

    indices: np.ndarray
    labels: np.ndarray
    z: jax.Array
    optimizer: list[jax.Array]
    done: int
    best: np.ndarray
    best_value: float

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds."""
        optimizer = {f"optimizer.{i:02d}": np.asarray(x) for i, x in enumerate(self.optimizer)}
        return {
            "indices": self.indices,
            "labels": self.labels,
            "z": np.asarray(self.z),
            "done": np.array(self.done),
            "best": self.best,
            "best_value": np.array(self.best_value),
            **optimizer,
        }

    @staticmethod
    def of(arrays: dict[str, np.ndarray]) -> _Climb:
        """The inverse of `arrays`."""
        optimizer = [jnp.asarray(arrays[k]) for k in sorted(arrays) if k.startswith("optimizer.")]
        return _Climb(
            arrays["indices"], arrays["labels"], jnp.asarray(arrays["z"]), optimizer,
            int(arrays["done"]), arrays["best"], float(arrays["best_value"]),
        )  # fmt: skip


@dataclass(frozen=True)
class _Problem:
    """What is climbed: the validation loss of victims trained with some images poisonable.

    Attributes:
        recipe: the victim's.
        data: the training set, with slots for the poison.
        loss: of a trained victim, on validation data.
        low, high: `[p, height, width, channels]`, float32, the pixels that the budget allows.
    """

    recipe: Recipe
    data: TrainingSet
    loss: ValidationLoss
    low: jax.Array
    high: jax.Array

    @staticmethod
    def of(task: Task, indices: np.ndarray, labels: np.ndarray, goal: Goal) -> _Problem:
        """The problem with these images poisoned, under these labels."""
        clean = TrainingSet.clean(task.train_images, task.train_labels, task.num_classes)
        images, truth = jnp.asarray(task.val_images), jnp.asarray(task.val_labels)
        loss = ValidationLoss(task.recipe, task.num_classes, goal, images, truth)
        low, high = (jnp.asarray(bound, jnp.float32) / 255 for bound in task.bounds(indices))
        return _Problem(task.recipe, clean.with_poison(indices, labels), loss, low, high)

    def metagradient(self, z: jax.Array | Poison, key: PRNGKeyArray, when: str) -> tuple[jax.Array, Any]:
        """The loss after one training run on the poison `z`, and its exact gradient.

        Raises:
            UserError: either is not finite; it says `when`.
        """
        run, state = TrainingRun.start(self.recipe, self.data, key[None])
        try:
            return metagradient(run, self.loss, state, run.num_steps, z)
        except NonFiniteError as error:
            raise UserError(f"{when}, {error}; as by --set smooth.learning_rate=…") from None


@dataclass(frozen=True)
class MGD(Attack):
    """The attack of the metagradient paper.

    Attributes:
        steps: metasteps; 0 leaves the pixels of the start as they are.
        step_size: of the first metastep, in pixel units (1 is the whole range); it falls linearly
            to a tenth.
        update: `adam`, or the `sign` of the metagradient's running mean.
        momentum: share of the running mean that each metastep keeps.
        runs_per_step: metagradients averaged in a metastep, each of a run of its own randomness.
        goal: loss to climb: `cross_entropy`, or the expected `error`, which saturates.
        start: which images: `influence` ranks them by metagradients, labels too where those are
            free; `random` draws them, with their own labels; `flips` takes the best concentrated
            ones (labels must be free).
        start_seeds: runs averaged for influence, and victims trained for each pair of flips.
        candidates: class pairs tried in search of flips.
        check_every: metasteps between checks on held-out seeds.
        check_seeds: victims trained for a check.
    """

    steps: int = 60
    step_size: float = 0.1
    update: Literal["adam", "sign"] = "adam"
    momentum: float = 0.8
    runs_per_step: int = 1
    goal: Goal = "cross_entropy"
    start: Literal["influence", "random", "flips"] = "influence"
    start_seeds: int = 5
    candidates: int = 6
    check_every: int = 10
    check_seeds: int = 5

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError("--steps must not be negative")
        for name in (
            "runs_per_step",
            "start_seeds",
            "candidates",
            "check_every",
            "check_seeds",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if not self.step_size > 0:
            raise UserError("--step-size must be above 0")
        if not 0 <= self.momentum < 1:
            raise UserError("--momentum must lie in [0, 1)")

    def require(self, budget: Budget) -> None:
        """Flips as a start need free labels."""
        if self.start == "flips" and budget.labels == "fixed":
            raise UserError("mgd cannot start from flips while labels are fixed: give --labels free")

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Climb from the start; the best checked poison, rounded to 8 bits, is the result."""
        start_key, step_key, check_key = jax.random.split(key, 3)
        check_keys = jax.random.split(check_key, self.check_seeds)
        arrays = journal.restore()
        climb = self._started(task, start_key, journal) if arrays is None else _Climb.of(arrays)
        problem = _Problem.of(task, climb.indices, climb.labels, self.goal)
        if arrays is None:
            climb, held_out = self._checked(problem, climb, check_keys)
            journal.save(climb.arrays(), {"metastep": 0, "held_out_loss": held_out})
        with journal.progress("crafting mgd", self.steps, climb.done) as bar:
            while climb.done < self.steps:
                keys = jax.random.split(jax.random.fold_in(step_key, climb.done), self.runs_per_step)
                climb, loss = self._metastep(problem, climb, keys)
                row = {"metastep": climb.done, "loss": loss}
                if climb.done % self.check_every == 0 or climb.done == self.steps:
                    climb, row["held_out_loss"] = self._checked(problem, climb, check_keys)
                journal.save(climb.arrays(), row)
                bar.advance(note=f"loss {loss:.3f}")
        return task.poison(climb.indices, climb.best, climb.labels)

    def _started(self, task: Task, key: PRNGKeyArray, journal: Journal) -> _Climb:
        if self.start == "influence":
            flips = self._most_influential(task, jax.random.split(key, self.start_seeds), journal)
        elif self.start == "flips":
            flips = best_concentrated_flips(
                task, key, journal, candidates=self.candidates, seeds=self.start_seeds
            )
        else:
            number = len(task.train_labels)
            rows = jax.random.choice(key, number, (task.num_poison,), replace=False)
            indices = np.sort(np.asarray(rows, np.int64))
            flips = Flips(indices, task.train_labels[indices])
        pixels = task.train_images[flips.indices]
        z = jnp.asarray(pixels, jnp.float32) / 255
        optimizer = jax.tree.leaves(self._optimizer().init(z))
        return _Climb(flips.indices, flips.labels, z, optimizer, 0, pixels, -np.inf)

    def _most_influential(self, task: Task, keys: Key[Array, " seeds"], journal: Journal) -> Flips:
        """The images through which the victim is hurt most, and the labels that do it."""
        labels = task.train_labels
        problem = _Problem.of(task, np.arange(len(labels)), labels, self.goal)
        targets = jax.nn.one_hot(labels, task.num_classes)
        z = Poison(jnp.asarray(task.train_images, jnp.float32) / 255, targets)
        total = jax.tree.map(jnp.zeros_like, z)
        with journal.progress("ranking images", len(keys)) as bar:
            for i in range(len(keys)):
                total = jax.tree.map(
                    jnp.add, total, problem.metagradient(z, keys[i], "in the ranking")[1]
                )
                bar.advance()
        if task.budget.labels == "free":
            gains = np.asarray(total.targets)
            gains = gains - gains[np.arange(len(labels)), labels][:, None]
            influence, labels = gains.max(1), gains.argmax(1).astype(np.int32)
        else:
            influence = np.asarray(jnp.abs(total.pixels).sum((1, 2, 3)))
        most = np.sort(np.argsort(-influence, kind="stable")[: task.num_poison])
        return Flips(most.astype(np.int64), labels[most])

    def _metastep(
        self, problem: _Problem, climb: _Climb, keys: Key[Array, " seeds"]
    ) -> tuple[_Climb, float]:
        """One step up, along the mean metagradient of fresh runs; and their mean loss."""
        value, gradient, when = 0.0, jnp.zeros_like(climb.z), f"at metastep {climb.done}"
        for i in range(len(keys)):
            one_value, one_gradient = problem.metagradient(climb.z, keys[i], when)
            value += float(one_value) / len(keys)
            gradient += one_gradient / len(keys)
        optimizer = self._optimizer()
        structure: Any = jax.tree.structure(optimizer.init(climb.z))
        state = structure.unflatten(climb.optimizer)
        updates, state = optimizer.update(-gradient, state, climb.z)
        z = jnp.clip(climb.z + updates, problem.low, problem.high)
        climb = replace(climb, z=z, optimizer=jax.tree.leaves(state), done=climb.done + 1)
        return climb, value

    def _optimizer(self) -> optax.GradientTransformation:
        """Descent on the negated loss."""
        size = optax.linear_schedule(self.step_size, self.step_size / 10, max(1, self.steps))
        if self.update == "adam":
            # A short second-moment memory: the gradient's scale grows as the attack bites.
            return optax.adam(size, b1=self.momentum, b2=0.95)
        return optax.chain(
            optax.ema(self.momentum), optax.scale_by_sign(), optax.scale_by_learning_rate(size)
        )

    def _checked(
        self, problem: _Problem, climb: _Climb, keys: Key[Array, " seeds"]
    ) -> tuple[_Climb, float]:
        """Hold the poison, as it would be stored, against the best; and its held-out loss."""
        images = np.asarray(jnp.rint(climb.z * 255), np.uint8)
        run, state = TrainingRun.start(problem.recipe, problem.data, keys)
        state = train(run, state, jnp.asarray(images, jnp.float32) / 255)
        value = float(_evaluate(problem.loss, state))
        if value > climb.best_value:
            climb = replace(climb, best=images, best_value=value)
        return climb, value


_evaluate = jax.jit(lambda loss, state: loss(state))
