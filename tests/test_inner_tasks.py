"""Inner tasks are what they are called, learnable, and drawn from keys.

Claims of `poisonbench.metatraining.tasks` and `.images` tested here:

- every family's loss falls under plain gradient descent on both sets that need no download, and its
  gradient is that of finite differences;
- parameters have the stated shapes and scales, from the key alone; a batch is drawn from the data, by
  the key, and with replacement;
- an auto-encoder that answers zeros costs about 1; a network that says nothing costs ln C;
- synthetic sets use every class, follow their seed alone, and are no white noise; digits hold no image
  of the track's test split; every set has mean 0 and variance 1;
- the normalisation has the stated values, rises with the loss, and maps NaN and infinity to the worst;
- `draw` follows its key, stays within its ranges, reaches every family, set and activation, and draws
  only tasks that `drawable` says it can; wider, deeper or unseen tasks are not drawable;
- tasks are hashable and equal when their fields are, and different tasks have different names;
- bad tasks and data sets are refused by name; CIFAR-10 is read grey or coloured, at the size asked for.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poisonbench import data
from poisonbench.errors import UserError
from poisonbench.metatraining import images, tasks
from poisonbench.metatraining.tasks import Batch, InnerTask
from poisonbench.tracks import DIGITS

KEY = jax.random.key
MLP = InnerTask("mlp", "digits", 8, 16, 1, 64)
EACH = [
    MLP,
    InnerTask("conv", "teacher:1", 6, 6, 2, 32, "gelu"),
    InnerTask("autoencoder", "teacher:2", 5, 16, 1, 32, "tanh"),
]


@pytest.mark.parametrize("task", EACH, ids=lambda task: task.name)
def test_losses_fall_under_gradient_descent(task: InnerTask) -> None:
    held = tasks.load_data(task)

    @jax.jit
    def step(params: Any, key: Any) -> Any:
        loss, slope = task.value_and_grad(params, task.batch(held, key))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, slope), loss

    params, losses = task.init(KEY(0)), []
    for i in range(150):
        params, loss = step(params, jax.random.fold_in(KEY(1), i))
        losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("task", EACH, ids=lambda task: task.name)
def test_gradients_are_those_of_finite_differences(task: InnerTask, x64: None) -> None:
    smooth = replace(task, activation="tanh")
    params = jax.tree.map(lambda x: x.astype(jnp.float64), smooth.init(KEY(0)))
    drawn = smooth.batch(tasks.load_data(smooth), KEY(1))
    batch = Batch(drawn.images.astype(jnp.float64), drawn.labels)
    loss, slope = smooth.value_and_grad(params, batch)
    assert float(loss) == float(smooth.loss(params, batch))
    way = smooth.init(KEY(2))
    along = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (slope, way)), strict=True))

    def at(h: float) -> float:
        return float(smooth.loss(jax.tree.map(lambda p, d: p + h * d, params, way), batch))

    assert (at(1e-5) - at(-1e-5)) / 2e-5 == pytest.approx(float(along), rel=1e-6)


def test_parameters_have_the_stated_shapes_and_scales() -> None:
    shapes = jax.tree.map(lambda x: x.shape, EACH[1].init(KEY(0)))
    assert shapes["layer0"] == {"w": (3, 3, 1, 6), "b": (6,)}
    assert shapes["layer2"] == {"w": (3 * 3 * 6, 10), "b": (10,)}
    code = jax.tree.map(lambda x: x.shape, EACH[2].init(KEY(0)))
    assert [code[f"layer{i}"]["w"] for i in range(4)] == [(25, 16), (16, 4), (4, 16), (16, 25)]
    wide = replace(MLP, width=400, depth=2)
    params = wide.init(KEY(0))
    assert float(params["layer1"]["w"].std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert float(params["layer2"]["w"].std()) == pytest.approx(math.sqrt(1 / 400), rel=0.05)
    np.testing.assert_array_equal(params["layer1"]["w"], wide.init(KEY(0))["layer1"]["w"])
    assert not np.array_equal(params["layer1"]["w"], wide.init(KEY(1))["layer1"]["w"])


def test_batches_come_from_the_data_with_replacement() -> None:
    held = tasks.load_data(MLP)
    few = images.TaskData(held.images[:16], held.labels[:16])
    batch = MLP.batch(few, KEY(0))
    found = (batch.images[:, None] == few.images[None]).all((2, 3, 4))
    assert found.any(1).all()
    assert batch.images.shape == (64, 8, 8, 1)
    np.testing.assert_array_equal(batch.labels, few.labels[found.argmax(1)])
    np.testing.assert_array_equal(batch.images, MLP.batch(few, KEY(0)).images)
    assert not np.array_equal(batch.images, MLP.batch(few, KEY(1)).images)


def test_saying_nothing_costs_the_stated_loss() -> None:
    for task, expected in zip(EACH, (math.log(10), math.log(10), 1.0), strict=True):
        silent = jax.tree.map(jnp.zeros_like, task.init(KEY(0)))
        held = tasks.load_data(task)
        everything = Batch(held.images, held.labels)
        assert float(task.loss(silent, everything)) == pytest.approx(expected, rel=1e-4)


def test_synthetic_sets_follow_their_seed() -> None:
    first, again = images.load("teacher:3", 6), images.load("teacher:3", 6)
    other = images.load("teacher:4", 6)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert not np.array_equal(first.images, other.images)
    shares = np.bincount(np.asarray(first.labels), minlength=10) / len(first.labels)
    assert shares.min() > 0.03
    assert shares.max() < 0.3
    neighbours = float((first.images[:, 1:] * first.images[:, :-1]).mean())
    assert neighbours > 0.1  # of white noise it is 0 ± 0.003
    for held in (first, images.load("digits", 5), images.load("teacher", 4, 3)):
        assert float(held.images.mean()) == pytest.approx(0, abs=1e-4)
        assert float(held.images.std()) == pytest.approx(1, abs=1e-4)


def test_digits_hold_nothing_that_victims_are_scored_on() -> None:
    split, held = data.load(DIGITS.dataset), images.load("digits", 8)
    assert len(held.labels) == len(split.train_labels) + len(split.val_labels)

    def prints(pixels: np.ndarray) -> set[bytes]:
        spread = pixels.reshape(len(pixels), -1).astype(np.float64)
        spread = spread - spread.min(1, keepdims=True)
        return {np.rint(255 * row / row.max()).astype(np.uint8).tobytes() for row in spread}

    seen = prints(np.asarray(held.images))
    assert len(seen & prints(split.train_images)) == len(prints(split.train_images))
    assert not seen & prints(split.test_images)


def test_the_normalisation_has_the_stated_values() -> None:
    worst = (math.log(20) - math.log(2)) * 10 / math.log(10)
    assert float(MLP.normalised(jnp.float32(math.log(2)))) == pytest.approx(0, abs=1e-6)
    assert worst == pytest.approx(10)
    losses = jnp.array([jnp.nan, jnp.inf, 7.0])
    np.testing.assert_allclose(MLP.normalised(losses), np.full(3, worst), rtol=1e-5)
    coder = EACH[2]
    assert float(coder.normalised(jnp.float32(1))) == pytest.approx(10)
    np.testing.assert_allclose(coder.normalised(losses), np.full(3, 10.5), rtol=1e-6)
    assert float(coder.normalised(jnp.float32(0))) == pytest.approx(4)
    for task in (MLP, coder):
        rising = task.normalised(jnp.linspace(0.01, 2.5, 40))
        assert (jnp.diff(rising) > 0).all()


def test_draw_follows_its_key_and_stays_within_its_ranges() -> None:
    drawn = tasks.draw(KEY(0), 300)
    assert drawn == tasks.draw(KEY(0), 300)
    assert drawn != tasks.draw(KEY(1), 300)
    assert all(tasks.drawable(task) for task in drawn)
    assert {task.family for task in drawn} == set(tasks.FAMILIES)
    assert {task.activation for task in drawn} == set(tasks.ACTIVATIONS)
    assert {task.data.partition(":")[0] for task in drawn} == {"digits", "teacher"}
    assert {task.resolution for task in drawn} == {4, 5, 6, 7, 8}
    batches = [task.batch_size for task in drawn]
    assert min(batches) < 12
    assert max(batches) > 100
    assert 25 < np.median(batches) < 40  # log-uniform: 32
    assert {task.data for task in tasks.draw(KEY(0), 9, ["digits"], ["conv"])} == {"digits"}


def test_what_draw_cannot_give_is_not_drawable() -> None:
    assert tasks.drawable(MLP)
    for other in (
        replace(MLP, width=65), replace(MLP, depth=4), replace(MLP, batch_size=256),
        replace(MLP, data="teacher:1000"), replace(MLP, data="tfds:cifar10"), replace(MLP, channels=3),
    ):  # fmt: skip
        assert not tasks.drawable(other)


def test_tasks_are_told_apart_by_their_fields() -> None:
    assert hash(MLP) == hash(replace(MLP))
    assert len({task.name for task in tasks.draw(KEY(2), 200)}) == len(set(tasks.draw(KEY(2), 200)))


def test_bad_tasks_and_sets_are_refused() -> None:
    with pytest.raises(UserError, match="positive"):
        replace(MLP, batch_size=0)
    with pytest.raises(UserError, match="two classes"):
        replace(MLP, num_classes=1)
    with pytest.raises(UserError, match="no data set of tasks called 'digit'; did you mean digits"):
        images.load("digit", 8)
    with pytest.raises(UserError, match="give a seed"):
        images.load("teacher:x", 8)
    with pytest.raises(UserError, match="at most 8"):
        images.load("digits", 9)
    with pytest.raises(UserError, match="1 channels, not 3"):
        images.load("digits", 8, 3)
    with pytest.raises(UserError, match="more classes"):
        tasks.load_data(replace(MLP, num_classes=9))
    with pytest.raises(UserError, match="at least one"):
        tasks.draw(KEY(0), 0)


@pytest.mark.slow
def test_cifar10_is_read_in_grey_and_in_colour(cifar10_dir: Path) -> None:
    grey = InnerTask("mlp", "tfds:cifar10", 8, 16, 1, 64)
    held = tasks.load_data(grey, cifar10_dir)
    assert held.images.shape == (images.KEPT, 8, 8, 1)
    coloured = tasks.load_data(replace(grey, resolution=4, channels=3), cifar10_dir)
    assert coloured.images.shape == (images.KEPT, 4, 4, 3)
    np.testing.assert_array_equal(held.labels, coloured.labels)
    [drawn] = tasks.draw(KEY(0), 1, ["tfds:cifar10"], data_dir=cifar10_dir)
    assert (drawn.data, drawn.num_classes) == ("tfds:cifar10", 10)
