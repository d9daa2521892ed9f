"""Every attack keeps the rules: one suite over `attacks.names()`, with no special case by name.

Claims tested for each attack, under every game it accepts:

- the poison stays within its budget, at the stored 8 bits, and is for the data it was made for;
- the same key gives the same poison, byte for byte; nothing outside the task is needed;
- it survives being saved and loaded unchanged;
- the attacker's view is read-only, and holds neither test images nor evaluation seeds;
- it can be interrupted at any checkpoint and ends with the same bytes;
- the test split, filled with pills, makes no difference;
- it says how far it has come;
- unless it is a control, it costs victims that it was not fitted to a floor of accuracy.

The problem is tiny: 40 images of 8×8, a ResNet-9 of width 2, one epoch; for effects, 100 digits and
twelve epochs of width 4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from poisonbench import attacks, harness, runs
from poisonbench._plugins import options
from poisonbench.attacks import Attack, Task
from poisonbench.data import Dataset, DataSpec, load
from poisonbench.errors import UserError
from poisonbench.journal import Journal, LogRow
from poisonbench.progress import Progress
from poisonbench.setting import Setting
from poisonbench.threat import Box, Budget, LInf, PoisonSet
from poisonbench.tracks import DIGITS
from poisonbench.victim.evaluation import train_and_score
from poisonbench.victim.training import TrainingSet

GAMES = [
    Budget(fraction=0.1),
    Budget(fraction=0.1, labels="free"),
    Budget(fraction=0.1, labels="free", pixels=LInf(radius=8)),
    Budget(fraction=0.1, pixels=LInf(radius=8)),
    Budget(fraction=1, pixels=LInf(radius=8)),
    Budget(fraction=0.1, mode="add"),
]
SOME = [*GAMES[:4], *(pytest.param(game, marks=pytest.mark.slow) for game in GAMES[4:])]
"""All of them; those of other shapes, which compile everything anew, among the slow tests."""
TINY = DIGITS.recipes["smooth"].replace(width=2, epochs=1, batch_size=20)
CHEAP = {
    "steps": "3", "check_every": "2", "check_seeds": "2", "start_seeds": "2", "trial_seeds": "2",
    "candidates": "2", "rounds": "3", "follower_steps": "2", "train_steps": "1",
}  # fmt: skip
"""Values for options of these names, wherever an attack has one, so that the suite is quick."""
ENOUGH = CHEAP | {
    "steps": "30",
    "check_every": "10",
    "start_seeds": "3",
    "rounds": "20",
    "follower_steps": "10",
    "follower_rate": "0.02",
}
"""As much as it takes for an effect."""
FLOOR = 2.0
"""Test error that an attack adds, in points, on a hundred digits of which a fifth is poisoned."""


class StoppedError(Exception):
    """What stands for a kill."""


class Interrupting(Journal):
    """A journal whose process is killed right after its n-th save."""

    def __init__(self, folder: Path, saves: int) -> None:
        super().__init__(folder)
        self.left = saves

    def save(self, arrays: dict[str, np.ndarray], row: LogRow | None = None) -> None:
        super().save(arrays, row)
        self.left -= 1
        if self.left == 0:
            raise StoppedError


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)

    def split(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(size, dtype=np.int32) % 4
        images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8) // 2
        images[np.arange(size), labels * 2] += 100  # a bright row tells the class
        return images, labels

    spec = DataSpec(name="digits", val_size=20)
    return Dataset(spec, *split(40), *split(20), *split(20), ("a", "b", "c", "d"))


def task(dataset: Dataset, budget: Budget) -> Task:
    return Task.of(dataset, budget, TINY)


def built(name: str) -> Attack:
    return attacks.build(name, _set(name, CHEAP))


def _set(name: str, values: dict[str, str]) -> list[tuple[str, str]]:
    """Those of these options that the attack has, as typed."""
    has = {field.name for field in options(attacks.load(name))}
    return [(option.replace("_", "-"), value) for option, value in values.items() if option in has]


def _accepts(attack: Attack, budget: Budget) -> bool:
    try:
        attack.require(budget)
    except UserError:
        return False
    return True


def accepted(name: str, budget: Budget) -> Attack:
    attack = built(name)
    try:
        attack.require(budget)
    except UserError as refusal:
        pytest.skip(str(refusal))
    return attack


@pytest.fixture(params=attacks.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "budget", SOME, ids=lambda b: f"{b.mode}-{b.labels}-{b.pixels.kind}-{b.fraction:g}"
)
def test_within_budget_deterministic_and_storable(
    name: str, budget: Budget, dataset: Dataset, tmp_path: Path
) -> None:
    attack = accepted(name, budget)
    poison = attack.craft(task(dataset, budget), harness.crafting_key(3), Journal())
    poison.save(tmp_path / "a.safetensors")
    stored = PoisonSet.load(tmp_path / "a.safetensors")
    stored.check(dataset.train_images, dataset.train_labels, dataset.num_classes)
    assert stored.hash == poison.hash
    assert stored.budget == budget

    again = attack.craft(task(dataset, budget), harness.crafting_key(3), Journal())
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def a_game_of(name: str) -> Budget:
    """The first of the games with free labels that an attack accepts, or else the first of all."""
    for budget in sorted(GAMES, key=lambda budget: budget.labels == "fixed"):
        if _accepts(built(name), budget):
            return budget
    pytest.fail("the attack accepts no game")


def test_nothing_depends_on_the_test_split(
    name: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """White images of classes that there are not: whoever looked at them would do otherwise, or fail."""
    pills = replace(
        dataset,
        test_images=np.full_like(dataset.test_images, 255),
        test_labels=np.full_like(dataset.test_labels, 99),
    )
    victims = {"smooth": TINY, "standard": TINY}
    setting = Setting(DIGITS, (), dataset.spec, None, a_game_of(name), victims, (0, 1))
    request = runs.Request(setting, name, built(name), 3, "")
    hashes = []
    for split in (dataset, pills):
        monkeypatch.setattr("poisonbench.data.load", lambda *_, split=split: split)
        hashes.append(runs.craft(request, tmp_path / str(len(hashes))).poison.hash)
    assert hashes[0] == hashes[1]


def test_progress_is_reported(name: str, dataset: Dataset) -> None:
    """An attack that trains or climbs says how far it has come; one that does neither need not."""
    attack, budget = built(name), a_game_of(name)
    bars: list[tuple[int, list[int]]] = []

    class Watched(Journal):
        def progress(self, title: str, total: int, done: int = 0) -> Progress:
            bar, moved = super().progress(title, total, done), [done]
            bars.append((total, moved))
            advance = bar.advance

            def watched(steps: int = 1, note: str = "") -> None:
                moved[0] += steps
                advance(steps, note)

            bar.advance = watched  # type: ignore[method-assign]
            return bar

    journal = Watched()
    attack.craft(task(dataset, budget), harness.crafting_key(3), journal)
    assert bars or not journal.rows
    assert bars or not {"steps", "rounds"} & {field.name for field in options(type(attack))}
    assert all(0 < moved[0] <= total for total, moved in bars)


def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    name: str, dataset: Dataset, tmp_path: Path
) -> None:
    attack, budget = built(name), a_game_of(name)
    key = harness.crafting_key(0)
    whole = attack.craft(task(dataset, budget), key, Journal(tmp_path / "whole"))
    for saves in range(1, 10):
        folder = tmp_path / str(saves)
        folder.mkdir()
        try:
            attack.craft(task(dataset, budget), key, Interrupting(folder, saves))
        except StoppedError:
            resumed = Journal(folder)
            poison = attack.craft(task(dataset, budget), key, resumed)
            assert poison.hash == whole.hash
            assert len({row["metastep"] for row in resumed.rows}) == len(resumed.rows)
        else:
            break  # fewer checkpoints than that
    else:
        pytest.fail("the attack never ends")


def test_the_view_of_an_attacker(dataset: Dataset) -> None:
    view = task(dataset, GAMES[0])
    for array in (view.train_images, view.train_labels, view.val_images, view.val_labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert not any("test" in field or "seed" in field for field in vars(view))
    assert not any(
        np.array_equal(array, dataset.test_images)
        for array in vars(view).values()
        if isinstance(array, np.ndarray)
    )


def test_crafting_and_evaluation_keys_differ() -> None:
    import jax

    craft = {tuple(jax.random.key_data(harness.crafting_key(seed)).tolist()) for seed in range(50)}
    judge = {tuple(jax.random.key_data(harness.evaluation_key(seed)).tolist()) for seed in range(50)}
    assert len(craft) == len(judge) == 50
    assert not craft & judge


def test_bounds_of_the_box_are_the_whole_range(dataset: Dataset) -> None:
    view = task(dataset, Budget(fraction=0.1, pixels=Box()))
    low, high = view.bounds(np.arange(3))
    assert (low == 0).all()
    assert (high == 255).all()


@pytest.mark.slow
def test_every_attack_but_a_control_does_harm(name: str) -> None:
    """Victims that it was not fitted to err more often, by the floor, than on clean data.

    What it does beyond noise is for the records to say: published attacks do not always.
    """
    attack = attacks.build(name, _set(name, ENOUGH))
    if attack.control:
        pytest.skip("a control does no harm by its choices")
    digits = load(DataSpec(name="digits", train_size=100, val_size=200, test_size=200))
    learns = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=12, norm_momentum=0.8)
    games = [Budget(fraction=0.2, labels="free"), Budget(fraction=1, pixels=LInf(radius=80))]
    view = Task.of(digits, next(game for game in games if _accepts(attack, game)), learns)
    poison = attack.craft(view, harness.crafting_key(0), Journal())
    keys = jnp.stack([harness.evaluation_key(seed) for seed in range(5)])

    def error(images: np.ndarray, labels: np.ndarray) -> float:
        data = TrainingSet.clean(images, labels, 10)
        scores = train_and_score(learns, data, keys, digits.test_images, digits.test_labels)
        return 100 - float(scores[:, -1].mean())

    clean = error(digits.train_images, digits.train_labels)
    assert clean < 40, "victims that have learnt nothing would prove nothing"
    assert error(*poison.apply(digits.train_images, digits.train_labels)) > clean + FLOOR


def held_out_losses(**options: str) -> list[float]:
    """Of victims with seeds that no metastep used, in an ascent of a digits task that learns."""
    digits = load(DataSpec(name="digits", train_size=100, val_size=200, test_size=100))
    learns = DIGITS.recipes["smooth"].replace(width=4, batch_size=25, epochs=8, norm_momentum=0.8)
    journal = Journal()
    attack = attacks.build("mgd", [(name.replace("_", "-"), text) for name, text in options.items()])
    attack.craft(Task.of(digits, GAMES[0], learns), harness.crafting_key(0), journal)
    return [row["held_out_loss"] for row in journal.rows if "held_out_loss" in row]


def test_mgd_climbs() -> None:
    held_out = held_out_losses(start="random", steps="8", step_size="0.2", check_every="4")
    assert held_out[0] < 2, "untrained victims are at log(10) = 2.3, and would prove nothing"
    assert held_out[0] + 0.01 < held_out[1]
    assert held_out[0] + 0.02 < held_out[2]


@pytest.mark.slow
def test_the_highest_ranked_images_are_a_better_start() -> None:
    (random,) = held_out_losses(start="random", steps="0")
    (ranked,) = held_out_losses(start="influence", steps="0", start_seeds="2")
    assert random + 0.02 < ranked
