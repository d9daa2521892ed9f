"""Perturbations of whole training sets do what their papers say: `error_min`, `tap` and `lsp`.

Claims tested here, each with a control that fails:

- a descent lowers the victim's loss, within the bounds, whatever the size of its chunks;
- images of `error_min` lose less than the clean ones, and than ones with random signs, to a victim that
  trains on them;
- killed after the turn that made them easy enough, it takes no further one;
- images of `tap` are mistaken for their target class by the clean victim, the clean ones are not;
- a linear classifier reads the class from the perturbation of `lsp` on images it has not seen, and from
  random perturbations it cannot; blocks have one colour, the largest at the radius;
- victims that train on any of the three do worse on clean images than ones that trained on clean images,
  and after the first two worse than after random signs of that size;
- a budget without a radius is refused, and so are pixels that are no numbers.

The problem: 200 digits of 8×8 within 80/255, a ResNet-9 of width 4, eight epochs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from poisonbench import arrays, attacks, perturb
from poisonbench.attacks import Task, error_min
from poisonbench.data import DataSpec, load
from poisonbench.errors import UserError
from poisonbench.journal import Journal, LogRow
from poisonbench.problem import Problem, clean_victim
from poisonbench.threat import Budget, LInf, PoisonSet
from poisonbench.tracks import DIGITS
from poisonbench.trained import TrainedVictim

KEY = jax.random.key(7)
RADIUS = 80
NAMES = ("error_min", "tap", "lsp")


@cache
def problem() -> Task:
    digits = load(DataSpec(name="digits", train_size=200, val_size=200, test_size=100))
    learns = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=8, norm_momentum=0.8)
    return Task.of(digits, Budget(fraction=1, pixels=LInf(radius=RADIUS)), learns)


@cache
def crafted(name: str) -> tuple[PoisonSet, Journal]:
    journal = Journal()
    options = [("steps", "100")] if name == "tap" else []
    return attacks.build(name, options).craft(problem(), KEY, journal), journal


def randomly_signed() -> np.ndarray:
    images = problem().train_images
    signs = np.random.default_rng(0).choice([-RADIUS, RADIUS], images.shape)
    return np.clip(images + signs, 0, 255).astype(np.uint8)


def loss(victim: TrainedVictim, images: np.ndarray, labels: np.ndarray) -> float:
    ones = jnp.ones(len(images))
    pixels = jnp.asarray(images, jnp.float32) / 255
    return float(victim.loss(victim.weights, pixels, jnp.asarray(labels), ones)) / len(images)


@pytest.mark.slow
def test_a_descent_stays_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem()
    victim = clean_victim(task, KEY)
    rows = np.arange(30)
    labels = (task.train_labels[rows] + 1) % 10
    low, high = bounds = task.bounds(rows)
    begin = task.train_images[rows] / np.float32(255)

    def descended(chunk: int) -> np.ndarray:
        monkeypatch.setattr(arrays, "CHUNK", chunk)
        return perturb.descended(victim, begin, labels, bounds, KEY, steps=15, size=0.03)

    moved = descended(500)
    assert (moved >= low / np.float32(255) - 1e-6).all()
    assert (moved <= high / np.float32(255) + 1e-6).all()
    free = (low > 0) & (high < 255)
    assert np.abs(moved - begin)[free].max() == pytest.approx(RADIUS / 255, abs=1e-5)
    assert loss(victim, moved * 255, labels) < loss(victim, begin * 255, labels) - 0.1
    np.testing.assert_allclose(descended(30), moved, atol=1e-6)
    # Another chunk sums in another order, so a sign may differ where a gradient is all but zero.
    assert np.mean(np.abs(descended(16) - moved) > 1e-6) < 0.02


@pytest.mark.slow
def test_error_minimising_noise_is_easy() -> None:
    task = problem()
    poison, journal = crafted("error_min")
    on_it = Task(**{**vars(task), "train_images": poison.images})
    victim = clean_victim(on_it, jax.random.key(1))
    of_signs = Task(**{**vars(task), "train_images": randomly_signed()})
    control = clean_victim(of_signs, jax.random.key(1))
    labels = task.train_labels
    easy = loss(victim, poison.images, labels)
    assert easy < loss(victim, task.train_images, labels) - 0.2
    assert easy < loss(control, randomly_signed(), labels) - 0.2
    assert journal.rows[-1]["error"] < 0.05


@pytest.mark.slow
def test_killed_after_its_last_turn_it_ends_where_it_would_have(tmp_path: Path) -> None:
    """The turn that reached the goal is the last, whether or not the process lived to say so."""
    whole, journal = crafted("error_min")
    assert journal.rows[-1]["error"] < error_min.LEARNT
    assert journal.rows[-1]["metastep"] < problem().recipe.num_steps(200)

    class Killed(Journal):
        def save(self, arrays: dict[str, np.ndarray], row: LogRow | None = None) -> None:
            super().save(arrays, row)
            if len(self.rows) == len(journal.rows):
                raise KeyboardInterrupt

    attack = attacks.build("error_min", [])
    with pytest.raises(KeyboardInterrupt):
        attack.craft(problem(), KEY, Killed(tmp_path))
    assert attack.craft(problem(), KEY, Journal(tmp_path)).hash == whole.hash


@pytest.mark.slow
def test_targeted_images_are_mistaken() -> None:
    task = problem()
    poison, journal = crafted("tap")
    targets = (task.train_labels + 1) % 10
    _, clean_key, _, _ = jax.random.split(KEY, 4)
    victim = clean_victim(task, clean_key)
    mistaken = float(np.mean(victim.classes(poison.images) == targets))
    assert mistaken > 0.8
    # Rounding to 8 bits moves an image over the boundary here and there.
    assert journal.rows[-1]["mistaken"] == pytest.approx(mistaken, abs=0.03)
    assert np.mean(victim.classes(task.train_images) == targets) < 0.1
    begun = attacks.build("tap", [("steps", "1"), ("step-size", "1e-6")])
    start = begun.craft(task, KEY, Journal()).images.astype(int) - task.train_images
    free = (task.train_images >= RADIUS) & (task.train_images <= 255 - RADIUS)
    assert start[free].std() == pytest.approx(RADIUS / 3**0.5, rel=0.05), "anywhere within the radius"
    with pytest.raises(UserError, match="--shift 10"):
        attacks.build("tap", [("shift", "10")]).craft(task, KEY, Journal())


@pytest.mark.parametrize("name", ["tap", "error_min"])
def test_pixels_that_are_no_numbers_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(victim: object, z: np.ndarray, *_: object, **__: object) -> np.ndarray:
        return np.full_like(z, np.nan)

    monkeypatch.setattr(f"poisonbench.attacks.{name}.descended", lost)
    with pytest.raises(UserError, match="pixels are not finite: lower the victim's learning rate"):
        attacks.build(name, [("steps", "1")]).craft(problem(), KEY, Journal())


def test_a_shift_is_modulo_the_number_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that no 32 bits hold."""
    aims: list[np.ndarray] = []

    def noted(
        victim: object, z: np.ndarray, targets: np.ndarray, *_: object, **__: object
    ) -> np.ndarray:
        aims.append(targets)
        return z

    monkeypatch.setattr("poisonbench.attacks.tap.descended", noted)
    for shift in ("1", "3000000001"):
        attacks.build("tap", [("steps", "1"), ("shift", shift)]).craft(problem(), KEY, Journal())
    np.testing.assert_array_equal(*aims)


def test_the_pattern_tells_the_class() -> None:
    grey = Task(**{**vars(problem()), "train_images": np.full_like(problem().train_images, 128)})
    moved = attacks.build("lsp", []).craft(grey, KEY, Journal()).images.astype(int) - 128
    task = problem()
    assert (np.abs(moved).max((1, 2, 3)) == RADIUS).all()

    def read(perturbation: np.ndarray) -> float:
        flat = perturbation.reshape(len(perturbation), -1)
        reader = LogisticRegression(max_iter=1000).fit(flat[::2], task.train_labels[::2])
        return float(reader.score(flat[1::2], task.train_labels[1::2]))

    assert read(moved) > 0.95
    assert read(np.random.default_rng(0).integers(-RADIUS, RADIUS + 1, moved.shape)) < 0.3
    blocks = moved.reshape(-1, 4, 2, 4, 2)
    assert (np.ptp(blocks, axis=(2, 4)) == 0).all()
    assert len(np.unique(moved[0])) > 8
    # Corners of a cube, so that most blocks are near the radius, and no two classes share one.
    assert np.abs(moved).mean() > 0.7 * RADIUS
    corners = {np.sign(one).tobytes() for one in moved}
    assert len(corners) == 10
    few = attacks.build("lsp", [("blocks", "2")]).craft(grey, KEY, Journal()).images.astype(int) - 128
    assert len({np.sign(one).tobytes() for one in few}) == 10
    with pytest.raises(UserError, match="1 colours cannot tell 10 classes apart"):
        attacks.build("lsp", [("blocks", "1")]).craft(grey, KEY, Journal())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_victims_learn_less(name: str) -> None:
    task = problem()
    everything = Problem.of(task, np.arange(len(task.train_labels)), task.train_labels, "error")
    keys = jax.random.split(jax.random.key(2), 3)
    control = everything.harm(task.train_images if name == "lsp" else randomly_signed(), keys)
    assert control < 0.7, "a control that learns nothing (0.9) would prove nothing"
    assert everything.harm(crafted(name)[0].images, keys) > control + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_without_a_radius_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--radius"):
        attacks.build(name, []).require(Budget(fraction=0.5))
