"""What a defence decides reaches the victims that train under it, and it sees no more than it may.

Claims of `poisonbench.defended` and of the harness tested here, on victims that are trained:

- an image that a filter drops makes no difference to the victim, and one that it keeps does;
- an image counts in the loss as much as its weight says;
- what is dropped after some epochs is missing from then on, and not before;
- the gradient is the one that `aggregate` made of those of the parts;
- the optimizer is the one that `transform` returned;
- the victim is that of the epoch that was picked;
- of two defences one filters what the other preprocessed, in whatever order they are named;
- places of what is dropped go to others, without replacement, and the rest stays where it was; what
  leaves nothing is refused, and a hook that gives something else than it should, by its name; the
  documented example runs;
- grouped or not, a seed's victim is the same; a defence that does nothing leaves victims as they are,
  where poison was added too;
- no defence but the oracle is told which points are poisoned, neither by a word nor by their order, nor
  given images that it does not declare, whatever it is composed with.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from test_defenses import RECIPE, built, keys, split, view

from poisonbench import defended, defenses, harness
from poisonbench._files import content_hash
from poisonbench.data import Dataset, DataSpec
from poisonbench.defenses import Composed, Defense, View
from poisonbench.errors import UserError
from poisonbench.threat import Budget, PoisonSet
from poisonbench.victim.recipe import Recipe

TEST = split(300, 1, 2)
PLAIN = RECIPE.replace(weight_decay=0.0)
FASTER = PLAIN.replace(learning_rate=2 * PLAIN.learning_rate)


def scored(*several: Defense, images: np.ndarray | None = None, recipe: Recipe = PLAIN) -> np.ndarray:
    """Test accuracy after each epoch of one victim under these defences."""
    seen = replace(view("none"), recipe=recipe)
    trusted = sum(defense.trusted for defense in several)
    held_out = split(trusted, 1, 1)
    seen = replace(seen, trusted_images=held_out[0], trusted_labels=held_out[1])
    if images is not None:
        seen = replace(seen, images=images)
    return defended.train_and_score(Composed(several), seen, keys(0), *TEST).by_epoch[0]


def painted(rows: np.ndarray) -> np.ndarray:
    """The training images, with some of them white."""
    images = view("none").images.copy()
    images[rows] = 255
    return images


class Whitening(Defense):
    """Every image is white."""

    def preprocess(self, view: View, key: Array) -> np.ndarray:
        return np.full_like(view.images, 255)


class Noticing(Defense):
    """Remembers what it was shown."""

    def __init__(self, trusted: int) -> None:
        self.trusted = trusted
        self.seen: list[View] = []

    def filter(self, view: View, key: Array) -> None:
        self.seen.append(view)


class Weighing(Defense):
    """Gives images these weights."""

    def __init__(self, weights: np.ndarray) -> None:
        self.weights = weights

    def filter(self, view: View, key: Array) -> np.ndarray:
        return self.weights


def test_what_is_dropped_makes_no_difference() -> None:
    rows = np.array([1, 7, 20, 33])
    dropping = Weighing(np.where(np.isin(np.arange(40), rows), 0.0, 1.0))
    expected = scored(dropping)
    np.testing.assert_array_equal(scored(dropping, images=painted(rows)), expected)
    assert not np.array_equal(scored(dropping, images=painted(rows + 1)), expected)
    assert not np.array_equal(scored(images=painted(rows)), scored())


@pytest.mark.slow
def test_an_image_counts_as_much_as_its_weight() -> None:
    # Powers of two leave no rounding: twice the loss is twice the learning rate, to the bit.
    twice = scored(Weighing(np.full(40, 2.0)))
    np.testing.assert_array_equal(twice, scored(recipe=FASTER))
    assert not np.array_equal(twice, scored())
    uneven = scored(Weighing(np.where(np.arange(40) % 4 < 2, 0.25, 1.75)))
    assert not np.array_equal(uneven, scored())


def test_what_is_dropped_later_is_missing_from_then_on() -> None:
    class Dropping(Defense):
        every = 2

        def revise(self, view: View, victim: object, epoch: int, weights: np.ndarray) -> np.ndarray:
            return view.without(np.flatnonzero(view.labels < 2))

    bare, dropped = scored(), scored(Dropping())
    np.testing.assert_array_equal(dropped[:2], bare[:2])
    assert (dropped[2:] != bare[2:]).all()
    assert dropped[-1] < bare[-1]  # two of the four classes are forgotten


@pytest.mark.slow
def test_the_gradient_is_what_was_aggregated() -> None:
    class Scaling(Defense):
        parts = 2

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def aggregate(self, gradients: Any, key: Array) -> Any:
            return jax.tree.map(lambda x: self.factor * x.mean(0), gradients)

    assert len(set(scored(Scaling(0.0)))) == 1
    assert len(set(scored(Scaling(1.0)))) > 1
    twice = scored(Scaling(1.0), recipe=FASTER)
    np.testing.assert_array_equal(scored(Scaling(2.0)), twice)


@pytest.mark.slow
def test_the_optimizer_is_what_was_returned() -> None:
    class Scaling(Defense):
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def transform(self, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
            return optax.chain(optimizer, optax.scale(self.factor))

    assert len(set(scored(Scaling(0.0)))) == 1
    expected = scored(recipe=FASTER)
    np.testing.assert_array_equal(scored(Scaling(2.0)), expected)
    np.testing.assert_array_equal(scored(Scaling(4.0), Scaling(0.5)), expected)


@pytest.mark.slow
def test_the_victim_is_of_the_picked_epoch() -> None:
    class Picking(Defense):
        trusted = 8

        def __init__(self) -> None:
            self.seen: list[np.ndarray] = []

        def pick(self, right: np.ndarray) -> int:
            self.seen.append(right)
            return 1

    picking, bare = Picking(), scored()
    np.testing.assert_array_equal(scored(picking), [bare[0], bare[1], bare[1], bare[1]])
    assert [right.shape for right in picking.seen] == [(PLAIN.epochs, 8)]


@pytest.mark.slow
def test_filters_see_what_was_preprocessed() -> None:
    for first, second in ((Noticing(0), Whitening()), (Whitening(), Noticing(0))):
        scored(first, second)
        spy = first if isinstance(first, Noticing) else second
        assert isinstance(spy, Noticing)
        assert (spy.seen[0].images == 255).all()


def test_what_takes_the_place_of_training_meets_test_images_afterwards() -> None:
    class Constant(Defense):
        def train(self, view: View, key: Array) -> Any:
            assert not any(np.array_equal(x, TEST[0]) for x in vars(view).values())
            return lambda images: defended.Predictions(np.full(len(images), 3))

    np.testing.assert_allclose(scored(Constant()), 100 * float(jnp.mean(TEST[1] == 3)))


def test_what_is_dropped_is_never_seen_and_the_rest_stays_where_it_is() -> None:
    order = np.random.default_rng(0).permuted(np.tile(np.arange(12), (3, 1)), axis=1).reshape(9, 4)
    weights = np.ones(12)
    weights[[0, 5, 7]] = 0
    left = defended._without(order, weights, jax.random.key(0))
    assert left.shape == order.shape
    assert not np.isin(left, [0, 5, 7]).any()
    stays = ~np.isin(order, [0, 5, 7])
    np.testing.assert_array_equal(left[stays], order[stays])
    assert len(np.unique(left[~stays])) == 9  # nine places, nine others, without replacement


@pytest.mark.slow
def test_victims_train_on_what_preprocessing_gives() -> None:
    test = split(20, 1, 2)
    bare = defended.train_and_score(Composed(()), view("none"), keys(0, 1), *test)
    white = defended.train_and_score(Composed((Whitening(),)), view("none"), keys(0, 1), *test)
    assert not np.array_equal(bare.by_epoch, white.by_epoch)
    by_hand = replace(view("none"), images=np.full_like(view("none").images, 255))
    same = defended.train_and_score(Composed(()), by_hand, keys(0, 1), *test)
    np.testing.assert_array_equal(white.by_epoch, same.by_epoch)


@pytest.mark.slow
def test_seeds_with_images_of_their_own_are_as_alone() -> None:
    """Grouped or not, a seed's victim is the same."""
    defense, seen, test = built("friendly_noise"), view("friendly_noise"), split(20, 1, 2)
    both = defended.train_and_score(defense, seen, keys(0, 1), *test)
    alone = [defended.train_and_score(defense, seen, keys(seed), *test) for seed in (0, 1)]
    np.testing.assert_array_equal(both.by_epoch, np.concatenate([a.by_epoch for a in alone]))


def test_each_sees_what_it_would_see_alone() -> None:
    one, other = Noticing(3), Noticing(4)
    oracle = defenses.build("oracle").defenses[0]
    together = Composed((one, oracle, other), ("one", "oracle", "other"))
    trusted = split(7, 1, seed=1)
    told = np.arange(40) < 4
    seen = View(*split(40, 1), 4, RECIPE, 4, *trusted, told)
    assert together.trusted == 7
    together.filter(seen, jax.random.key(0))
    for mine, rows in ((one, slice(0, 3)), (other, slice(3, 7))):
        (shown,) = mine.seen
        assert shown.poisoned is None
        np.testing.assert_array_equal(shown.trusted_images, trusted[0][rows])
        np.testing.assert_array_equal(shown.trusted_labels, trusted[1][rows])


def poisoned_data(mode: str) -> tuple[Dataset, PoisonSet]:
    """Four of forty images made white."""
    images, labels = split(40, 1)
    spec = DataSpec(name="digits", val_size=20)
    dataset = Dataset(spec, images, labels, *split(20, 1, 1), *split(20, 1, 2), ("a", "b", "c", "d"))
    budget = Budget.model_validate({"fraction": 0.1, "mode": mode})
    rows = np.array([3, 9, 22, 31])
    white = np.full((4, 8, 8, 1), 255, np.uint8)
    return dataset, PoisonSet(rows, white, labels[rows], budget, content_hash(images, labels))


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_defended_and_undefended_victims_see_one_order(mode: str) -> None:
    dataset, poison = poisoned_data(mode)
    (bare,) = harness.evaluate(dataset, poison, {"smooth": RECIPE}, [0, 1]).victims
    (same,) = harness.evaluate(
        dataset, poison, {"smooth": RECIPE}, [0, 1], defense=built("none")
    ).victims
    assert (bare.clean, bare.poisoned) == (same.clean, same.poisoned)
    assert bare.clean != bare.poisoned


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_the_harness_tells_no_more_than_it_may(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a word nor by the order of the images, which nobody may write to."""
    dataset, poison = poisoned_data(mode)
    spy = Noticing(5)
    monkeypatch.setattr(defenses, "sources", lambda _: "")
    monkeypatch.setattr(defenses, "config", lambda _: {})
    harness.evaluate(dataset, poison, {"smooth": RECIPE}, [0, 1], defense=Composed((spy,), ("spy",)))
    poisoned = [shown for shown in spy.seen if (shown.images == 255).all((1, 2, 3)).any()]
    assert len(poisoned) == 2
    for shown in spy.seen:
        assert shown.poisoned is None
        assert not any(a.flags.writeable for a in (shown.images, shown.labels, shown.trusted_images))
        assert len(shown.trusted_labels) == 5
    where = np.flatnonzero((poisoned[0].images == 255).all((1, 2, 3)))
    assert len(where) == 4
    assert where.tolist() != list(range(40, 44)), "poison that was added comes last"


@pytest.mark.slow
def test_revisions_that_leave_nothing_are_refused() -> None:
    class Dropping(Defense):
        every = 1

        def revise(self, view: View, victim: object, epoch: int, weights: np.ndarray) -> np.ndarray:
            left = np.flatnonzero(weights)
            return view.without(left[: len(left) // 2 + 1])

    with pytest.raises(UserError, match="drops every image"):
        defended.train_and_score(
            Composed((Dropping(),)),
            replace(view("none"), recipe=RECIPE.replace(epochs=12)),
            keys(0),
            *split(20, 1, 2),
        )


def test_a_defence_that_does_nothing_changes_nothing() -> None:
    seen, test = view("none"), split(20, 1, 2)
    bare = defended.train_and_score(Composed(()), seen, keys(0, 1), *test)
    none = defended.train_and_score(built("none"), seen, keys(0, 1), *test)
    np.testing.assert_array_equal(bare.by_epoch, none.by_epoch)

    ones = defended.train_and_score(Composed((Weighing(np.ones(40)),)), seen, keys(0, 1), *test)
    np.testing.assert_array_equal(bare.by_epoch, ones.by_epoch)
    with pytest.raises(UserError, match="drops every image"):
        defended.train_and_score(Composed((Weighing(np.zeros(40)),)), seen, keys(0), *test)
    with pytest.raises(UserError, match="negative or not finite"):
        defended.train_and_score(Composed((Weighing(np.full(40, np.nan)),)), seen, keys(0), *test)


class Giving(Defense):
    """A defence with a hook that gives the wrong thing."""

    def __init__(self, hook: str, given: Any) -> None:
        setattr(self, hook, lambda *_: given)


@pytest.mark.parametrize(
    ("hook", "given", "message"),
    [
        ("filter", np.arange(5), r"Giving\.filter gave int64 of shape \(5,\).*there are 40"),
        ("filter", np.ones((40, 1)), r"gave float64 of shape \(40, 1\)"),
        ("filter", 1.0, r"gave float64 of shape \(\)"),
        ("filter", "kept", "give one number for each"),
        ("filter", -np.ones(40), r"Giving\.filter gave weights that are negative"),
        (
            "preprocess",
            np.zeros((20, 8, 8, 1), np.uint8),
            r"\(20, 8, 8, 1\), and is to give uint8",
        ),
        ("preprocess", np.zeros((40, 8, 8, 1)), "gave float64"),
        ("augment", jnp.zeros((20, 8, 8, 1)), r"Giving\.augment gave float32 \(20, 8, 8, 1\), and is"),
        (
            "augment",
            (jnp.zeros((10, 8, 8, 1)), jnp.zeros((10, 10))),
            r"float32 \(10, 8, 8, 1\) and",
        ),
    ],
)
def test_a_hook_that_gives_something_else_is_named(hook: str, given: Any, message: str) -> None:
    wrong = Composed((Giving(hook, given),))
    with pytest.raises(UserError, match=message):
        defended.train_and_score(wrong, view("none"), keys(0), *split(20, 1, 2))


def test_the_documented_filter_drops_the_brightest() -> None:
    file = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"
    if not file.is_file():
        pytest.skip("NOT TESTED: CONTRIBUTING.md is part of the checkout only")
    (source,) = re.findall(r"```python\n(.*?)```", file.read_text("utf-8"), re.DOTALL)
    module: dict[str, Any] = {"__name__": __name__}
    exec(source, module)
    filtering, seen = module["Bright"](2.0), view("none")
    images = seen.images.copy()
    images[:8] = 255
    weights = filtering.filter(replace(seen, images=images, allowed=4), jax.random.key(0))
    assert np.flatnonzero(weights == 0).tolist() == list(range(8))
    composed = Composed((filtering,))
    assert composed.dropped(4) == 8
    defended.train_and_score(composed, replace(seen, allowed=4), keys(0), *split(20, 1, 2))


def test_the_picked_epoch_stays() -> None:
    test = np.array([[10.0, 50, 30, 20]])
    right = np.arange(8)[None, None] < np.array([1, 2, 7, 7])[None, :, None]
    picked = defended._picked(test, right, built("early_stop").pick)
    assert picked.tolist() == [[10, 50, 30, 30]]
    assert test[0, 3] == 20
