"""The small MLP optimizer.

- with weights that pick one channel its step is that channel's: the gradient's, Adam's, or time's;
- the learnt decays move as stated, and stay between 0 and 1;
- a metagradient by its weights is the derivative, and finite where a gradient is always zero;
- bad input: one error each.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradcheck import assert_differences_agree

from poisonbench.errors import UserError
from poisonbench.metagradient import metagradient
from poisonbench.optimizers import MLPOptimizer, mlp_opt, moments

FAMILY = MLPOptimizer()


def reading(channel: int, weights: Any = None) -> Any:
    """Weights whose direction is one channel of the input, passed through both hidden layers."""
    w = jax.tree.map(jnp.zeros_like, weights or FAMILY.init(jax.random.key(0)))
    # Two units, one for each sign, since a ReLU passes only what is above zero.
    first = w["mlp"]["layer_0"]["w"].at[channel, 0].set(1).at[channel, 1].set(-1)
    w["mlp"]["layer_0"]["w"] = first
    w["mlp"]["layer_1"]["w"] = w["mlp"]["layer_1"]["w"].at[0, 0].set(1).at[1, 1].set(1)
    w["mlp"]["layer_2"]["w"] = w["mlp"]["layer_2"]["w"].at[0, 0].set(1).at[1, 0].set(-1)
    return w


def moved(weights: Any, gradients: list[Any], params: Any) -> Any:
    """The step that the last of these gradients makes."""
    optimizer = mlp_opt(10, weights)
    state, moves = optimizer.init(params), None
    for g in gradients:
        moves, state = optimizer.update(g, state, params, value=1.0)
    return moves


def test_a_step_is_what_the_network_says_of_each_parameter() -> None:
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    gradients = [jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(3)]
    g = np.asarray(gradients[-1])
    step = -1e-3 * g / np.sqrt(1e-5 + (g**2).mean())
    np.testing.assert_allclose(moved(reading(0), gradients, params), step, rtol=1e-5)
    p = np.asarray(params)
    step = -1e-3 * p / np.sqrt(1e-5 + (p**2).mean())
    np.testing.assert_allclose(moved(reading(1), gradients, params), step, rtol=1e-5)
    m = np.zeros((3, 4))
    for each in gradients:
        m = 0.99 * m + 0.01 * np.asarray(each)
    step = -1e-3 * m / np.sqrt(1e-5 + (m**2).mean())
    np.testing.assert_allclose(moved(reading(3), gradients, params), step, rtol=1e-4)


def test_time_moves_all_parameters_alike() -> None:
    params = jnp.ones((2, 3))
    gradients = [jnp.ones((2, 3))] * 4
    # Channel 28 is tanh(t / 1 - 1), with t = 3 at the fourth step.
    np.testing.assert_allclose(
        moved(reading(28), gradients, params), np.full((2, 3), -1e-3 * np.tanh(2.0)), rtol=1e-5
    )


def test_decays_are_learnt_and_stay_decays() -> None:
    params, gradient = jnp.ones(3), jnp.arange(1.0, 4.0)
    for offset, decay in ((0.0, 0.9), (0.1, 1 - 0.1 * np.e), (1.0, 0.0), (-9.0, 1.0)):
        weights = FAMILY.init(jax.random.key(0))
        weights["decays"]["momentum"] = jnp.full(3, offset)
        optimizer = mlp_opt(10, weights)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(
            state.moments[0].m[:, 0], (1 - decay) * np.arange(1.0, 4.0), rtol=1e-5, atol=1e-6
        )


def problem(dtype: Any) -> tuple[Any, ...]:
    weights = FAMILY.init(jax.random.key(3))
    # Without biases a parameter whose units are all off leaves the next layer just at its kink.
    for i, layer in enumerate(weights["mlp"].values()):
        layer["b"] = 0.1 * jax.random.normal(jax.random.key(i), layer["b"].shape)
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    x = jax.random.normal(jax.random.key(4), (8, 3), dtype).at[:, 1].set(0)
    params = {"scale": jnp.full(3, 0.5, dtype), "w": jnp.ones((3, 1), dtype)}

    def loss(p: Any) -> Any:
        return jnp.mean((((x * p["scale"][None]) @ p["w"])[:, 0] - x.sum(1)) ** 2)

    def step(state: Any, t: Any, w: Any) -> Any:
        p, inner = state
        moves, inner = mlp_opt(20, w).update(jax.grad(loss)(p), inner, p)
        return optax.apply_updates(p, moves), inner

    return step, lambda s: loss(s[0]), (params, mlp_opt(20, weights).init(params)), weights


@pytest.mark.slow
def test_metagradients_by_the_weights_are_the_derivative(x64: None) -> None:
    step, objective, state, weights = problem(jnp.float64)

    def trained(w: Any) -> Any:
        return objective(jax.lax.fori_loop(0, 8, lambda t, s: step(s, t, w), state))

    _, gradient = metagradient(step, objective, state, 8, weights)
    # Central differences alone: Taylor's longer steps cross kinks of the network.
    assert_differences_agree(trained, weights, gradient, tolerance=1e-4)
    with pytest.raises(AssertionError, match="central differences"):
        assert_differences_agree(
            trained, weights, jax.tree.map(lambda g: 1.05 * g, gradient), tolerance=1e-4
        )


def test_metagradients_are_finite_where_a_gradient_is_always_zero() -> None:
    step, objective, state, weights = problem(jnp.float32)
    _, gradient = metagradient(step, objective, state, 8, weights)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert (
        moments.factored_axes((3,)) is None
    )  # so `scale`, whose second gradient is zero, keeps the whole D


@pytest.mark.parametrize(
    ("params", "gradients", "message"),
    [
        ({}, {}, "tree is empty"),
        (None, jnp.ones(2), "parameters are missing"),
        (jnp.ones(2), jnp.ones(3), "shapes of the parameters"),
        (jnp.ones(2, jnp.bfloat16), jnp.ones(2), "float32"),
    ],
)
def test_bad_input(params: Any, gradients: Any, message: str) -> None:
    optimizer = mlp_opt(9, FAMILY.init(jax.random.key(0)))
    with pytest.raises(UserError, match=message):
        optimizer.update(gradients, optimizer.init(jnp.ones(2) if params is None else params), params)


def test_weights_that_do_not_fit() -> None:
    weights = FAMILY.init(jax.random.key(0))
    assert MLPOptimizer.of(weights) == FAMILY
    for spoilt in ({}, weights | {"mlp": {}}):
        with pytest.raises(UserError, match="no weights of mlp_opt"):
            MLPOptimizer.of(spoilt)
    with pytest.raises(UserError, match="decays at the top is missing"):
        MLPOptimizer.of({"mlp": weights["mlp"]})
    with pytest.raises(UserError, match="hidden must be above 0"):
        MLPOptimizer(0)
