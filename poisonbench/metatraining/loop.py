"""Meta-training: a learned optimizer's weights, descended on by estimated gradients of its meta-loss.

A finite bank of tasks is drawn once, so that each is compiled once; a few more of the same distribution
are held out. Every meta-step takes some tasks of the bank, for each of them a run's length and several
runs (initial parameters and batches), and from each run one estimate of the gradient (`estimators.py`).
Each run's gradient is divided by its norm, where asked, so that no task's scale decides; the mean over
runs is clipped elementwise and given to Adam, whose rate falls by a cosine to a tenth. Lengths are
log-uniform between the least and a longest that grows geometrically over the first half, or as told.

At intervals the weights are judged on the held-out tasks by final loss, always on the same runs; the
best so judged are what is saved. Everything drawn is a function of the seed and the meta-step, so that a
meta-training that was killed ends with the bytes of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from poisonbench import _checkpoint
from poisonbench.errors import UserError
from poisonbench.metagradient.states import from_raw, to_raw
from poisonbench.metatraining import estimators
from poisonbench.metatraining.unroll import Objective, Problem, PyTree, Weights
from poisonbench.progress import Progress

CHECKPOINT_EVERY = 30.0
ELSEWHERE = "choose another --out, or start over with --fresh"
START, STEPS, JUDGED = range(3)
"""What the root key is for: streams of it that never meet."""
COLUMNS = ("loss", "longest", "inner_steps", "broken", "norm")
"""What is kept of each meta-step: mean meta-loss, longest run allowed, inner steps taken (forward and
differentiated alike), differences or gradients that were not finite, norm of the mean gradient."""


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on what.

    Attributes:
        steps: meta-steps.
        min_unroll, max_unroll: inner steps of a run.
        ramp: share of the meta-steps over which the longest run grows; 0 for none, where weights have
            learnt short runs before.
        tasks_per_step: tasks of the bank in a meta-step.
        runs: runs of each of them.
        learning_rate: of Adam, at the beginning.
        clip: largest entry of the mean gradient.
        normalise: divide each run's gradient by its norm, or leave it.
        seed: of everything drawn.
        validate_every: meta-steps.
        validation_runs: runs of each held-out task and length.
    """

    steps: int
    min_unroll: int = 30
    max_unroll: int = 300
    ramp: float = 0.5
    tasks_per_step: int = 2
    runs: int = 4
    learning_rate: float = 1e-3
    clip: float = 3.0
    normalise: Literal["unit", "none"] = "unit"
    seed: int = 0
    validate_every: int = 50
    validation_runs: int = 2

    def __post_init__(self) -> None:
        counts = {
            "--steps": self.steps, "--min-unroll": self.min_unroll, "--runs": self.runs,
            "--tasks-per-step": self.tasks_per_step, "--validate-every": self.validate_every,
            "--validation-runs": self.validation_runs,
        }  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"{name} must be at least 1, not {count}")
        if self.max_unroll < self.min_unroll:
            raise UserError(
                f"--max-unroll {self.max_unroll} is less than --min-unroll {self.min_unroll}"
            )
        if not 0 <= self.ramp <= 1:
            raise UserError(f"--ramp is a share of the meta-steps between 0 and 1, not {self.ramp:g}")
        for name, rate in {"--meta-learning-rate": self.learning_rate, "--clip": self.clip}.items():
            if not 0 < rate < math.inf:
                raise UserError(f"{name} must be positive, not {rate:g}")

    def longest(self, step: int) -> int:
        """The longest run allowed at a meta-step."""
        growing = self.ramp * self.steps
        share = min(1.0, step / growing) if growing else 1.0
        return round(self.min_unroll * (self.max_unroll / self.min_unroll) ** share)

    def length(self, step: int, uniform: float) -> int:
        """A run's length, by a number uniform in [0, 1); in whole tens from 10 on."""
        longest = self.longest(step)
        drawn = self.min_unroll * ((longest + 1) / self.min_unroll) ** uniform
        drawn = min(int(drawn), longest)
        return max(self.min_unroll, drawn // 10 * 10 if drawn >= 10 else drawn)


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        weights: the best by validation.
        last: those of the last meta-step.
        steps: `[steps, len(COLUMNS)]`, float64.
        validation: `[validations, 2]`: meta-steps done, and the score.
        seconds: taken, all sittings together.
    """

    weights: Weights
    last: Weights
    steps: np.ndarray
    validation: np.ndarray
    seconds: float


class Trainer:
    """One meta-training.

    Args:
        optimizer: whose weights are learnt.
        estimator: of their gradient.
        objective: `mean` or `final` loss of a run; PES and windows always take the mean.
        bank: tasks with their data.
        held_out: tasks to validate on, with their data.
        schedule: lengths, rates, seed.
        weights: to start from; None for the optimizer's own.
    """

    def __init__(
        self,
        optimizer: Any,
        estimator: Any,
        objective: Objective,
        bank: Sequence[tuple[Any, Any]],
        held_out: Sequence[tuple[Any, Any]],
        schedule: Schedule,
        weights: Weights | None = None,
    ) -> None:
        self.schedule = schedule
        self._estimator = estimator
        self._problems = [Problem(optimizer, task, objective, data) for task, data in bank]
        self._held_out = list(held_out)
        self._optimizer = optimizer
        self._root = jax.random.key(schedule.seed)
        start = jax.random.fold_in(self._root, START)
        self.start = optimizer.init(start) if weights is None else jax.tree.map(jnp.asarray, weights)
        rate = optax.cosine_decay_schedule(schedule.learning_rate, schedule.steps, 0.1)
        self._adam = optax.adam(rate)

    def train(self, checkpoint: Path, identity: str) -> Trained:
        """Meta-train, going on from a checkpoint of the same identity.

        Raises:
            UserError: the checkpoint is another's, or cannot be written.
        """
        state, done, seconds = self._opened(checkpoint, identity)
        began, saved = time.monotonic(), time.monotonic()
        every, total = self.schedule.validate_every, self.schedule.steps
        with Progress("meta-training", total, done) as bar:
            if done == 0:
                state = self._judged(state, 0)
            for step in range(done, total):
                state = self._stepped(state, step)
                if (step + 1) % every == 0 or step + 1 == total:
                    state = self._judged(state, step + 1)
                now = time.monotonic()
                if now - saved >= CHECKPOINT_EVERY or step + 1 == total:
                    self._save(checkpoint, identity, state, step + 1, seconds + now - began)
                    saved = time.monotonic()
                bar.advance(note=_note(state))
        seconds += time.monotonic() - began
        return Trained(
            state["best"],
            state["weights"],
            np.array(state["steps"]),
            np.array(state["validation"]),
            seconds,
        )

    def score(self, optimizer: Any, weights: Weights) -> np.ndarray:
        """Normalised final losses on the held-out tasks, `[tasks, lengths]`, means over runs."""
        key = jax.random.fold_in(self._root, JUDGED)
        keys = jax.random.split(key, self.schedule.validation_runs)
        return np.array(
            [
                [
                    float(_final(Problem(optimizer, task, "final", data), weights, jnp.int32(n), keys))
                    for n in self.judged_lengths
                ]
                for task, data in self._held_out
            ]
        )

    @property
    def judged_lengths(self) -> tuple[int, ...]:
        """Lengths of the runs that weights are judged by: the least and the longest."""
        return tuple(sorted({self.schedule.min_unroll, self.schedule.max_unroll}))

    def _stepped(self, state: dict[str, Any], step: int) -> dict[str, Any]:
        """One meta-step."""
        schedule, estimator = self.schedule, self._estimator
        key = jax.random.fold_in(jax.random.fold_in(self._root, STEPS), step)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        count = min(schedule.tasks_per_step, len(self._problems))
        chosen = rng.choice(len(self._problems), count, replace=False)
        carries, gradients, losses, broken, taken = list(state["carries"]), [], [], [], 0
        for i in (int(i) for i in chosen):
            length = schedule.length(step, float(rng.uniform()))
            keys = jax.random.split(jax.random.fold_in(key, i), schedule.runs)
            found = estimators.estimates(
                estimator, self._problems[i], state["weights"], length, keys, carries[i]
            )
            carries[i] = found.carry
            gradients.append(_mean(found.gradient, schedule.normalise == "unit"))
            losses.append(found.loss.mean())
            broken.append(found.broken.sum())
            cost = estimator.cost(length)
            taken += schedule.runs * (cost.forward + cost.differentiated)
        weights, adam, norm = self._descended(state["weights"], state["adam"], gradients)
        row = [float(np.mean(losses)), schedule.longest(step), taken, int(sum(broken)), float(norm)]
        return {
            **state, "weights": weights, "adam": adam, "carries": carries,
            "steps": [*state["steps"], row],
        }  # fmt: skip

    def _descended(
        self, weights: Weights, adam: PyTree, gradients: list[PyTree]
    ) -> tuple[Weights, PyTree, Any]:
        mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
        clipped = jax.tree.map(lambda g: jnp.clip(g, -self.schedule.clip, self.schedule.clip), mean)
        updates, adam = self._adam.update(clipped, adam, weights)
        return optax.apply_updates(weights, updates), adam, optax.tree.norm(mean)

    def _judged(self, state: dict[str, Any], done: int) -> dict[str, Any]:
        score = float(self.score(self._optimizer, state["weights"]).mean())
        best = min((s for _, s in state["validation"]), default=math.inf)
        found = {**state, "validation": [*state["validation"], [done, score]]}
        return {**found, "best": state["weights"]} if score < best else found

    def _first(self) -> dict[str, Any]:
        keys = [
            jax.random.fold_in(jax.random.fold_in(self._root, START), i) for i in range(1, 1 + self._n)
        ]
        carries = [
            estimators.begin(
                self._estimator, problem, self.start, jax.random.split(key, self.schedule.runs)
            )
            for problem, key in zip(self._problems, keys, strict=True)
        ]
        return {
            "weights": self.start, "best": self.start, "adam": self._adam.init(self.start),
            "carries": carries, "steps": [], "validation": [],
        }  # fmt: skip

    @property
    def _n(self) -> int:
        return len(self._problems)

    def _opened(self, path: Path, identity: str) -> tuple[dict[str, Any], int, float]:
        state, stored = self._first(), _checkpoint.read(path)
        if stored is None:
            return state, 0, 0.0
        arrays, header = stored
        if header["identity"] != identity:
            raise UserError(f"{path.parent} holds another meta-training: {ELSEWHERE}")
        held = {name: state[name] for name in HELD}
        raw = [arrays[f"{i:05}"] for i in range(len(arrays))]
        return (
            {**from_raw(raw, held), "steps": header["steps"], "validation": header["validation"]},
            int(header["done"]),
            float(header["seconds"]),
        )

    def _save(self, path: Path, identity: str, state: dict[str, Any], done: int, seconds: float) -> None:
        raw = to_raw({name: state[name] for name in HELD})
        header = {
            "identity": identity, "done": done, "seconds": seconds,
            "steps": state["steps"], "validation": state["validation"],
        }  # fmt: skip
        _checkpoint.write(path, {f"{i:05}": x for i, x in enumerate(raw)}, header)


HELD = ("weights", "best", "adam", "carries")
"""What of a meta-training's state is arrays."""


@jax.jit
def _final(problem: Problem, weights: Weights, num_steps: Any, keys: Any) -> Any:
    return jax.vmap(lambda key: problem.loss(weights, num_steps, key))(keys).mean()


def _mean(gradients: PyTree, unit: bool) -> PyTree:
    """Mean over the leading axis, of gradients divided by their norms where asked."""
    return _unit_mean(gradients) if unit else jax.tree.map(lambda g: g.mean(0), gradients)


@jax.jit
def _unit_mean(gradients: PyTree) -> PyTree:
    # By the largest entry first: squares of what long runs give do not fit float32.
    largest = jax.vmap(lambda g: optax.tree.norm(g, ord=jnp.inf))(gradients)
    root = jnp.sqrt(jnp.where(largest > 0, largest, 1))  # twice, for the reciprocal of all may not fit
    divided = jax.vmap(lambda tree, by: jax.tree.map(lambda g: g / by / by, tree))(gradients, root)
    norms = jax.vmap(optax.tree.norm)(divided)
    scale = 1 / jnp.where(norms > 0, norms, 1)
    return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1) / len(g), divided)


def _note(state: dict[str, Any]) -> str:
    recent = np.mean([row[0] for row in state["steps"][-20:]])
    return f"loss {recent:.3f}, held-out {state['validation'][-1][1]:.3f}"
