"""The comparison of estimators says of estimates what is true of them.

Claims of `benchmarks.estimating` and `benchmarks.estimators` tested here:

- of estimates drawn with a known noise, cosine, noise and their averages come out as they must; signs
  are judged after being brought to the truth's length;
- two noisy references agree as far as their halves say they can, and not where they differ in truth;
- samples of ES, of PES by whole runs, and of smoothed exact gradients have the same mean on a toy, and
  those of windows have another;
- a whole run of PES costs what a pair of ES does, and one in windows what one exact gradient does;
- the command writes its record and its pictures, and goes on from what is there (slow); bad input is one
  line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from metatoys import DATA, LearnedRate, Parabola, smoothed_slope

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("NOT TESTED: benchmarks/ is part of the checkout only", allow_module_level=True)

from benchmarks import estimating  # noqa: E402
from benchmarks import estimators as bench  # noqa: E402
from poisonbench.metatraining.estimators import ES, PES, Cost, Exact, Truncated  # noqa: E402
from poisonbench.metatraining.unroll import Problem  # noqa: E402

TRUTH = np.random.default_rng(0).normal(size=40)


def noisy(count: int, noise: float, seed: int, around: np.ndarray = TRUTH) -> np.ndarray:
    """Estimates whose mean squared deviation is `noise` times the truth's squared norm."""
    drawn = np.random.default_rng([1, seed]).normal(size=(count, len(TRUTH)))
    return around + drawn * np.linalg.norm(TRUTH) * (noise / len(TRUTH)) ** 0.5


def judged(name: str, gradients: np.ndarray, cost: float = 10.0) -> Any:
    found = estimating.Sample(gradients, 3)
    return estimating.quality("start", name, 5, found, cost, 30.0, TRUTH)


def test_quality_of_estimates_with_a_known_noise() -> None:
    found = judged("es", noisy(3000, 9.0, 0))
    assert found.noise == pytest.approx(9, rel=0.05)
    assert found.noise_compute == pytest.approx(18, rel=0.05)
    assert found.cosine == pytest.approx(1 / 10**0.5, abs=0.02)
    assert found.low < found.cosine < found.high
    # Exact costs three of these: its compute once is 3 estimates, ten times 30.
    assert found.cosine_equal[0] == pytest.approx(1 / 4**0.5, abs=0.04)
    assert found.cosine_equal[1] == pytest.approx(1 / 1.3**0.5, abs=0.04)
    assert found.cosine_mean > 0.99
    assert found.broken == 3
    assert judged("es-sign", 50 * noisy(3000, 9.0, 0)).noise == pytest.approx(9, rel=0.1)
    assert judged("es", 50 * noisy(3000, 9.0, 0)).noise == pytest.approx(9 * 50**2, rel=0.1)


def test_references_agree_as_far_as_their_noise_allows() -> None:
    exact, es = noisy(400, 40.0, 1), noisy(400, 400.0, 2)
    found, reference = estimating.truth("start", 5, exact, es)
    np.testing.assert_allclose(reference, exact.mean(0))
    assert found.halves == pytest.approx(1 / 1.2, abs=0.08)
    assert found.agreement == pytest.approx(1 / (1.1 * 2.0) ** 0.5, abs=0.12)
    assert found.attainable == pytest.approx(found.agreement, abs=0.15)
    elsewhere = noisy(400, 4.0, 3, around=TRUTH[::-1])
    other, _ = estimating.truth("start", 5, exact, elsewhere)
    assert other.attainable - other.agreement > 0.4


def test_samples_have_the_mean_that_they_should() -> None:
    problem = Problem(LearnedRate(), Parabola(), "mean", DATA)
    weights, steps, sigma = {"log_rate": jnp.array([-1.0])}, 8, 0.05
    slope = smoothed_slope(-1.0, sigma, steps, "mean")
    samples = [
        estimating.sample(ES(sigma), problem, weights, steps, 500),
        estimating.sample(PES(sigma, 2), problem, weights, steps, 500),
        estimating.smoothed(Exact(steps), problem, weights, sigma, steps, 100),
    ]
    for found in samples:
        error = found.gradients.std() / len(found.gradients) ** 0.5
        assert abs(found.gradients.mean() - slope) < 4 * error
        assert found.broken == 0
    assert len(samples[0].gradients) == 500
    assert samples[2].gradients.std() < 0.3 * samples[0].gradients.std()
    windows = estimating.sample(Truncated(2), problem, weights, steps, 100).gradients
    assert windows.std() < 0.1 * abs(windows.mean() - slope)


def test_costs() -> None:
    assert estimating.cost(ES(), 100, 4.0) == estimating.cost(PES(truncation=10), 100, 4.0) == 200
    assert estimating.cost(Truncated(10), 100, 4.0) == estimating.cost(Exact(), 100, 4.0) == 500
    assert estimating.strategies(0.01, 1000)["pes"].truncation == 100
    assert Exact().cost(3) == Cost(3, 3)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--nonsense"], ["--out", "/dev/null/x"]):
        assert bench.main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bench.Bench, "_length", interrupt)
        assert bench.main(["--quick", "--out", str(tmp_path)]) == 130
    with monkeypatch.context() as patched:
        patched.setattr(bench.Bench, "_leg", lambda *_: pytest.fail("raced again"))
        assert bench.main(["--quick", "--out", str(tmp_path)]) == 0
    record = bench.Comparison.load(tmp_path / "estimators.json")
    assert {q.estimator for q in record.qualities} == {"exact", "truncated", "es", "es-sign", "pes"}
    assert {q.num_steps for q in record.qualities} == set(bench.QUICK.lengths)
    assert record.factor > 0
    for leg in record.race:  # two meta-steps at least, however dear the clock found a differentiated one
        strategy = estimating.strategies(bench.QUICK.sigma, leg.num_steps)[leg.estimator]
        each = 4 * strategy.cost(leg.num_steps).in_steps(record.factor)
        assert leg.compute[-1] <= max(bench.QUICK.budget, 2.001 * each)
    for name in ("gradients.png", "race.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ".pieces").exists()
