"""Meta-training learns, goes on where it was, and says how its weights came about.

Claims of `poisonbench.metatraining.loop` and `experiment`, and of the verb, tested here:

- every estimator, through the loop, brings a learned rate on a parabola near the best one;
- a loop cut anywhere and started again ends with the state of one that was not, PES's runs included;
- another meta-training's checkpoint is refused; `fresh` starts over with the same bytes;
- lengths lie between the least and a longest that grows, or is there from the start, log-uniform;
- runs weigh the same, whether the squares of their gradients fit float32 or not;
- what is kept is the best by validation, not the last;
- broken estimates are counted in the record, and weights stay finite;
- the verb writes weights that load, a record and a picture, says them as JSON, and does nothing twice;
  begun from weights, it starts at them; published once, the three lie under results/; a process killed
  by the system ends with the same bytes (slow);
- bad input is one line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import Run, refused
from metatoys import DATA, LearnedRate, Parabola

from poisonbench.errors import UserError
from poisonbench.metatraining import estimators, loop
from poisonbench.metatraining.experiment import Adam, MetaTraining
from poisonbench.metatraining.loop import Schedule, Trained, Trainer
from poisonbench.optimizers.weights import load_weights

SHORT = Schedule(
    steps=60, min_unroll=10, max_unroll=20, tasks_per_step=1, runs=2, learning_rate=0.1,
    validate_every=20, validation_runs=1,
)  # fmt: skip


def trainer(name: str, schedule: Schedule = SHORT, start: float = -4.0) -> Trainer:
    bank = [(Parabola(curvature, 0.1), DATA) for curvature in (1.0, 2.0)]
    objective: Any = "mean"
    estimator = estimators.make(name, sigma=0.1, truncation=5, longest=schedule.max_unroll)
    return Trainer(LearnedRate(start), estimator, objective, bank, bank[:1], schedule)


def rate(trained: Trained) -> float:
    return float(jnp.exp(trained.weights["log_rate"][0]))


SLOW_EXACT = pytest.param("exact", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["es", "es-sign", "pes", SLOW_EXACT, "truncated"])
def test_every_estimator_learns_the_rate(name: str, tmp_path: Path) -> None:
    trained = trainer(name).train(tmp_path / "c.safetensors", "x")
    # Curvatures 1 and 2: the fastest stable rates are 1 and 1/2; the start is 0.018.
    assert 0.2 < rate(trained) < 1.3
    assert trained.validation[-1, 1] < 0.1 * trained.validation[0, 1]
    assert trained.steps.shape == (60, len(loop.COLUMNS))


@pytest.mark.parametrize("name", ["pes", SLOW_EXACT, "truncated"])
def test_cut_and_begun_again_it_ends_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer(name).train(tmp_path / "whole.safetensors", "x")
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 0.0)

    class KilledError(Exception):
        """Stands for a kill."""

    for cut in (1, 33):
        cut_one = trainer(name)
        steps = cut_one._stepped

        def until(state: Any, step: int, cut: int = cut, steps: Any = steps) -> Any:
            if step >= cut:
                raise KilledError
            return steps(state, step)

        monkeypatch.setattr(cut_one, "_stepped", until)
        with pytest.raises(KilledError):
            cut_one.train(tmp_path / "cut.safetensors", "x")
    again = trainer(name).train(tmp_path / "cut.safetensors", "x")
    np.testing.assert_array_equal(again.steps, whole.steps)
    np.testing.assert_array_equal(again.validation, whole.validation)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again.weights, whole.weights))
    with pytest.raises(UserError, match="another meta-training"):
        trainer(name).train(tmp_path / "cut.safetensors", "y")


def test_lengths() -> None:
    schedule = Schedule(steps=100, min_unroll=30, max_unroll=500)
    longest = [schedule.longest(step) for step in range(100)]
    assert longest[0] == 30
    assert longest == sorted(longest)
    assert set(longest[50:]) == {500}
    drawn = [schedule.length(step, u) for step in range(100) for u in np.linspace(0, 0.999, 20)]
    assert min(drawn) == 30
    assert max(drawn) >= 490
    assert all(length % 10 == 0 for length in drawn)
    assert all(schedule.length(0, u) == 30 for u in np.linspace(0, 0.999, 20))
    steep, flat = (Schedule(steps=100, min_unroll=30, max_unroll=500, ramp=ramp) for ramp in (0.1, 0.0))
    assert steep.longest(5) == schedule.longest(25)
    assert steep.longest(10) == 500
    assert {flat.longest(step) for step in range(100)} == {500}
    middle = np.mean([schedule.length(99, u) < (30 * 500) ** 0.5 for u in np.linspace(0, 1, 500)])
    assert abs(middle - 0.5) < 0.1


def test_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trainer("exact", start=-4.0)
    monkeypatch.setattr(
        found,
        "_descended",
        lambda weights, adam, g: ({"log_rate": weights["log_rate"] + 0.1}, adam, 1.0),
    )
    trained = found.train(tmp_path / "c.safetensors", "x")
    best = trained.validation[np.argmin(trained.validation[:, 1])]
    assert 0 < best[0] < 60
    np.testing.assert_allclose(
        trained.weights["log_rate"], found.start["log_rate"] + 0.1 * best[0], rtol=1e-3
    )
    assert trained.last["log_rate"] > trained.weights["log_rate"]


def test_every_run_weighs_the_same_however_long_its_gradient() -> None:
    gradients = {
        "a": jnp.array([[1.5e38, 0], [0, 0], [3e-25, 0], [0, 0.6]]),
        "b": jnp.array([2e38, 0, 4e-25, 0.8]),
    }  # fmt: skip
    found = loop._mean(gradients, unit=True)
    np.testing.assert_allclose(found["a"], [0.3, 0.15], rtol=1e-5)
    np.testing.assert_allclose(found["b"], 0.6, rtol=1e-5)


def test_broken_estimates_are_counted(tmp_path: Path) -> None:
    trained = trainer("es", start=40.0).train(tmp_path / "c.safetensors", "x")
    assert trained.steps[:, loop.COLUMNS.index("broken")].sum() > 0
    assert np.isfinite(trained.weights["log_rate"]).all()


def test_adam_is_adam() -> None:
    import optax

    params, slope = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, -2.0, 0.0])}
    ours, theirs = Adam().transformation(5, {}), optax.adam(1e-3)
    first = ours.update(slope, ours.init(params), params, value=jnp.float32(1))[0]
    np.testing.assert_array_equal(first["w"], theirs.update(slope, theirs.init(params))[0]["w"])


TINY = (
    "metatrain", "--optimizer", "mlp_opt", "--estimator", "es", "--hidden", "2", "--steps", "4",
    "--tasks", "2", "--held-out", "1", "--family", "mlp", "--augmented", "0",
    "--min-unroll", "3", "--max-unroll", "4",
    "--tasks-per-step", "1", "--runs", "2", "--validate-every", "2", "--validation-runs", "1",
)  # fmt: skip


@pytest.mark.slow
def test_the_verb(command: Run) -> None:
    code, out, err = command(*TINY, "--json", "--out", "first")
    assert code == 0, err
    record = MetaTraining.load(Path("first/metatraining.json"))
    assert json.loads(out) == json.loads(record.model_dump_json())
    assert len(record.steps) == 4
    assert [done for done, _ in record.validation] == [0, 2, 4]
    assert np.shape(record.scores) == np.shape(record.adam) == (1, 2)
    assert np.mean(record.scores) == pytest.approx(min(score for _, score in record.validation))
    assert record.command.endswith("--out first")
    optimizer, weights = load_weights("first/weights.safetensors")
    assert optimizer.name == "mlp_opt"
    assert jax.tree.leaves(weights)[0].dtype == jnp.float32
    assert Path("first/loss.png").read_bytes().startswith(b"\x89PNG")
    before = Path("first/metatraining.json").read_bytes()
    assert command(*TINY, "--out", "first")[0] == 0
    assert Path("first/metatraining.json").read_bytes() == before
    message = refused(command, *TINY, "--seed", "1", "--out", "first")
    assert "another meta-training" in message
    assert command(*TINY, "--fresh", "--out", "first")[0] == 0
    again = load_weights("first/weights.safetensors")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, weights))
    words = (*TINY, "--from", "first/weights.safetensors", "--out", "second")
    assert command(*words)[0] == 0
    second = MetaTraining.load(Path("second/metatraining.json"))
    assert second.start is not None
    assert second.validation[0][1] == pytest.approx(np.mean(record.scores))
    assert "weights of" in refused(command, *words, "--hidden", "3")
    Path("results").mkdir()
    assert command("publish", "second", "--results", "results")[0] == 0
    names = ("loss.png", "metatraining.json", "weights.safetensors")
    published = Path("results/metatraining/second")
    assert sorted(path.name for path in published.iterdir()) == list(names)
    for name in names:
        assert (published / name).read_bytes() == Path("second", name).read_bytes()
    assert "never overwritten" in refused(command, "publish", "second", "--results", "results")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--max-unroll", "2"], "less than --min-unroll"),
        (["--meta-learning-rate", "nan"], "--meta-learning-rate must be positive"),
        (["--sigma", "0"], "--sigma must be positive"),
        (["--estimator", "reinforce"], "reinforce"),
        (["--optimizer", "adam"], "adam"),
        (["--bank", "4"], "VeLO's"),
        (["--hidden", "0"], "hidden"),
        (["--tasks", "0"], "at least 1"),
        (["--augmented", "2"], "between 0 and 1"),
        (["--family", "convs"], "conv"),
        (["--dataset", "digit"], "digits"),
        (["--estimator", "pes", "--objective", "final"], "pes estimates the mean"),
        (["--ramp", "1.5"], "--ramp is a share"),
        (["--estimator", "pes", "--truncation", "999"], "at most --max-unroll"),
        (["--estimator", "truncated", "--objective", "final"], "truncated estimates the mean"),
        (["--from", "nowhere"], "nowhere"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, command: Run) -> None:
    assert said in refused(command, *TINY, *words)


@pytest.mark.slow
def test_killed_by_the_system_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys; from poisonbench.metatraining import loop; loop.CHECKPOINT_EVERY = 0;"
        "from poisonbench.cli import main; main()"
    )
    words = [sys.executable, "-c", script, *TINY, "--steps", "30", "--estimator", "pes"]
    words += ["--truncation", "4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*words, "--out", str(whole)], check=True, capture_output=True)
    kills = 0
    for _ in range(3):
        with subprocess.Popen([*words, "--out", str(cut)], stderr=subprocess.DEVNULL) as process:
            before = cut / "checkpoint.safetensors"
            stamp = before.stat().st_mtime_ns if before.exists() else 0
            while process.poll() is None:
                if before.exists() and before.stat().st_mtime_ns != stamp:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.01)
    assert kills > 0
    subprocess.run([*words, "--out", str(cut)], check=True, capture_output=True)
    first, second = (MetaTraining.load(folder / "metatraining.json") for folder in (whole, cut))
    assert second.steps == first.steps
    arrays = [load_weights(folder / "weights.safetensors")[1] for folder in (whole, cut)]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *arrays))
