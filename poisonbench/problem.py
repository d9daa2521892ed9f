"""The victims that an attacker trains: their loss after training, as a function of the poison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Key, PRNGKeyArray, UInt8

from poisonbench.attacks import Task
from poisonbench.errors import UserError
from poisonbench.trained import Layers, TrainedVictim
from poisonbench.victim.evaluation import Goal, ValidationLoss, train
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import Guard, Poison, TrainingRun, TrainingSet, TrainState

JudgedOn = Literal["validation", "all"]
"""Clean images that the loss is of: validation images alone, or training images that stay too."""


@dataclass(frozen=True)
class Problem:
    """The loss of victims trained with some images poisonable: what attacks raise.

    Attributes:
        recipe: the victim's.
        data: the training set, with slots for the poison.
        loss: of a trained victim, on clean images.
        low, high: `[p, height, width, channels]`, float32, the pixels that the budget allows.
        guard: the defence in its steps that the attack is made against; None for none.
    """

    recipe: Recipe
    data: TrainingSet
    loss: ValidationLoss
    low: jax.Array
    high: jax.Array
    guard: Guard | None = None

    @staticmethod
    def of(
        task: Task,
        indices: np.ndarray,
        labels: np.ndarray,
        goal: Goal,
        guard: Guard | None = None,
        temperature: float = 1.0,
        judged_on: JudgedOn = "validation",
    ) -> Problem:
        """The problem with these images poisoned, under these labels; the loss is on validation images.

        Where it is `judged_on` all, it is on the training images at other indices too.
        """
        clean = TrainingSet.clean(task.train_images, task.train_labels, task.num_classes)
        images, truth = task.val_images, task.val_labels
        if judged_on == "all":
            images = np.concatenate([images, np.delete(task.train_images, indices, axis=0)])
            truth = np.concatenate([truth, np.delete(task.train_labels, indices)])
        loss = ValidationLoss(
            task.recipe, task.num_classes, goal, jnp.asarray(images), jnp.asarray(truth), temperature
        )
        low, high = (jnp.asarray(bound, jnp.float32) / 255 for bound in task.bounds(indices))
        data = clean.with_poison(indices, labels, add=task.budget.mode == "add")
        return Problem(task.recipe, data, loss, low, high, guard)

    def start(self, keys: Key[Array, " seeds"]) -> tuple[TrainingRun, TrainState]:
        """A run of the victim and its initial state, for each key."""
        return TrainingRun.start(self.recipe, self.data, keys, self.guard)

    def harm(self, images: UInt8[np.ndarray, "p h w c"], keys: Key[Array, " seeds"]) -> float:
        """The mean loss of a victim for each key, trained on a poison as it would be stored."""
        return self.judged(images, keys)[0]

    def judged(
        self,
        images: UInt8[np.ndarray, "p h w c"],
        keys: Key[Array, " seeds"],
        labels: Int32[np.ndarray, " p"] | None = None,
    ) -> tuple[float, float]:
        """The same mean loss, and the share of its images that these victims get wrong.

        Args:
            images: the poison.
            keys: of the victims.
            labels: of the poison; None for those that the problem was made with.
        """
        run, state = self.start(keys)
        pixels = jnp.asarray(images, jnp.float32) / 255
        if labels is None:
            state = train(run, state, pixels)
        else:
            state = train(run, state, Poison(pixels, jax.nn.one_hot(labels, self.data.num_classes)))
        loss, wrong = _judge(self.loss, state)
        return float(loss), float(wrong)


def clean_victim(task: Task, key: PRNGKeyArray, layers: Layers = "all") -> TrainedVictim:
    """A victim trained on the task's data as they are, of which these weights may move."""
    return TrainedVictim.on(
        task.train_images, task.train_labels, task.num_classes, task.recipe, key, layers
    )


def require_finite(best: float) -> None:
    """Refuse to hand in a poison of which no check had a finite loss.

    Args:
        best: the highest loss of all checks; minus infinity where there was none.

    Raises:
        UserError: so it is.
    """
    if np.isneginf(best):
        raise UserError(
            "no check had a finite loss: lower the victim's learning rate, as by"
            " --set smooth.learning_rate=…"
        )


_judge = jax.jit(lambda loss, state: (loss(state), loss.wrong(state)))
