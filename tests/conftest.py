"""What every test runs under: checked shapes, no silent broadcasting, compiled programs kept on disk.

The import hook makes beartype check the annotations of every function and dataclass of the package
as the tests run, so it has to be in place before anything of it is imported. Recipes alone come
first: they check what users give them, and beartype would hide how they do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import poisonbench.victim.recipe  # noqa: F401

install_import_hook(["poisonbench", "attacks", "defenses"], "beartype.beartype")

# Most of a run's time goes into compiling small programs once. What is tested is their arithmetic, not
# the speed of the machine code, so it is not optimised, unless flags are given in the environment.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from commandline import command  # noqa: E402, F401 - a fixture for all

from poisonbench import compute  # noqa: E402

compute.setup()

import jax  # noqa: E402

# An array of lower rank is never stretched in silence: `[n] - [n, 1]` is a defect until spelled out.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test; JAX computes in float32 otherwise."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Let go of compiled programs after each file, whose tests share them."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_many_programs() -> Iterator[None]:
    """Let go of them before there are too many.

    Each takes mappings of memory, of which Linux allows a process 65,530; past the limit the compiler
    takes the process down. Elsewhere there is nothing to count.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """A TFDS data directory that holds a prepared CIFAR-10.

    Named by the environment variable POISONBENCH_TFDS; without it, a folder `shared/tfds` beside
    the checkout.
    """
    named = os.environ.get("POISONBENCH_TFDS")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "tfds"
    if not any(folder.glob("cifar10/*/dataset_info.json")):
        pytest.skip(f"NOT TESTED: no prepared CIFAR-10 in {folder}; name its folder in POISONBENCH_TFDS")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not tested, which pytest keeps to itself unless asked."""
    reasons = {str(report.longrepr[2]) for report in terminalreporter.getreports("skipped")}
    for reason in sorted(reasons):
        terminalreporter.write_line(reason, yellow=True)
