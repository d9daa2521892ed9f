"""Every defence keeps the rules: one suite over `defenses.names()`, with no special case by name.

Claims tested for each defence, on images of one channel and of three:

- the same keys give the same scores and weights, and another key another victim;
- weights are finite, not negative, and never all zero, be the images all alike, of one class, alone in
  theirs, or labelled at random; images keep shape and dtype; in a step, images and targets keep theirs,
  and targets stay distributions;
- of them all the oracle alone is told which points are poisoned;
- what cannot work is refused before anything is trained;
- test images make no difference to what it does;
- it composes with mixup, whichever is named first, each doing in every hook what it does alone; or it
  replaces training, or is mixup, and says that it cannot;
- what it does in a step goes through a batch norm;
- its hyperparameters are documented where they are declared.

The problem is tiny: 40 images of 8×8 in four classes, a plain network of width 2, four epochs.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from poisonbench import defended, defenses
from poisonbench._plugins import options
from poisonbench.defenses import Composed, Defense, View
from poisonbench.errors import UserError
from poisonbench.tracks import DIGITS
from poisonbench.trained import TrainedVictim

RECIPE = DIGITS.recipes["smooth"].replace(network="cnn", width=2, epochs=4, batch_size=10)
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


def squares(images: Array, targets: Array) -> Array:
    """A loss that is easy to differentiate."""
    return (images**2).sum()


@pytest.fixture(params=defenses.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_deterministic_and_within_its_rules(name: str, channels: int) -> None:
    seen = view(name, channels)
    before = seen.images.copy()
    first, again = (
        defended.train_and_score(built(name), seen, keys(0, 1), *split(300, channels, 2))
        for _ in range(2)
    )
    np.testing.assert_array_equal(seen.images, before)
    np.testing.assert_array_equal(first.by_epoch, again.by_epoch)
    assert first.by_epoch.shape == (2, RECIPE.epochs)
    assert ((first.by_epoch >= 0) & (first.by_epoch <= 100)).all()
    if channels == 1:  # of colour a vote of victims on a few images each learns nothing
        assert not np.array_equal(first.by_epoch[0], first.by_epoch[1])
    assert (first.weights is None) == (again.weights is None)
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
    moved, blended = defense.augment(batch, targets, jax.random.key(0), squares)
    assert (moved.shape, moved.dtype) == (batch.shape, batch.dtype)
    assert (blended.shape, blended.dtype) == (targets.shape, targets.dtype)
    np.testing.assert_allclose(blended.sum(1), 1, atol=1e-6)
    assert (blended >= 0).all()


def test_the_oracle_alone_is_told() -> None:
    assert [name for name in defenses.names() if defenses.load(name).sees_poison] == ["oracle"]


def hostile(kind: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = split(40, 1)
    rng = np.random.default_rng(7)
    if kind == "all alike":
        images = np.repeat(images[:1], 40, axis=0)
    elif kind == "one class":
        labels = np.zeros_like(labels)
    elif kind == "one of a class":
        labels = np.where(np.arange(40) == 5, 3, labels % 3).astype(np.int32)
    else:
        labels = rng.integers(0, 4, 40).astype(np.int32)
    return images, labels


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all alike", "one class", "one of a class", "labels at random"])
def test_no_set_is_dropped_whole(name: str, kind: str) -> None:
    images, labels = hostile(kind)
    defense, seen = built(name), replace(view(name), images=images, labels=labels)
    once = defense.filter(seen, jax.random.key(0))
    while_training = None
    if defense.every:
        while_training = defense.revise(seen, seen.trained(jax.random.key(0)), 1, np.ones(len(labels)))
        assert while_training is not None
        assert set(labels[while_training > 0]) == set(labels)
    for weights in (w for w in (once, while_training) if w is not None):
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()
        assert (weights > 0).sum() >= RECIPE.batch_size


BY_STEPS = [
    name
    for name in defenses.names()
    if any(
        getattr(defenses.load(name), hook) is not getattr(Defense, hook)
        for hook in ("augment", "aggregate", "transform", "revise")
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("stepping", BY_STEPS)
def test_it_trains_through_a_batch_norm(stepping: str) -> None:
    seen = view(stepping)
    seen = replace(seen, recipe=RECIPE.replace(network="resnet9"))
    images, labels = split(200, 1, 2)
    under = defended.train_and_score(built(stepping), seen, keys(0), images, labels).by_epoch
    bare = defended.train_and_score(Composed(()), seen, keys(0), images, labels).by_epoch
    assert under.shape == bare.shape == (1, RECIPE.epochs)
    assert not np.array_equal(under, bare)


@pytest.mark.slow
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


@pytest.mark.slow
def test_it_composes_with_mixup(name: str) -> None:
    if name == "none":
        with pytest.raises(UserError, match="none is no defence beside others"):
            built(name, "mixup")
        return
    if name == "mixup":
        with pytest.raises(UserError, match="once"):
            built(name, "mixup")
        return
    both, seen = built(name, "mixup"), view(name)
    scored = defended.train_and_score(both, seen, keys(0), *split(20, 1, 2))
    assert np.isfinite(scored.by_epoch).all()
    if defenses.load(name).replaces_training():
        return  # of which only the steps are the other's: see below
    for names in ((name, "mixup"), ("mixup", name)):
        assert_each_does_what_it_does_alone(built(*names), names.index(name), seen)


@pytest.mark.slow
def test_what_replaces_training_trains_with_what_others_do_in_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on, made = TrainedVictim.on, []

    def kept(*arguments: Any, **options: Any) -> TrainedVictim:
        made.append(on(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(TrainedVictim, "on", kept)
    for names in ("dpa", "dpa,mixup", "mixup,dpa"):
        defenses.build(names, ["dpa.k=2"]).train(view("dpa"), jax.random.key(0))
    alone, mixed, other_way = (np.concatenate(weights(made[i : i + 2])) for i in (0, 2, 4))
    np.testing.assert_array_equal(mixed, other_way)
    assert np.abs(mixed - alone).max() > 1e-3
    for other, why in (("spectral", "acts by `filter`"), ("dp_sgd", "cuts their batches")):
        with pytest.raises(UserError, match=f"dpa trains victims of its own, and {other} {why}"):
            built(other, "dpa")


def weights(victims: list[TrainedVictim]) -> list[np.ndarray]:
    return [np.ravel(leaf) for victim in victims for leaf in jax.tree.leaves(victim.weights)]


def assert_each_does_what_it_does_alone(both: Composed, place: int, seen: View) -> None:
    key, alone = jax.random.key(0), both.defenses[place]
    own = [jax.random.fold_in(key, i) for i in range(2)]
    for hook in ("preprocess", "filter"):
        found, expected = getattr(both, hook)(seen, key), getattr(alone, hook)(seen, own[place])
        np.testing.assert_array_equal(found, expected)
    if both.every:
        victim, counted = seen.trained(key), np.ones(len(seen.labels))
        found, expected = (d.revise(seen, victim, both.every, counted) for d in (both, alone))
        np.testing.assert_array_equal(found, expected)
    if both.parts:
        stack = {"w": jax.random.normal(key, (both.parts, 50))}
        found, expected = both.aggregate(stack, key), alone.aggregate(stack, key)
        np.testing.assert_array_equal(found["w"], expected["w"])
    right = np.random.default_rng(0).random((RECIPE.epochs, both.trusted)) < 0.5
    assert both.pick(right) == alone.pick(right)
    weights = {"w": jnp.arange(3.0)}
    moved = [d.transform(optax.sgd(0.1)) for d in (both, alone)]
    found, expected = (o.update(weights, o.init(weights), weights)[0] for o in moved)
    np.testing.assert_array_equal(found["w"], expected["w"])
    batch = jnp.asarray(seen.images[:10], jnp.float32) / 255, jax.nn.one_hot(seen.labels[:10], 4)
    by_hand = batch
    for defense, own_key in zip(both.defenses, own, strict=True):
        by_hand = defense.augment(*by_hand, own_key, squares)
    for found, expected in zip(both.augment(*batch, key, squares), by_hand, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_hyperparameters_are_documented(name: str) -> None:
    cls = defenses.load(name)
    text = inspect.getdoc(cls) or ""
    assert all(f"{field.name}:" in text for field in options(cls))


def test_what_cannot_work_is_refused_beforehand() -> None:
    defenses.build("spectral").require(RECIPE, 40, 4, 20)
    with pytest.raises(UserError, match="spectral leaves less than a batch of 10: lower --fraction"):
        defenses.build("spectral").require(RECIPE, 40, 40, 20)
    with pytest.raises(UserError, match="less than a batch"):
        defenses.build("oracle").require(RECIPE, 40, 40, 20)
    with pytest.raises(
        UserError,
        match=r"has 20: lower --defense-set early_stop\.trusted=…, or",
    ):
        defenses.build("early_stop").require(RECIPE, 40, 4, 20)
    with pytest.raises(UserError, match=r"10 cannot be cut into 3 .* --defense-set dp_sgd\.parts=…"):
        defenses.build("dp_sgd", ["dp_sgd.parts=3"]).require(RECIPE, 40, 4, 20)


@pytest.mark.parametrize(
    ("text", "typed", "message"),
    [
        ("spectrl", [], "did you mean spectral"),
        ("mixup,mixup", [], "once"),
        ("none,mixup", [], "--defense none,mixup: none is no defence beside others"),
        ("spectral", ["spectral.factor=1e308"], "below 1e9"),
        ("mixup", ["spectral.factor=2"], "--defense does not name spectral"),
        ("mixup", ["alpha=2"], "defence.option=value"),
        ("mixup", ["mixup.alpha"], "defence.option=value"),
        ("mixup", ["mixup.alfa=2"], "did you mean --defense-set mixup.alpha"),
        ("mixup", ["mixup.alpha=0"], "mixup.alpha must be above 0"),
        ("dpa,spectral", [], "dpa trains victims of its own, and spectral acts by `filter`"),
        ("epic,dp_sgd", ["epic.every=0"], "every must be at least 1"),
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
