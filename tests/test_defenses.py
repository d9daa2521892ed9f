"""Every defence keeps the rules: one suite over `defenses.names()`, with no special case by name.

Claims tested for each defence, on images of one channel and of three:

- the same keys give the same scores and weights, and another key another victim;
- weights are finite, not negative, and never all zero; images keep shape and dtype; in a step, images
  and targets keep theirs, and targets stay distributions;
- it is never told which points are poisoned, unless it is the oracle, of which there is one, nor given
  images that it does not declare;
- test images make no difference to what it does;
- it composes with mixup, or replaces training and says that it cannot;
- its hyperparameters are documented where they are declared.

The problem is tiny: 40 images of 8×8 in four classes, a ResNet-9 of width 2, four epochs.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from poisonbench import defended, defenses
from poisonbench._plugins import options
from poisonbench.defenses import Composed, Defense, View
from poisonbench.errors import UserError
from poisonbench.tracks import DIGITS

RECIPE = DIGITS.recipes["smooth"].replace(width=2, epochs=4, batch_size=10)
CHEAP = {"steps": "2", "trusted": "8", "rounds": "2", "k": "3", "parts": "2"}
"""Values for options of these names, wherever a defence has one, so that the suite is quick."""


def split(size: int, channels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(size, dtype=np.int32) % 4
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 8, 8, channels)).astype(np.uint8) // 2
    images[np.arange(size), labels * 2] += 100  # a bright row tells the class
    return images, labels


def view(name: str, channels: int = 1) -> View:
    trusted = split(built(name).trusted, channels, seed=1)
    told = np.arange(40) < 4 if defenses.load(name).sees_poison else None
    return View(*split(40, channels), 4, RECIPE, 4, *trusted, told)


def built(*names: str) -> Composed:
    typed = [
        f"{name}.{field.name}={CHEAP[field.name]}"
        for name in names
        for field in options(defenses.load(name))
        if field.name in CHEAP
    ]
    return defenses.build(",".join(names), typed)


def keys(*seeds: int) -> Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


@pytest.fixture(params=defenses.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("channels", [1, 3])
def test_deterministic_and_within_its_rules(name: str, channels: int) -> None:
    seen = view(name, channels)
    before = seen.images.copy()
    first, again = (
        defended.train_and_score(built(name), seen, keys(0, 1), *split(20, channels, 2))
        for _ in range(2)
    )
    np.testing.assert_array_equal(seen.images, before)
    np.testing.assert_array_equal(first.by_epoch, again.by_epoch)
    assert first.by_epoch.shape == (2, RECIPE.epochs)
    assert ((first.by_epoch >= 0) & (first.by_epoch <= 100)).all()
    if first.weights is not None and again.weights is not None:
        np.testing.assert_array_equal(first.weights, again.weights)
        assert first.weights.shape == (2, 40)
        assert np.isfinite(first.weights).all()
        assert (first.weights >= 0).all()
        assert first.weights.any(axis=1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_targets_keep_their_kind(name: str, channels: int) -> None:
    seen, defense = view(name, channels), built(name)
    images = defense.preprocess(seen, jax.random.key(0))
    assert (images.shape, images.dtype) == (seen.images.shape, seen.images.dtype)
    batch = jnp.asarray(seen.images[:10], jnp.float32) / 255
    targets = jax.nn.one_hot(seen.labels[:10], 4)
    moved, blended = defense.augment(batch, targets, jax.random.key(0), lambda x: (x**2).sum())
    assert (moved.shape, moved.dtype) == (batch.shape, batch.dtype)
    assert (blended.shape, blended.dtype) == (targets.shape, targets.dtype)
    np.testing.assert_allclose(blended.sum(1), 1, atol=1e-6)
    assert (blended >= 0).all()


def test_the_oracle_alone_is_told() -> None:
    assert sum(defenses.load(name).sees_poison for name in defenses.names()) == 1


def test_test_images_make_no_difference(name: str) -> None:
    """White images of classes that there are not are always wrong: the others score as they do alone."""
    seen, (images, labels) = view(name), split(20, 1, 2)
    pills = np.full_like(images, 255), np.full_like(labels, 99)
    alone = defended.train_and_score(built(name), seen, keys(0), images, labels)
    both = np.concatenate([images, pills[0]]), np.concatenate([labels, pills[1]])
    mixed = defended.train_and_score(built(name), seen, keys(0), *both)
    np.testing.assert_allclose(mixed.by_epoch, alone.by_epoch / 2)
    if alone.weights is not None:
        np.testing.assert_array_equal(alone.weights, mixed.weights)


def test_it_composes_with_mixup_or_says_that_it_cannot(name: str) -> None:
    if name == "mixup":
        with pytest.raises(UserError, match="once"):
            built(name, "mixup")
        return
    if defenses.load(name).train is not Defense.train:
        with pytest.raises(UserError, match="cannot be combined"):
            built(name, "mixup")
        return
    together = defended.train_and_score(built(name, "mixup"), view(name), keys(0), *split(20, 1, 2))
    assert np.isfinite(together.by_epoch).all()


def test_hyperparameters_are_documented(name: str) -> None:
    cls = defenses.load(name)
    text = inspect.getdoc(cls) or ""
    assert all(f"{field.name}:" in text for field in options(cls))


# ------------------------------------------------------------------ the order of what is kept


def test_what_is_dropped_is_never_seen_and_the_rest_keeps_its_order() -> None:
    order = np.random.default_rng(0).permuted(np.tile(np.arange(12), (3, 1)), axis=1).reshape(9, 4)
    weights = np.ones(12)
    weights[[0, 5, 7]] = 0
    left = defended._without(order, weights, jax.random.key(0))
    assert left.shape == order.shape
    assert not np.isin(left, [0, 5, 7]).any()
    first = order.ravel()[~np.isin(order.ravel(), [0, 5, 7])]
    np.testing.assert_array_equal(left.ravel()[: len(first)], first)
    assert len(np.unique(left)) == 9


def test_a_defence_that_does_nothing_changes_nothing() -> None:
    seen, test = view("none"), split(20, 1, 2)
    bare = defended.train_and_score(Composed(()), seen, keys(0, 1), *test)
    none = defended.train_and_score(built("none"), seen, keys(0, 1), *test)
    np.testing.assert_array_equal(bare.by_epoch, none.by_epoch)

    class Weighing(Defense):
        def __init__(self, weight: float) -> None:
            self.weight = weight

        def filter(self, view: View, key: Array) -> np.ndarray:
            return np.full(len(view.labels), self.weight)

    ones = defended.train_and_score(Composed((Weighing(1.0),)), seen, keys(0, 1), *test)
    np.testing.assert_array_equal(bare.by_epoch, ones.by_epoch)
    with pytest.raises(UserError, match="drops every image"):
        defended.train_and_score(Composed((Weighing(0.0),)), seen, keys(0), *test)
    with pytest.raises(UserError, match="negative or not finite"):
        defended.train_and_score(Composed((Weighing(float("nan")),)), seen, keys(0), *test)


def test_parts_must_divide_a_batch() -> None:
    with pytest.raises(UserError, match="10 cannot be cut into 3"):
        defended.train_and_score(
            defenses.build("dp_sgd", ["dp_sgd.parts=3"]), view("dp_sgd"), keys(0), *split(20, 1)
        )


def test_the_picked_epoch_stays() -> None:
    test = np.array([[10.0, 50, 30, 20]])
    picked = defended._picked(test, np.array([[1.0, 2, 9, 9]]), built("early_stop").pick)
    assert picked.tolist() == [[10, 50, 30, 30]]
    assert test[0, 3] == 20


@pytest.mark.parametrize(
    ("text", "typed", "message"),
    [
        ("spectrl", [], "did you mean spectral"),
        ("mixup,mixup", [], "once"),
        ("mixup", ["spectral.factor=2"], "--defense does not name spectral"),
        ("mixup", ["alpha=2"], "defence.option=value"),
        ("mixup", ["mixup.alpha"], "defence.option=value"),
        ("mixup", ["mixup.alfa=2"], "did you mean --alpha"),
        ("mixup", ["mixup.alpha=0"], "mixup.alpha must be above 0"),
        ("dpa,mixup", [], "cannot be combined"),
    ],
)
def test_bad_input(text: str, typed: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        defenses.build(text, typed)


def test_config_names_every_hyperparameter() -> None:
    both = defenses.build("spectral,mixup", ["mixup.alpha=0.5"])
    assert defenses.config(both) == {"spectral": {"factor": 1.5}, "mixup": {"alpha": 0.5}}
    assert replace(both) == both
    assert hash(both) == hash(defenses.build("spectral,mixup", ["mixup.alpha=0.5"]))
