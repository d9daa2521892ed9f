"""What the engine does beside the plain gradient.

Claims of the docstrings of `poisonbench.metagradient` tested here:

- auxiliary output of the objective comes back beside the value;
- NaN and infinity in training, objective or gradient are refused, with the step where they began;
- Adam without `eps_root` is warned of, and only that; the NaN that it warns of is real;
- interrupted after any leaf, a backward pass goes on from its file to the same bytes, runs no step
  twice, and removes the file; a spoilt file is set aside, one of another run is refused;
- a run in one leaf keeps no more of its states than the derivative reads, and memory is counted so;
- several seeds go at once through `jax.vmap`, with the gradient of each;
- a batch sharded over four devices gives the same gradient, and the work is really shared;
- a run of 10,000 steps stays within the memory that was promised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradcheck
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from jaxtyping import Array

from poisonbench.errors import UserError
from poisonbench.metagradient import AdamWithoutEpsRoot, NonFiniteError, metagradient, plan, programs

PyTree = Any
POINTS = jax.random.normal(jax.random.key(0), (20, 3))
BINOMIAL: dict[str, Any] = {"schedule": "binomial", "max_states": 4}


def descend(state: dict[str, Array], t: Array, z: Array) -> dict[str, Array]:
    """Momentum on a quadratic that moves with z."""
    gradient = state["at"] - z[t % len(z)] + 0.1 * state["at"] ** 3
    velocity = 0.9 * state["velocity"] + gradient
    return {"at": state["at"] - 0.05 * velocity, "velocity": velocity, "seen": state["seen"] + 1}


def start() -> dict[str, Array]:
    return {"at": jnp.ones(3), "velocity": jnp.zeros(3), "seen": jnp.int32(0)}


def length(state: dict[str, Array]) -> Array:
    return jnp.square(state["at"]).sum()


def same(found: PyTree, expected: PyTree) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_auxiliary_output_comes_along() -> None:
    value, gradient = metagradient(descend, length, start(), 20, POINTS)
    both = lambda state: (length(state), {"seen": state["seen"], "at": state["at"]})  # noqa: E731
    (again, aux), same_gradient = metagradient(descend, both, start(), 20, POINTS, has_aux=True)
    assert same((again, same_gradient), (value, gradient))
    assert int(aux["seen"]) == 20
    assert float(jnp.square(aux["at"]).sum()) == pytest.approx(float(value))


# ---------------------------------------------------------------- NaN, infinity and Adam


@pytest.mark.parametrize("schedule", [{"schedule": "store_all"}, BINOMIAL])
def test_a_run_that_breaks_down_says_where(schedule: dict[str, Any]) -> None:
    def explode(state: Array, t: Array, z: Array) -> Array:
        return jnp.where(t == 13, jnp.inf, state) * z

    with pytest.raises(NonFiniteError, match="after step 13 of 20; a smaller learning rate") as raised:
        metagradient(explode, jnp.sum, jnp.ones(2), 20, jnp.ones(2), **schedule)
    assert raised.value.step == 13


@pytest.mark.parametrize("schedule", [{"schedule": "store_all"}, BINOMIAL])
def test_a_gradient_that_breaks_down_says_where(schedule: dict[str, Any]) -> None:
    def kink(state: Array, t: Array, z: Array) -> Array:
        # The root of zero is finite, its derivative is not.
        return state * z + jnp.sqrt(jnp.where(t == 7, z - z, 1.0))

    with pytest.raises(NonFiniteError, match="at step 7 of 20, going backwards") as raised:
        metagradient(kink, jnp.sum, jnp.ones(2), 20, jnp.ones(2), **schedule)
    assert raised.value.step == 7


def test_an_objective_that_breaks_down_is_named() -> None:
    with pytest.raises(NonFiniteError, match="the objective is nan of a finite final state") as raised:
        metagradient(descend, lambda s: jnp.log(-length(s)), start(), 5, POINTS)
    assert raised.value.step is None


def adam_step(optimizer: optax.GradientTransformation, scale: float = 1.0) -> Any:
    def step(state: PyTree, t: Array, z: Array) -> PyTree:
        gradient = scale * (state["at"] - z)
        updates, moments = optimizer.update(gradient, state["moments"], state["at"])
        return {"at": optax.apply_updates(state["at"], updates), "moments": moments}

    return step


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted"])
def test_adam_without_eps_root_is_warned_of(wrap: Any) -> None:
    optimizer = optax.adam(0.1)
    state = {"at": jnp.ones(3), "moments": optimizer.init(jnp.ones(3))}
    with pytest.warns(AdamWithoutEpsRoot, match="derivative at zero"):
        metagradient(wrap(adam_step(optimizer)), lambda s: s["at"].sum(), state, 4, jnp.zeros(3))
    # And rightly so: a parameter whose gradient is zero.
    step = wrap(adam_step(optimizer, scale=0.0))
    with pytest.raises(NonFiniteError, match="eps_root"):  # noqa: SIM117
        with pytest.warns(AdamWithoutEpsRoot):
            metagradient(step, lambda s: s["at"].sum(), state, 4, jnp.zeros(3))


@pytest.mark.parametrize(
    "optimizer", [optax.adam(0.1, eps_root=1e-8), optax.sgd(0.1, momentum=0.9), optax.rmsprop(0.1)]
)
def test_nothing_else_is_warned_of(optimizer: optax.GradientTransformation) -> None:
    state = {"at": jnp.ones(3), "moments": optimizer.init(jnp.ones(3))}
    metagradient(adam_step(optimizer), lambda s: s["at"].sum(), state, 4, jnp.zeros(3))


# ---------------------------------------------------------------- interrupted and continued


class KillError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("offload", ["device", "host", "folder"])
def test_an_interrupted_backward_pass_goes_on(offload: str, tmp_path: Path) -> None:
    ran: list[int] = []

    def step(state: PyTree, t: Array, z: Array) -> PyTree:
        jax.debug.callback(lambda t: ran.append(int(t)), t)
        return descend(state, t, z)

    both = lambda state: (length(state), state["seen"])  # noqa: E731
    place = tmp_path / "states" if offload == "folder" else offload
    file = tmp_path / "pass.safetensors"
    arguments: dict[str, Any] = {
        **BINOMIAL, "offload": place, "has_aux": True, "checkpoint": file, "checkpoint_every": 0.0,
    }  # fmt: skip
    expected = metagradient(step, both, start(), 40, POINTS, **arguments)
    jax.effects_barrier()
    total, written = len(ran), [b""]
    assert not file.exists()

    def interrupt(*_: int) -> None:
        if file.exists() and file.read_bytes() != written[-1]:
            written.append(file.read_bytes())
            raise KillError

    ran.clear()
    for _ in range(6):
        with pytest.raises(KillError):
            metagradient(step, both, start(), 40, POINTS, progress=interrupt, **arguments)
    found = metagradient(step, both, start(), 40, POINTS, **arguments)
    jax.effects_barrier()
    assert len(set(written)) == 7
    assert same(found, expected)
    assert len(ran) == total, "steps that were done are not run again"
    assert not file.exists()


def test_a_spoilt_checkpoint_is_set_aside_and_anothers_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pass.safetensors"

    def interrupt(done: int, total: int) -> None:
        if file.exists():
            raise KillError

    def call(z: Array, progress: Any = None, **others: Any) -> Any:
        return metagradient(
            descend, length, start(), 40, z, **{**BINOMIAL, **others},
            progress=progress, checkpoint=file, checkpoint_every=0.0,
        )  # fmt: skip

    expected = call(POINTS)
    with pytest.raises(KillError):
        call(POINTS, interrupt)
    written = file.read_bytes()
    for others in ({"z": POINTS + 1}, {"z": POINTS, "max_states": 5}):
        with pytest.raises(UserError, match="belongs to a run with other arguments"):
            call(**others)
    assert file.read_bytes() == written
    file.write_bytes(written[: len(written) // 2])
    assert same(call(POINTS), expected)
    assert "is corrupt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pass.corrupt-1.safetensors"]


# ---------------------------------------------------------------- what is recorded of a state


@pytest.mark.parametrize("fits", [True, False])
def test_one_leaf_records_what_the_derivative_reads(fits: bool) -> None:
    ran: list[int] = []
    size, num_steps = 1009, 30

    def step(state: PyTree, t: Array, z: Array) -> PyTree:
        jax.debug.callback(lambda t: ran.append(int(t)), t)
        velocity = 0.9 * state["velocity"] + jnp.sin(state["at"] * z)
        return {"at": state["at"] - 0.05 * velocity, "velocity": velocity, "flag": ~state["flag"]}

    begin = {"at": jnp.ones(size), "velocity": jnp.zeros(size), "flag": jnp.array(False)}
    assert programs.leaves_read(Partial(step), begin, jnp.ones(size)) == (True, False, False)
    shapes: list[set[tuple[int, ...]]] = []

    def look(*_: int) -> None:
        shapes.append({x.shape for x in jax.live_arrays() if x.shape[-1:] == (size,)})

    memory = num_steps * 4 * size - (not fits)
    arguments = (step, lambda s: jnp.square(s["at"]).sum(), begin, num_steps, 0.5 * jnp.ones(size))
    gradient = metagradient(*arguments, memory=memory, progress=look)[1]
    jax.effects_barrier()
    assert (len(ran) == 2 * num_steps) == fits
    buffers = {shape[0] for shape in set.union(*shapes) if len(shape) == 2}
    assert buffers == ({num_steps} if fits else {memory // (8 * size + 1)})
    assert gradcheck.relative_error(gradient, metagradient(*arguments, schedule="tree")[1]) <= 1e-5


# ---------------------------------------------------------------- many seeds, many devices, many steps


@pytest.mark.parametrize("schedule", [{"schedule": "store_all"}, {"schedule": "tree"}, BINOMIAL])
def test_several_seeds_in_one_vmap(schedule: dict[str, Any]) -> None:
    starts = jax.random.normal(jax.random.key(4), (3, 3))
    orders = jax.vmap(lambda key: jax.random.permutation(key, 20))(
        jax.random.split(jax.random.key(5), 3)
    )

    def ordered(order: Array, state: PyTree, t: Array, z: Array) -> PyTree:
        return descend(state, t, z[order])

    def one(at: Array, order: Array) -> Any:
        state = {**start(), "at": at}
        return metagradient(Partial(ordered, order), length, state, 20, POINTS, **schedule)

    values, gradients = jax.vmap(one)(starts, orders)
    assert gradients.shape == (3, 20, 3)
    for i in range(3):
        value, gradient = one(starts[i], orders[i])
        assert float(values[i]) == pytest.approx(float(value), rel=1e-6)
        assert gradcheck.relative_error(gradients[i], gradient) <= 1e-5


def test_in_a_transformation_nothing_leaves_the_device(tmp_path: Path) -> None:
    for elsewhere in ({"offload": "host"}, {"checkpoint": tmp_path / "file"}):
        with pytest.raises(UserError, match="inside a transformation"):
            jax.jit(lambda z, e=elsewhere: metagradient(descend, length, start(), 5, z, **e))(POINTS)


def in_a_process(code: str, **environment: str) -> dict[str, Any]:
    """What a fresh interpreter prints last, as JSON."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


SHARDED = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from poisonbench import data, tracks
from poisonbench.metagradient import metagradient
from poisonbench.victim.evaluation import ValidationLoss
from poisonbench.victim.training import TrainingRun, TrainingSet
from dataclasses import replace

jax.config.update("jax_default_matmul_precision", "highest")
track = tracks.DIGITS
recipe = track.recipes["smooth"].replace(width=4, epochs=2, batch_size=48)
digits = data.load(track.dataset.model_copy(update={"train_size": 100, "val_size": 50, "test_size": 50}))
indices = np.arange(10)
images = TrainingSet.clean(digits.train_images, digits.train_labels, 10)
images = images.with_poison(indices, digits.train_labels[indices])
held_out = map(jnp.asarray, (digits.val_images, digits.val_labels))
loss = ValidationLoss(recipe, 10, "cross_entropy", *held_out)
run, state = TrainingRun.start(recipe, images, jax.random.split(jax.random.key(0), 1))
z = jnp.asarray(digits.train_images[indices], jnp.float32) / 255
value, gradient = metagradient(run, loss, state, run.num_steps, z)

mesh = Mesh(np.array(jax.devices()), ("batch",))
everywhere, over_batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, None, "batch"))
order = jax.device_put(run.order, over_batch)
run, state, z, loss = jax.device_put((run, state, z, loss), everywhere)
shared = replace(run, order=order)
found = metagradient(shared, loss, state, run.num_steps, z, schedule="tree")
program = jax.jit(shared.__class__.__call__).lower(shared, state, jnp.int32(0), z).compile().as_text()
print(json.dumps({
    "devices": len(jax.devices()),
    "all-reduce": program.count("all-reduce"),
    "value": abs(float(found[0] - value) / float(value)),
    "gradient": float(jnp.linalg.norm(found[1] - gradient) / jnp.linalg.norm(gradient)),
}))
"""


@pytest.mark.slow
def test_four_devices_share_the_batch() -> None:
    answer = in_a_process(
        SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu"
    )
    assert answer["devices"] == 4
    assert answer["all-reduce"] > 0, "the devices have nothing to say to each other"
    assert answer["value"] < 1e-5
    assert answer["gradient"] < 1e-4


LONG = """
import json, resource, sys
import jax, jax.numpy as jnp
from poisonbench.metagradient import metagradient

def step(state, t, z):
    return state + 0.001 * (z[t % 2] - state)

state, z = jnp.zeros(2**18), jnp.ones((2, 2**18))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
for steps in (40, int(sys.argv[1])):
    before = peak()
    value, gradient = metagradient(step, jnp.sum, state, steps, z, memory="32MiB")
    gradient.block_until_ready()
print(json.dumps({"value": float(value), "gradient": float(gradient.sum()), "grown": peak() - before}))
"""


@pytest.mark.slow
def test_ten_thousand_steps_stay_within_their_memory() -> None:
    states = plan(10_000, memory="32MiB", state_bytes=2**20)
    assert states.kept == 32
    assert states.forward < 4 * 10_000
    code = LONG.replace("sys.argv[1]", "10_000")
    answer = in_a_process(code, JAX_PLATFORMS="cpu")
    # The first, short run took what any run takes; 10,000 states would be 10,000 MiB.
    assert answer["grown"] < 16
    expected = 2**18 * (1 - 0.999**10_000)
    assert answer["value"] == pytest.approx(expected, rel=1e-3)
    assert answer["gradient"] == pytest.approx(expected, rel=1e-3)
