"""Metagradient descent: climb the victim's validation loss along exact metagradients.

The ascent of `poisonbench.ascent` on `F(z) = E_ω φ(A(z, ω))`, the expected loss on held-out data after a
whole training run with the poison `z`, along `∇_z φ(A(z, ω))`: exact, and through every step of
training, with a fresh `ω` (initialisation, order, augmentation) at each metastep.

Paper: Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
https://arxiv.org/abs/2503.13751: CIFAR-10, 1,000 of 40,000 images, about 800 metasteps, test
accuracy 92 % to 78 %.

What the paper leaves open, and how it is settled here:

- *Which images, and which labels.* One pass on clean data differentiates with respect to every
  training image and its label, a distribution over classes. The loss is linear in that distribution,
  so `∂φ/∂c` is what one more pair of that image and class c would gain, to first order. Free labels:
  moving the label from y to c gains `∂φ/∂c - ∂φ/∂y`; the images with the largest gains get those labels.
  Fixed labels, any pixels: the same wrong pairs are had by copies of the images, those of the largest
  `∂φ/∂c`, in places of class c whose own pairs have the smallest. Then the pixels climb. Fixed labels
  within a radius: the images with the largest metagradient, summed over pixels in magnitude, which is
  what a small sign step on that image would gain.
- *Concentration.* Flips of one class to another reinforce each other, which no first-order gain of
  single pairs sees; and where seeds agree little, the largest of all those gains are largely noise.
  `--start pair` finds the two classes by trial, as `label_flip` does, and ranks the images of one.
- *The loss.* Victims of half the accuracy are unsure of most images, and the loss of all of them can
  rise while few answers change. `--goal error --temperature` below 1 climbs what is closer to the share
  of wrong answers. `--goal margin` pulls as much at every answer.
- *Soft labels.* Labels that are free may climb as the pixels do (`--label-step`): distributions over
  classes, moved by multiplicative weights, `p ∝ p · exp(η u)`, where u is the optimizer's update along
  `∂φ/∂p` less its mean under p, which no distribution can follow. The logged loss is of victims of soft
  labels; checks, and what is handed in, are of the likeliest class. From the start `influence` no label
  of `digits` changed so, by logs that are not on record.
- *The step.* Adam on the pixels, its size falling linearly to a tenth; the gradient's scale grows as the
  attack bites, so its second moment forgets fast (a share of 0.95 is kept). A plain sign step
  moves every pixel equally far, those with no signal too: as large as Adam's first it is worse, and a
  quarter as large not told from Adam. From copies of clean images, on `cifar10-small`, steps of 0.1
  lower held-out loss; smaller ones along the gradient itself raise it (`--update normalized --step-size
  0.03`).
- *What is climbed on.* A climb may fit the few images of a validation set. `--judged-on all` adds the
  training images that stay, which victims fit in turn.
- *The projection.* Clipping to the allowed 8-bit range after each step, rounding at the end.

Cost: a metagradient is three to four victim trainings, and one or more on top where `memory` does not
hold the states of a whole one. There are `steps × runs_per_step` of them, and `start_seeds` for the
ranking, where there is one; and `check_seeds` trainings at every check. `--start flips` and `pair`
search for the classes by `(candidates + 1) × start_seeds` trainings.

Published: CIFAR-10, 2.5 %, 92 to 78 % (-13.9 points); -10.2 on a victim that is not smooth.

Measured on `digits` (12 of 500 images, 45 metasteps, ten pairs of smooth victims): 3.38 ± 0.46 points
lost with fixed labels, of which the start alone (`--steps 0`) takes 2.07 ± 0.32; 3.90 ± 0.39 with
free ones, of which the labels alone take 2.52 ± 0.29. From random images under their own labels
(`--start random`) it takes 1.22 ± 0.31, and `es` from the same ones 0.37 ± 0.12. Knowing a defence
gained nothing for sure where it was tried: of victims that train by mixup, `--against mixup` takes
1.47 ± 0.30 (smooth) and 2.38 ± 1.01 (standard), the attack that knows nothing of it 1.67 ± 0.47 and
1.38 ± 0.63.

On `cifar10-small` (100 of 4,000 images, ten pairs), by the options that the track sets: with fixed
labels 1.76 ± 0.39 (smooth) and 0.88 ± 0.84 (standard), by 24 metasteps along cross-entropy from
`--start pixels`; with free ones 3.30 ± 0.44 and 2.34 ± 0.85, 1.6 and 2.0 times what concentrated flips
take, by 100 automobiles labelled trucks (`--start pair`), of which 8 metasteps raise held-out error at
the temperature 0.5 from 0.602 to 0.610; what that start alone takes was not measured on victims. With
fixed labels and `--start-seeds 3 --goal error --temperature 0.5`: 2.01 ± 0.57 and 0.45 ± 0.72 by 24
metasteps, not told from cross-entropy, and by 40 (`--steps 40`) 2.13 ± 0.56 and 1.08 ± 0.94, 2.9 times
what `gradcancel` takes of smooth victims; by 32 through half of the training that are judged on all
clean images, 1.87 ± 0.36 and 0.64 ± 1.01. From `--start influence`, of which none of 24 metasteps came
to more, 0.97 ± 0.45 and 1.57 ± 0.73; from there, by 48 smaller ones through half of the training
(`--differentiated 0.5 --update normalized --step-size 0.03`, and as its row says), 1.86 ± 0.41 and 0.63
± 0.82. See `results/README.md`, and `docs/choices.md` for what each choice is worth on `digits`.

On `availability` (4,000 images within 8/255, ten pairs) 10.32 ± 1.10 (smooth) and 4.88 ± 0.70
(standard), by the options that the track sets, where `error_min` takes 24.91 ± 1.75 and 25.10 ± 1.50.
Eight metasteps raise held-out loss from 1.42 to 1.85, and four more lower it to 1.79; in a run of 24 it
was 1.87 after eight and 1.71 after sixteen (not on record). Smaller steps or more seeds in each may go
further: of three million pixels, most of what one metagradient says holds for its own seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray, Shaped

from poisonbench.arrays import highest
from poisonbench.ascent import Ascent, Poisoned
from poisonbench.attacks import Task, require_at_least_one
from poisonbench.errors import UserError
from poisonbench.flips import Flips, placed, require_flips
from poisonbench.journal import Journal
from poisonbench.metagradient import Later, NonFiniteError, OtherRunError, metagradient
from poisonbench.metagradient.planning import in_bytes
from poisonbench.problem import Problem
from poisonbench.threat import Box, Budget, PoisonSet
from poisonbench.victim.evaluation import train_some
from poisonbench.victim.training import Poison, TrainingRun, TrainState

Step = Callable[[TrainState, Array, Array], TrainState]
SURE = 0.9
"""Share of a soft label that is its start's: enough to begin near it, and little enough to leave it."""
FLOOR = 1e-9
"""Share of a soft label that none falls below."""


@dataclass(frozen=True)
class MGD(Ascent):
    """The attack of the metagradient paper; the other options are those of `Ascent`.

    Attributes:
        runs_per_step: metagradients averaged in a metastep, each of a run of its own randomness. A kill
            costs those of its metastep that are done.
        differentiated: share of the run, from its end back, that the gradient goes through. What earlier
            steps owe to the poison is left out; at 1 nothing is, and the gradient is exact.
        full_from: share of the metasteps after which nothing is left out, whatever
            `differentiated` says.
        label_step: of the first metastep, for labels that climb with the pixels, as distributions over
            classes of which the start's have nine tenths: a step of the logarithms of shares, before
            these are normalised. Of ten classes another's has 4.4 to gain on the start's to become the
            label. 0 leaves labels as they start.
        memory: for the states of a training that a metagradient may keep, such as `32GiB`: the more, the
            fewer of its steps are made again. The gradient is the same. A metagradient that is killed
            goes on from a file of at most as much, written at most once a minute.
        start: `influence` takes the wrong pairs of image and label that metagradients rank highest;
            `pixels` the images that they rank highest, with their own labels, and so does `influence`
            where labels are fixed within a radius; `flips` the best concentrated flips, or copies of
            them where labels are fixed; `pair` takes their two classes, and of the first the images that
            metagradients rank highest under the label of the other; `random` draws images.
        start_seeds: runs whose metagradients rank images; for `flips` and `pair`, victims trained for
            each pair of classes.
    """

    runs_per_step: int = 1
    differentiated: float = 1.0
    full_from: float = 1.0
    label_step: float = 0.0
    memory: str = "2GiB"
    start: Literal["influence", "pixels", "pair", "flips", "random"] = "influence"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "runs_per_step")
        if not 0 < self.differentiated <= 1:
            raise UserError("--differentiated must lie in (0, 1]")
        if not 0 <= self.full_from <= 1:
            raise UserError("--full-from must lie in [0, 1]")
        if not (0 <= self.label_step < math.inf):
            raise UserError("--label-step must be a number, and not negative")
        in_bytes(self.memory)  # so that what is no size is refused at once

    def started(self, task: Task, key: PRNGKeyArray, journal: Journal) -> PoisonSet:
        """The images that the start names, and the labels that they get."""
        if self.start in ("influence", "pixels"):
            return self._most_influential(task, jax.random.split(key, self.start_seeds), journal)
        if self.start == "pair":
            search, rank = jax.random.split(key)
            pair = self._pair(task, search, journal)
            return self._most_influential(task, jax.random.split(rank, self.start_seeds), journal, pair)
        return super().started(task, key, journal)

    def require(self, budget: Budget) -> None:
        """Flips as a start need a budget that can have them; labels that climb, one that frees them."""
        super().require(budget)
        if self.label_step and budget.labels == "fixed":
            raise UserError("mgd --label-step moves labels, which are fixed: give --labels free as well")
        if self.start == "pair":
            require_flips(budget, "mgd --start pair")

    def _pair(self, task: Task, key: PRNGKeyArray, journal: Journal) -> tuple[int, int]:
        """The classes of the best concentrated flips: whose images, and whose label."""
        kept = journal.restore() or {}
        if "pair" not in kept:
            flips = self.concentrated(task, key, journal)
            kept = {"pair": np.array([task.train_labels[flips.indices[0]], flips.labels[0]])}
            journal.save(kept)
        source, target = kept["pair"].tolist()
        return source, target

    def gradient(
        self,
        problem: Problem,
        z: Poisoned,
        key: PRNGKeyArray,
        done: int,
        journal: Journal,
    ) -> tuple[float, Poisoned]:
        """The mean loss of `runs_per_step` runs, and their mean metagradient."""
        value, gradient = 0.0, jax.tree.map(jnp.zeros_like, z)
        share = 1.0 if done >= self.full_from * self.steps else self.differentiated
        for i, one_key in enumerate(jax.random.split(key, self.runs_per_step)):
            run, state = problem.start(one_key[None])
            first = run.num_steps - max(1, round(share * run.num_steps))
            if first:
                state = train_some(run, state, z, jnp.int32(0), jnp.int32(first))
            later = Later(run, jnp.int32(first))
            when, place = f"at metastep {done}", journal.aside(f"run{i}")
            one_value, one_gradient = self._metagradient(
                problem, later, state, run.num_steps - first, z, when, place
            )
            value += float(one_value) / self.runs_per_step
            gradient = jax.tree.map(lambda a, b: a + b / self.runs_per_step, gradient, one_gradient)
        if isinstance(gradient, Poison) and isinstance(z, Poison):
            mean = (z.targets * gradient.targets).sum(-1, keepdims=True)
            gradient = Poison(gradient.pixels, gradient.targets - mean)
        return value, gradient

    def relaxed(self, task: Task, start: PoisonSet) -> Poisoned:
        """The pixels; and where labels climb too, those of the start at a share of `SURE`."""
        pixels = super().relaxed(task, start)
        if not self.label_step:
            return pixels
        assert isinstance(pixels, jax.Array)
        others = (1 - SURE) / (task.num_classes - 1)
        chosen = jax.nn.one_hot(start.labels, task.num_classes)
        return Poison(pixels, jnp.where(chosen == 1, SURE, others))

    def moved(self, problem: Problem, z: Poisoned, updates: Poisoned) -> Poisoned:
        """Pixels by addition and projection, shares of classes by multiplication."""
        if not (isinstance(z, Poison) and isinstance(updates, Poison)):
            return super().moved(problem, z, updates)
        pixels = jnp.clip(z.pixels + updates.pixels, problem.low, problem.high)
        # An update is a multiple of the step of the pixels, by Adam as by sign.
        by = updates.targets * (self.label_step / self.step_size)
        # A share that is rounded to nothing could never come back.
        return Poison(pixels, jax.nn.softmax(jnp.log(jnp.maximum(z.targets, FLOOR)) + by))

    def _most_influential(
        self,
        task: Task,
        keys: Key[Array, " seeds"],
        journal: Journal,
        pair: tuple[int, int] | None = None,
    ) -> PoisonSet:
        """The images through which the victim is hurt most, and the labels that do it.

        Args:
            task: what the attacker knows.
            keys: of the runs that rank.
            journal: shows progress, and keeps what was ranked.
            pair: the class whose images alone may be taken, and the label that they get; None for all.
        """
        labels, rows = task.train_labels, np.arange(len(task.train_labels))
        everything = replace(task, budget=task.budget.model_copy(update={"mode": "replace"}))
        problem = self.problem(everything, rows, labels)
        pixels = jnp.asarray(task.train_images, jnp.float32) / 255
        bounded = task.budget.labels == "fixed" and not isinstance(task.budget.pixels, Box)
        if bounded or self.start == "pixels":
            influence = jnp.abs(self._summed(problem, pixels, None, keys, journal)).sum((1, 2, 3))
            most = highest(np.asarray(influence), task.num_poison)
            return task.poison(most, task.train_images[most], labels[most])
        targets = jax.nn.one_hot(labels, task.num_classes)
        gains = np.array(self._summed(problem, targets, pixels, keys, journal))
        own = gains[rows, labels]
        gains[rows, labels] = -np.inf
        if pair is not None:
            elsewhere = (labels[:, None] != pair[0]) | (np.arange(task.num_classes) != pair[1])
            gains[elsewhere] = -np.inf
        room = np.bincount(labels, minlength=task.num_classes)
        if task.budget.labels == "free":
            room = np.full(task.num_classes, np.inf)
            if task.budget.mode == "replace":
                # A flip takes the right pair of image and label away; a copy elsewhere leaves it.
                gains -= own[:, None]
        flips = _best_pairs(gains, task.num_poison, room)
        return placed(task, flips, worth=-own)

    def _summed(
        self,
        problem: Problem,
        z: Array,
        pixels: Array | None,
        keys: Key[Array, " seeds"],
        journal: Journal,
    ) -> Array:
        """The metagradient summed over runs: by pixels or, where `pixels` are given, by targets."""
        kept = {"summed": np.zeros(z.shape, np.float32), "runs": np.array(0)} | (journal.restore() or {})
        total, done = jnp.asarray(kept["summed"]), int(kept["runs"])
        with journal.progress("ranking images", len(keys), done) as bar:
            for i in range(done, len(keys)):
                run, state = problem.start(keys[i][None])
                step = run if pixels is None else _ByTargets(run, pixels)
                total += self._metagradient(
                    problem, step, state, run.num_steps, z, "in the ranking", journal.aside("ranking")
                )[1]
                journal.save(kept | {"summed": np.asarray(total), "runs": np.array(i + 1)})
                bar.advance()
        return total

    def _metagradient(
        self,
        problem: Problem,
        step: Step,
        state: TrainState,
        num_steps: int,
        z: Array | Poison,
        when: str,
        place: Path | None,
    ) -> tuple[Array, Any]:
        """The loss after these steps, and its gradient by `z`; it goes on from `place` if it was killed.

        Raises:
            UserError: either is not finite; it says `when`.
        """
        how: dict[str, Any] = {"memory": self.memory, "checkpoint": place}
        value: Array
        gradient: Any
        try:
            try:
                value, gradient = metagradient(step, problem.loss, state, num_steps, z, **how)
            except OtherRunError:  # of another machine, or left by a run that lost its own checkpoint
                assert place is not None
                place.unlink()
                value, gradient = metagradient(step, problem.loss, state, num_steps, z, **how)
        except NonFiniteError as error:
            raise UserError(f"{when}, {error}; as by --set smooth.learning_rate=…") from None
        return value, gradient


def _best_pairs(
    gains: Float[np.ndarray, "n classes"], count: int, room: Shaped[np.ndarray, " classes"]
) -> Flips:
    """The pairs of image and class that gain most, an image once, a class as often as it has room.

    Raises:
        UserError: there is not so much room for wrong pairs; right ones gain minus infinity.
    """
    room, chosen = np.array(room, float), dict[int, int]()
    for pair in np.argsort(-gains, axis=None, kind="stable"):
        image, label = divmod(int(pair), gains.shape[1])
        if len(chosen) == count or np.isneginf(gains[image, label]):
            break
        if image not in chosen and room[label] > 0:
            chosen[image] = label
            room[label] -= 1
    if len(chosen) < count:
        raise UserError(
            f"there is room for {len(chosen)} wrong pairs of image and label, and not for {count}: lower"
            " --fraction, or give --labels free"
        )
    images = sorted(chosen)
    return Flips(np.array(images, np.int64), np.array([chosen[i] for i in images], np.int32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _ByTargets:
    """A training run as a function of its target distributions; its pixels are constants."""

    run: TrainingRun
    pixels: Array

    def __call__(self, state: TrainState, t: Array, targets: Array) -> TrainState:
        return self.run(state, t, Poison(self.pixels, targets))
