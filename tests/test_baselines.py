"""The baselines do what their papers say: `es`, `gradcancel`, `tgda` and confident flips.

Claims tested here, each with a control that fails:

- as its perturbations shrink, the estimate of `es` from one pair is the exact metagradient's
  component along the perturbation, in the same run; in a run of another seed it is not;
- `--against` takes the gradient of the defended run, which finite differences agree with, and every
  victim that such an attack trains is defended;
- `mgd` of a share of the run differentiates that share, as a naive gradient of it does;
- the most that an image can take off a classifier's gradient is Lambert's function of the paper's
  argument, and no image does better; with too few poisons for that bound, cancelling fails;
- `gradcancel` cancels more of the gradient than the images it starts from do, and what it states as
  left is what is left, summed image by image;
- GradPC's targets do worse on the training set the larger their radius, and stay within it;
- the first poison of `tgda` is the clean images, within a hundredth of the range, and a leader that
  moves leaves its follower worse off than one that stands still;
- confident flips are of the images that victims are surest of, and give them the least likely class.

The problem: 100 digits of 8×8, a ResNet-9 of width 4, eight epochs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poisonbench import attacks, conformance, flips
from poisonbench.attacks import Task, es, gradcancel, mgd, tgda
from poisonbench.data import DataSpec, load
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.metagradient import metagradient
from poisonbench.problem import Problem, clean_victim
from poisonbench.threat import Budget
from poisonbench.tracks import DIGITS
from poisonbench.trained import TrainedVictim
from poisonbench.victim.evaluation import train, train_some
from poisonbench.victim.training import TrainingRun

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def task() -> Task:
    digits = load(DataSpec(name="digits", train_size=100, val_size=200, test_size=100))
    learns = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=8, norm_momentum=0.8)
    return Task.of(digits, Budget(fraction=0.1), learns)


@pytest.mark.slow
def test_a_pair_measures_the_metagradient_along_its_perturbation(task: Task) -> None:
    indices = task.random_indices(KEY)
    problem = Problem.of(task, indices, task.train_labels[indices], "cross_entropy")
    z = jnp.asarray(task.train_images[indices], jnp.float32) / 255
    _, estimate = es.ES(pairs=1, sigma=0.003).gradient(problem, z, KEY, 0, Journal())

    noise_key, run_key = jax.random.split(KEY)
    noise = jax.random.normal(noise_key, z.shape)

    def along(key: Any) -> float:
        run, state = TrainingRun.start(problem.recipe, problem.data, key[None])
        return float(jnp.vdot(metagradient(run, problem.loss, state, run.num_steps, z)[1], noise))

    measured = float(jnp.vdot(estimate, noise) / jnp.vdot(noise, noise))
    same, other = (along(jax.random.split(key, 1)[0]) for key in (run_key, noise_key))
    assert measured == pytest.approx(same, rel=0.02)
    assert measured != pytest.approx(other, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("against", ["mixup", "adversarial"])
def test_an_adaptive_attack_goes_through_the_defence(task: Task, against: str) -> None:
    """Its gradient is that of the defended run, and of no other."""
    indices = task.random_indices(KEY)
    z = jnp.asarray(task.train_images[indices], jnp.float32) / 255

    def found(against: str, labels: np.ndarray = task.train_labels[indices]) -> Any:
        attack: Any = attacks.build("mgd", [("against", against)] if against else [])
        problem = Problem.of(task, indices, labels, "cross_entropy", attack.guard())
        return attack.gradient(problem, z, KEY, 0, Journal()), problem

    (value, gradient), problem = found(against)
    assert float(jnp.abs(gradient).max()) > 1e-6
    direction = jax.random.normal(KEY, z.shape)

    def loss(z: Any) -> float:
        run, state = problem.start(jax.random.split(KEY, 1))
        return float(problem.loss(train(run, state, z)))

    (bare, other), _ = found("")
    assert value == pytest.approx(loss(z), rel=1e-5)
    assert bare != pytest.approx(value, rel=1e-3)
    if against == "adversarial":
        return  # the signs of its steps jump, and finite differences see that
    h = 1e-3
    slope = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
    assert float(jnp.vdot(gradient, direction)) == pytest.approx(slope, rel=0.05)
    assert float(jnp.vdot(other, direction)) != pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize(
    ("name", "start"),
    [
        pytest.param("mgd", "random", marks=pytest.mark.slow),
        pytest.param("mgd", "influence", marks=pytest.mark.slow),
        pytest.param("mgd", "flips", marks=pytest.mark.slow),
        pytest.param("mgd", "pair", marks=pytest.mark.slow),
        ("es", "random"),
    ],
)
def test_every_victim_of_an_adaptive_attack_is_defended(
    name: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the start, of the gradients and of the checks."""
    guards: list[Any] = []
    real = TrainingRun.start

    def started(recipe: Any, data: Any, keys: Any, guard: Any = None) -> Any:
        guards.append(guard)
        return real(recipe, data, keys, guard)

    monkeypatch.setattr(TrainingRun, "start", started)
    cheap = {
        "against": "mixup", "start": start, "steps": "1", "start-seeds": "1", "candidates": "1",
        "check-seeds": "1",
    }  # fmt: skip
    attack: Any = attacks.build(name, list(cheap.items()))
    attack.craft(Task.of(conformance.tiny(), Budget(fraction=0.1), conformance.TINY), KEY, Journal())
    assert len(guards) >= 3
    assert all(guard == attack.guard() for guard in guards)


def test_no_attack_is_made_against_what_it_cannot_go_through(task: Task) -> None:
    with pytest.raises(UserError, match="against spectral: it acts by `filter`"):
        attacks.build("mgd", [("against", "mixup,spectral")])
    with pytest.raises(UserError, match="did you mean mixup"):
        attacks.build("es", [("against", "mixpu")])
    odd = replace(task, recipe=task.recipe.replace(batch_size=task.recipe.batch_size - 1))
    with pytest.raises(UserError, match=r"^--against dp_sgd cuts a batch .* that can be cut so$"):
        attacks.build("mgd", [("against", "dp_sgd")]).craft(odd, KEY, Journal())


@pytest.mark.slow
def test_a_share_of_the_run_is_differentiated(task: Task) -> None:
    """As if what came before had not known of the poison, and no other gradient."""
    indices = task.random_indices(KEY)
    problem = Problem.of(task, indices, task.train_labels[indices], "cross_entropy")
    z = jnp.asarray(task.train_images[indices], jnp.float32) / 255
    value, gradient = mgd.MGD(differentiated=0.25).gradient(problem, z, KEY, 0, Journal())
    whole_value, whole = mgd.MGD().gradient(problem, z, KEY, 0, Journal())
    assert value == pytest.approx(whole_value, rel=1e-5)

    run, state = TrainingRun.start(problem.recipe, problem.data, jax.random.split(KEY, 1))
    first = run.num_steps * 3 // 4

    def loss(late: Any, state: Any) -> Any:
        for t in range(first, run.num_steps):
            state = run(state, jnp.int32(t), late)
        return problem.loss(state)

    middle = train_some(run, state, z, jnp.int32(0), jnp.int32(first))
    naive = jax.jit(jax.grad(loss))(z, middle)
    assert float(jnp.linalg.norm(gradient - naive) / jnp.linalg.norm(naive)) < 1e-4
    assert float(jnp.linalg.norm(whole - naive) / jnp.linalg.norm(naive)) > 0.1
    for share in ("0", "1.5"):
        with pytest.raises(UserError, match="--differentiated"):
            attacks.build("mgd", [("differentiated", share)])


@pytest.mark.parametrize(("classes", "most"), [(2, 0.2785), (10, 1.101)])
def test_what_one_image_can_take_off(classes: int, most: float) -> None:
    assert gradcancel.most_taken_off(classes) == pytest.approx(most, rel=1e-3)
    said = 10 * np.random.default_rng(0).normal(size=(10_000, classes))
    chance = np.asarray(jax.nn.softmax(said))
    taken = said[:, 0] - (chance * said).sum(1)
    assert taken.max() <= most + 1e-6
    assert taken.max() > 0.5 * most


@pytest.fixture(scope="module")
def clean(task: Task) -> TrainedVictim:
    return clean_victim(task, KEY)


def training_loss(task: Task, clean: TrainedVictim, weights: Any) -> float:
    images = jnp.asarray(task.train_images / np.float32(255))
    ones = jnp.ones(len(images))
    return float(clean.loss(weights, images, jnp.asarray(task.train_labels), ones)) / len(images)


@pytest.mark.slow
def test_targets_do_worse_with_their_radius(task: Task, clean: TrainedVictim) -> None:
    radii = gradcancel.RADII["all"]
    targets = [gradcancel._grad_pc(clean, task, radius, KEY) for radius in radii]
    losses = [training_loss(task, clean, weights) for weights in (clean.weights, *targets)]
    assert losses == sorted(losses)
    assert losses[-1] > 1.2 * losses[0]
    for radius, target in zip(radii, targets, strict=True):
        moved = jax.tree.map(jnp.subtract, target, clean.weights)
        assert optax.tree.norm(moved) <= radius * optax.tree.norm(clean.weights) * 1.0001


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["all", "last"])
def test_cancelling_leaves_less(task: Task, layers: Any) -> None:
    attack = gradcancel.GradCancel(layers=layers, steps=60, step_size=0.1)
    clean = clean_victim(task, KEY, attack.layers)
    indices = task.random_indices(KEY)
    problem = Problem.of(task, indices, task.train_labels[indices], "cross_entropy")
    target = gradcancel._grad_pc(clean, task, gradcancel.RADII[layers][2], KEY)
    images, row = attack._cancelled(clean, target, task, problem, indices, 0.1)

    def share_left(poisoned: np.ndarray) -> float:
        """One image at a time: all clean ones that stay, and these."""
        whole = np.array(task.train_images)
        whole[indices] = poisoned
        kept = np.setdiff1d(np.arange(len(whole)), indices)

        def summed(rows: np.ndarray) -> Any:
            ones = [
                gradcancel._summed_gradient(clean, target, whole[[i]], task.train_labels[[i]])
                for i in rows
            ]
            return jax.tree.map(lambda *g: sum(g), *ones)

        everything = summed(np.arange(len(whole)))
        return float(optax.tree.norm(everything) / optax.tree.norm(summed(kept)))

    untouched = share_left(task.train_images[indices])
    # Rounding to 8 bits moves what is left a little.
    assert share_left(images) == pytest.approx(row["gradient_left"], abs=0.02)
    assert row["gradient_left"] < 0.9 * untouched


@pytest.mark.parametrize("distance", [None, 0.25])
def test_a_given_distance_is_the_only_radius(
    task: Task, distance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []
    images = task.train_images[: task.num_poison]
    monkeypatch.setattr(gradcancel, "clean_victim", lambda *_: None)
    monkeypatch.setattr(gradcancel, "_grad_pc", lambda clean, task, radius, key: tried.append(radius))
    monkeypatch.setattr(gradcancel.GradCancel, "_cancelled", lambda *_: (images, {}))
    monkeypatch.setattr(gradcancel.Problem, "harm", lambda *_: 0.0)
    gradcancel.GradCancel(distance=distance).craft(task, KEY, Journal())
    assert tried == ([0.25] if distance else list(gradcancel.RADII["all"]))
    with pytest.raises(UserError, match="--distance must be above 0"):
        gradcancel.GradCancel(distance=0.0)


@pytest.mark.slow
def test_too_few_poisons_cannot_cancel(task: Task) -> None:
    attack = gradcancel.GradCancel(layers="last", steps=200, step_size=0.1)
    clean = clean_victim(task, KEY, attack.layers)
    one = np.array([3])
    problem = Problem.of(task, one, task.train_labels[one], "cross_entropy")
    target = gradcancel._grad_pc(clean, task, 3.0, KEY)
    _, row = attack._cancelled(clean, target, task, problem, one, 0.1)
    assert row["needed"] > row["given"]
    assert row["gradient_left"] > 0.1


def played(task: Task, *, rate: float, rounds: int = 12) -> tuple[Any, float]:
    """The first poison, and the follower's held-out loss after a leader's steps."""
    attack = tgda.TGDA(rounds=rounds, leader_rate=rate, follower_steps=5, follower_rate=0.02)
    indices = task.random_indices(KEY)
    problem = Problem.of(task, indices, task.train_labels[indices], "cross_entropy")
    game = tgda._Game(
        clean_victim(task, KEY), problem.data.images, problem.data.labels, problem.data.slot,
        jnp.asarray(indices, jnp.int32), problem.low, problem.high,
        problem.loss.images, problem.loss.labels,
    )  # fmt: skip
    theta = tgda._generator(KEY, task)
    players = (theta, optax.adam(0.1).init(theta), game.victim.weights)
    first = np.asarray(game.poison(theta)) - task.train_images[indices] / np.float32(255)
    for i in range(rounds):
        players, _ = tgda._round(attack, game, players, jax.random.fold_in(KEY, i))
    return first, float(game.climbed(players[2], jnp.arange(len(game.truth))))


@pytest.mark.slow
def test_a_leader_leads(task: Task) -> None:
    (first, still), (_, up) = (played(task, rate=rate) for rate in (1e-8, 0.05))
    assert np.abs(first).max() <= 0.0101
    assert up > still + 0.001


def test_confident_flips(task: Task) -> None:
    victims = jax.random.fold_in(KEY, 0)
    found = flips.confident_flips(task, victims, seeds=2)
    said = flips._probabilities(task, jax.random.split(victims, 2), task.train_images)
    own = said[np.arange(len(said)), task.train_labels]
    others = np.setdiff1d(np.arange(len(said)), found.indices)
    assert own[found.indices].min() >= own[others].max()
    np.testing.assert_array_equal(found.labels, said[found.indices].argmin(1))
    assert (found.labels != task.train_labels[found.indices]).all()
    attack = attacks.build("label_flip", [("spread", "confident"), ("trial-seeds", "2")])
    free = Task(**{**vars(task), "budget": Budget(fraction=0.1, labels="free")})
    poison = attack.craft(free, KEY, Journal())
    np.testing.assert_array_equal(poison.indices, found.indices)
    np.testing.assert_array_equal(poison.labels, found.labels)
