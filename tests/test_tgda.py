"""The leader's derivative of `tgda` is total: that of what it climbs once the follower has answered.

Claims of `attacks.tgda.total_derivative` tested here, in float64:

- for a follower that fits a ridge regression to a leader's pixels, it is the one worked out on paper;
- for the game that the attack plays, its own generator, losses and victim, whose classifier answers
  by its exact minimum, finite differences of the leader's loss after that answer agree with it, where
  poison takes the place of images and where it is added;
- each of them finds wrong: the other sign, the gradient without the Hessian between, too few conjugate
  gradients, and weights that are no minimum.

The game: 40 digits of 8×8, four poisons, the last layer of a ResNet-9 of width 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradcheck import assert_differences_agree, relative_error
from jax.flatten_util import ravel_pytree

from poisonbench.attacks import Task, tgda
from poisonbench.data import DataSpec, load
from poisonbench.problem import Problem
from poisonbench.threat import Budget
from poisonbench.tracks import DIGITS
from poisonbench.trained import TrainedVictim
from poisonbench.victim.training import TrainingRun

KEY = jax.random.key(3)
DAMPING = 0.001


def test_a_ridge_regression_by_hand(x64: None) -> None:
    rng = np.random.default_rng(0)
    theta, clean, y, held, truth = (
        jnp.asarray(rng.normal(size=shape)) for shape in ((3, 4), (9, 4), (12,), (7, 4), (7,))
    )

    def led(theta: Any, w: Any) -> Any:
        return 0.5 * jnp.square(theta @ w - y[:3]).sum()

    def loss(theta: Any, w: Any) -> Any:
        return led(theta, w) + 0.5 * jnp.square(clean @ w - y[3:]).sum()

    hessian = theta.T @ theta + clean.T @ clean + DAMPING * jnp.eye(4)
    w = jnp.linalg.solve(hessian, jnp.concatenate([theta, clean]).T @ y)
    uphill = held.T @ (held @ w - truth)
    # f_w = θᵀ(θw - y) + …, so d(f_w · v) by θ is (θw - y) vᵀ + (θv) wᵀ.
    v = jnp.linalg.solve(hessian, uphill)
    by_hand = -(jnp.outer(theta @ w - y[:3], v) + jnp.outer(theta @ v, w))

    def found(iterations: int = 4, damping: float = DAMPING) -> Any:
        slope = jax.grad(lambda w: loss(theta, w))
        return tgda.total_derivative(slope, led, theta, w, uphill, iterations, damping)

    assert relative_error(found(), by_hand) < 1e-8
    assert relative_error(found(iterations=1), by_hand) > 1e-2
    assert relative_error(found(damping=1.0), by_hand) > 1e-2
    assert relative_error(-found(), by_hand) > 1


def _game(mode: Any) -> tuple[Any, Any]:
    """A game whose follower is a classifier on fixed features, and a leader that has begun to move."""
    digits = load(DataSpec(name="digits", train_size=40, val_size=60, test_size=20))
    recipe = DIGITS.recipes["smooth"].replace(width=2, batch_size=20, epochs=2)
    task = Task.of(digits, Budget(fraction=0.1, mode=mode), recipe)
    indices = task.random_indices(KEY)
    problem = Problem.of(task, indices, task.train_labels[indices], "cross_entropy")
    _, state = TrainingRun.start(recipe, problem.data, KEY[None])  # its features need not be learnt
    state = jax.tree.map(lambda x: x[0], state)
    victim = _double(TrainedVictim(recipe, task.num_classes, "last", state))
    game = tgda._Game(
        victim, problem.data.images, problem.data.labels, problem.data.slot,
        jnp.asarray(np.flatnonzero(np.asarray(problem.data.slot) >= 0), jnp.int32),
        *_double((problem.low, problem.high)), problem.loss.images, problem.loss.labels,
    )  # fmt: skip
    theta = _double(tgda._generator(KEY, task))
    flat, back = ravel_pytree(theta)
    return game, back(flat + 0.1 * jax.random.normal(KEY, flat.shape, flat.dtype))


def _double(tree: Any) -> Any:
    wide = jnp.float64
    return jax.tree.map(lambda x: x.astype(wide) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_the_game_that_is_played(mode: str, x64: None) -> None:
    game, theta = _game(mode)
    everything, held_out = jnp.arange(len(game.labels)), jnp.arange(len(game.truth))
    start, back = ravel_pytree(game.victim.weights)

    def answer(theta: Any) -> Any:
        """The minimum of f and half the damping times the squares, by Newton's method from zero."""
        poison = game.poison(theta)

        def loss(flat: Any) -> Any:
            return game.loss(poison, back(flat), everything) + DAMPING / 2 * flat @ flat

        def newton(_: Any, flat: Any) -> Any:
            return flat - jnp.linalg.solve(jax.hessian(loss)(flat), jax.grad(loss)(flat))

        return back(jax.lax.fori_loop(0, 8, newton, jnp.zeros_like(start)))

    @jax.jit
    def led_to(theta: Any) -> Any:
        return game.climbed(answer(theta), held_out)

    @jax.jit
    def found(weights: Any, iterations: int) -> Any:
        slope = jax.grad(game.loss, argnums=1)
        poison, uphill = game.poison(theta), jax.grad(game.climbed)(weights, held_out)
        return tgda.total_derivative(
            lambda w: slope(poison, w, everything), game.poisoned_loss, theta, weights, uphill,
            iterations, DAMPING,
        )  # fmt: skip

    best = jax.jit(answer)(theta)
    right = found(best, len(start))
    assert_differences_agree(led_to, theta, right, tolerance=1e-3)
    for wrong in (
        jax.tree.map(jnp.negative, right),
        found(best, 0),
        found(best, 1),
        found(game.victim.weights, len(start)),
    ):
        with pytest.raises(AssertionError, match="central differences"):
            assert_differences_agree(led_to, theta, wrong, tolerance=1e-2)
