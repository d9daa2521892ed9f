"""Labels that climb: from their start's, along the metagradient by classes, to the likeliest.

Claims of `attacks.mgd` and `poisonbench.ascent` tested here, on made-up gradients unless said:

- a soft label starts with nine tenths on the label of the start, stays a distribution, and goes where
  the gradient says, by a step of the logarithms of its shares; none of them is lost for ever;
- what is checked and handed in is the likeliest class, of the best check, and how many labels have
  changed is logged;
- a gradient by classes is the mean over runs, less its mean under the distribution;
- killed, it goes on and ends the same;
- pixels climb as without soft labels;
- the gradient is the derivative of the loss by pixels and by shares of classes (a real run);
- a check by other labels is that of a problem with those labels (real victims);
- labels that are fixed do not climb, which is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poisonbench.attacks import Task, mgd
from poisonbench.conformance import tiny
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.problem import Problem
from poisonbench.threat import Budget
from poisonbench.tracks import DIGITS
from poisonbench.victim.training import Poison

KEY = jax.random.key(3)
RECIPE = DIGITS.recipes["smooth"].replace(network="cnn", width=2, batch_size=10, epochs=2)
TASK = Task.of(tiny(), Budget(fraction=0.1, labels="free"), RECIPE)
WANTED = 1
"""The class that made-up gradients favour."""


@dataclass(frozen=True)
class Wanting(mgd.MGD):
    """Gains by the class `WANTED`, and by brightness."""

    start: Any = "random"

    def gradient(self, problem: Problem, z: Any, key: Any, done: int, journal: Journal) -> Any:
        pixels = z.pixels if isinstance(z, Poison) else z
        up = jnp.ones_like(pixels)
        if not isinstance(z, Poison):
            return 0.0, up
        assert_distributions(z.targets)
        favoured = jax.nn.one_hot(jnp.full(len(pixels), WANTED), TASK.num_classes)
        return 0.0, Poison(up, favoured)


def assert_distributions(targets: Any) -> None:
    assert np.asarray(targets).min() >= 0
    np.testing.assert_allclose(np.asarray(targets).sum(-1), 1, rtol=1e-5)


class Judge:
    """Held-out losses by a list; and the images and labels that they were asked of."""

    def __init__(self, values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.values, self.images, self.labels = values, [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(Problem, "judged", self)

    def __call__(self, images: Any, keys: Any, labels: Any = None) -> tuple[float, float]:
        value = self.values[len(self.images)]
        self.images.append(images)
        self.labels.append(labels)
        return value, 0.5


def wanting(**options: Any) -> Wanting:
    return Wanting(steps=8, check_every=4, label_step=1.5, **options)


@pytest.mark.parametrize("best", range(3))
def test_labels_go_where_they_gain(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge([float(i == best) for i in range(3)], monkeypatch)
    journal = Journal()
    poison = wanting().craft(TASK, KEY, journal)
    own = TASK.train_labels[poison.indices]
    np.testing.assert_array_equal(judge.labels[0], own)
    assert (own != WANTED).any()
    assert (judge.labels[2] == WANTED).all()
    np.testing.assert_array_equal(poison.labels, judge.labels[best])
    np.testing.assert_array_equal(poison.images, judge.images[best])
    assert poison.labels.dtype == np.int32
    logged = [row["changed_labels"] for row in journal.rows if "changed_labels" in row]
    assert logged == [float((labels != own).mean()) for labels in judge.labels]


def test_pixels_climb_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    soft = Judge([0.0, 0.0, 1.0], monkeypatch)
    wanting().craft(TASK, KEY, Journal())
    hard = Judge([0.0, 0.0, 1.0], monkeypatch)
    Wanting(steps=8, check_every=4).craft(TASK, KEY, Journal())
    np.testing.assert_array_equal(soft.images, hard.images)
    assert hard.labels == [None] * 3


def test_a_soft_label_starts_near_its_own() -> None:
    start = Wanting(start="random").started(TASK, KEY, Journal())
    z = wanting().relaxed(TASK, start)
    assert isinstance(z, Poison)
    assert_distributions(z.targets)
    np.testing.assert_allclose(
        np.asarray(z.targets)[np.arange(len(start.labels)), start.labels], 0.9, rtol=1e-6
    )


def test_gains_are_over_what_a_distribution_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real attack, whose metagradients are made up: the mean of its runs, less that under z."""
    made = [7.0 + k * jnp.arange(TASK.num_classes) for k in (1.0, 2.0, 6.0)]
    left = list(made)

    def stated(step: Any, objective: Any, state: Any, num_steps: int, z: Poison, **how: Any) -> Any:
        row = left.pop(0)
        return jnp.float32(0), Poison(jnp.zeros_like(z.pixels), jnp.zeros_like(z.targets) + row[None])

    monkeypatch.setattr(mgd, "metagradient", stated)
    attack = mgd.MGD(start="random", label_step=0.5, runs_per_step=3)
    start = attack.started(TASK, KEY, Journal())
    problem = Problem.of(TASK, start.indices, start.labels, "cross_entropy")
    z = attack.relaxed(TASK, start)
    assert isinstance(z, Poison)
    _, gradient = attack.gradient(problem, z, KEY, 0, Journal())
    assert isinstance(gradient, Poison)
    mean = np.asarray(sum(made)) / 3
    shares = np.asarray(z.targets)
    np.testing.assert_allclose(gradient.targets, mean - (shares @ mean)[:, None], rtol=1e-5, atol=1e-5)


def test_a_label_step_is_one_of_logarithms() -> None:
    """Whatever the step of the pixels is; and no share is lost for ever."""
    attack = mgd.MGD(start="random", label_step=1.5, step_size=0.03)
    start = attack.started(TASK, KEY, Journal())
    problem = Problem.of(TASK, start.indices, start.labels, "cross_entropy")
    z = attack.relaxed(TASK, start)
    assert isinstance(z, Poison)
    up = 0.03 * (2 * jax.nn.one_hot(jnp.full(len(start.labels), WANTED), TASK.num_classes) - 1)
    updates = Poison(jnp.zeros_like(z.pixels), up)
    moved = attack.moved(problem, z, updates)
    assert isinstance(moved, Poison)
    assert_distributions(moved.targets)
    ratio = jnp.log(moved.targets / z.targets)
    np.testing.assert_allclose(ratio[:, WANTED] - ratio[:, WANTED - 1], 3.0, rtol=1e-4)
    for _ in range(40):
        moved = attack.moved(problem, moved, updates)
    back = Poison(updates.pixels, -2 * up)
    for _ in range(8):
        moved = attack.moved(problem, moved, back)
    assert isinstance(moved, Poison)
    assert (np.asarray(moved.targets).argmax(-1) != WANTED).all()


def test_killed_it_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Judge([0.0, 1.0, 2.0], monkeypatch)
    whole = wanting().craft(TASK, KEY, Journal())
    Judge([0.0], monkeypatch)  # the second check ends in an error
    with pytest.raises(IndexError):
        wanting().craft(TASK, KEY, Journal(tmp_path))
    Judge([1.0, 2.0], monkeypatch)
    assert wanting().craft(TASK, KEY, Journal(tmp_path)).hash == whole.hash


def test_what_is_best_is_kept_with_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it that of the start or a later one, over a kill and checks that are worse."""
    for values, before_kill in (([9.0, 1.0], 0), ([0.0, 9.0], 1)):
        folder = tmp_path / str(before_kill)
        judge = Judge(values, monkeypatch)
        with pytest.raises(IndexError):
            wanting().craft(TASK, KEY, Journal(folder))
        best = judge.labels[before_kill]
        Judge([2.0], monkeypatch)
        poison = wanting().craft(TASK, KEY, Journal(folder))
        np.testing.assert_array_equal(poison.labels, best)
    assert (best == WANTED).all()
    assert (TASK.train_labels[poison.indices] != WANTED).any()


@pytest.mark.slow
def test_its_gradient_is_the_derivative() -> None:
    attack = mgd.MGD(start="random", label_step=0.5)
    start = attack.started(TASK, KEY, Journal())
    problem = Problem.of(TASK, start.indices, start.labels, "cross_entropy")
    z = attack.relaxed(TASK, start)
    assert isinstance(z, Poison)
    _, found = attack.gradient(problem, z, KEY, 0, Journal())
    run, state = problem.start(jax.random.split(KEY, 1))

    def loss(z: Poison) -> Any:
        last = state
        for t in range(run.num_steps):
            last = run(last, jnp.int32(t), z)
        return problem.loss(last)

    naive = jax.jit(jax.grad(loss))(z)
    by_class = naive.targets - (z.targets * naive.targets).sum(-1, keepdims=True)
    assert isinstance(found, Poison)
    for ours, theirs in ((found.pixels, naive.pixels), (found.targets, by_class)):
        assert float(jnp.linalg.norm(theirs)) > 1e-4
        assert float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) < 1e-3


@pytest.mark.slow
def test_a_check_by_other_labels_is_that_of_a_problem_with_them() -> None:
    start = mgd.MGD(start="random").started(TASK, KEY, Journal())
    others = ((start.labels + 1) % TASK.num_classes).astype(np.int32)
    keys = jax.random.split(KEY, 2)
    first, second = (
        Problem.of(TASK, start.indices, labels, "cross_entropy") for labels in (start.labels, others)
    )
    asked = first.judged(start.images, keys, others)
    assert asked == pytest.approx(second.judged(start.images, keys), rel=1e-6)
    assert asked[0] != pytest.approx(first.judged(start.images, keys)[0], rel=1e-5)


def test_fixed_labels_do_not_climb() -> None:
    with pytest.raises(UserError, match="--labels free"):
        mgd.MGD(label_step=0.5).require(Budget(fraction=0.1))
    mgd.MGD(label_step=0.5).require(TASK.budget)
    with pytest.raises(UserError, match="--label-step"):
        mgd.MGD(label_step=-1.0)
