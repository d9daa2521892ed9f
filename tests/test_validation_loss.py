"""The validation loss is what its goal says, of few images and of many.

Claims of the docstring of `poisonbench.victim.evaluation.ValidationLoss` tested here:

- each goal is what it is said to be, and the margin pulls as much wherever it stands;
- the error of cold logits is the share of wrong answers, and cross-entropy divides them as well;
- the derivative of the loss of many images is that of its parts, and keeps hardly more than one part's;
- nor is it made image by image: in memory it takes hardly more than that of one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from sklearn.datasets import load_digits

from poisonbench.victim import evaluation
from poisonbench.victim.evaluation import ValidationLoss
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import TrainingRun, TrainingSet, TrainState, logits

PyTree = Any
RECIPE = Recipe(width=2, batch_size=20)
BUNCH = load_digits()
IMAGES = np.uint8(BUNCH.images * 15)[..., None]
LABELS = np.int32(BUNCH.target)


def untrained() -> TrainState:
    """One victim before its first step."""
    data = TrainingSet.clean(IMAGES[:100], LABELS[:100], 10)
    return TrainingRun.start(RECIPE, data, jax.random.split(jax.random.key(0), 1))[1]


def test_a_loss_is_what_its_goal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = jnp.array([[[2.0, 5.0, 1.0], [3.0, 0.0, -1.0], [0.5, 0.5, 0.0]]])  # of one victim
    monkeypatch.setattr(ValidationLoss, "_logits", lambda _, state: state.params)

    def loss(goal: evaluation.Goal, temperature: float = 1.0) -> Callable[[Array], Array]:
        images, labels = jnp.zeros((3, 1, 1, 1)), jnp.array([0, 0, 0])
        of = ValidationLoss(RECIPE, 3, goal, images, labels, temperature)
        return lambda said: of(TrainState(said, None, None))

    shares = np.exp(said[0]) / np.exp(said[0]).sum(-1, keepdims=True)
    assert float(loss("margin")(said)) == pytest.approx((3 - 3 + 0) / 3)
    assert float(loss("margin", 0.5)(said.at[..., 1].add(1))) == pytest.approx(2 * (4 - 2 + 1) / 3)
    assert float(loss("error")(said)) == pytest.approx(1 - float(shares[:, 0].mean()))
    assert float(loss("cross_entropy")(said)) == pytest.approx(-float(np.log(shares[:, 0]).mean()))
    ((surely_wrong, surely_right, _),) = jax.grad(loss("margin"))(said)
    np.testing.assert_allclose(surely_wrong, np.array([-1, 1, 0]) / 3, rtol=1e-6)
    np.testing.assert_allclose(surely_right, np.array([-1, 1, 0]) / 3, rtol=1e-6)


@pytest.mark.slow
def test_the_colder_the_logits_the_closer_the_error_to_the_share_of_wrong_answers() -> None:
    state = untrained()
    images, labels = jnp.asarray(IMAGES[:300]), jnp.asarray(LABELS[:300])
    said = logits(RECIPE, 10, jax.tree.map(lambda x: x[0], state), images / 255)
    wrong = float((said.argmax(-1) != labels).mean())

    def loss(goal: evaluation.Goal, temperature: float) -> float:
        return float(ValidationLoss(RECIPE, 10, goal, images, labels, temperature)(state))

    far, near = (abs(loss("error", temperature) - wrong) for temperature in (1.0, 1e-5))
    assert near < 0.01
    cold = ValidationLoss(RECIPE, 10, "error", images, labels, 1e-5)
    assert float(cold.wrong(state)) == pytest.approx(wrong)
    assert near < far / 3
    expected = -jnp.take_along_axis(jax.nn.log_softmax(said / 0.5), labels[:, None], axis=1).mean()
    np.testing.assert_allclose(loss("cross_entropy", 0.5), expected, rtol=1e-5)


@pytest.mark.slow
def test_the_loss_of_many_images_is_differentiated_within_the_memory_of_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = untrained()

    def loss(images: np.ndarray, labels: np.ndarray) -> ValidationLoss:
        return ValidationLoss(RECIPE, 10, "cross_entropy", jnp.asarray(images), jnp.asarray(labels))

    def kept(count: int) -> int:
        many = loss(np.resize(IMAGES, (count, 8, 8, 1)), np.resize(LABELS, count))

        def pulled_back(params: PyTree) -> PyTree:
            return jax.vjp(lambda p: many(replace(state, params=p)), params)[1]

        found = jax.eval_shape(pulled_back, state.params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found))

    assert kept(500) > 2**20  # one chunk
    assert kept(8000) - kept(4000) < kept(500) / 2
    assert kept(4000) < kept(1000)

    monkeypatch.setattr(evaluation, "KEPT", 500)
    images, labels = np.resize(IMAGES, (1000, 8, 8, 1)), np.resize(LABELS, 1000)

    def gradient(part: slice) -> PyTree:
        of = loss(images[part], labels[part])
        return jax.jit(jax.grad(lambda p: of(replace(state, params=p))))(state.params)

    whole, *halves = map(gradient, (slice(None), slice(0, 500), slice(500, None)))
    for found, one, other in zip(*map(jax.tree.leaves, (whole, *halves)), strict=True):
        np.testing.assert_allclose(found, (one + other) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_derivative_of_the_loss_is_made_in_the_memory_of_one_part() -> None:
    wide = Recipe(width=16, batch_size=20)
    data = TrainingSet.clean(IMAGES[:100], LABELS[:100], 10)
    _, state = TrainingRun.start(wide, data, jax.random.split(jax.random.key(0), 1))

    def temporary(count: int) -> int:
        images, labels = jnp.asarray(IMAGES[:count]), jnp.asarray(LABELS[:count])
        of = ValidationLoss(wide, 10, "cross_entropy", images, labels)
        derivative = jax.jit(jax.grad(lambda params: of(replace(state, params=params))))
        return derivative.lower(state.params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(700) < 1.5 * temporary(500)
