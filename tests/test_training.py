"""A training is a pure function of (recipe, data, key), and of the poison.

Claims of the docstrings of `poisonbench.victim.training` tested here, and of what trains and scores in
`poisonbench.victim.evaluation`:

- the same key gives the same victim, byte for byte, and another key another one;
- every epoch has an order of its own, without repeats;
- victims trained together are those trained alone;
- a row of `z` stands in for its image exactly: training on the poisoned set gives the same bytes;
- so does a row of `Poison` for its image and its label, and one-hot targets are labels;
- the metagradient through a whole victim, with flips and shifts, agrees with finite differences in
  float64, for pixels and targets; rows that no step used get exactly zero, all others do not;
- the metagradient through max pooling is finite;
- over 200 steps in float32 all schedules agree to 1e-4, with plain autodiff too;
- what the attack trains scores the same as what the harness trains, and it does learn;
- augmentation gives the same images for the same key, of the same shape, each a mirrored or shifted
  one, and differentiates as the linear map that it is; every step of a run draws its own, and nothing
  else in the step draws from the same keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradcheck
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from sklearn.datasets import load_digits

from poisonbench.defenses import Composed, Defense
from poisonbench.metagradient import metagradient
from poisonbench.victim.evaluation import ValidationLoss, train, train_and_score
from poisonbench.victim.recipe import STANDARD, Recipe
from poisonbench.victim.training import (
    Poison,
    TrainingRun,
    TrainingSet,
    TrainState,
    _update,
    augment,
    logits,
)

PyTree = Any
RECIPE = Recipe(
    width=2, final_scale=0.5, epochs=10, batch_size=20, learning_rate=0.3, flip=True, crop_padding=1
)
NUM_IMAGES = 210
POISONED = np.array([3, 77, 150, 209])


@dataclass(frozen=True)
class Digits:
    """Some handwritten digits to train on, and others to score on; 8×8, uint8."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def clean(self) -> TrainingSet:
        return TrainingSet.clean(self.images, self.labels, 10)


@pytest.fixture(scope="module")
def digits() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    labels, train, test = labels.astype(np.int32), slice(NUM_IMAGES), slice(500, 700)
    return Digits(images[train], labels[train], images[test], labels[test])


def keys(*seeds: int) -> Array:
    return jax.vmap(jax.random.key)(jnp.array(seeds))


def trained(data: TrainingSet, seeds: Array, z: Array) -> TrainState:
    run, state = TrainingRun.start(RECIPE, data, seeds)
    return train(run, state, z)


@jax.jit
def step(run: TrainingRun, state: TrainState, t: Array, z: Array | Poison) -> TrainState:
    return run(state, t, z)


def assert_same_bytes(found: PyTree, expected: PyTree) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# ---------------------------------------------------------------- keys


def test_same_key_same_bytes(digits: Digits) -> None:
    data, z = digits.clean(), jnp.zeros((len(POISONED), 8, 8, 1))
    first, second, swapped = (trained(data, keys(*seeds), z) for seeds in [(5, 6), (5, 6), (6, 5)])
    assert_same_bytes(second, first)
    assert_same_bytes(jax.tree.map(lambda x: x[::-1], swapped), first)
    kernels = first.params["stem"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_every_epoch_has_an_order_without_repeats(digits: Digits) -> None:
    run, _ = TrainingRun.start(RECIPE, digits.clean(), keys(5, 6))
    per_epoch = RECIPE.steps_per_epoch(NUM_IMAGES)
    assert run.order.shape == (2, run.num_steps, RECIPE.batch_size)
    assert run.num_steps == RECIPE.num_steps(NUM_IMAGES) == RECIPE.epochs * per_epoch
    epochs = np.asarray(run.order).reshape(2 * RECIPE.epochs, per_epoch * RECIPE.batch_size)
    for order in epochs:
        assert len(set(order)) == len(order)
        assert 0 <= order.min() <= order.max() < NUM_IMAGES
    assert len({tuple(order) for order in epochs}) == len(epochs)


def test_together_or_alone(digits: Digits) -> None:
    data, z = digits.clean(), jnp.zeros((len(POISONED), 8, 8, 1))
    together, alone = trained(data, keys(5, 6), z).params, trained(data, keys(6), z).params
    other, same = (jax.tree.map(lambda x, i=i: x[i], together) for i in (0, 1))
    alone = jax.tree.map(lambda x: x[0], alone)
    # Compiled differently, they round differently, and a hundred steps enlarge that.
    assert gradcheck.relative_error(same, alone) < 1e-3
    assert gradcheck.relative_error(other, alone) > 0.3


# ---------------------------------------------------------------- poison


def test_z_stands_in_for_its_images(digits: Digits) -> None:
    random = np.random.default_rng(0)
    poison = random.integers(0, 256, (len(POISONED), 8, 8, 1), np.uint8)
    labels = (digits.labels[POISONED] + 1) % 10
    z = jnp.asarray(poison, jnp.float32) / 255

    never_read = digits.images.copy()
    never_read[POISONED] = random.integers(0, 256, poison.shape, np.uint8)
    with_room = TrainingSet.clean(never_read, digits.labels, 10).with_poison(POISONED, labels)

    images, all_labels = digits.images.copy(), digits.labels.copy()
    images[POISONED], all_labels[POISONED] = poison, labels
    applied = TrainingSet.clean(images, all_labels, 10)

    found = trained(with_room, keys(5, 6), z)
    assert_same_bytes(found, trained(applied, keys(5, 6), z))
    clean = trained(digits.clean(), keys(5, 6), z)
    assert gradcheck.relative_error(found.params, clean.params) > 1e-3


@pytest.mark.slow
def test_added_poison_is_a_longer_set(digits: Digits) -> None:
    poison = np.random.default_rng(0).integers(0, 256, (len(POISONED), 8, 8, 1), np.uint8)
    labels = (digits.labels[POISONED] + 1) % 10
    with_room = digits.clean().with_poison(POISONED, labels, add=True)
    longer = TrainingSet.clean(
        np.concatenate([digits.images, poison]), np.concatenate([digits.labels, labels]), 10
    )
    found = trained(with_room, keys(5, 6), jnp.asarray(poison, jnp.float32) / 255)
    assert_same_bytes(found, trained(longer, keys(5, 6), jnp.zeros((0, 8, 8, 1))))


def test_one_hot_targets_are_labels(digits: Digits) -> None:
    run, state = TrainingRun.start(RECIPE, digits.clean(), keys(5, 6))
    rows = np.asarray(run.order[0, 0, :4])
    labels = (digits.labels[rows] + 1) % 10
    pixels = jax.random.uniform(jax.random.key(0), (len(rows), 8, 8, 1))
    labelled = replace(run, data=digits.clean().with_poison(rows, labels))
    unlabelled = replace(run, data=digits.clean().with_poison(rows, digits.labels[rows]))
    expected = step(labelled, state, 0, pixels)
    found = step(unlabelled, state, 0, Poison(pixels, jax.nn.one_hot(labels, 10)))
    assert gradcheck.relative_error(found.params, expected.params) < 1e-6
    assert gradcheck.relative_error(step(unlabelled, state, 0, pixels).params, expected.params) > 1e-4


def test_every_step_augments_anew(digits: Digits) -> None:
    run, state = TrainingRun.start(RECIPE, digits.clean(), keys(5, 6))
    always_the_same = replace(run, order=jnp.broadcast_to(run.order[:, :1], run.order.shape))
    z = jnp.zeros((len(POISONED), 8, 8, 1))
    first, again, later = (step(always_the_same, state, t, z).params for t in (0, 0, 1))
    assert_same_bytes(again, first)
    assert gradcheck.relative_error(later, first) > 1e-4


@pytest.mark.usefixtures("x64")
def test_metagradient_through_a_victim(digits: Digits) -> None:
    steps = 3
    with jax.enable_x64(False):  # the same start as elsewhere, compiled once
        run, state = TrainingRun.start(RECIPE, digits.clean(), keys(5))
    order = np.asarray(run.order)[0]
    used = order[:steps, 0]
    unused = np.setdiff1d(order, order[:steps])[:3]
    rows = np.concatenate([used, unused])
    images, labels = digits.images, digits.labels
    run = replace(run, data=digits.clean().with_poison(rows, labels[rows]))
    loss = ValidationLoss(RECIPE, 10, "cross_entropy", jnp.asarray(images), jnp.asarray(labels))
    state = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(float), state)
    z = Poison(jnp.asarray(images[rows], float) / 255, jax.nn.one_hot(labels[rows], 10, dtype=float))

    gradient = metagradient(run, loss, state, steps, z)[1]
    for part in (gradient.pixels, gradient.targets):
        assert not np.any(part[steps:])
        assert np.all(np.any(part[:steps].reshape(steps, -1), axis=1))
    gradcheck.assert_gradient(lambda z: metagradient(run, loss, state, steps, z)[0], z, gradient)


@pytest.mark.slow
def test_metagradient_through_max_pooling_is_finite(digits: Digits) -> None:
    # With `x.max` in place of a choice between two, the metagradient of this run was NaN.
    recipe = STANDARD.replace(width=16, epochs=2, batch_size=100, learning_rate=0.1)
    data = digits.clean().with_poison(POISONED, digits.labels[POISONED])
    run, state = TrainingRun.start(recipe, data, keys(1))
    images, labels = jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels)
    loss = ValidationLoss(recipe, 10, "cross_entropy", images, labels)
    z = jnp.asarray(digits.images[POISONED], jnp.float32) / 255
    _, gradient = metagradient(run, loss, state, run.num_steps, z)
    assert float(jnp.abs(gradient).max()) > 0


@pytest.mark.slow
def test_schedules_agree_on_a_long_run_in_float32(digits: Digits) -> None:
    recipe = RECIPE.replace(width=4, epochs=20, learning_rate=0.1)
    data = digits.clean().with_poison(POISONED, digits.labels[POISONED])
    run, state = TrainingRun.start(recipe, data, keys(1))
    assert run.num_steps == 200
    images, labels = jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels)
    loss = ValidationLoss(recipe, 10, "cross_entropy", images, labels)
    z = jnp.asarray(digits.images[POISONED], jnp.float32) / 255
    schedules: list[dict[str, Any]] = [
        {"schedule": "store_all"}, {"schedule": "tree"}, {"schedule": "binomial", "max_states": 5},
        {"max_states": 20, "offload": "host"},
    ]  # fmt: skip
    first, *others = (metagradient(run, loss, state, 200, z, **how)[1] for how in schedules)

    def unrolled(z: Array) -> Array:
        one = jax.checkpoint(lambda state, t: (run(state, t, z), None))
        return loss(jax.lax.scan(one, state, jnp.arange(200))[0])

    for gradient in (*others, jax.jit(jax.grad(unrolled))(z)):
        assert gradcheck.relative_error(gradient, first) <= 1e-4


# ---------------------------------------------------------------- scores


@jax.jit
def said(state: TrainState, images: Array) -> Array:
    pixels = images.astype(jnp.float32) / 255
    return jax.vmap(lambda state: logits(RECIPE, 10, state, pixels))(state)


def test_victims_learn_and_the_harness_sees_what_the_attack_sees(digits: Digits) -> None:
    scores = train_and_score(RECIPE, digits.clean(), keys(5, 6), digits.test_images, digits.test_labels)
    assert scores.shape == (2, RECIPE.epochs)
    assert scores.dtype == np.float64
    assert scores[:, -1].min() > 40  # guessing gives 10
    assert scores[:, -1].min() > scores[:, 0].max()

    state = trained(digits.clean(), keys(5, 6), jnp.zeros((len(POISONED), 8, 8, 1)))
    right = np.asarray(said(state, jnp.asarray(digits.test_images)).argmax(-1)) == digits.test_labels
    # Two compilations round differently, so an image or two may fall on either side.
    np.testing.assert_allclose(scores[:, -1], 100 * right.mean(1), atol=1)


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize(("flip", "pad"), [(False, 0), (True, 0), (False, 2), (True, 1)])
def test_augmented_images_are_mirrored_or_shifted(flip: bool, pad: int) -> None:
    recipe = Recipe(flip=flip, crop_padding=pad, input_mean=0.25)
    image = np.random.default_rng(0).random((5, 6, 3), np.float32)
    images = jnp.asarray(np.stack([image] * 300))
    found = augment(recipe, images, jax.random.key(0))
    assert found.shape == images.shape
    assert_same_bytes(augment(recipe, images, jax.random.key(0)), found)
    if flip or pad:
        assert not np.array_equal(augment(recipe, images, jax.random.key(1)), found)

    padded = [
        np.pad(mirrored, ((pad, pad), (pad, pad), (0, 0)), constant_values=0.25)
        for mirrored in ([image, image[:, ::-1]] if flip else [image])
    ]
    possible = {
        p[i : i + 5, j : j + 6].tobytes() for p in padded for i, j in np.ndindex(*[2 * pad + 1] * 2)
    }
    assert {x.tobytes() for x in np.asarray(found)} == possible


@pytest.mark.slow
def test_augmentation_and_a_defence_draw_from_keys_of_their_own(
    monkeypatch: pytest.MonkeyPatch, digits: Digits
) -> None:
    """What a step draws with is folded from one key, and `split` would give some of the same."""
    seen: list[bytes] = []

    class Drawing(Defense):
        parts = 2

        def augment(self, images: Array, targets: Array, key: Array, loss: Any) -> tuple[Array, Array]:
            seen.append(raw(key))
            return images, targets

        def aggregate(self, gradients: Any, key: Array) -> Any:
            seen.append(raw(key))
            return jax.tree.map(lambda x: x.mean(0), gradients)

    def raw(key: Array) -> bytes:
        return np.asarray(jax.random.key_data(key)).tobytes()

    def watched(draw: Any) -> Any:
        def drawn(key: Array, *arguments: Any, **options: Any) -> Any:
            seen.append(raw(key))
            return draw(key, *arguments, **options)

        return drawn

    monkeypatch.setattr(jax.random, "bernoulli", watched(jax.random.bernoulli))
    monkeypatch.setattr(jax.random, "randint", watched(jax.random.randint))
    data, key = TrainingSet.clean(digits.images, digits.labels, 10), jax.random.key(5)
    run, state = TrainingRun.start(RECIPE, data, keys(0), Composed((Drawing(),)))
    images = jnp.asarray(digits.images[:20], jnp.float32) / 255
    seen.clear()
    alone, targets = jax.tree.map(lambda x: x[0], state), jax.nn.one_hot(digits.labels[:20], 10)
    _update(run, alone, augment(RECIPE, images, key), targets, None, key)
    assert len(seen) == 4  # mirrors, shifts, the defence's augmentation and its aggregation
    assert len(set(seen)) == 4


def test_augmentation_differentiates_as_a_linear_map() -> None:
    recipe, key = Recipe(flip=True, crop_padding=1), jax.random.key(0)
    x, v, w = jax.random.normal(jax.random.key(1), (3, 8, 5, 6, 2))
    change = (w * (augment(recipe, x + v, key) - augment(recipe, x, key))).sum()
    gradient = jax.grad(lambda x: (w * augment(recipe, x, key)).sum())(x)
    np.testing.assert_allclose((gradient * v).sum(), change, rtol=1e-4)
