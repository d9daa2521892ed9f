"""An ascent hands in the best of what it checked, and is never far from where it was killed.

Claims of `poisonbench.ascent` and `attacks.mgd` tested here, on made-up losses and gradients:

- what is handed in is the poison of the check with the highest held-out loss, be it the first, the last
  or one between, and not where the climb ended;
- every update climbs; the sign of the mean moves all pixels equally far, and a normalized step has its
  length whatever the gradients are;
- what it is judged on holds no image whose place the poison takes;
- steps fall to the share that they are told, as often as they are told;
- killed between a metastep and its check, it repeats the check alone and ends the same;
- where no check is finite it says so;
- killed within a metagradient, it goes on from there and ends the same; what another run left there is
  dropped;
- a metastep's gradient is the mean over its runs, each with a key and a place of its own to go on from,
  within the memory that was asked for;
- a gradient goes through a share of the run, and from a share of the metasteps on through all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, PRNGKeyArray

from poisonbench.ascent import Ascent
from poisonbench.attacks import Task, mgd
from poisonbench.conformance import tiny
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.metagradient import metagradient
from poisonbench.metagradient.resume import Resume
from poisonbench.problem import Problem
from poisonbench.threat import Budget
from poisonbench.tracks import DIGITS

KEY = jax.random.key(0)
RECIPE = DIGITS.recipes["smooth"].replace(network="cnn", width=2, batch_size=10)
TASK = Task.of(tiny(), Budget(fraction=0.1), RECIPE)
TARGET = 0.5
WRONG = 0.25
SHAPE = (TASK.num_poison, 8, 8, 1)


@dataclass(frozen=True)
class Towards(Ascent):
    """Climbs minus half the squared distance to mid-grey, of which the gradient is the distance.

    Attributes:
        calls: for each gradient, how many metasteps had been taken.
    """

    calls: list[int] = field(default_factory=list)

    def gradient(
        self,
        problem: Problem,
        z: Float[Array, "p h w c"],
        key: PRNGKeyArray,
        done: int,
        journal: Journal,
    ) -> tuple[float, Float[Array, "p h w c"]]:
        """The distance."""
        self.calls.append(done)
        return 0.0, TARGET - z


class Checks:
    """Held-out losses by a list, and the poisons that they were asked of."""

    def __init__(self, values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.values = values
        self.seen: list[np.ndarray] = []
        monkeypatch.setattr(Problem, "judged", lambda _, images, *rest: (self.harm(images), WRONG))

    def harm(self, images: np.ndarray) -> float:
        self.seen.append(images)
        return self.values[len(self.seen) - 1]


@pytest.mark.parametrize("best", range(4))
def test_the_best_of_the_checks_is_handed_in(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1 * i for i in range(4)]
    values[best] = 1.0
    checks, journal = Checks(values, monkeypatch), Journal()
    poison = Towards(steps=5, check_every=2).craft(TASK, KEY, journal)
    assert len(checks.seen) == 4
    assert all((a != b).any() for a, b in zip(checks.seen, checks.seen[1:], strict=False))
    np.testing.assert_array_equal(poison.images, checks.seen[best])
    logged = {row["metastep"]: row["held_out_loss"] for row in journal.rows if "held_out_loss" in row}
    assert logged == dict(zip((0, 2, 4, 5), values, strict=True))
    assert [row["metastep"] for row in journal.rows] == list(range(6))
    assert all(row["held_out_error"] == WRONG for row in journal.rows if "held_out_loss" in row)


@pytest.mark.parametrize("update", ["adam", "sign", "normalized"])
def test_every_update_climbs(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks([0.0, 1.0], monkeypatch)
    attack = Towards(steps=20, check_every=20, update=update, step_size=0.05)
    attack.craft(TASK, KEY, Journal())
    before, after = (np.abs(images / 255 - TARGET).mean() for images in checks.seen)
    assert after < before / 4


def test_a_sign_step_moves_all_pixels_equally_far(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks([0.0, 1.0], monkeypatch)
    Towards(steps=1, update="sign", step_size=20 / 255).craft(TASK, KEY, Journal())
    before, after = (images.astype(int) for images in checks.seen)
    assert set(np.abs(after - before).ravel()) == {20}
    np.testing.assert_array_equal(np.sign(after - before), np.sign(255 * TARGET - before))


def test_a_normalized_step_is_the_gradient_at_a_length_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long gradients are, a step is as long, and each gradient has an equal part in it."""
    monkeypatch.setattr(Problem, "judged", lambda *_: (0.0, WRONG))
    first, second = jax.random.normal(KEY, (2, *SHAPE))
    given, seen = iter([first, 1000 * second, 0 * first]), []

    @dataclass(frozen=True)
    class Told(Towards):
        def gradient(self, *_: Any) -> tuple[float, Any]:
            return 0.0, next(given)

        def moved(self, problem: Problem, z: Any, updates: Any) -> Any:
            seen.append(updates)
            return z

    Told(steps=2, update="normalized", momentum=0.5, step_size=0.1, last_step=1.0).craft(
        TASK, KEY, Journal()
    )
    one, two = (each / jnp.sqrt(jnp.mean(each**2)) for each in (first, second))
    np.testing.assert_allclose(seen[0], 0.1 * one, rtol=1e-4)
    mean = one / 3 + two * 2 / 3
    np.testing.assert_allclose(seen[1], 0.1 * mean / jnp.sqrt(jnp.mean(mean**2)), rtol=1e-4, atol=1e-6)
    Told(steps=1, update="normalized").craft(TASK, KEY, Journal())
    assert not seen[2].any(), "no gradient, no step"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [20, 15.5, 11, 6.5]),
        ({"last_step": 1.0}, [20, 20, 20, 20]),
        ({"last_step": 0.0}, [20, 15, 10, 5]),
        ({"restarts": 1}, [20, 11, 20, 11]),
        ({"restarts": 3}, [20, 20, 20, 20]),
        ({"restarts": 3}, [20, 20, 20, 11, 20]),
        ({"restarts": 1, "last_step": 0.0}, [20, 10, 20, 40 / 3, 20 / 3]),
    ],
)
def test_steps_fall_as_they_are_told(
    options: dict[str, Any], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes in levels, seen on a pixel that has far to go."""
    monkeypatch.setattr(Problem, "judged", lambda *_: (0.0, WRONG))
    seen = [0.0]

    @dataclass(frozen=True)
    class Watched(Towards):
        def moved(self, problem: Problem, z: Any, updates: Any) -> Any:
            moved: Any = super().moved(problem, z, updates)
            seen.append(255 * float(moved[far]))
            return moved

    attack = Watched(steps=len(expected), update="sign", momentum=0.0, step_size=20 / 255, **options)
    start = attack.started(TASK, jax.random.split(KEY, 3)[0], Journal()).images
    far = np.unravel_index(start.argmin(), start.shape)
    assert start[far] == 0
    attack.craft(TASK, KEY, Journal())
    np.testing.assert_allclose(np.diff(seen), expected, rtol=1e-4)


def test_what_a_step_cannot_be_is_refused() -> None:
    for options in ({"last_step": 1.5}, {"restarts": -1}, {"restarts": 4, "steps": 4}):
        with pytest.raises(UserError, match=f"--{next(iter(options)).replace('_', '-')}"):
            Towards(**options)  # type: ignore[arg-type]


def test_killed_before_a_check_it_repeats_the_check_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [0.0, 2.0, 1.0]
    Checks(values, monkeypatch)
    whole = Towards(steps=4, check_every=2).craft(TASK, KEY, Journal())

    cut = Towards(steps=4, check_every=2)
    Checks(values[:1], monkeypatch)  # the second check ends in an error
    with pytest.raises(IndexError):
        cut.craft(TASK, KEY, Journal(tmp_path))
    assert len(cut.calls) == 2
    checks, journal = Checks(values[1:], monkeypatch), Journal(tmp_path)
    again = cut.craft(TASK, KEY, journal)
    assert again.hash == whole.hash
    assert len(cut.calls) == 4
    assert len(checks.seen) == 2
    assert [row.get("held_out_loss") for row in journal.rows] == [0.0, None, 2.0, None, 1.0]


def test_where_no_check_is_finite_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    Checks([float("nan")] * 3, monkeypatch)
    with pytest.raises(UserError, match="no check had a finite loss"):
        Towards(steps=2, check_every=1).craft(TASK, KEY, Journal())


def test_a_metastep_is_the_mean_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path | None, int | str | None]] = []
    runs: list[bytes] = []

    def stated(step: Any, objective: Any, state: Any, num_steps: int, z: Array, **how: Any) -> Any:
        asked.append((how["checkpoint"], how["memory"]))
        runs.append(np.asarray(jax.random.key_data(step.run.keys)).tobytes())
        return jnp.float32(len(asked)), jnp.full(SHAPE, 3.0 * len(asked))

    monkeypatch.setattr(mgd, "metagradient", stated)
    indices = TASK.random_indices(KEY)
    problem = Problem.of(TASK, indices, TASK.train_labels[indices], "cross_entropy")
    attack = mgd.MGD(runs_per_step=3, memory="1MiB")
    value, gradient = attack.gradient(problem, jnp.zeros(SHAPE), KEY, 0, Journal(tmp_path))
    assert value == pytest.approx(2.0)
    np.testing.assert_allclose(gradient, 6.0, rtol=1e-6)
    assert len(set(runs)) == 3
    assert {memory for _, memory in asked} == {"1MiB"}
    places = [place for place, _ in asked]
    assert len(set(places)) == 3
    assert all(place is not None and place.parent == tmp_path for place in places)
    attack.gradient(problem, jnp.zeros(SHAPE), KEY, 0, Journal())
    assert asked[-1][0] is None


def test_metasteps_are_truncated_until_they_are_to_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    gone_through: list[int] = []

    def stated(step: Any, objective: Any, state: Any, num_steps: int, z: Array, **how: Any) -> Any:
        gone_through.append(num_steps)
        return jnp.float32(0), jnp.zeros(SHAPE)

    monkeypatch.setattr(mgd, "metagradient", stated)
    indices = TASK.random_indices(KEY)
    problem = Problem.of(TASK, indices, TASK.train_labels[indices], "cross_entropy")
    attack = mgd.MGD(steps=4, differentiated=0.5, full_from=0.5)
    for done in range(4):
        attack.gradient(problem, jnp.zeros(SHAPE), KEY, done, Journal())
    whole = problem.start(KEY[None])[0].num_steps
    half = round(whole / 2)
    assert gone_through == [half, half, whole, whole]
    with pytest.raises(UserError, match="--full-from"):
        mgd.MGD(full_from=2.0)


def crafted(folder: Path | None, seed: int = 0) -> str:
    """The poison of two metasteps, whose metagradients go through several leaves."""
    attack = mgd.MGD(start="pixels", steps=2, start_seeds=1, check_every=2, check_seeds=1, memory="15KB")
    return attack.craft(TASK, jax.random.key(seed), Journal(folder)).hash


@pytest.mark.slow
def test_killed_within_a_metagradient_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = crafted(None)
    monkeypatch.setattr(mgd, "metagradient", partial(metagradient, checkpoint_every=0.0))
    saves, save, skipped = [0], Resume.save, []

    def killing(self: Resume, *arguments: Any) -> None:
        save(self, *arguments)
        saves[0] += 1
        if saves[0] in (2, 9, 12):
            raise KeyboardInterrupt

    load = Resume.load

    def watched(self: Resume, *arguments: Any) -> Any:
        found = load(self, *arguments)
        skipped.append(found is not None and found[0])
        return found

    monkeypatch.setattr(Resume, "save", killing)
    monkeypatch.setattr(Resume, "load", watched)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            crafted(tmp_path)
    assert len(list(tmp_path.glob("checkpoint-*.safetensors"))) == 1
    assert crafted(tmp_path) == whole
    assert len(skipped) == 3
    assert all(skipped)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


@pytest.mark.slow
def test_what_another_run_left_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = crafted(None)
    with monkeypatch.context() as patched:
        patched.setattr(mgd, "metagradient", partial(metagradient, checkpoint_every=0.0))
        patched.setattr(Resume, "remove", lambda _: None)
        crafted(tmp_path, seed=1)
    (tmp_path / "checkpoint.safetensors").unlink()
    assert len(list(tmp_path.iterdir())) == 2  # of the ranking and of a metastep
    assert crafted(tmp_path) == whole


def test_a_memory_that_is_no_size_is_refused() -> None:
    with pytest.raises(UserError, match="as a size"):
        mgd.MGD(memory="plenty")


def test_what_is_climbed_is_what_was_asked_for() -> None:
    attack, rows = Towards(goal="error", temperature=0.5), np.arange(TASK.num_poison)
    loss = attack.problem(TASK, rows, TASK.train_labels[rows]).loss
    assert (loss.goal, loss.temperature) == ("error", 0.5)
    np.testing.assert_array_equal(loss.images, TASK.val_images)
    with pytest.raises(UserError, match="temperature"):
        Towards(temperature=0.0)


def test_all_that_a_climb_may_be_judged_on_is_clean() -> None:
    """Validation images, and training images, less those whose places the poison takes."""
    attack, rows = Towards(judged_on="all"), np.array([2, 0])
    loss = attack.problem(TASK, rows, TASK.train_labels[rows]).loss
    kept = [i for i in range(len(TASK.train_labels)) if i not in rows]
    assert len(loss.images) == len(loss.labels) == len(TASK.val_labels) + len(kept)
    np.testing.assert_array_equal(loss.images[len(TASK.val_labels) :], TASK.train_images[kept])
    np.testing.assert_array_equal(loss.labels[len(TASK.val_labels) :], TASK.train_labels[kept])
    everywhere = np.arange(len(TASK.train_labels))
    np.testing.assert_array_equal(
        attack.problem(TASK, everywhere, TASK.train_labels).loss.images, TASK.val_images
    )
