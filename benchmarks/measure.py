"""Timing and memory of one way in a process of its own, asked over a pipe.

A worker prepares one or more ways, runs each once (which compiles whatever is left to compile), and
then answers one request at a time; the others wait meanwhile. So ways are timed in turn, round by
round, on a machine that changes under them all alike, and neither compiling nor the first run is in
any number.

Memory is the rise of the resident set from just before a run, everything compiled and free memory
given back to the system (`malloc_trim`), to the run's peak, which Linux keeps (`VmHWM`) and lets a
process reset. It is what the run needs beyond the problem itself, whose arrays are there before.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.problems import Setting
from benchmarks.ways import Way

MATRIX = 2048
SAFE_SHARE = 0.8
LEAST_SECONDS, MOST_CALLS = 0.1, 20


@dataclass(frozen=True)
class Prepared:
    """What a way said once it was ready.

    Attributes:
        value: of the objective.
        gradient: by the poisoned pixels.
        memory: peak of a run beyond the problem itself, bytes; None where the system does not tell.
        temporary: bytes that XLA sets aside, where the way is one program.
        kept: the most states alive at once, for ours.
        refused: why it was not run, or nothing.
    """

    value: float = float("nan")
    gradient: np.ndarray | None = None
    memory: int | None = None
    temporary: int | None = None
    kept: int | None = None
    refused: str = ""


class WorkerError(RuntimeError):
    """A worker died, or what it ran raised."""


class Worker:
    """A process that runs ways of one problem; a context manager."""

    def __init__(self, setting: Setting, *, double: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid(), setting, double), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def prepare(self, way: Way, *, steps: int | None = None, warm: bool = True) -> Prepared:
        """Compile a way, run it once and once more for its memory; `steps` other than the problem's."""
        found: Prepared = self._ask("prepare", way, steps, warm)
        return found

    def seconds(self, way: Way | None, *, steps: int | None = None) -> float:
        """Run a way again, or with None the training alone; runs of milliseconds are averaged."""
        found: float = self._ask("seconds", way, steps)
        return found

    def ask(self, what: str, *arguments: Any) -> Any:
        """Any other of the requests that `_Desk` answers."""
        return self._ask(what, *arguments)

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            why = "killed, most likely for want of memory" if code == -9 else f"ended with code {code}"
            raise WorkerError(f"the process was {why}") from None
        if isinstance(answer, _Raised):
            print(answer.trace, file=sys.stderr)
            raise WorkerError(answer.summary)
        return answer


@dataclass(frozen=True)
class _Raised:
    summary: str
    trace: str


def _serve(pipe: Connection, parent: int, setting: Setting, double: bool) -> None:
    from poisonbench import compute

    compute.setup()
    import jax

    jax.config.update("jax_enable_x64", double)
    desk = _Desk(setting, double)
    while os.getppid() == parent:
        try:
            what, *arguments = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = getattr(desk, what)(*arguments)
        except Exception as error:  # whatever it is, the parent must hear of it
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = _Raised(line, traceback.format_exc())
        pipe.send(answer)


class _Desk:
    """What a worker does, request by request."""

    def __init__(self, setting: Setting, double: bool) -> None:
        self.setting = setting
        self.double = double
        self.problems: dict[int, Any] = {}
        self.programs: dict[tuple[str, int], Callable[[], Any]] = {}
        self.matrix: Any = None

    def problem(self, steps: int | None) -> Any:
        from benchmarks import problems

        steps = steps or self.setting.steps
        if steps not in self.problems:
            setting = self.setting.replace(steps=steps)
            self.problems[steps] = problems.make(setting, double=self.double)
        return self.problems[steps]

    def prepare(self, way: Way, steps: int | None, warm: bool) -> Prepared:
        from benchmarks import ways
        from poisonbench.metagradient import state_bytes

        problem = self.problem(steps)
        run: Callable[[], Any]
        size = state_bytes(problem.state)
        kept = ways.planned(way, problem.num_steps, size).kept if way.ours else None
        if way.needs == "torch":
            from benchmarks import torch_way

            need = torch_way.memory_needed(way.name, problem, peak_of) if warm else None
            run, temporary = torch_way.prepare(way.name, problem), None
        else:
            run, temporary = ways.prepare(way, problem)
            need = temporary
        if need is not None and need > SAFE_SHARE * available_memory():
            there = available_memory() / 2**30
            return Prepared(
                temporary=temporary,
                refused=f"does not fit: needs about {need / 2**30:.1f} GiB, {there:.1f} GiB are free",
            )
        self.programs[way.name, problem.num_steps] = run
        run()
        memory, (value, gradient) = peak_of(run) if warm else (None, run())
        return Prepared(float(value), np.asarray(gradient), memory, temporary, kept)

    def seconds(self, way: Way | None, steps: int | None) -> float:
        problem = self.problem(steps)
        key = ("train" if way is None else way.name, problem.num_steps)
        if key not in self.programs:
            from benchmarks import ways

            self.programs[key] = ways.train(problem)
            self.programs[key]()
        found = timed(self.programs[key])
        release()
        return found

    def torch_training(self) -> float:
        from benchmarks import torch_way

        key = ("torch-train", self.setting.steps)
        if key not in self.programs:
            self.programs[key] = torch_way.TorchTraining(self.problem(None)).train
            self.programs[key]()
        return timed(self.programs[key])

    def matrix_rate(self) -> float:
        """Floating-point operations per second of a large product in float32."""
        import jax
        import jax.numpy as jnp

        if self.matrix is None:
            x = jnp.full((MATRIX, MATRIX), 1e-3, jnp.float32)
            product = jax.jit(jnp.matmul).lower(x, x).compile()
            self.matrix = lambda: jax.block_until_ready(product(x, x))
            self.matrix()
        return 2 * MATRIX**3 / min(timed(self.matrix) for _ in range(5))

    def state_bytes(self) -> int:
        from poisonbench.metagradient import state_bytes

        return state_bytes(self.problem(None).state)

    def operations(self) -> Any:
        from benchmarks.operations import count

        return count(self.problem(None))


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes, the mean of several where it is short.

    Garbage is collected before and not during it.
    """
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        calls, spent = 0, 0.0
        while calls == 0 or (spent < LEAST_SECONDS and calls < MOST_CALLS):
            run()
            calls += 1
            spent = time.perf_counter() - start
        return spent / calls
    finally:
        gc.enable()


def peak_of(run: Callable[[], Any]) -> tuple[int | None, Any]:
    """Bytes by which the resident set rose at its peak during a call, and what the call returned."""
    release()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        return None, run()
    result = run()
    return max(0, _status("VmHWM") - before), result


def release() -> None:
    """Give free memory back to the system, where it is one that we know how to ask."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    """A size from the process's status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return int(found[1]) * 1024


def available_memory() -> int:
    """Bytes that a new program could take."""
    import psutil

    return int(psutil.virtual_memory().available)
