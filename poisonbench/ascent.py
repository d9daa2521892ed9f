"""Ascent of the victim's loss over the poisoned pixels, whatever estimates the gradient.

With `A(z, ω)` the parameters after a whole training run on the set that holds the poison `z`, and
`ω` its initialisation, data order and augmentation, an ascent maximises

    F(z) = E_ω φ(A(z, ω)),    φ the loss on held-out data,

by steps along an estimate of `∇F`, with a fresh `ω` at each metastep so that the poison works on
victims never seen. Pixels are projected to the budget after each step, and what is handed in is the
8-bit poison that did best on held-out `ω`.

Attacks that climb, by exact metagradients or by evolution strategies, derive from `Ascent`; given the
same start they differ in nothing but the estimate.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.arrays import to_pixels
from poisonbench.attacks import Attack, Task, require_at_least_one, require_positive
from poisonbench.defenses import Composed, in_steps
from poisonbench.errors import UserError
from poisonbench.flips import Flips, best_concentrated_flips, placed, require_flips
from poisonbench.journal import Journal, pack, unpack
from poisonbench.problem import JudgedOn, Problem, require_finite
from poisonbench.threat import Budget, PoisonSet
from poisonbench.victim.evaluation import Goal
from poisonbench.victim.training import Poison

Poisoned: TypeAlias = Float[Array, "p height width channels"] | Poison
"""Poisoned pixels in [0, 1]; or those and soft labels."""
SECOND_MOMENT = 0.95
"""Share of Adam's second moment that a metastep keeps: gradients grow as the attack bites."""


@dataclass(frozen=True)
class _Climb:
    """Where the ascent stands.

    Attributes:
        indices, labels: `[p]`, which images are poisoned, and their labels at the start.
        z: `[p, height, width, channels]`, float32 pixels in [0, 1]; or those and soft labels.
        optimizer: state of the pixel optimizer.
        done: metasteps taken.
        checked: how many had been when it was last checked; -1 before the first time.
        best: `[p, height, width, channels]`, uint8, the best poison at any check.
        best_labels: `[p]`, int32, its labels.
        best_value: its mean loss over the held-out seeds; minus infinity before the first check.
    """

    indices: np.ndarray
    labels: np.ndarray
    z: Poisoned
    optimizer: optax.OptState
    done: int
    checked: int
    best: np.ndarray
    best_labels: np.ndarray
    best_value: float

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds."""
        soft = {"targets": np.asarray(self.z.targets)} if isinstance(self.z, Poison) else {}
        return {
            "indices": self.indices,
            "labels": self.labels,
            "z": np.asarray(self.z.pixels if isinstance(self.z, Poison) else self.z),
            "done": np.array(self.done),
            "checked": np.array(self.checked),
            "best": self.best,
            "best_labels": self.best_labels,
            "best_value": np.array(self.best_value),
            **soft,
            **pack(self.optimizer, "optimizer"),
        }

    @staticmethod
    def of(arrays: dict[str, np.ndarray], optimizer: optax.GradientTransformation) -> _Climb:
        """The inverse of `arrays`, of an ascent with this pixel optimizer."""
        pixels = jnp.asarray(arrays["z"])
        soft = "targets" in arrays
        z = Poison(pixels, jnp.asarray(arrays["targets"])) if soft else pixels
        return _Climb(
            arrays["indices"], arrays["labels"], z, unpack(arrays, "optimizer", optimizer.init(z)),
            int(arrays["done"]), int(arrays["checked"]), arrays["best"], arrays["best_labels"],
            float(arrays["best_value"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Ascent(Attack):
    """An attack that climbs; a subclass says where from, and along what.

    Attributes:
        steps: metasteps; 0 leaves the pixels of the start as they are.
        step_size: of the first metastep, in pixel units (1 is the whole range); it falls linearly.
        last_step: to what share of that it falls.
        restarts: how often it falls anew, by parts of the metasteps as equal as can be.
        update: `adam`; the `sign` of the gradient's running mean; or that mean itself, `normalized`: as
            long as a step that moves every pixel by `step_size`, but most where the gradient is large.
        momentum: share of the running mean that each metastep keeps.
        goal: loss to climb: `cross_entropy`, the `margin` of the best wrong answer over the right one,
            or the expected `error`, which saturates.
        temperature: the victims' logits are divided by it before that. Where they are unsure, much of
            either loss at 1 is of answers that stay as they are; the lower, the more only those count
            that a little more would change.
        judged_on: images whose loss is climbed, and checked: `validation`, or `all` that are clean, the
            training images that are not poisoned among them. Victims fit those, but there are more of
            them: a climb may fit the few of a small validation set.
        check_every: metasteps between checks on held-out seeds.
        check_seeds: victims trained for a check.
        start: which images: `random` draws them, with their own labels; `flips` takes the best
            concentrated ones, or copies of them where labels are fixed.
        start_seeds: victims trained on clean data, and for each pair of classes that `flips` tries.
        candidates: class pairs that a search for two classes tries.
        against: defences, with commas between and with their default options, that the victim is taken
            to train under: the attack is adaptive then. They must act in its steps alone.
    """

    steps: int = 45
    step_size: float = 0.1
    last_step: float = 0.1
    restarts: int = 0
    update: Literal["adam", "sign", "normalized"] = "adam"
    momentum: float = 0.8
    goal: Goal = "cross_entropy"
    temperature: float = 1.0
    judged_on: JudgedOn = "validation"
    check_every: int = 10
    check_seeds: int = 5
    start: str = "random"
    start_seeds: int = 5
    candidates: int = 6
    against: str = ""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError("--steps must not be negative")
        require_at_least_one(self, "check_every", "check_seeds", "start_seeds", "candidates")
        require_positive(self, "step_size", "temperature")
        if not 0 <= self.momentum < 1:
            raise UserError("--momentum must lie in [0, 1)")
        if not 0 <= self.last_step <= 1:
            raise UserError("--last-step must lie in [0, 1]")
        if not 0 <= self.restarts <= max(0, self.steps - 1):
            raise UserError("--restarts must be fewer than --steps, and not negative")
        self.guard()  # so that a wrong name is refused at once

    def guard(self) -> Composed | None:
        """The defence that the attack is made against.

        Raises:
            UserError: there is no such defence, or it acts elsewhere than in the victim's steps.
        """
        return in_steps(self.against) if self.against else None

    def problem(self, task: Task, indices: np.ndarray, labels: np.ndarray) -> Problem:
        """What is climbed with these images poisoned, under these labels."""
        return Problem.of(
            task, indices, labels, self.goal, self.guard(), self.temperature, self.judged_on
        )

    def require(self, budget: Budget) -> None:
        """Flips as a start need a budget that can have them."""
        if self.start == "flips":
            require_flips(budget, f"{_name(self)} --start flips")

    def started(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """The poison that the ascent starts from."""
        if self.start == "flips":
            flips = self.concentrated(task, key, journal)
            return placed(task, flips, jax.random.fold_in(key, 2))
        indices = task.random_indices(key)
        return task.poison(indices, task.train_images[indices], task.train_labels[indices])

    def concentrated(self, task: Task, key: PRNGKeyArray, journal: Journal) -> Flips:
        """The best concentrated flips, found by victims that train as those attacked do."""
        return best_concentrated_flips(
            task, key, journal, candidates=self.candidates, seeds=self.start_seeds, guard=self.guard()
        )

    @abstractmethod
    def gradient(
        self,
        problem: Problem,
        z: Poisoned,
        key: PRNGKeyArray,
        done: int,
        journal: Journal,
    ) -> tuple[float, Poisoned]:
        """An estimate of `F(z)` and of its gradient, from runs of fresh randomness.

        Args:
            problem: what is climbed.
            z: what `relaxed` made of the start, as far as it was climbed.
            key: for these runs alone.
            done: metasteps taken.
            journal: where what takes long may keep its place.

        Raises:
            UserError: either is not finite.
        """

    def relaxed(self, task: Task, start: PoisonSet) -> Poisoned:
        """What is climbed, at the start: the pixels, where labels stay as they are."""
        del task
        return jnp.asarray(start.images, jnp.float32) / 255

    def moved(self, problem: Problem, z: Poisoned, updates: Poisoned) -> Poisoned:
        """One update on, projected to what the budget allows."""
        assert isinstance(z, jax.Array)  # whoever relaxes labels moves them too
        assert isinstance(updates, jax.Array)
        return jnp.clip(z + updates, problem.low, problem.high)

    @property
    def checks(self) -> int:
        """How often a poison is checked on held-out seeds: at the start, every so often, at the end."""
        return 1 + -(-self.steps // self.check_every)

    def craft(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """Climb from the start; the best checked poison, rounded to 8 bits, is the result."""
        guard = self.guard()
        if guard and guard.parts and task.recipe.batch_size % guard.parts:
            raise UserError(
                f"--against {self.against} cuts a batch of {task.recipe.batch_size} into {guard.parts}"
                " equal parts: give a --set batch_size=… that can be cut so"
            )
        start_key, step_key, check_key = jax.random.split(key, 3)
        arrays = journal.restore() or {}
        begun = "z" in arrays  # otherwise a checkpoint is of the search for the start
        if begun:
            climb = _Climb.of(arrays, self._optimizer())
        else:
            climb = self._start(task, start_key, journal)
            journal.save(climb.arrays(), {"metastep": 0})
        problem = self.problem(task, climb.indices, climb.labels)
        with journal.progress(f"crafting {_name(self)}", self.steps, climb.done) as bar:
            climb = self._checked_if_due(problem, climb, check_key, journal)
            while climb.done < self.steps:
                climb, loss = self._metastep(
                    problem, climb, jax.random.fold_in(step_key, climb.done), journal
                )
                journal.save(climb.arrays(), {"metastep": climb.done, "loss": loss})
                climb = self._checked_if_due(problem, climb, check_key, journal)
                bar.advance(note=f"loss {loss:.3f}")
        require_finite(climb.best_value)
        return task.poison(climb.indices, climb.best, climb.best_labels)

    def _start(self, task: Task, key: PRNGKeyArray, journal: Journal) -> _Climb:
        start = self.started(task, key, journal)
        z = self.relaxed(task, start)
        optimizer = self._optimizer().init(z)
        return _Climb(
            start.indices, start.labels, z, optimizer, 0, -1, start.images, start.labels, -np.inf
        )

    def _metastep(
        self, problem: Problem, climb: _Climb, key: PRNGKeyArray, journal: Journal
    ) -> tuple[_Climb, float]:
        """One step up, along the gradient of fresh runs; and their mean loss."""
        value, gradient = self.gradient(problem, climb.z, key, climb.done, journal)
        down = jax.tree.map(jnp.negative, gradient)
        updates, optimizer = self._optimizer().update(down, climb.optimizer, climb.z)
        z = self.moved(problem, climb.z, updates)
        return replace(climb, z=z, optimizer=optimizer, done=climb.done + 1), value

    def _optimizer(self) -> optax.GradientTransformation:
        """Descent on the negated loss."""
        last, parts = self.last_step * self.step_size, self.restarts + 1
        ends = [round(max(1, self.steps) * i / parts) for i in range(parts + 1)]
        falls = [
            optax.linear_schedule(self.step_size, last, end - begin) for begin, end in pairwise(ends)
        ]
        size = optax.join_schedules(falls, ends[1:-1])
        if self.update == "adam":
            return optax.adam(size, b1=self.momentum, b2=SECOND_MOMENT)
        if self.update == "normalized":
            # Before the mean, so that no one run outweighs the others; and after it, where runs that
            # disagree would shorten the step.
            mean = optax.chain(_unit_rms(), optax.ema(self.momentum), _unit_rms())
            return optax.chain(mean, optax.scale_by_learning_rate(size))
        return optax.chain(
            optax.ema(self.momentum), optax.scale_by_sign(), optax.scale_by_learning_rate(size)
        )

    def _checked_if_due(
        self, problem: Problem, climb: _Climb, key: PRNGKeyArray, journal: Journal
    ) -> _Climb:
        """Hold the poison, as it would be stored, against the best, and log how victims do on it."""
        due = climb.done % self.check_every == 0 or climb.done == self.steps
        if not due or climb.checked == climb.done:
            return climb
        images, labels = _stored(climb.z)
        value, wrong = problem.judged(images, jax.random.split(key, self.check_seeds), labels)
        climb = replace(climb, checked=climb.done)
        if value > climb.best_value:
            best = climb.labels if labels is None else labels
            climb = replace(climb, best=images, best_labels=best, best_value=value)
        journal.rows[-1] |= {"held_out_loss": value, "held_out_error": wrong}
        if labels is not None:
            journal.rows[-1]["changed_labels"] = float((labels != climb.labels).mean())
        journal.save(climb.arrays())
        return climb


def _unit_rms() -> optax.GradientTransformation:
    """Each array divided by the root of its mean square; zeros stay as they are."""

    def unit(array: Array) -> Array:
        rms = jnp.sqrt(jnp.mean(array**2))
        return array / jnp.where(rms > 0, rms, 1)

    return optax.stateless_with_tree_map(lambda array, _: unit(array))


def _stored(z: Poisoned) -> tuple[np.ndarray, np.ndarray | None]:
    """The pixels as uint8; and where labels climb, the likeliest ones as int32."""
    if isinstance(z, Poison):
        return to_pixels(z.pixels), np.asarray(z.targets.argmax(-1), np.int32)
    return to_pixels(z), None


def _name(attack: Attack) -> str:
    return type(attack).__module__.rsplit(".", 1)[-1]
