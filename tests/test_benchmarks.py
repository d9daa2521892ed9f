"""The benchmark compares what it says it compares, and says what it could not measure.

Claims tested here, without a word on how long anything takes:

- every way in JAX gives the same gradient, in float64 to 1e-12, and in float32 to 1e-5 of float64;
  so does PyTorch's double backward of ResNet-9, where PyTorch is installed;
- a wrong gradient is called one, by the row and by the exit code;
- multiply-adds are those counted by hand for a layer, forward and backward, dead code left out, and
  a metagradient of ResNet-9 with every step run again is 3.66 trainings by count;
- what a track costs is counted from shapes as the same training is from its arrays;
- the predicted cost of a schedule follows from its plan; the share of dispatch from its count;
- the memory of a call is what it takes at its peak, not what is left at its end;
- the command writes its JSON and its pictures and prints every row, those that were not measured as
  well; it goes on from what a killed run left, and removes that in the end;
- a process that dies is a row that failed, and bad input is one line and exit code 2.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("NOT TESTED: benchmarks/ is part of the checkout only", allow_module_level=True)

from benchmarks import comparing, cost, measure, problems, sweeps, tables, ways  # noqa: E402
from benchmarks import metagradient as command  # noqa: E402
from benchmarks.operations import Operations, count, multiply_adds  # noqa: E402
from benchmarks.pieces import Pieces  # noqa: E402
from benchmarks.problems import Setting  # noqa: E402
from benchmarks.report import Comparison, Dispatch, Point, Report, Round, Row, Sweep  # noqa: E402
from poisonbench.stored import hardware, now  # noqa: E402
from poisonbench.tracks import TRACKS  # noqa: E402

MLP = Setting(kind="mlp", width=3, batch_size=20, steps=11, images=40, held_out=20)
NET = Setting(kind="resnet9", width=2, batch_size=10, steps=4, images=40, held_out=20)
NO_TORCH = "NOT TESTED: torch is not installed: uv pip install torch==2.13.0"


def _needed(way: ways.Way) -> ways.Way:
    if not way.installed:
        pytest.skip(f"NOT TESTED: {way.needs} is not installed: uv sync --extra bench")
    return way


IN_JAX = [way for way in ways.all_ways(MLP.steps) if way.needs != "torch"]


@pytest.mark.parametrize("way", IN_JAX, ids=lambda way: way.name)
def test_every_way_gives_the_same_gradient(way: ways.Way, x64: None) -> None:
    doubled = problems.make(MLP, double=True)
    run, _ = ways.prepare(ways.SCAN_CHECKPOINT, doubled)
    value, gradient = run()
    assert float(jnp.abs(gradient).max()) > 1e-6  # a comparison of zeros would prove nothing
    his_value, his = ways.prepare(_needed(way), doubled)[0]()
    assert float(his_value) == pytest.approx(float(value), rel=1e-14)
    assert _away(his, gradient) < 1e-12
    with jax.enable_x64(False):
        single = ways.prepare(way, problems.make(MLP))[0]()[1]
    assert single.dtype == jnp.float32
    assert 0 < _away(single, gradient) < 1e-5


@pytest.mark.slow
def test_a_track_is_counted_from_its_shapes() -> None:
    problem = problems.make(NET)
    counted = count(problem)
    found = cost.cost(NET.recipe, NET.images, (8, 8, 1), len(problem.z))
    assert found.steps == NET.recipe.num_steps(NET.images)
    assert found.training == counted.step * found.steps
    assert found.metagradient == (counted.step + counted.vjp) * found.steps
    for name, track in TRACKS.items():
        images, shape = cost.size(track.dataset)
        assert images == track.dataset.train_size, name
        assert shape[0] == (track.dataset.resolution or cost.SHAPES[track.dataset.name][0])


def _away(gradient: Any, reference: Any) -> float:
    gradient, reference = np.asarray(gradient, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))


def test_pytorch_gives_the_same_gradient() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip(NO_TORCH)
    from benchmarks import torch_way

    problem = problems.make(NET)
    value, gradient = ways.prepare(ways.ours("store_all"), problem)[0]()
    assert float(jnp.abs(gradient).max()) > 0
    for name in ("torch", "torch-checkpoint"):
        his_value, his = torch_way.prepare(name, problem)()
        assert his_value == pytest.approx(float(value), rel=1e-5)
        assert _away(his, gradient) < 1e-4
        training = torch_way.TorchTraining(problem)
        training.rates = [rate * 1.01 for rate in training.rates]
        assert _away(torch_way.prepare(name, problem)()[1], training.whole_graph()[1].numpy()) > 1e-3


def test_multiply_adds_are_those_counted_by_hand() -> None:
    x, w, k = jnp.ones((5, 7)), jnp.ones((7, 11)), jnp.ones((3, 3, 2, 4))
    images = jnp.ones((6, 8, 8, 2))

    def convolve(x: Any, k: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    one = 5 * 7 * 11
    assert multiply_adds(lambda x, w: jnp.tanh(x @ w), x, w) == one
    assert multiply_adds(lambda x, w: (x @ w).sum() * 0 + x, x, w) == one
    assert multiply_adds(lambda x, w: ((x @ w), x)[1], x, w) == 0  # nobody asks for the product
    both = jax.grad(lambda x, w: (x @ w).sum() ** 2, argnums=(0, 1))
    assert multiply_adds(both, x, w) == 3 * one
    assert multiply_adds(jax.jit(jax.grad(lambda w: ((x @ w) ** 2).sum())), w) == 2 * one
    assert multiply_adds(convolve, images, k) == 6 * 8 * 8 * (3 * 3 * 2) * 4
    repeated = lambda x: jax.lax.scan(lambda c, _: (c @ jnp.eye(7), None), x, None, length=9)[0]  # noqa: E731
    assert multiply_adds(repeated, x) == 9 * 5 * 7 * 7


def test_the_floor_of_resnet9_is_366() -> None:
    counted = count(problems.make(command.PROBLEMS["8x8"]))
    assert counted.step / counted.forward == pytest.approx(3, abs=0.02)
    assert counted.floor == pytest.approx(3.66, abs=0.01)


def test_the_prediction_is_the_plans_count() -> None:
    def point(way: ways.Way, steps: int, seconds: float) -> Point:
        return sweeps._point(way, steps, [Round(seconds=seconds, training_seconds=1.0)])

    plain, tree = ways.ours("store_all"), ways.ours("tree", arity=2)
    sweep = Sweep(
        setting=MLP, points=(point(plain, 16, 9.9), point(plain, 64, 3.5), point(tree, 64, 7.0))
    )
    assert sweep.points[1].forward == sweep.points[1].differentiated == 64
    assert sweep.vjp == pytest.approx(2.5)  # from the longest run that repeats least
    planned = ways.planned(tree, 64)
    assert planned.forward > 64
    predicted = sweep.predicted(planned.forward, planned.differentiated, 64)
    assert predicted == pytest.approx(planned.forward / 64 + 2.5)
    one = Dispatch(way="x", setting=MLP, seconds=(0.4, 9.0, 0.1), forward=10, differentiated=10)
    assert one.share(vjp=3.0) == pytest.approx(0.4 / (0.4 + 0.02 * 40))


def test_memory_is_that_of_the_peak() -> None:
    size = 200 * 2**20

    def passing() -> int:
        return int(np.ones(size, np.uint8)[-1])

    passing()
    peak, result = measure.peak_of(passing)
    if peak is None:
        pytest.skip("NOT TESTED: this system does not tell a process its peak memory")
    assert result == 1
    assert 0.95 * size < peak < 1.2 * size
    nothing, _ = measure.peak_of(lambda: None)
    assert nothing is not None
    assert nothing < 0.2 * size  # the peak before is forgotten


def _row(way: str, ratio: float, memory: int | None, error: float = 1e-6) -> Row:
    one = Round(seconds=ratio, training_seconds=1.0)
    return Row(way=way, title=way, rounds=(one,), memory=memory, error=error, value=1.0)


def _comparison(*rows: Row) -> Comparison:
    counted = Operations(forward=100, step=300, vjp=800)
    return Comparison(
        name="8x8", setting=NET, reference="float64", operations=counted, state_bytes=8, rows=rows
    )


def _report(**fields: Any) -> Report:
    return Report(
        created=now(), command="x", quick=False, rounds=1, threads=1,
        hardware=hardware(), memory_bytes=2**30, code={}, libraries={}, **fields,
    )  # fmt: skip


def test_aims_are_judged_at_equal_memory(capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        _row("ours-fast", 3.6, 1000), _row("ours-small", 5.0, 100), _row("unrolled", 5.5, 9000),
        _row("nested", 4.9, 110), _row("tiny", 6.0, 10), _row("torch", 7.1, None),
    )  # fmt: skip
    report = _report(comparisons=(_comparison(*rows),))
    verdicts = {aim: met for aim, _, met in tables.aims(report)}
    assert [met for aim, met in verdicts.items() if "at most 3.7" in aim] == [True]
    assert [met for aim, met in verdicts.items() if "below the floor" in aim] == [True]
    slower = {aim.split("“")[1].split("”")[0]: met for aim, met in verdicts.items() if "“" in aim}
    assert slower == {"unrolled": True, "nested": False, "tiny": None, "torch": None}
    assert [met for aim, met in verdicts.items() if "half the time" in aim] == [False]
    assert Report.model_validate_json(report.model_dump_json()) == report


class _Here(measure.Worker):
    """A worker without a process of its own, which would import and compile everything anew."""

    def __init__(self, setting: Setting, *, double: bool = False) -> None:
        self.desk, self.double = measure._Desk(setting, double), double

    def close(self) -> None:
        pass

    def _ask(self, *request: Any) -> Any:
        with jax.enable_x64(self.double):
            return getattr(self.desk, request[0])(*request[1:])


@pytest.mark.slow
def test_the_command_measures_writes_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("psutil") is None:
        pytest.skip("NOT TESTED: psutil is not installed: uv sync --extra bench")
    monkeypatch.setattr(comparing, "Worker", _Here)
    monkeypatch.setattr(sweeps, "Worker", _Here)
    monkeypatch.setattr(sweeps, "_length_ways", lambda: [ways.ours("store_all"), ways.SCAN_CHECKPOINT])
    small = command.Sizes({"8x8": MLP}, MLP, MLP, (4, MLP.steps), (3, 4), (2,))
    monkeypatch.setattr(command.Sizes, "of", staticmethod(lambda quick: small))
    installed = ways.Way.installed.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        ways.Way, "installed", property(lambda way: way.needs is None and installed(way))
    )
    chosen = ["--way", "ours-store-all", "--way", "scan-checkpoint", "--way", "torch"]
    words = [
        "--quick",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
        "--part",
        "8x8",
        "--part",
        "lengths",
        *chosen,
    ]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(command.pictures, "write", stop)
        assert command.main(words) == 130
    left = [path.name for path in (tmp_path / ".pieces").rglob("round-*.json")]
    assert len(left) == 4
    before = sorted(path.read_text() for path in (tmp_path / ".pieces").rglob("round-*.json"))
    capsys.readouterr()

    assert command.main(words) == 0
    said = capsys.readouterr()
    assert "going on from" in said.err
    assert "NOT MEASURED: PyTorch" in said.err
    assert "not installed: torch" in " ".join(said.out.split())
    report = Report.model_validate_json((tmp_path / "metagradient.json").read_bytes())
    rows = {row.way: row for row in report.comparisons[0].rows}
    assert {name: row.status for name, row in rows.items()} == {
        "ours-store-all": "measured", "scan-checkpoint": "measured", "torch": "not installed"
    }  # fmt: skip
    again = sorted(r.model_dump_json() + "\n" for row in rows.values() for r in row.rounds)
    assert again == before  # what was measured is not measured again
    assert rows["ours-store-all"].kept == MLP.steps
    assert all(row.agrees for row in rows.values() if row.status == "measured")
    assert report.lengths is not None
    assert {point.steps for point in report.lengths.points} == {4, MLP.steps}
    assert {path.name for path in tmp_path.iterdir()} == {"metagradient.json", "ways.png", "cost.png"}


def test_a_wrong_gradient_is_called_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    right, wrong = _row("ours-a", 3.0, 10), _row("b", 3.0, 10, error=0.1)
    assert right.agrees
    assert not wrong.agrees
    tables.show(_report(comparisons=(_comparison(right, wrong),)), tables.Console(width=120))
    assert capsys.readouterr().out.count("DIFFERS") == 1


@pytest.mark.slow
def test_a_worker_answers_from_its_own_process() -> None:
    with measure.Worker(MLP) as worker:
        assert worker.ask("state_bytes") == 4 * 2 * (64 * 3 + 3 + 3 * 10 + 10)
        with pytest.raises(measure.WorkerError, match="KeyError"):
            worker.prepare(ways.Way("x", "x", peer="no such thing"))
        assert worker.seconds(None) > 0
    assert worker._process.exitcode is not None


def test_a_process_that_dies_is_a_row_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: measure.Worker, way: ways.Way, **_: Any) -> measure.Prepared:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        found: measure.Prepared = self.ask("prepare", way, None, True)
        return found

    monkeypatch.setattr(measure.Worker, "prepare", die)
    pieces = Pieces(tmp_path, {})
    with comparing.ExitStack() as stack:
        bench = comparing._Bench("x", MLP, 1, pieces, np.ones(1), stack)
        row = bench.first_row(ways.SCAN_CHECKPOINT)
    assert row.status == "failed"
    assert "killed" in row.remark


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--rounds", "x"], "invalid int"),
        (["--threads", "0"], "between 1 and"),
        (["--way", "unroled"], "unrolled"),
        (["--part", "7x7"], "8x8"),
        (["--nonsense"], "--nonsense"),
        (["--out", "/dev/null/x"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err
