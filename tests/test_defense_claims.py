"""Each defence does what its docstring says, and a control shows that the test could fail.

Claims tested here:

- the oracle drops the poison and nothing else, the random filter as many as may be poisoned;
- `spectral`, `activation_clustering`, `deep_knn` and `loss_trim` find planted outliers in features or
  losses, at least twice as often as chance;
- `mixup` and `cutmix` blend labels as they blend pixels; `cutout` blanks what it says; `gaussian` has
  its standard deviation;
- `iss` makes images grey, and its JPEG is what Pillow makes of them;
- `adversarial` raises the loss within its radius; `friendly_noise` stays within its own and moves what
  the victim says less than as much random noise does;
- `dp_sgd` moves by no more than its clip, however large a part's gradient;
- `epic` finds the isolated; its medoids are those of a hand-made example;
- `dpa`: where an image goes depends on itself alone, and one more changes one part's training alone;
  the certificate is the largest that brute force cannot break, and no change of so many votes breaks it;
- `metagradient_weights` follows the exact gradient by the weights, which finite differences agree with,
  and takes weight from mislabelled images.

The problem: 200 digits of 8×8, of which some are spoilt, and a ResNet-9 of width 4.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from poisonbench import defenses
from poisonbench.data import DataSpec, load
from poisonbench.defenses import Defense, View, dpa, epic, metagradient_weights
from poisonbench.tracks import DIGITS
from poisonbench.trained import TrainedVictim
from poisonbench.victim.training import TrainState

RECIPE = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=8, norm_momentum=0.8)
KEY = jax.random.key(11)
WRONG = np.arange(0, 200, 10)


@cache
def view() -> View:
    """A tenth of the labels is wrong."""
    digits = load(DataSpec(name="digits", train_size=200, val_size=200, test_size=100))
    labels = digits.train_labels.copy()
    labels[WRONG] = (labels[WRONG] + 5) % 10
    trusted = digits.val_images[:100], digits.val_labels[:100]
    told = np.isin(np.arange(200), WRONG)
    return View(digits.train_images, labels, 10, RECIPE, len(WRONG), *trusted, told)


def one(name: str, **hyperparameters: float) -> Defense:
    typed = [f"{name}.{option}={value}" for option, value in hyperparameters.items()]
    return defenses.build(name, typed).defenses[0]


def other(images: np.ndarray, labels: np.ndarray, **changes: Any) -> View:
    """A view of other images, with nothing trusted and nothing told."""
    none = {"trusted_images": images[:0], "trusted_labels": labels[:0], "poisoned": None}
    return replace(view(), images=images, labels=labels, **none, **changes)


def dropped(name: str, **hyperparameters: float) -> np.ndarray:
    weights = one(name, **hyperparameters).filter(view(), KEY)
    assert weights is not None
    return np.flatnonzero(weights == 0)


def test_the_controls() -> None:
    assert dropped("oracle").tolist() == WRONG.tolist()
    drawn = dropped("random_filter")
    assert len(drawn) == len(WRONG)
    assert len(np.intersect1d(drawn, WRONG)) < len(WRONG) / 2


@pytest.mark.parametrize(
    "name", ["spectral", "deep_knn", pytest.param("loss_trim", marks=pytest.mark.slow)]
)
def test_filters_find_wrong_labels(name: str) -> None:
    found = dropped(name)
    assert 0 < len(found) < 100
    precision = np.isin(found, WRONG).mean()
    assert precision > 0.2, "chance is a tenth"


def test_activation_clustering_drops_the_small_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2, dtype=np.int32), 50)
    features = rng.normal(size=(100, 12))
    features[:8] += 20  # apart from the rest of class 0
    features[50:75] += 20  # class 1 falls into halves, of which neither is small
    seen = other(view().images[:100], labels, num_classes=2)

    class Stated:
        def features(self, images: np.ndarray) -> np.ndarray:
            return features

    monkeypatch.setattr(View, "trained", lambda *_: Stated())
    weights = one("activation_clustering").filter(seen, KEY)
    assert weights is not None
    assert (weights[:8] == 0).all()
    assert (weights[8:] == 1).all()


def test_blends_are_the_same_in_pixels_and_labels() -> None:
    # Each image is one level, which tells the class it came from; so a mean level tells the blend.
    levels = jnp.arange(4) / 4
    images = jnp.broadcast_to(levels[:, None, None, None], (4, 16, 16, 1))
    targets = jnp.eye(4)
    for name in ("mixup", "cutmix"):
        moved = False
        for seed in range(5):
            mixed, blended = one(name).augment(
                images, targets, jax.random.key(seed), lambda x, _: x.sum()
            )
            np.testing.assert_allclose(mixed.mean((1, 2, 3)), blended @ levels, atol=1e-5)
            moved |= bool(jnp.abs(blended - targets).max() > 0.1)
        assert moved


def test_cutout_blanks_and_gaussian_adds() -> None:
    images, targets = jnp.ones((64, 16, 16, 3)), jnp.ones((64, 1))
    cut, same = one("cutout").augment(images, targets, KEY, lambda x, _: x.sum())
    blank = np.asarray(cut != 1).any(-1)
    assert (np.asarray(cut)[blank] == 0.5).all()
    assert 0.1 < blank.mean() <= 0.25  # a quarter, less what sticks out
    assert blank.sum((1, 2)).max() == 64
    np.testing.assert_array_equal(same, targets)
    noisy, _ = one("gaussian", sigma=0.2).augment(images, targets, KEY, lambda x, _: x.sum())
    assert float((noisy - images).std()) == pytest.approx(0.2, rel=0.02)


def test_squeezing_is_grey_and_real_jpeg() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    seen = other(colour, view().labels[:2])
    grey = defenses.build("iss", ["iss.how=grey"]).preprocess(seen, KEY)
    assert (grey[..., :1] == grey).all()
    squeezed = defenses.build("iss", ["iss.how=jpeg"]).preprocess(seen, KEY)
    stored = BytesIO()
    Image.fromarray(colour[0]).save(stored, "JPEG", quality=10)
    np.testing.assert_array_equal(squeezed[0], np.asarray(Image.open(stored)))
    of_one = colour[..., :1]
    for images, image in (
        (colour, Image.fromarray(colour[1]).convert("L").convert("RGB")),
        (of_one, Image.fromarray(of_one[1, ..., 0])),
    ):
        both = defenses.build("iss").preprocess(other(images, seen.labels), KEY)
        image.save(stored := BytesIO(), "JPEG", quality=10)
        np.testing.assert_array_equal(both[1], np.asarray(Image.open(stored)).reshape(both[1].shape))
    assert not (squeezed[..., :1] == squeezed).all()


@pytest.mark.slow
def test_adversarial_images_lose_more_within_the_radius() -> None:
    victim = view().trained(KEY)
    images = jnp.asarray(view().images[:50], jnp.float32) / 255
    labels, ones = jnp.asarray(view().labels[:50]), jnp.ones(50)

    def loss(x: jax.Array, _: object = None) -> jax.Array:
        return victim.loss(victim.weights, x, labels, ones)

    moved, _ = one("adversarial", radius=16).augment(images, jnp.eye(50), KEY, loss)
    assert jnp.abs(moved - images).max() <= 16 / 255 + 1e-6
    random = jnp.clip(images + jax.random.uniform(KEY, images.shape, minval=-1) * 16 / 255, 0, 1)
    assert loss(moved) > loss(random) + 1
    assert moved.min() >= 0
    assert moved.max() <= 1


@pytest.mark.slow
def test_friendly_noise_is_large_and_minded_less() -> None:
    moved = one("friendly_noise", radius=64, steps=60).preprocess(view(), KEY)
    before = view().images.astype(int)
    change = moved.astype(int) - before
    assert np.abs(change).max() <= 65
    victim = view().trained(jax.random.split(KEY)[0])
    calm = victim.probabilities(view().images)
    shuffled = np.random.default_rng(0).permuted(change.reshape(200, -1), axis=1).reshape(change.shape)
    random = np.clip(before + shuffled, 0, 255).astype(np.uint8)

    def minded(images: np.ndarray) -> float:
        return float(np.abs(victim.probabilities(images) - calm).sum(1).mean())

    assert np.abs(change).mean() > 5
    assert minded(moved) < 0.7 * minded(random)


def test_no_part_moves_more_than_the_clip() -> None:
    defense = one("dp_sgd", parts=4, clip=2.0, noise=0.0)
    small = {"a": jnp.full((4, 3), 0.1), "b": jnp.full((4, 2), -0.1)}
    np.testing.assert_allclose(defense.aggregate(small, KEY)["a"], 0.1, rtol=1e-6)
    spiked = jax.tree.map(lambda x: x.at[2].set(1e6), small)
    moved = jax.tree.map(jnp.subtract, defense.aggregate(spiked, KEY), defense.aggregate(small, KEY))
    length = float(jnp.sqrt(sum((x**2).sum() for x in moved.values())))
    assert length <= (2.0 + 0.3) / 4
    loud = one("dp_sgd", parts=4, clip=2.0, noise=3.0).aggregate({"a": jnp.zeros((4, 10_000))}, KEY)
    assert float(loud["a"].std()) == pytest.approx(3.0 * 2.0 / 4, rel=0.05)


def test_isolated_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.array([0.0, 0.1, 0.2, 5.0, 5.1, 9.0])
    line = np.array([0.0, 0.1, 0.2, 0.4, 5.0, 5.1, 9.0])
    # The one in the middle first, then what takes off most: 5.1, and then 9, which is far from both.
    nearest = epic.medoids(np.abs(line[:, None] - line[None]), 3)
    assert nearest.tolist() == [3, 3, 3, 3, 5, 5, 6]

    class Stated(TrainedVictim):
        def __init__(self) -> None:
            """Says what it is told to."""

        def features(self, images: np.ndarray) -> np.ndarray:
            return np.ones((6, 1))

        def probabilities(self, images: np.ndarray) -> np.ndarray:
            said = np.stack([points, -points], axis=1) / 20
            return said + np.eye(2)[0]

    seen = other(view().images[:6], np.zeros(6, np.int32), num_classes=2)
    weights = one("epic", share=0.5).revise(seen, Stated(), 3, np.ones(6))
    assert weights is not None
    assert weights.tolist() == [1, 1, 1, 1, 1, 0]
    # One of a pair was dropped before: its partner is company for nobody now.
    gone = np.array([1.0, 1, 1, 0, 1, 0])
    again = one("epic", share=0.5).revise(seen, Stated(), 6, gone)
    assert again is not None
    assert again.tolist() == [1, 1, 1, 1, 0, 1]


@dataclass(frozen=True)
class Constant:
    """A victim that says one thing."""

    state: TrainState = field(default_factory=lambda: TrainState({}, {}, None))

    def classes(self, images: np.ndarray) -> np.ndarray:
        return np.zeros(len(images), int)


def key_data(key: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))


def test_where_an_image_goes_depends_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = view().images, view().labels
    whole = dpa.parts(images, labels, 7)
    assert sorted(np.concatenate(whole)) == list(range(200))
    order = np.random.default_rng(0).permutation(200)[:150]
    fewer = dpa.parts(images[order], labels[order], 7)
    for part, rows in zip(whole, fewer, strict=True):
        assert set(order[rows]) == set(part) & set(order)
        in_order = [row for row in part if row in order]
        assert order[rows].tolist() == in_order
    recipes: list[tuple[int, int, bytes]] = []

    def trained(
        images: np.ndarray, labels: np.ndarray, _: int, recipe: Any, key: Any, *, guard: Any
    ) -> Any:
        recipes.append((len(labels), recipe.batch_size, images.tobytes() + bytes(key_data(key))))
        return Constant()

    monkeypatch.setattr(TrainedVictim, "on", trained)
    one("dpa", k=7).train(view(), KEY)
    before = list(recipes)
    recipes.clear()
    longer = other(np.concatenate([images, 255 - images[:1]]), np.append(labels, labels[0]))
    one("dpa", k=7).train(longer, KEY)
    assert sum(a != b for a, b in zip(before, recipes, strict=True)) == 1, "one part alone may change"
    flipped = dpa.parts(images, (labels + 1) % 10, 7)
    assert any(a.tolist() != b.tolist() for a, b in zip(whole, flipped, strict=True))


def test_the_certificate_is_what_brute_force_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        ballots = rng.integers(0, 3, 6)
        votes = np.bincount(ballots, minlength=3)
        said = dpa.counted(votes[None])
        assert said.certified is not None
        broken = min(
            sum(new != old for new, old in zip(changed, ballots, strict=True))
            for changed in itertools.product(range(3), repeat=6)
            if np.bincount(changed, minlength=3).argmax() != said.classes[0]
        )
        assert said.certified[0] == broken - 1


@pytest.mark.slow
def test_weights_follow_the_exact_gradient() -> None:
    short = replace(view(), recipe=RECIPE.replace(epochs=2))
    weights = jnp.ones(200)
    gradient = metagradient_weights.weight_metagradient(short, weights, KEY)
    direction = jax.random.normal(jax.random.key(1), (200,))

    def trusted_loss(weights: jax.Array) -> float:
        from poisonbench.victim.evaluation import ValidationLoss, train
        from poisonbench.victim.training import TrainingRun, TrainingSet

        data = TrainingSet.clean(short.images, short.labels, 10)
        run, state = TrainingRun.start(short.recipe, data, KEY[None])
        loss = ValidationLoss(
            short.recipe, 10, "cross_entropy",
            jnp.asarray(short.trusted_images), jnp.asarray(short.trusted_labels),
        )  # fmt: skip
        state = train(replace(run, weights=weights[None]), state, jnp.zeros((0, 8, 8, 1)))
        return float(loss(state))

    h = 0.01
    slope = (trusted_loss(weights + h * direction) - trusted_loss(weights - h * direction)) / (2 * h)
    assert float(gradient @ direction) == pytest.approx(slope, rel=0.05)
    assert float(gradient @ jnp.roll(direction, 1)) != pytest.approx(slope, rel=0.05)


@pytest.mark.slow
def test_mislabelled_images_lose_weight() -> None:
    weights = one("metagradient_weights", steps=12).filter(view(), KEY)
    assert weights is not None
    right = np.setdiff1d(np.arange(200), WRONG)
    assert weights[weights > 0].mean() == pytest.approx(1)
    assert weights[WRONG].mean() < 0.7 * weights[right].mean()
