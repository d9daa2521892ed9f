"""Metagradients are exact; the oracle is `jax.grad` of a plain Python loop over the same steps.

Claims of the docstrings of `poisonbench.metagradient` tested here:

- the gradient is the derivative of the run: it is the unrolled loop's to 1e-10, central differences
  agree with it, and its Taylor remainder is of second order; all relative, in float64;
- the schedule changes time and memory, never the answer (1e-12);
- it flows through an optimizer's momentum, Adam's second moment and batch norm's tracked statistics;
- state and z are any pytrees: integers, flags and keys are carried, integer leaves of z get float0;
- what cannot be differentiated is refused in a readable line.

The checks can fail: a gradient that forgets momentum, one that forgets batch norm's statistics, and a
zero one are refuted, of a function of scale 1e-6 too. So is the gradient through `flax.nnx.BatchNorm`,
which puts a `stop_gradient` on what it tracks: a trap, since nothing else of it looks wrong.
"""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gradcheck
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import Array, Float

from poisonbench import metagradient as package
from poisonbench.errors import UserError
from poisonbench.metagradient import metagradient
from poisonbench.victim.recipe import Recipe
from poisonbench.victim.resnet9 import ConvBlock

PyTree = Any
Scalar = Float[Array, ""]


@dataclass(frozen=True)
class Problem:
    """A training run and its objective."""

    step: Callable[[PyTree, Array, PyTree], PyTree]
    objective: Callable[[PyTree], Scalar]
    state: PyTree
    num_steps: int
    z: PyTree

    def metagradient(self, **schedule: Any) -> PyTree:
        return metagradient(self.step, self.objective, self.state, self.num_steps, self.z, **schedule)[1]

    def unrolled(self, z: PyTree) -> Scalar:
        # A step is compiled for itself: compiling the whole loop would take a minute.
        state, step = self.state, jax.jit(lambda state, t, z: self.step(state, t, z))
        for t in range(self.num_steps):
            state = step(state, jnp.int32(t), z)
        return self.objective(state)

    @cached_property
    def function(self) -> gradcheck.Function:
        """The objective as a function of z, compiled."""

        def run(z: PyTree) -> Scalar:
            one = lambda t, state: self.step(state, t.astype(jnp.int32), z)  # noqa: E731
            return self.objective(jax.lax.fori_loop(0, self.num_steps, one, self.state))

        return jax.jit(run)

    def detached(self, part: str) -> Problem:
        """The same run, whose gradient forgets one part of the state."""

        def step(state: PyTree, t: Array, z: PyTree) -> PyTree:
            state = self.step(state, t, z)
            return {**state, part: jax.lax.stop_gradient(state[part])}

        return replace(self, step=step)


def regression(optimizer: optax.GradientTransformation, num_steps: int = 12) -> Problem:
    """A net of two layers fits eight points, four at a time; z is the points."""
    keys = jax.random.split(jax.random.key(1), 6)
    params = {"hidden": jax.random.normal(keys[0], (3, 5)), "out": jax.random.normal(keys[1], (5, 1))}
    held_out = jax.random.normal(keys[2], (6, 3)), jax.random.normal(keys[3], (6, 1))

    def loss(params: PyTree, inputs: Array, targets: Array) -> Scalar:
        return jnp.square(jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets).mean()

    def step(state: PyTree, t: Array, z: PyTree) -> PyTree:
        rows = (4 * t + jnp.arange(4)) % 8
        gradient = jax.grad(loss)(state["params"], z["inputs"][rows], z["targets"][rows])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}

    return Problem(
        step,
        lambda state: loss(state["params"], *held_out),
        {"params": params, "optimizer": optimizer.init(params)},
        num_steps,
        {"inputs": jax.random.normal(keys[4], (8, 3)), "targets": jax.random.normal(keys[5], (8, 1))},
    )


@cache
def momentum() -> Problem:
    return regression(optax.sgd(0.1, momentum=0.9))


@cache
def adam() -> Problem:
    return regression(optax.adam(0.1, eps_root=1e-6))


class FlaxNorm(nnx.Module):
    """Flax's own batch norm, called as ours is."""

    def __init__(self, features: int, recipe: Recipe) -> None:
        self.norm = nnx.BatchNorm(
            features,
            momentum=recipe.norm_momentum,
            epsilon=recipe.norm_epsilon,
            dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )

    def __call__(self, x: Array, train: bool) -> Array:
        return self.norm(x, use_running_average=not train)


class TinyNet(nnx.Module):
    """One block of the victim and a classifier."""

    def __init__(self, norm: type[nnx.Module] | None) -> None:
        recipe = Recipe(width=2, norm_momentum=0.6)
        self.block = ConvBlock(1, 2, recipe, how="matrix", rngs=nnx.Rngs(0))
        if norm is not None:
            self.block.norm = norm(2, recipe)
        self.classifier = nnx.Linear(2, 2, rngs=nnx.Rngs(1))

    def __call__(self, images: Array, train: bool) -> Array:
        return self.classifier(self.block(images, train).mean((1, 2)))


@cache
def batch_norm(norm: type[nnx.Module] | None = None) -> Problem:
    """That net classifies images, and is judged by its tracked statistics; z is the images."""
    graph, params, stats = nnx.split(TinyNet(norm), nnx.Param, nnx.BatchStat)
    state = {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}
    train_key, held_out_key = jax.random.split(jax.random.key(2))
    labels = jnp.arange(6) % 2

    def loss(params: PyTree, stats: PyTree, images: Array, train: bool) -> tuple[Scalar, PyTree]:
        model = nnx.merge(graph, params, stats)
        said = model(images, train)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return optax.softmax_cross_entropy_with_integer_labels(said, labels).mean(), stats

    def step(state: PyTree, t: Array, z: Array) -> PyTree:
        gradient, stats = jax.grad(loss, has_aux=True)(state["params"], state["stats"], z, train=True)
        return {
            "params": jax.tree.map(lambda p, g: p - 0.3 * g, state["params"], gradient),
            "stats": stats,
        }

    held_out = 0.5 + jax.random.normal(held_out_key, (6, 4, 4, 1))
    return Problem(
        step,
        lambda state: loss(state["params"], state["stats"], held_out, train=False)[0],
        jax.tree.map(lambda x: x.astype(jnp.float64), state),
        4,
        jax.random.normal(train_key, (6, 4, 4, 1)),
    )


# ---------------------------------------------------------------- the gradient is the derivative


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("problem", [momentum, adam, batch_norm])
def test_gradient_is_that_of_the_run(problem: Callable[[], Problem]) -> None:
    run = problem()
    gradient = run.metagradient()
    assert gradcheck.relative_error(gradient, jax.grad(run.unrolled)(run.z)) <= 1e-10
    gradcheck.assert_gradient(run.function, run.z, gradient)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "problem", [momentum, *(pytest.param(other, marks=pytest.mark.slow) for other in (adam, batch_norm))]
)
def test_schedules_agree(problem: Callable[[], Problem], tmp_path: Path) -> None:
    run = problem()
    everything_kept = run.metagradient(schedule="store_all")
    trees = [(2, 1), (3, 1), (16, 1), (2, 3), (4, 3), (3, None)]
    bounds = [(2, None), (3, None), (3, 1), (4, 2)]
    schedules = [
        *({"schedule": "tree", "arity": arity, "leaf": leaf} for arity, leaf in trees),
        *({"schedule": "binomial", "max_states": most, "leaf": leaf} for most, leaf in bounds),
        {"schedule": "store_all", "leaf": 1},
        {"max_states": 3, "offload": "host"},
        {"max_states": 3, "offload": tmp_path / "states"},
        {"schedule": "tree", "offload": "host", "leaf": 2},
        {"schedule": "store_all", "offload": tmp_path / "states"},
    ]
    for schedule in schedules:
        gradient = run.metagradient(**schedule)
        assert gradcheck.relative_error(gradient, everything_kept) <= 1e-12, schedule
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("problem", "forgotten"), [(momentum, "optimizer"), (adam, "optimizer"), (batch_norm, "stats")]
)
def test_forgetful_gradients_are_refuted(problem: Callable[[], Problem], forgotten: str) -> None:
    run = problem()
    gradcheck.assert_refuted(run.function, run.z, run.detached(forgotten).metagradient())


@pytest.mark.usefixtures("x64")
def test_zero_gradient_is_refuted_at_any_scale() -> None:
    run = momentum()
    for scale in (1.0, 1e-6):
        small = replace(run, objective=lambda state, scale=scale: scale * run.objective(state))
        gradient, function = small.metagradient(), small.function
        gradcheck.assert_gradient(function, run.z, gradient)
        gradcheck.assert_refuted(function, run.z, jax.tree.map(jnp.zeros_like, gradient))


@pytest.mark.usefixtures("x64")
def test_flax_batch_norm_is_a_trap() -> None:
    ours, theirs = batch_norm(), batch_norm(FlaxNorm)
    # The same run: only the derivative of what is tracked differs.
    assert float(theirs.function(theirs.z)) == pytest.approx(float(ours.function(ours.z)), rel=1e-6)
    gradcheck.assert_refuted(theirs.function, theirs.z, theirs.metagradient())
    gradcheck.assert_gradient(ours.function, ours.z, ours.metagradient())


# ---------------------------------------------------------------- any pytrees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Walk:
    """A state of every kind of leaf."""

    at: dict[str, Array]
    key: Array
    backwards: Array
    taken: Array
    name: str = field(metadata={"static": True}, default="walk")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stride:
    """A callable with an array of its own."""

    length: Array

    def __call__(self, state: Walk, t: Array, z: PyTree) -> Walk:
        noise = jax.random.normal(state.key, (3,))
        sign = jnp.where(state.backwards, -1.0, 1.0)
        gain = z["scale"][z["rows"][t]] * noise + z["shift"][0]
        at = {"here": jnp.sin(state.at["here"]) + self.length * sign * gain, "before": state.at["here"]}
        key = jax.random.fold_in(state.key, state.taken)
        return Walk(at, key, ~state.backwards, state.taken + 1, state.name)


def walk() -> Problem:
    start = Walk(
        {"here": jnp.ones(3), "before": jnp.zeros(3)}, jax.random.key(3), jnp.array(False), jnp.array(0)
    )
    z = {"scale": jnp.array([0.5, -2.0]), "shift": (jnp.array(0.1),), "rows": jnp.array([0, 1, 1, 0, 0])}
    return Problem(
        Stride(jnp.array(0.7)), lambda s: (s.at["here"] * s.at["before"]).sum() * s.taken, start, 5, z
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leaf", [1, 2, 5])
def test_any_pytrees(leaf: int) -> None:
    run = walk()
    gradient = run.metagradient(schedule="tree", arity=2, leaf=leaf)
    assert jax.tree.structure(gradient) == jax.tree.structure(run.z)
    assert gradient["rows"].dtype == jax.dtypes.float0
    assert gradient["rows"].shape == run.z["rows"].shape
    expected = jax.grad(run.unrolled, allow_int=True)(run.z)
    for part in ("scale", "shift"):
        assert gradcheck.relative_error(gradient[part], expected[part]) <= 1e-12


def test_no_steps_give_the_objective_and_zeros() -> None:
    run = replace(walk(), num_steps=0)
    value, gradient = metagradient(run.step, run.objective, run.state, 0, run.z)
    assert value == run.objective(run.state)
    assert gradient["rows"].dtype == jax.dtypes.float0
    for part in jax.tree.leaves((gradient["scale"], gradient["shift"])):
        np.testing.assert_array_equal(part, np.zeros_like(part))


def test_numbers_and_numpy_will_do() -> None:
    value, gradient = metagradient(lambda s, t, z: s * z, lambda s: s, 1.0, 3, np.float32(2))
    assert (float(value), float(gradient)) == (8, 12)


# ---------------------------------------------------------------- refusals and the example


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"step": lambda s, t, z: (s["a"], s["b"])}, "changes the structure of the state"),
        ({"step": lambda s, t, z: {"a": s["a"]}}, "changes the structure of the state"),
        (
            {"step": lambda s, t, z: {**s, "b": s["b"][:1]}},
            r"leaf '\['b'\]'.*float32\[2\] to float32\[1\]",
        ),
        (
            {"step": lambda s, t, z: {**s, "a": s["a"] * 1.5}},
            r"leaf '\['a'\]'.*int32\[\] to float32\[\]",
        ),
        ({"objective": lambda s: s["b"]}, "objective must return one floating"),
        ({"objective": lambda s: (s["b"][0], s["a"])}, "objective must return one floating"),
        ({"objective": lambda s: s["a"]}, "objective must return one floating"),
        ({"objective": lambda s: s["b"].sum(), "has_aux": True}, "objective must return"),
        ({"objective": lambda s: (s["b"], 1), "has_aux": True}, "objective must return one floating"),
        ({"num_steps": -1}, "num_steps must be at least 0"),
        ({"schedule": "tree", "arity": 1}, "arity must be at least 2"),
        ({"schedule": "tree", "leaf": 0}, "leaf must be at least 1"),
        ({"schedule": "tree", "max_states": 3}, r"'tree' need at least \d+ kept states .* and 3 fit"),
        ({"schedule": "binomial", "max_states": 1}, r"need at least 2 kept states .* and 1 fit"),
        ({"schedule": "binomial", "max_states": 3, "leaf": 0}, "leaf must be at least 1"),
        ({"schedule": "store_all", "max_states": 5}, r"need at least 6 kept states \(48 bytes\), and 5"),
        ({"memory": 20}, r"need at least 2 kept states \(24 bytes\), and 1 fit"),
        ({"memory": 0, "num_steps": 1}, r"need at least 1 kept states .* and 0 fit"),
        ({"memory": -5}, r"need at least 2 kept states .* and 0 fit"),
        ({"memory": "much"}, "cannot read 'much' as a size"),
        ({"memory": "9" * 308 + "TiB"}, "cannot read '9+TiB' as a size"),
        ({"offload": "/dev/null/states"}, "cannot write"),
    ],
)
def test_what_cannot_be_differentiated_is_refused(changes: dict[str, Any], complaint: str) -> None:
    arguments = {
        "step": lambda s, t, z: {**s, "b": s["b"] * z},
        "objective": lambda s: s["b"].sum(),
        "state": {"a": jnp.array(1), "b": jnp.ones(2)},
        "num_steps": 6,
        "z": 2.0,
    }
    with pytest.raises(UserError, match=complaint) as refused:
        metagradient(**{**arguments, **changes})
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leaf", [1, 3])
def test_the_step_number_is_int32_in_any_precision(leaf: int) -> None:
    def step(s: dict[str, Any], t: Any, z: Any) -> dict[str, Any]:
        return {"last": t, "x": s["x"] * z}

    state = {"last": jnp.int32(-1), "x": jnp.ones(())}
    found = metagradient(step, lambda s: s["x"], state, 5, jnp.float64(2.0), schedule="tree", leaf=leaf)
    value, gradient = found
    assert (float(value), float(gradient)) == (32.0, 80.0)


def test_docstring_example() -> None:
    names = {"metagradient": metagradient, "jnp": jnp}
    example = doctest.DocTestParser().get_doctest(
        package.metagradient.__doc__ or "", names, "example", None, 0
    )
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
