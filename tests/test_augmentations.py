"""Augmented tasks compute what their task computes, in other coordinates.

Claims of `poisonbench.metatraining.augmentations` tested here, with `task` an inner task:

- in other units the loss at the start is the task's, and after a step of gradient descent whose rates
  are divided by the scales' squares it still is; scales are one, one per tensor or one per entry,
  within their range and spread over it;
- `value_and_grad` of every augmentation but the normalised one is the gradient of its `loss`;
- a subspace starts at one initialisation of the task, moves along independent directions of the stated
  size, and moves nowhere else;
- a smaller batch is the head of the task's, never empty;
- normalised gradients have length 1 and the task's direction, a zero gradient stays zero, and the loss
  and its own derivative are untouched;
- augmentations stack, are equal and hash alike when their numbers are, and can be static arguments;
- `augment` follows its key, and each augmentation comes about as often as it says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from poisonbench.metatraining import tasks
from poisonbench.metatraining.augmentations import (
    NormalisedGradient,
    Reparameterised,
    SmallerBatch,
    Subspace,
    augment,
)
from poisonbench.metatraining.tasks import Batch, InnerTask

KEY = jax.random.key
TASK = InnerTask("mlp", "digits", 6, 8, 1, 16, "tanh")


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return TASK.batch(tasks.load_data(TASK), KEY(3))


@pytest.mark.parametrize("scope", ["global", "tensor", "parameter"])
def test_other_units_are_the_same_function(scope: Any, batch: Batch) -> None:
    varied, params = Reparameterised(TASK, scope, 1, 5), TASK.init(KEY(0))
    start = varied.init(KEY(0))
    assert not np.allclose(flat(start), flat(params))
    loss, slope = varied.value_and_grad(start, batch)
    assert float(loss) == pytest.approx(float(TASK.loss(params, batch)), rel=1e-5)
    ones = jax.tree.map(jnp.ones_like, params)
    scales = jax.tree.map(lambda one: 1 / one, Reparameterised(_Ones(TASK), scope, 1, 5).init(KEY(0)))
    after = jax.tree.map(lambda p, g, s: p - 0.3 * g / s**2, start, slope, scales)
    plain = jax.tree.map(lambda p, g: p - 0.3 * g, params, TASK.value_and_grad(params, batch)[1])
    expected = float(TASK.loss(plain, batch))
    assert float(varied.loss(after, batch)) == pytest.approx(expected, rel=1e-4)
    assert expected < 0.95 * float(loss)
    kinds = {"global": 1, "tensor": len(jax.tree.leaves(ones)), "parameter": flat(ones).size}
    assert len(np.unique(flat(scales).round(6))) == pytest.approx(kinds[scope], rel=0.02)
    assert 0.1 <= flat(scales).min() <= flat(scales).max() <= 10


class _Ones(InnerTask):
    """The same task, all of whose parameters begin at 1: its units are read off them."""

    def __init__(self, task: InnerTask) -> None:
        super().__init__(**vars(task))

    def init(self, key: Any) -> Any:
        return jax.tree.map(jnp.ones_like, super().init(key))


def test_scales_are_spread_over_their_decades() -> None:
    exponents = -np.log10(flat(Reparameterised(_Ones(TASK), "parameter", 3, 1).init(KEY(0))))
    assert np.abs(exponents).max() < 3 + 1e-5
    assert exponents.std() == pytest.approx(3 / np.sqrt(3), rel=0.1)
    other = -np.log10(flat(Reparameterised(_Ones(TASK), "parameter", 3, 2).init(KEY(0))))
    assert abs(np.corrcoef(exponents, other)[0, 1]) < 0.2


@pytest.mark.parametrize(
    "varied",
    [
        Reparameterised(TASK, "tensor", 1, 4),
        Subspace(TASK, 6, 4),
        SmallerBatch(Reparameterised(Subspace(TASK, 6, 4), "parameter", 1, 2), 0.5),
    ],
    ids=["units", "subspace", "stacked"],
)
def test_gradients_are_those_of_the_loss(varied: Any, batch: Batch) -> None:
    params = jax.tree.map(lambda x: x + 0.1, varied.init(KEY(0)))
    loss, slope = varied.value_and_grad(params, batch)
    expected, gradient = jax.value_and_grad(varied.loss)(params, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(flat(slope), flat(gradient), rtol=1e-4, atol=1e-7)
    assert np.abs(flat(slope)).max() > 1e-3


def test_a_subspace_is_one_start_and_a_few_directions(batch: Batch) -> None:
    varied = Subspace(TASK, 4, 7)
    start = varied.init(KEY(0))
    np.testing.assert_array_equal(start, varied.init(KEY(1)))
    base = flat(varied.place(start))
    assert float(varied.loss(start, batch)) == float(TASK.loss(varied.place(start), batch))
    assert any(np.array_equal(base, flat(TASK.init(k))) for k in jax.random.split(KEY(7)))
    moves = np.stack([flat(varied.place(row)) - base for row in jnp.eye(4)])
    assert np.linalg.matrix_rank(moves) == 4
    np.testing.assert_allclose(np.linalg.norm(moves, axis=1), np.sqrt(base.size / 4), rtol=0.2)
    both = flat(varied.place(jnp.array([1.0, -2.0, 0, 0]))) - base
    np.testing.assert_allclose(both, moves[0] - 2 * moves[1], atol=1e-5)
    assert not np.allclose(base, flat(Subspace(TASK, 4, 8).place(start)))


def test_a_smaller_batch_is_the_head_of_the_whole() -> None:
    data = tasks.load_data(TASK)
    whole, some = TASK.batch(data, KEY(0)), SmallerBatch(TASK, 0.3).batch(data, KEY(0))
    assert len(some.labels) == 5
    np.testing.assert_array_equal(some.images, whole.images[:5])
    np.testing.assert_array_equal(some.labels, whole.labels[:5])
    assert len(SmallerBatch(TASK, 0.01).batch(data, KEY(0)).labels) == 1


def test_normalised_gradients_have_length_one(batch: Batch) -> None:
    varied, params = NormalisedGradient(TASK), TASK.init(KEY(0))
    loss, slope = varied.value_and_grad(params, batch)
    expected, gradient = TASK.value_and_grad(params, batch)
    assert float(loss) == float(expected)
    assert np.linalg.norm(flat(slope)) == pytest.approx(1, rel=1e-5)
    assert abs(np.linalg.norm(flat(gradient)) - 1) > 0.05
    np.testing.assert_allclose(flat(slope) * np.linalg.norm(flat(gradient)), flat(gradient), rtol=1e-4)
    np.testing.assert_array_equal(flat(jax.grad(varied.loss)(params, batch)), flat(gradient))
    still = Batch(jnp.zeros_like(batch.images), batch.labels)
    _, none = NormalisedGradient(_Coder()).value_and_grad(_Coder().init(KEY(0)), still)
    np.testing.assert_array_equal(flat(none), 0)


class _Coder(InnerTask):
    """An auto-encoder, which misses nothing of zeros."""

    def __init__(self) -> None:
        super().__init__("autoencoder", "digits", 6, 8, 1, 16, "tanh")


def test_augmentations_are_static_arguments(batch: Batch) -> None:
    @partial(jax.jit, static_argnames="task")
    def loss(task: Any, params: Any) -> Any:
        return task.loss(params, batch)

    one, same = (Reparameterised(TASK, "tensor", 2, 4) for _ in range(2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != Reparameterised(TASK, "tensor", 2, 5)
    loss(one, one.init(KEY(0)))
    loss(same, same.init(KEY(0)))
    assert loss._cache_size() == 1


def test_augment_follows_its_key_and_its_chances() -> None:
    drawn = [augment(key, TASK) for key in jax.random.split(KEY(0), 2000)]
    assert drawn[:50] == [augment(key, TASK) for key in jax.random.split(KEY(0), 2000)[:50]]

    def share(kind: type) -> float:
        return float(np.mean([kind in chain(task) for task in drawn]))

    for kind, chance in (
        (Reparameterised, 5 / 7),
        (Subspace, 0.08),
        (SmallerBatch, 0.2),
        (NormalisedGradient, 0.05),
    ):
        assert share(kind) == pytest.approx(chance, abs=4 * np.sqrt(chance / 2000))
    scopes = {
        (v.scope, v.decades) for task in drawn for v in layers(task) if isinstance(v, Reparameterised)
    }
    assert len(scopes) == 9
    assert len({task.name for task in drawn}) == len(set(drawn))


def layers(task: Any) -> list[Any]:
    return [task, *layers(task.task)] if hasattr(task, "task") else [task]


def chain(task: Any) -> set[type]:
    return {type(layer) for layer in layers(task)}
