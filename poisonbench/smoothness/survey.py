"""One recipe, measured: clean accuracy, both smoothness definitions, agreement, one-step gains.

What happens, with S seeds, D directions and E step sizes (formulas in `definitions.py`):

1. Train S victims on clean data: losses, accuracies and parameters at the start of every line.
2. For each direction, train the S victims at `h` and at `2h` along it. Each direction has images and
   signs of its own, as many images as the budget allows. Definitions 1 and 2, S × D values each.
3. Rank the images by the metagradients of S further seeds, as `mgd --start pixels` does: by the
   magnitude of the summed metagradient, summed over an image's pixels. Seeds of their own, since
   images chosen for how well some seeds agree on them say nothing of how well these seeds agree.
4. For each of the S seeds, the metagradient on those images: norms and cosines.
5. For each seed and step size, one sign step along that seed's metagradient, clipped to the budget,
   and the S victims trained on the result: S gains on the step's own seed, S(S - 1) on others.

Cost: S (1 + 2D + S·E) trainings and 2S metagradients of about four trainings each; without 3 to 5,
S (1 + 2D) trainings. A landscape of P × P points is P² trainings. Every piece is kept as it is
finished (`pieces.py`).

The loss is the cross-entropy on validation images; the test split is not among the arguments. Keys
come from a root of their own, so none of these victims is one that a poison is judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from poisonbench import harness
from poisonbench.arrays import CHUNK, highest
from poisonbench.attacks import Task
from poisonbench.metagradient import NonFiniteError, metagradient
from poisonbench.smoothness import definitions
from poisonbench.smoothness.pieces import Pieces
from poisonbench.smoothness.probe import Probe
from poisonbench.smoothness.records import (
    Gain,
    Landscape,
    Number,
    Steps,
    Survey,
    array,
    numbers,
)
from poisonbench.stored import Frozen, Percent
from poisonbench.victim.evaluation import ValidationLoss, train
from poisonbench.victim.training import TrainingRun, TrainingSet, TrainState, logits

Advance = Callable[[int, str], None]
VICTIMS, RANKING, IMAGES, SIGNS, SQUARE = range(5)
"""What a key is for: streams of the root key that never meet."""


class Clean(Frozen):
    """Victims of clean data, `[seeds]`."""

    loss: list[Number]
    accuracy: list[Percent]


class Line(Frozen):
    """Victims at `h` and `2h` along a direction, `[seeds]`."""

    loss_h: list[Number]
    loss_2h: list[Number]
    smoothness: list[Number]


class Ranking(Frozen):
    """The most influential images, and how many seeds' metagradients were finite."""

    images: list[int]
    ranked_by: int


class Metagradient(Frozen):
    """One seed's metagradient on the chosen images, flattened; None where it is not finite."""

    pixels: list[float] | None


class Step(Frozen):
    """A sign step: what its gradient promised, and every seed's loss after it."""

    predicted: Number
    loss: list[Number]


class Row(Frozen):
    """A row of a landscape."""

    loss: list[Number]


@dataclass(frozen=True)
class Trained:
    """Victims of one training set, `[seeds, …]`."""

    loss: np.ndarray
    accuracy: np.ndarray
    parameters: np.ndarray


class Surveyor:
    """Measures one recipe on one task.

    What is drawn (keys, images, signs) depends on `probe.seed` alone, so all recipes are asked the
    same questions.
    """

    def __init__(self, task: Task, probe: Probe, pieces: Pieces, advance: Advance) -> None:
        self.task = task
        self.probe = probe
        self._pieces = pieces
        self._advance = advance
        self._root = harness.smoothness_key(probe.seed)
        self._keys = jax.random.split(self._stream(VICTIMS), probe.seeds)
        self._set = TrainingSet.clean(task.train_images, task.train_labels, task.num_classes)
        truth = jnp.asarray(task.val_labels)
        images = jnp.asarray(task.val_images)
        self._loss = ValidationLoss(task.recipe, task.num_classes, "cross_entropy", images, truth)

    def survey(self, label: str, *, steps: bool) -> Survey:
        """Everything about the recipe, under this label; agreement and gains only with `steps`."""
        self._pieces.lap()
        clean = self._get(Clean, {}, self._measured_clean, self.probe.seeds, f"{label}: clean")
        at_0, rows = array(clean.loss), []
        for d in range(self.probe.directions):
            line = self._get(
                Line, {"h": self.probe.h, "direction": d}, lambda d=d: self._line(d),
                2 * self.probe.seeds, f"{label}: direction {d + 1}",
            )  # fmt: skip
            bend = definitions.definition1(at_0, array(line.loss_h), array(line.loss_2h), self.probe.h)
            rows.append((bend, array(line.smoothness)))
        return Survey(
            label=label,
            recipe=self.task.recipe.as_dict(),
            accuracy=clean.accuracy,
            loss=clean.loss,
            definition1=numbers(np.stack([bend for bend, _ in rows], axis=1)),
            definition2=numbers(np.stack([smooth for _, smooth in rows], axis=1)),
            steps=self._steps(label, at_0) if steps else None,
            seconds=round(self._pieces.lap(), 1),
        )

    def landscape(self, label: str) -> Landscape:
        """The first seed's loss over the square that two directions span on one set of images."""
        self._pieces.lap()
        probe, indices = self.probe, self._images(SQUARE)
        z = self._pixels(indices)
        first, second = (self._signs((SQUARE, i), z, 2 * probe.extent) for i in (1, 2))
        at = np.linspace(0, probe.extent, probe.points)

        def row(a: float) -> Row:
            points = [(z + a * first + b * second).astype(np.float32) for b in at]
            losses = [self._train(indices, x, 1).loss[0] for x in points]
            return Row(loss=numbers(np.array(losses)))

        about = {"points": probe.points, "extent": probe.extent}
        rows = [
            self._get(
                Row, {**about, "row": i}, lambda a=a: row(a), probe.points, f"{label}: landscape {i + 1}"
            )
            for i, a in enumerate(at)
        ]
        return Landscape(
            label=label,
            at=[float(a) for a in at],
            loss=[r.loss for r in rows],
            seconds=round(self._pieces.lap(), 1),
        )

    def _get(self, kind: Any, what: dict[str, Any], measure: Any, trainings: int, note: str) -> Any:
        # The seeds are in every identity: keys are split among them all at once.
        probe = {"seed": self.probe.seed, "seeds": self.probe.seeds}
        piece = self._pieces.get(kind, {"recipe": self.task.recipe.as_dict(), **probe, **what}, measure)
        self._advance(trainings, note)
        return piece

    def _measured_clean(self) -> Clean:
        clean = self._clean
        return Clean(loss=numbers(clean.loss), accuracy=[round(float(a), 6) for a in clean.accuracy])

    @cached_property
    def _clean(self) -> Trained:
        # In the program of the perturbed ones, which has slots for the images of a direction: their
        # pixels are the clean ones here, so any direction's slots give the same victims.
        indices = self._images(IMAGES)
        return self._train(indices, self._pixels(indices))

    def _line(self, direction: int) -> Line:
        indices = self._images(IMAGES, direction)
        z = self._pixels(indices)
        signs = self._signs((SIGNS, direction), z, 2 * self.probe.h)
        _, at_h, at_2h = definitions.line(z, signs, self.probe.h)
        near, far = self._train(indices, at_h), self._train(indices, at_2h)
        smoothness = [
            definitions.definition2(*thetas)
            for thetas in zip(self._clean.parameters, near.parameters, far.parameters, strict=True)
        ]
        return Line(
            loss_h=numbers(near.loss),
            loss_2h=numbers(far.loss),
            smoothness=numbers(np.array(smoothness)),
        )

    def _steps(self, label: str, at_0: Float[np.ndarray, " seeds"]) -> Steps:
        probe = self.probe
        images, ranked_by = [int(i) for i in self._images(IMAGES)], 0
        if probe.images == "influence":
            ranking = self._get(Ranking, {}, self._ranking, 4 * probe.seeds, f"{label}: ranking images")
            images, ranked_by = ranking.images, ranking.ranked_by
        indices = np.array(images, np.int64)
        gradients = np.full((probe.seeds, self._pixels(indices).size), np.nan, np.float32)
        for s in range(probe.seeds):
            found = self._get(
                Metagradient, {"images": images, "of": s}, lambda s=s: self._metagradient(s, indices),
                4, f"{label}: metagradient {s + 1}",
            )  # fmt: skip
            if found.pixels is not None:
                gradients[s] = found.pixels
        gains = []
        for size in probe.step_sizes:
            taken = [
                self._get(
                    Step, {"images": images, "of": s, "size": size},
                    lambda s=s, size=size: self._step(indices, gradients[s], size),
                    probe.seeds, f"{label}: steps of {size:g}",
                )
                for s in range(probe.seeds)
            ]  # fmt: skip
            realised = np.array([array(step.loss) for step in taken]) - at_0[None, :]
            predicted = [step.predicted for step in taken]
            gains.append(Gain(step_size=size, predicted=predicted, realised=numbers(realised)))
        return Steps(
            images=images,
            ranked_by=ranked_by,
            norms=numbers(np.linalg.norm(gradients.astype(np.float64), axis=1)),
            cosines=numbers(definitions.cosines(gradients)),
            gains=gains,
        )

    def _ranking(self) -> Ranking:
        keys = jax.random.split(self._stream(RANKING), self.probe.seeds)
        found = [g for i in range(len(keys)) if (g := self._gradient(keys, i)) is not None]
        if not found:  # nothing to rank by: the images of the first direction will do
            return Ranking(images=[int(i) for i in self._images(IMAGES)], ranked_by=0)
        influence = np.abs(np.sum(found, axis=0)).sum((1, 2, 3))
        most = highest(influence, self.task.num_poison)
        return Ranking(images=most.tolist(), ranked_by=len(found))

    def _metagradient(self, seed: int, indices: Int[np.ndarray, " p"]) -> Metagradient:
        gradient = self._gradient(self._keys, seed)
        pixels = None if gradient is None else [float(x) for x in gradient[indices].ravel()]
        return Metagradient(pixels=pixels)

    def _gradient(
        self, keys: Key[Array, " seeds"], seed: int
    ) -> Float[np.ndarray, "n height width channels"] | None:
        """One seed's metagradient on every training image, None where it is not finite."""
        # On all of them, so that one compiled program serves the ranking and every choice of images.
        everything = np.arange(len(self.task.train_labels))
        data = self._set.with_poison(everything, self.task.train_labels)
        run, state = TrainingRun.start(self.task.recipe, data, keys[seed : seed + 1])
        z = jnp.asarray(self._pixels(everything))
        try:
            _, gradient = metagradient(run, self._loss, state, run.num_steps, z)
        except NonFiniteError:
            return None
        found = np.asarray(gradient)
        return found if np.isfinite(found).all() else None

    def _step(
        self, indices: Int[np.ndarray, " p"], gradient: Float[np.ndarray, " pixels"], size: float
    ) -> Step:
        """Sign step of this size along one seed's metagradient, tried on every seed."""
        if not np.isfinite(gradient).all():
            return Step(predicted=None, loss=[None] * self.probe.seeds)
        z = self._pixels(indices)
        low, high = (bound.astype(np.float32) / 255 for bound in self.task.bounds(indices))
        after = definitions.sign_step(z, gradient.reshape(z.shape), size, low, high)
        predicted = definitions.predicted_gain(gradient.reshape(z.shape), z, after)
        loss = self._train(indices, after).loss
        return Step(predicted=predicted if np.isfinite(predicted) else None, loss=numbers(loss))

    def _train(
        self, indices: Int[np.ndarray, " p"], z: Float[np.ndarray, "p ..."], stop: int | None = None
    ) -> Trained:
        """A victim for each seed, or for the first few, with these pixels in place of these images."""
        data = self._set.with_poison(indices, self.task.train_labels[indices])
        parts: list[tuple[np.ndarray, ...]] = []
        stop = len(self._keys) if stop is None else stop
        for i in range(0, stop, harness.GROUP):
            group = self._keys[i : min(stop, i + harness.GROUP)]
            run, state = TrainingRun.start(self.task.recipe, data, group)
            state = train(run, state, jnp.asarray(z))
            loss, accuracy = _judge(self._loss, state)
            leaves = [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(state.params)]
            parts.append((np.asarray(loss), np.asarray(accuracy), np.concatenate(leaves, axis=1)))
        return Trained(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _pixels(self, indices: Int[np.ndarray, " p"]) -> Float[np.ndarray, "p ..."]:
        # As a training run divides its own: NumPy's quotients are not all the same to the last bit.
        return np.asarray(jnp.asarray(self.task.train_images[indices], jnp.float32) / 255)

    def _images(self, *stream: int) -> Int[np.ndarray, " p"]:
        """A budget's worth of training images, drawn at random, in order."""
        number_of = len(self.task.train_labels)
        key = self._stream(*stream, *((0,) if len(stream) == 1 else ()))
        rows = jax.random.choice(key, number_of, (self.task.num_poison,), replace=False)
        return np.sort(np.asarray(rows, np.int64))

    def _signs(self, stream: tuple[int, ...], z: Float[np.ndarray, "p ..."], reach: float) -> np.ndarray:
        coins = jax.random.bernoulli(self._stream(*stream, 1), shape=z.shape)
        return definitions.inward(np.asarray(coins), z, reach)

    def _stream(self, *path: int) -> PRNGKeyArray:
        key = self._root
        for part in path:
            key = jax.random.fold_in(key, part)
        return key


def trainings(probe: Probe, *, steps: bool) -> int:
    """What a survey costs, a metagradient counted as four trainings."""
    count = probe.seeds * (1 + 2 * probe.directions)
    if steps:
        ranking = probe.seeds if probe.images == "influence" else 0
        count += 4 * (probe.seeds + ranking) + probe.seeds**2 * len(probe.step_sizes)
    return count


@jax.jit
def _judge(loss: ValidationLoss, state: TrainState) -> tuple[Array, Array]:
    """Loss and accuracy in percent of each victim on the images of `loss`."""

    def accuracy(state: TrainState) -> Array:
        def said(image: Array) -> Array:
            pixels = image[None].astype(jnp.float32) / 255
            return logits(loss.recipe, loss.num_classes, state, pixels)[0].argmax()

        right = jax.lax.map(said, loss.images, batch_size=CHUNK) == loss.labels
        return 100 * right.mean()

    return loss.per_seed(state), jax.vmap(accuracy)(state)
