"""A recipe's optimizer is the one that it names, at the rates of its schedule.

Claims of the docstrings of `poisonbench.victim.optimizer` tested here:

- the one-cycle schedule has its three knots and is linear between them, and the optimizer follows it;
- any optax optimizer serves by name; unknown ones and unknown arguments are refused;
- weight decay acts on kernels only.
"""

from __future__ import annotations

import gradcheck
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from test_training import RECIPE, keys

from poisonbench.errors import UserError
from poisonbench.optimizers import FAMILIES
from poisonbench.optimizers.weights import packaged
from poisonbench.victim.optimizer import learning_rate_schedule, make_optimizer
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.training import (
    TrainingRun,
    TrainingSet,
    TrainState,
)


def test_one_cycle() -> None:
    recipe = Recipe(learning_rate=2.0, start_factor=0.25, peak_at=0.2, final_factor=1e-3)
    rate = np.array([float(learning_rate_schedule(recipe, 50)(t)) for t in range(51)])
    np.testing.assert_allclose(rate[[0, 5, 10, 30, 50]], [0.5, 1.25, 2.0, 1.001, 0.002], rtol=1e-4)
    assert rate.argmax() == 10
    assert np.ptp(np.diff(rate[:11])) < 1e-5
    assert np.ptp(np.diff(rate[10:])) < 1e-5


def test_the_optimizer_follows_the_schedule() -> None:
    recipe = Recipe(optimizer_options=(), learning_rate=2.0, weight_decay=0.0)
    optimizer, weights = make_optimizer(recipe, 50), {"w": jnp.ones(3)}
    state, moved = optimizer.init(weights), []
    for _ in range(50):
        updates, state = optimizer.update(weights, state, weights)
        moved.append(-float(updates["w"][0]))
    rate = learning_rate_schedule(recipe, 50)
    np.testing.assert_allclose(moved, [float(rate(t)) for t in range(50)], rtol=1e-5)
    assert np.ptp(moved) > 1


@pytest.mark.parametrize("peak_at", [0.0, 1.0])
def test_one_cycle_with_its_peak_at_an_end(peak_at: float) -> None:
    rate = learning_rate_schedule(Recipe(learning_rate=2.0, peak_at=peak_at), 10)
    assert float(rate(10 * peak_at)) == 2
    assert 0 < float(rate(5)) < 2


def test_constant_schedule() -> None:
    rate = learning_rate_schedule(Recipe(learning_rate=0.3, schedule="constant"), 10)
    assert rate(0) == rate(9) == 0.3


PARAMS = {
    "stem": {
        "kernel": np.ones((3, 3, 1, 2), np.float32),
        "norm": {"scale": np.ones(2), "bias": np.ones(2)},
    },
    "classifier": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3)},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("adam", {"eps_root": 1e-8}),
        ("adamw", {"b1": 0.8, "eps_root": 1e-6, "weight_decay": 0.1}),
        ("rmsprop", {"decay": 0.95, "eps_in_sqrt": True}),
        ("lion", {}),
        pytest.param("velo", {}, marks=pytest.mark.slow),
        pytest.param("mlp_opt", {}, marks=pytest.mark.slow),
    ],
)
def test_any_optimizer_by_name(name: str, options: dict[str, float | bool]) -> None:
    recipe = RECIPE.replace(
        optimizer=name, optimizer_options=tuple(options.items()), schedule="constant", weight_decay=0.0
    )
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    gradient = jax.tree.map(jnp.sin, params)
    ours = optax.with_extra_args_support(make_optimizer(recipe, 10))
    if name in FAMILIES:
        family, weights = packaged(name)
        theirs = family.transformation(10, weights)
    else:
        theirs = optax.with_extra_args_support(getattr(optax, name)(recipe.learning_rate, **options))
    found, _ = ours.update(gradient, ours.init(params), params, value=2.0)
    expected, _ = theirs.update(gradient, theirs.init(params), params, value=2.0)
    assert gradcheck.relative_error(found, expected) < 1e-6

    # And a victim's step keeps the shapes and dtypes of its state, as a metagradient needs.
    def start_and_step(keys: Array, images: Array, labels: Array) -> tuple[TrainState, TrainState]:
        run, state = TrainingRun.start(
            recipe, TrainingSet(images, labels, -jnp.ones_like(labels), 10), keys
        )
        return state, run(state, jnp.int32(0), jnp.zeros((0, 8, 8, 1)))

    like = jnp.zeros((40, 8, 8, 1), jnp.uint8), jnp.zeros(40, jnp.int32)
    before, after = jax.eval_shape(start_and_step, keys(0), *like)
    assert before == after


def test_unknown_optimizers_and_arguments_are_refused() -> None:
    with pytest.raises(UserError, match=r"no optimizer called 'adamm'; did you mean .*adam"):
        make_optimizer(Recipe(optimizer="adamm"), 10)
    with pytest.raises(UserError, match=r"optimizer adam does not take.*momentum"):
        make_optimizer(Recipe(optimizer="adam"), 10)
    with pytest.raises(UserError, match=r"velo has nothing to set: add --set optimizer_options=\{\}"):
        make_optimizer(Recipe(optimizer="velo"), 10)
    with pytest.raises(UserError, match=r"weights 0123 of velo are not those of this version"):
        make_optimizer(Recipe(optimizer="velo", optimizer_options=(("weights", "0123"),)), 10)


def test_weight_decay_acts_on_kernels_only() -> None:
    recipe = Recipe(optimizer_options=(), schedule="constant", learning_rate=0.5, weight_decay=0.1)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    optimizer = make_optimizer(recipe, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        expected = -0.05 if path[-1].key == "kernel" else 0
        np.testing.assert_allclose(update, np.full(update.shape, expected), rtol=1e-6)
