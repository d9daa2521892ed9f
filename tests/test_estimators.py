"""Estimators of a metagradient agree with the truth where it is known.

Claims of `poisonbench.metatraining.evolution`, `exact` and `unroll` tested here:

- the mean of many ES estimates is the gradient of the smoothed loss, in closed form, and not that of the
  unsmoothed one where the two differ; so is the mean of PES over a run's truncations, at a small σ;
- PES forgets its perturbations at the end of a run and nowhere else, and ES of the truncations alone,
  which has no such memory, is wrong;
- signs make of every pair's difference ±1/2σ²;
- an exact gradient is that of plain reverse mode through a scan, for either objective, also by what an
  optimizer's first state is made of, with the states that memory is short of, and where the program
  is that of longer runs;
- a truncated gradient is that of each window's mean loss with the state it begins from held fixed, and
  of the whole run where the window is; a run that has ended or broken is followed by another;
- both runs of a pair see the same initial parameters and batches;
- differences and gradients that are not finite count as 0 and are counted;
- the cost is what was stepped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from metatoys import DATA, LearnedMomentum, LearnedRate, Parabola, loss_of_rate, smoothed_slope

from poisonbench.errors import UserError
from poisonbench.metatraining import estimators
from poisonbench.metatraining.estimators import ES, PES, Cost, Exact, Truncated
from poisonbench.metatraining.unroll import Problem

THETA = -1.0
WEIGHTS = {"log_rate": jnp.array([THETA])}


def problem(objective: str = "final", optimizer: Any = None, **task: Any) -> Problem:
    return Problem(optimizer or LearnedRate(), Parabola(**task), objective, DATA)


def many(
    estimator: Any, objective: str, num_steps: int, count: int, calls: int = 1, theta: float = THETA
) -> np.ndarray:
    """Gradients `[count]`, each the mean over as many successive estimates."""
    keys = jax.random.split(jax.random.key(1), (calls + 1, count))
    of, weights = problem(objective), {"log_rate": jnp.array([theta])}
    carry = estimators.begin(estimator, of, weights, keys[-1])
    found = np.zeros(count)
    for i in range(calls):
        estimate = estimators.estimates(estimator, of, weights, num_steps, keys[i], carry)
        carry = estimate.carry
        found += np.asarray(estimate.gradient["log_rate"][:, 0]) / calls
    return found


@pytest.mark.parametrize("objective", ["final", "mean"])
def test_es_has_the_mean_of_the_smoothed_gradient(objective: str) -> None:
    theta, sigma, num_steps = 0.0, 0.3, 2
    found = many(ES(sigma, pairs=4), objective, num_steps, 4000, theta=theta)
    truth = smoothed_slope(theta, sigma, num_steps, objective)
    sharp = smoothed_slope(theta, 1e-3, num_steps, objective)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - truth) < 4 * error
    assert abs(found.mean() - sharp) > 6 * error


def test_pes_over_a_run_has_the_mean_of_the_gradient_and_truncated_es_has_not() -> None:
    sigma, num_steps, truncation = 0.01, 12, 3
    truth = smoothed_slope(THETA, sigma, num_steps, "mean")
    found = many(PES(sigma, truncation), "mean", num_steps, 4000, calls=4)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - truth) < 4 * error
    first = many(PES(sigma, truncation), "mean", num_steps, 4000, calls=1)
    assert abs(first.mean() - truth) > 6 * error
    again = many(PES(sigma, truncation), "mean", num_steps, 4000, calls=8)
    assert abs(again.mean() - truth) < 4 * again.std() / len(again) ** 0.5


def test_pes_begins_anew_where_a_run_ends() -> None:
    estimator, of = PES(0.1, 2), problem("mean", spread=0.5)
    keys = jax.random.split(jax.random.key(0), 4)[:, None]
    carry = estimators.begin(estimator, of, WEIGHTS, keys[0])
    seen = []
    for key in keys:
        carry = estimators.estimates(estimator, of, WEIGHTS, 3, key, carry).carry
        at = carry.position
        seen.append((int(at.t[0]), int(at.num_steps[0]), float(carry.noise["log_rate"][0, 0])))
    assert [(t, n) for t, n, _ in seen] == [(2, 4), (4, 4), (2, 4), (4, 4)]
    draws = [
        0.1 * jax.random.normal(jax.random.split(jax.random.split(key[0])[0], 1)[0], (1,))
        for key in keys
    ]
    drawn = np.array(draws)[:, 0]
    expected = [drawn[0], drawn[0] + drawn[1], drawn[2], drawn[2] + drawn[3]]
    np.testing.assert_allclose([noise for _, _, noise in seen], expected, rtol=1e-5)


def test_signs_make_every_pair_weigh_the_same() -> None:
    sigma = 0.1
    plain, signed = (many(ES(sigma, signed=signed), "final", 5, 64) for signed in (False, True))
    np.testing.assert_array_equal(np.sign(plain), np.sign(signed))
    epsilon = np.abs(signed) * 2 * sigma**2
    assert 0.5 * sigma < epsilon.std() + epsilon.mean() < 2 * sigma
    above, below = (loss_of_rate(THETA + sign * epsilon, 5, "final") for sign in (1, -1))
    np.testing.assert_allclose(np.abs(plain / signed), np.abs(above - below), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", ["final", "mean"])
@pytest.mark.parametrize(
    "optimizer", [pytest.param(LearnedRate(), marks=pytest.mark.slow), LearnedMomentum()]
)
def test_exact_is_reverse_mode_through_a_scan(objective: str, optimizer: Any) -> None:
    of = problem(objective, optimizer, spread=0.7)
    weights, num_steps = optimizer.init(jax.random.key(5)), 9
    keys = jax.random.split(jax.random.key(2), 3)

    def plain(weights: Any, key: Any) -> Any:
        run = of.run(num_steps, key)
        scanned = jax.lax.scan(
            lambda s, t: (run.step(s, t, weights), None), run.start(weights), jnp.arange(num_steps)
        )
        return run.loss(scanned[0])

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(plain), (None, 0)))(weights, keys)
    for estimator in (Exact(), Exact(memory=40), Exact(longest=12)):
        found = estimators.estimates(estimator, of, weights, num_steps, keys, ())
        np.testing.assert_allclose(found.loss, values, rtol=1e-5)
        for name in weights:
            np.testing.assert_allclose(found.gradient[name], gradients[name], rtol=1e-4, atol=1e-6)
        assert int(found.broken.sum()) == 0
    assert Exact(memory=40).counted(of, weights, num_steps).forward > num_steps
    if "first" in weights:
        assert np.abs(gradients["first"]).min() > 1e-4


@pytest.mark.parametrize("optimizer", [LearnedRate(), LearnedMomentum()])
@pytest.mark.parametrize("window", [3, 9])
def test_truncated_is_reverse_mode_that_stops_between_windows(window: int, optimizer: Any) -> None:
    of = problem("mean", optimizer, spread=0.7)
    weights, num_steps = optimizer.init(jax.random.key(5)), 9
    keys = jax.random.split(jax.random.key(2), 3)

    def plain(weights: Any, key: Any) -> Any:
        run = of.run(num_steps, key)
        state, losses = run.start(weights), []
        for start in range(0, num_steps, window):
            before = jax.lax.stop_gradient(state) if start else state
            state = run.advance(before, start, start + window, weights)
            losses.append((state.total - before.total) / window)
        return jnp.stack(losses)

    values = jax.jit(jax.vmap(plain, (None, 0)))(weights, keys)
    gradients = jax.jit(jax.vmap(jax.jacrev(plain), (None, 0)))(weights, keys)
    estimator = Truncated(window)
    carry = estimators.begin(estimator, of, weights, keys)
    for i in range(num_steps // window):
        # The key of a window that goes on decides nothing.
        own = keys if i == 0 else jax.random.split(jax.random.key(i), 3)
        found = estimators.estimates(estimator, of, weights, num_steps, own, carry)
        carry = found.carry
        np.testing.assert_allclose(found.loss, values[:, i], rtol=1e-5)
        for name in weights:
            np.testing.assert_allclose(found.gradient[name], gradients[name][:, i], rtol=1e-4, atol=1e-6)
    whole = estimators.estimates(Exact(), of, weights, num_steps, keys, ())
    alike = [np.allclose(gradients[n].mean(1), whole.gradient[n], rtol=1e-4) for n in weights]
    assert all(alike) == (window == num_steps)


def test_truncated_begins_anew_where_a_run_ends_or_breaks() -> None:
    estimator, of = Truncated(2), problem("mean", spread=0.5)
    keys = jax.random.split(jax.random.key(0), 4)[:, None]
    carry = estimators.begin(estimator, of, WEIGHTS, keys[0])
    seen = []
    for i, key in enumerate(keys):
        if i == 3:
            broken = jax.tree.map(lambda x: x * jnp.nan, carry.state.params)
            carry = carry._replace(state=carry.state._replace(params=broken))
        found = estimators.estimates(estimator, of, WEIGHTS, 5, key, carry)
        carry = found.carry
        seen.append((int(carry.position.t[0]), int(carry.position.num_steps[0])))
        assert int(found.broken[0]) == 0
    assert seen == [(2, 6), (4, 6), (6, 6), (2, 6)]
    carry = carry._replace(position=carry.position._replace(t=jnp.array([6])))
    again = estimators.estimates(estimator, of, WEIGHTS, 5, keys[3], carry)
    np.testing.assert_array_equal(again.gradient["log_rate"], found.gradient["log_rate"])


def test_a_pair_differs_by_the_weights_alone() -> None:
    of = problem(spread=1.0)
    keys = jax.random.split(jax.random.key(3), 50)
    tiny = estimators.estimates(ES(1e-3), of, WEIGHTS, 8, keys, ())
    exact = estimators.estimates(Exact(), of, WEIGHTS, 8, keys, ())
    alone = jax.jit(jax.vmap(lambda key: of.loss(WEIGHTS, 8, jax.random.split(key)[1])))(keys)
    np.testing.assert_allclose(tiny.loss, alone, rtol=1e-4)
    # With other data in either run, differences would be a thousand times as large.
    spread = np.abs(np.asarray(tiny.gradient["log_rate"])).max()
    assert spread < 30 * np.abs(np.asarray(exact.gradient["log_rate"])).max()


def test_what_is_not_finite_counts_as_nothing() -> None:
    weights = {"log_rate": jnp.array([60.0])}
    for estimator in (ES(0.1, pairs=3), PES(0.1, 8), Exact(), Truncated(8)):
        of = problem("mean")
        keys = jax.random.split(jax.random.key(0), 2)
        carry = estimators.begin(estimator, of, weights, keys)
        found = estimators.estimates(estimator, of, weights, 8, keys, carry)
        assert int(found.broken.min()) == (3 if isinstance(estimator, ES) else 1)
        np.testing.assert_array_equal(found.gradient["log_rate"], 0)


def test_cost_is_what_was_stepped() -> None:
    assert ES(pairs=3).cost(50) == Cost(300)
    assert PES(truncation=10).cost(50) == Cost(20)
    assert Exact().cost(50) == Cost(50, 50)
    assert Truncated(10).cost(50) == Cost(10, 10)
    assert Cost(50, 50).in_steps(2.5) == 175


def test_sizes_that_cannot_be() -> None:
    assert estimators.make("es-sign", pairs=2) == ES(pairs=2, signed=True)
    assert estimators.make("pes", truncation=5) == PES(truncation=5)
    assert estimators.make("exact") == Exact()
    assert estimators.make("truncated", truncation=5) == Truncated(5)
    with pytest.raises(UserError, match="--sigma must be positive"):
        estimators.make("es", sigma=0.0)
    with pytest.raises(UserError, match="at least 1"):
        estimators.make("pes", truncation=0)
