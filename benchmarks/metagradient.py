"""Our metagradient engine beside every way that people have today, measured on one machine.

    uv run --extra bench python -m benchmarks.metagradient

prints tables and writes `metagradient.json`, `ways.png` and `cost.png` to `--out`. PyTorch is not
part of the extra, since its default build on Linux brings several gigabytes for a GPU that nobody
asks for here; a row that needs it says so. To measure it as well, install it, best its CPU build:

    uv pip install torch==2.13.0
    uv run --extra bench python -m benchmarks.metagradient

What is measured: time over training time (each run beside one of the training alone, ways taken in
turn, the order reversed in every other round), peak memory, and error against float64, for ResNet-9
by the smooth recipe on 8×8 and 16×16 images; cost against the length of the run and the states kept,
on a small network; and what dispatch takes. A benchmark that was killed goes on where it was when the
same command is given again; a finished one starts anew.

Threads of OpenMP, which PyTorch uses, wait without spinning: where anything else runs on the cores,
spinning made it forty times slower. `OMP_WAIT_POLICY=ACTIVE` in the environment has them spin.

Cost: on two cores 20 minutes without the part 16x16, and about twice that with it; a quarter of it is
compiling. Measure on a machine that does nothing else.

Exit codes: 0, 1 where a way failed or gave another gradient, 2 for bad input, 130 where interrupted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from benchmarks import pictures, sweeps, tables
from benchmarks.comparing import compare
from benchmarks.pieces import Pieces
from benchmarks.problems import Setting
from benchmarks.report import Comparison, Report
from benchmarks.ways import Way, all_ways
from poisonbench._files import require_writable
from poisonbench.errors import UserError, unknown_name
from poisonbench.progress import Progress
from poisonbench.stored import hardware, library_versions, provenance

RESULTS = Path(__file__).parent / "results"
PROBLEMS = {
    "8x8": Setting(kind="resnet9", width=16, batch_size=100, steps=100),
    "16x16": Setting(kind="resnet9", width=16, batch_size=100, steps=100, resolution=16),
}
SWEEPS = ("lengths", "states", "dispatch")
PARTS = (*PROBLEMS, *SWEEPS)
SMALL = Setting(kind="mlp", width=128, batch_size=100, steps=512)
LEAVES = PROBLEMS["8x8"].replace(kind="leaves", steps=512)
LENGTHS = (16, 64, 256, 512, 1024, 4096)
STATES = (4, 8, 16, 32, 64, 128, 256, 512)
ARITIES = (2, 3, 4, 8, 16)


@dataclass(frozen=True)
class Sizes:
    """How much is measured: everything, or just enough to see that it works."""

    problems: dict[str, Setting]
    small: Setting
    leaves: Setting
    lengths: tuple[int, ...]
    states: tuple[int, ...]
    arities: tuple[int, ...]

    @staticmethod
    def of(quick: bool) -> Sizes:
        """The sizes of a whole or of a quick benchmark."""
        if not quick:
            return Sizes(PROBLEMS, SMALL, LEAVES, LENGTHS, STATES, ARITIES)
        tiny = {"width": 2, "batch_size": 10, "steps": 6, "images": 40, "held_out": 20}
        return Sizes(
            {name: setting.replace(**tiny) for name, setting in PROBLEMS.items()},
            SMALL.replace(**tiny),
            LEAVES.replace(**tiny),
            (4, 16),
            (4, 6),
            (2,),
        )


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    try:
        arguments = _parser().parse_args(words)
        _check(arguments)
        return _run(arguments)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what it had kept", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.metagradient",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--rounds", type=int, help="runs of each way (default 3, with --quick 1)")
    parser.add_argument("--threads", type=int, help="cores to run on (default: all)")
    parser.add_argument("--part", action="append", help=f"only these, of {', '.join(PARTS)}")
    parser.add_argument("--way", action="append", help="only these rows of the tables of ResNet-9")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few steps")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Fill in defaults, and refuse what cannot work.

    Raises:
        UserError: the line says what.
    """
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.quick else 3
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {arguments.rounds}")
    known = [way.name for way in all_ways(Sizes.of(arguments.quick).problems["8x8"].steps)]
    for kind, given, allowed in (("part", arguments.part, PARTS), ("way", arguments.way, known)):
        for name in given or ():
            if name not in allowed:
                raise unknown_name(kind, name, allowed)
    there = hardware().cores
    if arguments.threads is None:
        arguments.threads = there
    elif not 1 <= arguments.threads <= there:
        raise UserError(f"--threads must lie between 1 and the {there} cores there are")
    elif not hasattr(os, "sched_setaffinity"):
        raise UserError("--threads needs a system that binds processes to cores, such as Linux")
    else:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    require_writable(arguments.out)


def _run(arguments: argparse.Namespace) -> int:
    import psutil

    sizes = Sizes.of(arguments.quick)
    parts = [part for part in PARTS if not arguments.part or part in arguments.part]
    report = Report(
        quick=arguments.quick,
        rounds=arguments.rounds,
        threads=arguments.threads,
        memory_bytes=psutil.virtual_memory().total,
        environment={"OMP_WAIT_POLICY": os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")},
        **provenance(_command(arguments)) | {"libraries": _libraries()},
    )
    kept = report.model_dump(
        include={"quick", "rounds", "threads", "hardware", "libraries"}, mode="json"
    )
    pieces = Pieces(arguments.out, {**kept, "sizes": repr(sizes)})
    if len(pieces):
        print(f"going on from {len(pieces)} results of a run that did not finish", file=sys.stderr)
    report = report.model_copy(update=_measured(arguments, sizes, parts, pieces))
    report.save(arguments.out / "metagradient.json")
    written = pictures.write(report, arguments.out)
    # A pipe or a file has no width of its own, and rich would take 80 columns.
    tables.show(report, Console(width=None if sys.stdout.isatty() else 120))
    pieces.clear()
    for path in (arguments.out / "metagradient.json", *written):
        print(f"wrote {path}", file=sys.stderr)
    rows = [row for comparison in report.comparisons for row in comparison.rows]
    wrong = [row for row in rows if row.status == "failed" or (row.rounds and not row.agrees)]
    return 1 if wrong else 0


def _measured(
    arguments: argparse.Namespace, sizes: Sizes, parts: Sequence[str], pieces: Pieces
) -> dict[str, object]:
    """Fields of the report."""
    rounds = arguments.rounds
    chosen = {
        name: _ways(setting, arguments.way) for name, setting in sizes.problems.items() if name in parts
    }
    lengths, states = (
        sweeps.by_length(sizes.lengths),
        sweeps.by_states(sizes.states, sizes.arities, sizes.small.steps),
    )
    total = sum(1 + (1 + rounds) * len(ways) for ways in chosen.values())
    total += rounds * (len(lengths) * ("lengths" in parts) + len(states) * ("states" in parts))
    found: dict[str, object] = {}
    with Progress("benchmark", total + 3 * ("dispatch" in parts)) as progress:

        def tell(note: str) -> None:
            progress.advance(1, note)

        comparisons: list[Comparison] = []
        for name, ways in chosen.items():
            comparisons.append(compare(name, sizes.problems[name], ways, rounds, pieces, tell))
        found["comparisons"] = tuple(comparisons)
        if "lengths" in parts:
            found["lengths"] = sweeps.sweep("lengths", sizes.small, lengths, rounds, pieces, tell)
        if "states" in parts:
            found["states"] = sweeps.sweep("states", sizes.small, states, rounds, pieces, tell)
        if "dispatch" in parts:
            found["dispatch"] = sweeps.dispatch(sizes.leaves, rounds, pieces, tell)
    return found


def _ways(setting: Setting, wanted: Sequence[str] | None) -> list[Way]:
    return [way for way in all_ways(setting.steps) if not wanted or way.name in wanted]


def _command(arguments: argparse.Namespace) -> str:
    words = ["python -m benchmarks.metagradient", f"--rounds {arguments.rounds}"]
    words += [f"--threads {arguments.threads}"] + ["--quick"] * arguments.quick
    words += [f"--part {name}" for name in arguments.part or ()]
    words += [f"--way {name}" for name in arguments.way or ()]
    return " ".join(words)


def _libraries() -> dict[str, str | None]:
    found: dict[str, str | None] = dict(library_versions())
    for name in ("equinox", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
