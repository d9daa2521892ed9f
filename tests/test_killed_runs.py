"""A run that was killed goes on where it was, and a second process compiles nothing anew.

Claims of `poisonbench.runs` tested here, on processes of their own:

- a process killed at any metastep and started again ends with the bytes of one that never was;
- a second process with the same cache compiles nothing anew.

Runs are tiny: 100 digits, a plain network of width 2, one epoch, two seeds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import safe_open
from test_runs import RECIPE, SIZES, files, request

import poisonbench
from poisonbench import runs

STEPS = 40  # enough to be killed among them, and quick


def words(name: str = "mgd", steps: int = 3, out: Path = Path("runs"), verb: str = "craft") -> list[str]:
    """The command line of `request`."""
    sizes = [w for size, n in SIZES.items() for w in (f"--{size.replace('_', '-')}", str(n))]
    recipe = [word for override in RECIPE for word in ("--set", override)]
    mgd = ["--start", "random", "--check-seeds", "2", "--check-every", "2", "--steps", str(steps)]
    own = mgd if name == "mgd" else []
    return [verb, "--attack", name, *sizes, "--fraction", "0.1", *recipe, *own, "--out", str(out)]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, whether or not the package is installed."""
    root = Path(poisonbench.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", "from poisonbench.cli import main; main()", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def metasteps(folder: Path) -> int:
    """Metasteps in the checkpoint below a folder; -1 before there is one."""
    with suppress(FileNotFoundError):  # folders come and go while the process looks where it may write
        for path in folder.rglob("checkpoint.safetensors"):
            with safe_open(path, framework="numpy") as file:
                return len(json.loads(file.metadata()["poisonbench"])["rows"]) - 1
    return -1


def kill_at(metastep: int, out: Path) -> None:
    """Craft in another process, and kill it once its checkpoint has so many metasteps."""
    process = start(words(steps=STEPS, out=out))
    try:
        while metasteps(out) < metastep and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert metastep <= metasteps(out) < STEPS
    assert not list(out.rglob("poison.safetensors"))


def killed_and_whole(metasteps_: list[int], folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Poisons of a run that was killed at each of these metasteps, and of one that never was."""
    killed, whole = folder / "killed", folder / "whole"
    for metastep in metasteps_:
        kill_at(metastep, killed)
    path = Path(finish(start(words(steps=STEPS, out=killed))).strip())
    assert path.is_relative_to(killed)
    crafted = runs.craft(request(steps=STEPS), whole)
    log = json.loads((path.parent / "crafting.json").read_text())["log"]
    assert log == crafted.log
    assert [row["metastep"] for row in log] == list(range(STEPS + 1))
    return [p.read_bytes() for p in killed.rglob("poison.*")], [crafted.path.read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="NOT TESTED: no SIGKILL on this system")
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed, whole = killed_and_whole([2], tmp_path)
    assert killed == whole


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="NOT TESTED: no SIGKILL on this system")
def test_killed_five_times_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed, whole = killed_and_whole(sorted(random.Random(0).sample(range(STEPS - 10), 5)), tmp_path)
    assert killed == whole


@pytest.mark.skipif(
    sys.platform != "linux", reason="NOT TESTED: XDG_CACHE_HOME moves the cache on Linux"
)
@pytest.mark.slow
@pytest.mark.parametrize("verb", ["craft", "run"])
def test_a_second_process_compiles_nothing_anew(verb: str, tmp_path: Path) -> None:
    def compiled() -> set[str]:
        programs = files(tmp_path / "cache" / "poisonbench" / "compiled")
        return {name for name in programs if not name.endswith("-atime")}

    first: set[str] = set()
    for seed in ("0", "1"):  # another poison, but the same programs
        arguments = [*words("noise", out=tmp_path / "runs", verb=verb), "--seed", seed]
        seeds = ["--seeds", "2"] if verb == "run" else []
        finish(start([*arguments, *seeds], XDG_CACHE_HOME=str(tmp_path / "cache")))
        first = first or compiled()
    program = "train_and_score" if verb == "run" else "randint"
    assert any(program in name for name in first)
    assert compiled() == first
    assert len(list((tmp_path / "runs").rglob("poison.safetensors"))) == 2
