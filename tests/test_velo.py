"""VeLO as an optimizer.

- every quantity of the reference's vectors, within the tolerances, and slips of ours are noticed;
- the same as an evaluation of the formulas in float64, for tensors of any rank, equal sides, scalars,
  gradients that are cut, zero or infinite, and losses that are negative, zero or spike (one that never
  moves gives features of float32 noise, in ours as in any other);
- an update is pure: plain, compiled, vectorised and scanned runs agree; a traced length too;
- a metagradient through it is the derivative, by weights and by what the gradients depend on, and stays
  finite where a parameter never has a gradient; the forward values are not touched;
- bad input: one error each.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradcheck import assert_gradient, assert_refuted
from velo_numpy import Reference

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("NOT TESTED: benchmarks/ is part of the checkout only", allow_module_level=True)

from benchmarks.vectors import Vectors, differences, nested, read  # noqa: E402
from poisonbench.errors import UserError  # noqa: E402
from poisonbench.metagradient import metagradient  # noqa: E402
from poisonbench.optimizers import VeLO, moments, velo  # noqa: E402
from poisonbench.optimizers.checks import require_num_steps  # noqa: E402
from poisonbench.optimizers.velo import loss_decays  # noqa: E402

FILE = Path(__file__).parent / "vectors" / "velo_small.npz"
SMALL = VeLO(hidden=6, bank=3, bank_scale=1.0)


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return read(FILE)


@pytest.fixture(scope="module")
def weights(vectors: Vectors) -> dict[str, Any]:
    return nested(vectors, "theta")


def test_every_quantity_of_the_reference(vectors: Vectors) -> None:
    found = list(differences(vectors))
    assert len(found) == 29
    for each in found:
        assert each.largest <= each.tolerance, each


@pytest.mark.parametrize("slip", ["length", "loss", "gradient", "bank", "dead"])
def test_slips_are_noticed(vectors: Vectors, slip: str) -> None:
    wrong = dict(vectors)
    if slip == "length":
        wrong["num_steps"] = np.asarray(60, np.int32)
    if slip == "loss":
        wrong["losses"] = vectors["losses"][::-1].copy()
    if slip == "gradient":
        wrong["grads/dense/w"] = vectors["grads/dense/w"] * 1.01
    if slip == "bank":
        wrong["theta/ff_mod_stack/~/w1"] = vectors["theta/ff_mod_stack/~/w1"] * 1.01
    if slip == "dead":
        # This layer is in the files, and nothing reads it.
        wrong["theta/rnn_params/linear/w"] = vectors["theta/rnn_params/linear/w"] + 1
    missed = [d.quantity for d in differences(wrong) if d.largest > d.tolerance]
    assert bool(missed) == (slip != "dead"), missed


@pytest.mark.slow
def test_the_command_prints_the_differences_and_fails_where_one_is_too_large(
    tmp_path: Path, vectors: Vectors
) -> None:
    command = [sys.executable, "-m", "benchmarks.vectors"]
    good = subprocess.run([*command, str(FILE)], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert re.search(r"params/conv/w .*1e-06", good.stdout)
    spoilt = tmp_path / "spoilt.npz"
    np.savez(spoilt, **{**vectors, "params/conv/w": vectors["params/conv/w"] + 1e-5})  # type: ignore[arg-type]
    bad = subprocess.run([*command, str(spoilt)], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout.count("missed")) == (1, 1)


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "scalar": [()],
    "vectors": [(1,), (5,)],
    "squares": [(4, 4), (3, 3, 3)],
    "many axes": [(1, 1, 3, 2, 2), (2, 3, 1, 4)],
    "ones": [(1, 1), (1, 6)],
    "everything": [(), (7,), (5, 5), (2, 3, 4), (3, 3, 2, 2)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_any_shape_agrees_with_the_formulas(weights: dict[str, Any], name: str) -> None:
    rng = np.random.default_rng(1)
    params = [np.float32(rng.normal(size=shape)) for shape in SHAPES[name]]
    gradients = [[np.float32(rng.normal(size=p.shape)) for p in params] for _ in range(6)]
    assert_like_the_formulas(weights, params, gradients, list(rng.normal(size=6) + 2))


@pytest.mark.parametrize(
    ("size", "losses"),
    [
        (0.0, [2.0, 1.5, 1.0, 0.9, 0.8, 0.7]),
        (1e-12, [2.0, 1.5, 1.0, 0.9, 0.8, 0.7]),
        (1e5, [2.0, 1.5, 1.0, 0.9, 0.8, 0.7]),
        (np.inf, [2.0, 1.5, 1.0, 0.9, 0.8, 0.7]),
        (1.0, [-1.0, -2.0, -1.5, -3.0, -3.0, -2.0]),
        (1.0, [2.0, 1.0, 1e6, 1.0, 1e30, 0.5]),
        (1.0, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_odd_gradients_and_losses_agree_with_the_formulas(
    weights: dict[str, Any], size: float, losses: list[float]
) -> None:
    rng = np.random.default_rng(2)
    params = [np.float32(rng.normal(size=(3, 4))), np.zeros(5, np.float32)]
    signs = [[np.sign(rng.normal(size=p.shape)) for p in params] for _ in losses]
    gradients = [[np.float32(0.0 if not size else size * s) for s in each] for each in signs]
    if not size:
        gradients = [[np.zeros_like(p) for p in params] for _ in losses]
    assert_like_the_formulas(weights, params, gradients, losses)


def assert_like_the_formulas(
    weights: dict[str, Any],
    params: list[np.ndarray],
    gradients: list[list[np.ndarray]],
    losses: list[float],
) -> None:
    reference = Reference(weights, params, 30)
    optimizer = velo(30, weights)
    state, ours = optimizer.init(params), [jnp.asarray(p) for p in params]
    update = jax.jit(lambda g, s, p, loss: optimizer.update(g, s, p, value=loss))
    for gradient, loss in zip(gradients, losses, strict=True):
        theirs = reference.step(gradient, float(np.float32(loss)))
        moves, state = update([jnp.asarray(g) for g in gradient], state, ours, loss)
        ours = optax.apply_updates(ours, moves)
        for a, b, start in zip(ours, theirs, params, strict=True):
            assert a.shape == start.shape
            # Loss features are differences of running means, good to 1e-4 in float32; so are the steps.
            way = np.abs(b - start.reshape(b.shape)).max()
            floor = 1e-6 if start.any() else 5e-10
            np.testing.assert_allclose(a, b.reshape(a.shape), rtol=0, atol=floor + 2e-4 * way)


@pytest.mark.slow
def test_a_nan_reaches_everything(weights: dict[str, Any]) -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2))}
    optimizer = velo(10, weights)
    state = optimizer.init(params)
    gradients = {"a": jnp.array([0.0, jnp.nan, 0.0]), "b": jnp.ones((2, 2))}
    _, state = optimizer.update(gradients, state, params, value=1.0)
    moves, _ = optimizer.update(gradients, state, params, value=1.0)
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(moves))


def quadratic(weights: Any, num_steps: Any, target: Any, steps: int, how: str = "scan") -> Any:
    """Train on `½‖p - target‖²`, with a bias that starts at zero."""
    optimizer = velo(num_steps, weights, bank_scale=1.0)

    def loss(p: Any) -> Any:
        return 0.5 * ((p["w"] - target) ** 2).sum() + 0.5 * ((p["b"] - 1) ** 2).sum()

    def one(carry: Any, _: Any) -> Any:
        p, state = carry
        value, gradient = jax.value_and_grad(loss)(p)
        moves, state = optimizer.update(gradient, state, p, value=value)
        return (optax.apply_updates(p, moves), state), value

    p = {"w": jnp.ones_like(target), "b": jnp.zeros(2, target.dtype)}
    carry = (p, optimizer.init(p))
    if how == "scan":
        return jax.lax.scan(one, carry, length=steps)[0]
    for _ in range(steps):
        carry, _ = one(carry, None)
    return carry


@pytest.mark.slow
def test_plain_compiled_scanned_and_vectorised_runs_agree(x64: None) -> None:
    weights = jax.tree.map(lambda x: x.astype(jnp.float64), SMALL.init(jax.random.key(0)))
    targets = jax.random.normal(jax.random.key(1), (2, 3, 2))
    plain = [quadratic(weights, 20, t, 5, how="loop") for t in targets]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *plain)
    for other in (
        jax.jit(jax.vmap(lambda t: quadratic(weights, 20, t, 5)))(targets),
        jax.jit(jax.vmap(lambda t, n: quadratic(weights, n, t, 5)))(targets, jnp.full(2, 20)),
    ):
        for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_the_length_decides_the_decays_of_the_loss() -> None:
    decays = loss_decays(1000)
    np.testing.assert_allclose(-1 / np.log(decays), np.geomspace(10, 1000, 10), rtol=1e-3)
    np.testing.assert_allclose(loss_decays(10), np.full(10, np.exp(-0.1)), rtol=1e-6)


def engine_problem(dtype: Any) -> tuple[Any, ...]:
    """A step, an objective, a state and weights; the second input of the regression is always zero."""
    weights = jax.tree.map(lambda x: x.astype(dtype), SMALL.init(jax.random.key(3)))
    x = jax.random.normal(jax.random.key(4), (8, 3), dtype).at[:, 1].set(0)
    y = x.sum(1)
    params = {"scale": jnp.full(3, 0.5, dtype), "w": jnp.ones((3, 1), dtype), "b": jnp.zeros(1, dtype)}

    def loss(p: Any) -> Any:
        return jnp.mean((((x * p["scale"][None]) @ p["w"] + p["b"][None])[:, 0] - y) ** 2)

    def step(state: Any, t: Any, w: Any) -> Any:
        p, inner = state
        optimizer = velo(20, w, bank_scale=1.0)
        value, gradient = jax.value_and_grad(loss)(p)
        moves, inner = optimizer.update(gradient, inner, p, value=value)
        return optax.apply_updates(p, moves), inner

    state = (params, velo(20, weights, bank_scale=1.0).init(params))
    return step, lambda s: loss(s[0]), state, weights


@pytest.mark.slow
def test_metagradients_by_the_weights_are_the_derivative(x64: None) -> None:
    step, objective, state, weights = engine_problem(jnp.float64)

    def trained(w: Any) -> Any:
        return objective(jax.lax.fori_loop(0, 12, lambda t, s: step(s, t, w), state))

    value, gradient = metagradient(step, objective, state, 12, weights)
    np.testing.assert_allclose(value, trained(weights), rtol=1e-12)
    assert_gradient(trained, weights, gradient, tolerance=1e-4)
    assert_refuted(trained, weights, jax.tree.map(lambda g: 1.05 * g, gradient))


@pytest.mark.slow
def test_metagradients_stay_finite_where_a_gradient_is_always_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, objective, state, weights = engine_problem(jnp.float32)
    value, gradient = metagradient(step, objective, state, 12, weights)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    # With the exact derivative of the root they are not; the value is the same.
    monkeypatch.setattr(moments, "rsqrt", jax.lax.rsqrt)

    def unrolled(w: Any) -> Any:
        return objective(jax.lax.scan(lambda s, t: (step(s, t, w), None), state, jnp.arange(12))[0])

    same, spoilt = jax.jit(jax.value_and_grad(unrolled))(weights)
    np.testing.assert_allclose(same, value, rtol=1e-4)
    assert not all(np.isfinite(g).all() for g in jax.tree.leaves(spoilt))


def test_the_floor_leaves_values_and_ordinary_derivatives_alone() -> None:
    x = jnp.array([1e-33, 1e-31, 1e-20, 1e-12, 1.0])
    np.testing.assert_array_equal(moments.rsqrt(x), jax.lax.rsqrt(x))
    slope = jax.vmap(jax.grad(moments.rsqrt))(x)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope[3:], -0.5 * np.asarray(x[3:], np.float64) ** -1.5, rtol=1e-5)


def test_sizes_of_the_release() -> None:
    shapes = jax.tree.leaves(VeLO().shapes(), is_leaf=lambda x: isinstance(x, tuple))
    assert sum(int(np.prod(s)) for s in shapes) == 2_320_385
    small = SMALL.init(jax.random.key(0))
    assert VeLO.of(small, 1.0) == SMALL


P = {"w": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("num_steps", "params", "gradients", "value", "message"),
    [
        (0, P, P, 1.0, "num_steps must be at least 1"),
        (9, P, P, None, "value=loss"),
        (9, P, P, jnp.ones(3), "scalar loss"),
        (9, {}, {}, 1.0, "tree is empty"),
        (9, P, {"w": jnp.ones((2, 3))}, 1.0, "shapes of the parameters"),
        (9, P, {"w": P["w"].astype(jnp.bfloat16)}, 1.0, "float32"),
        (9, {"w": P["w"].astype(jnp.float16)}, P, 1.0, "float32"),
        (9, {"w": P["w"], "n": jnp.ones(2, jnp.int32)}, P, 1.0, r"\['n'\] has int32"),
        (9, None, P, 1.0, "parameters are missing"),
    ],
)
def test_bad_input(num_steps: Any, params: Any, gradients: Any, value: Any, message: str) -> None:
    def train() -> None:
        optimizer = velo(num_steps, SMALL.init(jax.random.key(0)))
        state = optimizer.init(P if params is None else params)
        optimizer.update(gradients, state, params, value=value)

    with pytest.raises(UserError, match=message):
        train()


@pytest.mark.parametrize("wrong", [None, True, {"w": 1}, jnp.ones(2)])
def test_no_length(wrong: Any) -> None:
    with pytest.raises(UserError, match="num_steps"):
        require_num_steps(wrong)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: {}, "no weights of velo"),
        (lambda w: None, "no weights of velo"),
        (lambda w: w | {"lstm_init_state": {}}, "cell at lstm_init_state is missing"),
        (lambda w: w | {"more": 1}, "more at the top is unknown"),
        (
            lambda w: w | {"lstm_init_state": {**w["lstm_init_state"], "cell": jnp.ones((1, 7))}},
            r"\(1, 6\)",
        ),
    ],
)
def test_weights_that_do_not_fit(spoil: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VeLO.of(spoil(SMALL.init(jax.random.key(0))))


def test_a_family_of_no_size() -> None:
    with pytest.raises(UserError, match="above 0"):
        replace(SMALL, bank=0)
