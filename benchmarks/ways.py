"""Ways to differentiate a training run in JAX, behind one signature.

Each peer is what a researcher would write today, as one compiled program:

- `unrolled`: reverse mode through `lax.scan`; every residual of every step is kept.
- `scan-checkpoint`: each step of the scan under `jax.checkpoint`; every state is kept.
- `nested-checkpoint`: √T segments of √T steps, both under `jax.checkpoint`; 2√T states are kept, and
  each step runs forward twice.
- `equinox`: Equinox's checkpointed `while_loop`, with its default count of kept states and with one
  for every step.

Ours differ in their schedule alone. References: Griewank and Walther, ACM TOMS 26(1), 2000; Stumm and
Walther, SIAM J. Sci. Comput. 32(2), 2010 (Equinox's online checkpointing).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.problems import Problem
from poisonbench.metagradient import Plan, metagradient, plan
from poisonbench.metagradient.replay import DEFAULT_MEMORY

PyTree = Any
Gradient = tuple[Float[Array, ""], PyTree]
Traced = Callable[..., Gradient]


@dataclass(frozen=True)
class Way:
    """One way, described.

    Attributes:
        name: as in `--way`.
        title: in the table.
        options: keyword arguments of the engine, or of the peer's function.
        peer: which of `TRACED` it is; None for the engine, and for PyTorch.
        needs: the module that must be installed, if any.
    """

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    needs: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is the engine, and not a peer."""
        return "schedule" in self.options

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None


def ours(schedule: str, **options: Any) -> Way:
    """The engine under one schedule."""
    words = [f"{name.replace('_', ' ')} {value}" for name, value in options.items()]
    name = "-".join(["ours", schedule.replace("_", "-"), *(str(x) for x in options.values())])
    return Way(name, " ".join(["ours:", schedule, *words]), {"schedule": schedule, **options})


def equinox(title: str, checkpoints: int | None) -> Way:
    """Equinox's checkpointed loop with so many kept states; None for its own choice."""
    name = "equinox" if checkpoints is None else f"equinox-{checkpoints}"
    return Way(name, title, {"checkpoints": checkpoints}, peer="equinox", needs="equinox")


SCAN_CHECKPOINT = Way("scan-checkpoint", "scan of jax.checkpoint steps", peer="scan-checkpoint")


def all_ways(num_steps: int) -> list[Way]:
    """Every way in the table: ours, then the peers.

    The binomial schedule gets the 2√T states that nested checkpointing keeps, to compare at equal
    memory.
    """
    room = min(num_steps, 2 * math.isqrt(num_steps))
    mine = [ours("auto"), ours("store_all"), ours("tree", arity=4), ours("binomial", max_states=room)]
    peers = [
        Way("unrolled", "scan, every residual kept", peer="unrolled"),
        SCAN_CHECKPOINT,
        Way("nested-checkpoint", "nested √T jax.checkpoint", peer="nested-checkpoint"),
        equinox("Equinox checkpointed loop", None),
        equinox("Equinox, a checkpoint for every step", num_steps),
        Way("torch", "PyTorch, whole graph kept", needs="torch"),
        Way("torch-checkpoint", "PyTorch, states kept, step by step", needs="torch"),
    ]
    return [*mine, *peers]


def prepare(way: Way, problem: Problem) -> tuple[Callable[[], Gradient], int | None]:
    """Compile a way for a problem.

    Returns:
        What runs it and waits for the result; and the bytes that XLA sets aside for its
        intermediate results, where it is one program. (The engine compiles at its first run.)
    """
    if way.ours:
        arguments = (problem.step, problem.objective, problem.state, problem.num_steps, problem.z)
        return lambda: jax.block_until_ready(metagradient(*arguments, **way.options)), None
    assert way.peer is not None, "PyTorch has a module of its own"
    return _compile(partial(TRACED[way.peer], **way.options), problem)


def train(problem: Problem) -> Callable[[], Array]:
    """Compile the training run alone, with the objective's value at its end."""
    return _compile(_trained, problem)[0]


def _compile(function: Callable[..., Any], problem: Problem) -> tuple[Callable[[], Any], int]:
    step, objective = (
        jax.tree_util.Partial(f) if jax.tree.leaves(f) == [f] else f
        for f in (problem.step, problem.objective)
    )
    structure: Any
    arrays, structure = jax.tree.flatten((step, objective, problem.state, problem.z))

    def whole(arrays: list[Array]) -> Any:
        return function(*structure.unflatten(arrays), num_steps=problem.num_steps)

    compiled = jax.jit(whole).lower(arrays).compile()
    memory: Any = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(arrays)), int(memory.temp_size_in_bytes)


def planned(way: Way, num_steps: int, size: int | None = None) -> Plan:
    """What the engine will do for one of our ways; `size` is that of a state in bytes."""
    bounded = "max_states" in way.options or way.options["schedule"] not in ("auto", "binomial")
    memory = None if bounded or size is None else DEFAULT_MEMORY
    return plan(num_steps, state_bytes=size, memory=memory, **way.options)


def _trained(step: Any, objective: Any, state: PyTree, z: PyTree, num_steps: int) -> Array:
    return objective(jax.lax.fori_loop(0, num_steps, lambda t, s: step(s, t, z), state))


def _unrolled(step: Any, objective: Any, state: PyTree, z: PyTree, num_steps: int) -> Gradient:
    def whole(z: PyTree) -> Array:
        return objective(_scan(lambda s, t: step(s, t, z), state, jnp.arange(num_steps)))

    return jax.value_and_grad(whole)(z)


def _scan_checkpoint(step: Any, objective: Any, state: PyTree, z: PyTree, num_steps: int) -> Gradient:
    def whole(z: PyTree) -> Array:
        one = jax.checkpoint(lambda s, t: step(s, t, z), prevent_cse=False)
        return objective(_scan(one, state, jnp.arange(num_steps)))

    return jax.value_and_grad(whole)(z)


def _nested_checkpoint(step: Any, objective: Any, state: PyTree, z: PyTree, num_steps: int) -> Gradient:
    length = math.isqrt(num_steps)
    whole_segments = num_steps // length * length

    def whole(z: PyTree) -> Array:
        one = jax.checkpoint(lambda s, t: step(s, t, z), prevent_cse=False)
        segment = jax.checkpoint(lambda s, ts: _scan(one, s, ts), prevent_cse=False)
        times = jnp.arange(num_steps)
        final = _scan(segment, state, times[:whole_segments].reshape(-1, length))
        return objective(_scan(one, final, times[whole_segments:]))

    return jax.value_and_grad(whole)(z)


def _equinox(
    step: Any, objective: Any, state: PyTree, z: PyTree, num_steps: int, checkpoints: int | None
) -> Gradient:
    from equinox import internal as eqxi

    def whole(z: PyTree) -> Array:
        def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            t, state = carry
            return t + 1, step(state, t, z)

        _, final = eqxi.while_loop(
            lambda carry: carry[0] < num_steps, body, (jnp.int32(0), state),
            kind="checkpointed", max_steps=num_steps, checkpoints=checkpoints,
        )  # fmt: skip
        return objective(final)

    return jax.value_and_grad(whole)(z)


def _scan(one: Callable[[PyTree, Array], PyTree], state: PyTree, times: Array) -> PyTree:
    return jax.lax.scan(lambda s, t: (one(s, t), None), state, times)[0]


TRACED: dict[str, Traced] = {
    "unrolled": _unrolled,
    "scan-checkpoint": _scan_checkpoint,
    "nested-checkpoint": _nested_checkpoint,
    "equinox": _equinox,
}
