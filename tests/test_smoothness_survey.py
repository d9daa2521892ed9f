"""A measurement of smoothness is whole, honest about seeds, and goes on where it was killed.

Claims of `poisonbench.smoothness` and of its verb tested here:

- one call prints one table and leaves record, tables and pictures in a folder of its own, and
  finished pieces beside it; nothing is written elsewhere; `--json` prints JSON and nothing else;
- a small step's gain on its own seed is what the metagradient predicted, and not so on other seeds;
- the definitions in the record are those of victims trained anew, outside of the survey;
- its victims share no key with those of an attack or of a judgement;
- the number of trainings is the one that is stated, and that progress counts in;
- killed at any of several points and called again, it repeats no finished piece and ends with the
  same bytes of every table and picture; called once more, it trains nothing;
- `fresh` measures everything anew, with the same result; a damaged piece is measured anew;
- an added question repeats nothing of what was answered; another seed gives other numbers;
- the test split changes nothing;
- bad input is one line and exit code 2, with nothing written;
- a finished measurement is published once, without its pieces.

The recipe is tiny: 60 digits, a ResNet-9 of width 2, two epochs of two steps.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import Run

from poisonbench import harness, runs, setting
from poisonbench.attacks import Task
from poisonbench.smoothness import definitions, experiment, report, survey
from poisonbench.smoothness.experiment import Finished, Request
from poisonbench.smoothness.pieces import Pieces
from poisonbench.smoothness.probe import Probe
from poisonbench.victim.evaluation import train
from poisonbench.victim.training import TrainingRun, TrainingSet

SIZES = {"train_size": 60, "val_size": 40, "test_size": 40}
RECIPE = ["width=2", "epochs=2", "batch_size=30"]
PROBE = Probe(seeds=3, directions=2, step_sizes=(0.003, 0.3), points=3)


def request(probe: Probe = PROBE, **asked: Any) -> Request:
    typed: Any = dict.fromkeys(("track", "dataset", "data_dir", "labels", "radius", "seeds"))
    tiny = setting.resolve(**typed, sizes=SIZES, fraction=0.1, overrides=RECIPE)
    return replace(Request(tiny, ("smooth",), probe, False, False, "poisonbench smoothness …"), **asked)


def words(*more: str) -> list[str]:
    """The command line of `request`."""
    sizes = [w for size, n in SIZES.items() for w in (f"--{size.replace('_', '-')}", str(n))]
    recipe = [word for override in RECIPE for word in ("--set", override)]
    probe = ["--seeds", "3", "--directions", "2", "--step-size", "0.003", "--step-size", "0.3"]
    asked = ["--recipe", "smooth", "--fraction", "0.1", "--points", "3"]
    return ["smoothness", *asked, *sizes, *recipe, *probe, *more]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a word with every victim that is trained and every metagradient that is taken."""
    seen: list[str] = []

    def counted(run: Any, state: Any, z: Any) -> Any:
        seen.extend(["victim"] * len(run.keys))
        return train(run, state, z)

    def differentiated(*arguments: Any) -> Any:
        seen.append("metagradient")
        return real(*arguments)

    real = survey.metagradient
    monkeypatch.setattr(survey, "train", counted)
    monkeypatch.setattr(survey, "metagradient", differentiated)
    return seen


def files(folder: Path, *suffixes: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in suffixes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return experiment.run(request(), tmp_path_factory.mktemp("finished") / "runs")


def test_one_call_leaves_everything_in_its_folder(command: Run, finished: Finished) -> None:
    code, out, err = command(*words())
    assert code == 0, err
    assert out.count("clean accuracy, %") == 1
    assert "Definition 2" in out
    assert "measuring smoothness" in err
    here = Path.cwd()
    (track,) = (here / "runs").iterdir()
    assert [path.name for path in here.iterdir()] == ["runs"]
    assert {path.name for path in track.iterdir()} == {finished.folder.name, "smoothness-pieces"}
    folder = track / finished.folder.name
    assert {path.name for path in folder.iterdir()} == {
        "smoothness.json", "smoothness.csv", "gains.csv", "lines.csv", "gains.png",
    }  # fmt: skip
    assert all(f"runs/digits/{folder.name}/{path.name}" in out for path in folder.iterdir())
    assert files(folder, ".csv", ".png") == files(finished.folder, ".csv", ".png")

    code, out, err = command(*words("--json"))
    told = json.loads(out)
    assert told["folder"] == f"runs/digits/{folder.name}"
    assert told["record"]["command"].startswith("poisonbench smoothness --recipe smooth")
    assert told["summary"][0]["recipe"] == "smooth"
    assert told["record"]["libraries"]["jax"] == jax.__version__
    assert [row["step_size"] for row in told["gains"]] == [0.003, 0.3]


def test_the_advice_names_a_start_and_the_step_that_gains_most(finished: Finished) -> None:
    def advice(ranked_by: int, *means: float) -> str:
        (one,) = finished.record.recipes
        assert one.steps is not None
        gains = [
            gain.model_copy(update={"realised": [[mean] * 3] * 3})
            for gain, mean in zip(one.steps.gains, means, strict=True)
        ]
        steps = one.steps.model_copy(update={"gains": gains, "ranked_by": ranked_by})
        changed = one.model_copy(update={"steps": steps})
        return report.stated(finished.record.model_copy(update={"recipes": [changed]}))[-1]

    assert advice(3, 0.2, 0.1).endswith("run --attack mgd --start pixels --step-size 0.003 …")
    assert advice(0, 0.1, 0.2).endswith("run --attack mgd --start random --step-size 0.3 …")
    assert advice(3, -0.1, -0.2).startswith("No step gains on other seeds of smooth")


def test_a_small_step_gains_what_was_predicted_on_its_own_seed(finished: Finished) -> None:
    steps = finished.record.recipes[0].steps
    assert steps is not None
    assert steps.ranked_by == 3
    assert len(set(steps.images)) == 6
    small = steps.gains[0]
    realised = np.array(small.realised, np.float64)
    predicted = np.array(small.predicted, np.float64)
    assert (predicted > 0).all()
    np.testing.assert_allclose(np.diag(realised), predicted, rtol=0.25)
    others = realised[~np.eye(3, dtype=bool)].reshape(3, 2)
    assert not np.allclose(others, predicted[:, None], rtol=0.25)


@pytest.mark.slow
def test_the_definitions_are_those_of_victims_trained_outside(finished: Finished) -> None:
    asked = request()
    data = runs.load_data(asked.setting)
    task = Task.of(data, asked.setting.budget, asked.setting.surrogate)
    drawn = survey.Surveyor(task, PROBE, Pieces(finished.folder, {}), lambda *_: None)
    root = jax.random.fold_in(harness.smoothness_key(0), survey.VICTIMS)
    keys = jax.random.split(root, 3)
    direction = 1
    indices = drawn._images(survey.IMAGES, direction)
    z = data.train_images[indices].astype(np.float32) / np.float32(255)
    v = drawn._signs((survey.SIGNS, direction), z, 2 * PROBE.h)
    assert len(indices) == 6
    thetas, losses = [], []
    for t in range(3):
        clean = TrainingSet.clean(data.train_images, data.train_labels, 10)
        poisoned = clean.with_poison(indices, data.train_labels[indices])
        run, state = TrainingRun.start(task.recipe, poisoned, keys)
        state = train(run, state, jnp.asarray(z + np.float32(t * PROBE.h) * v))
        leaves = [np.asarray(x).reshape(3, -1) for x in jax.tree.leaves(state.params)]
        thetas.append(np.concatenate(leaves, 1))
        losses.append(np.asarray(drawn._loss.per_seed(state), np.float64))
    told = finished.record.recipes[0]
    np.testing.assert_allclose(told.loss, losses[0], rtol=1e-4)
    curved = definitions.definition1(*losses, PROBE.h)
    # Of two differences of losses that are alike to five digits little is left.
    found = [row[direction] for row in told.definition1]
    np.testing.assert_allclose(found, curved, rtol=1e-2, atol=1e-5 / PROBE.h**2)
    for s in range(3):
        direct = definitions.definition2(*(theta[s] for theta in thetas))
        assert finished.record.recipes[0].definition2[s][direction] == pytest.approx(direct, abs=1e-3)


def test_the_number_of_trainings_is_as_stated(trained: list[str], tmp_path: Path) -> None:
    steps = []
    asked = request()
    data = runs.load_data(asked.setting)
    task = Task.of(data, asked.setting.budget, asked.setting.surrogate)
    surveyor = survey.Surveyor(task, PROBE, Pieces(tmp_path, {}), lambda n, _: steps.append(n))
    surveyor.survey("smooth", steps=True)
    assert trained.count("victim") == 3 * (1 + 2 * 2 + 3 * 2)
    assert trained.count("metagradient") == 3 + 3
    assert sum(steps) == 33 + 4 * 6 == survey.trainings(PROBE, steps=True)


def test_no_victim_here_is_one_that_a_poison_is_judged_by() -> None:
    """Nor one that it is crafted on: roots differ, for equal seeds and unequal ones."""
    roots = [
        tuple(np.asarray(jax.random.key_data(root(seed))).tolist())
        for root in (harness.smoothness_key, harness.crafting_key, harness.evaluation_key)
        for seed in range(20)
    ]
    assert len(set(roots)) == 60


@pytest.mark.parametrize("killed_at", [2, 9, 20, 30])
def test_a_killed_measurement_goes_on_and_ends_with_the_same_bytes(
    killed_at: int,
    trained: list[str],
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = survey.train

    def dying(run: Any, state: Any, z: Any) -> Any:
        if trained.count("victim") >= killed_at:
            raise KeyboardInterrupt
        return counted(run, state, z)

    with monkeypatch.context() as patched:
        patched.setattr(survey, "train", dying)
        with pytest.raises(KeyboardInterrupt):
            experiment.run(request(), tmp_path)
    kept = len(list((tmp_path / "digits" / "smoothness-pieces").iterdir()))
    assert not list(tmp_path.rglob("smoothness.json"))
    before = len(trained)
    again = experiment.run(request(), tmp_path)
    # Clean victims are trained again where their parameters are still needed, and only there; a
    # piece that was begun is trained again as a whole.
    assert len(trained) - before <= 39 - before + 6
    assert len(list((tmp_path / "digits" / "smoothness-pieces").iterdir())) == 13 > kept
    assert files(again.folder, ".csv", ".png") == files(finished.folder, ".csv", ".png")
    assert again.record.recipes[0].model_copy(update={"seconds": 0.0}) == finished.record.recipes[
        0
    ].model_copy(update={"seconds": 0.0})

    trained.clear()
    (again.folder / "smoothness.json").unlink()
    experiment.run(request(), tmp_path)
    assert trained == []


def test_fresh_and_damaged_are_measured_anew(
    finished: Finished, trained: list[str], tmp_path: Path
) -> None:
    first = experiment.run(request(), tmp_path)
    everything = len(trained)
    trained.clear()
    fresh = experiment.run(request(), tmp_path, fresh=True)
    assert len(trained) == everything == 39
    assert files(fresh.folder, ".csv", ".png") == files(finished.folder, ".csv", ".png")
    pieces = sorted((tmp_path / "digits" / "smoothness-pieces").iterdir())
    for piece, text in zip(pieces[:3], ("", "[]", '{"identity": "x"}'), strict=True):
        piece.write_text(text)
    (first.folder / "smoothness.json").unlink()
    trained.clear()
    experiment.run(request(), tmp_path)
    assert 0 < len(trained) < everything
    assert all(json.loads(piece.read_text())["answer"] for piece in pieces)


def test_more_questions_repeat_nothing(trained: list[str], finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    plain = experiment.run(request(), out)
    trained.clear()
    more = experiment.run(request(replace(PROBE, directions=3, step_sizes=(0.003, 0.1, 0.3))), out)
    # Clean victims and one direction, and one step size.
    assert len(trained) == (3 + 6) + 9
    assert more.folder != plain.folder
    old, new = plain.record.recipes[0], more.record.recipes[0]
    assert [row[:2] for row in new.definition2] == old.definition2
    assert new.accuracy == old.accuracy
    other = experiment.run(request(replace(PROBE, seed=1)), out)
    assert other.folder not in (plain.folder, more.folder)
    assert other.record.recipes[0].definition2 != old.definition2


def test_the_test_split_changes_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runs.load_data

    def other(asked: Any) -> Any:
        data = real(asked)
        return replace(data, test_images=255 - data.test_images, test_labels=9 - data.test_labels)

    monkeypatch.setattr(runs, "load_data", other)
    again = experiment.run(request(), tmp_path)
    assert again.folder.name == finished.folder.name
    assert files(again.folder, ".csv") == files(finished.folder, ".csv")
    assert set(again.record.hashes) == {"train", "val"}


MISTAKES = [
    ("--recipe smoth", "no recipe called 'smoth'; did you mean smooth"),
    ("--set widht=2", "did you mean width"),
    ("--set batch_size=61", "batch_size 61 is larger"),
    ("--seeds 2", "--seeds must be at least 3"),
    ("--seeds few", "--seeds"),
    ("--directions 1", "--directions must be at least 2"),
    ("--h 0.3", "--h must lie in (0, 0.25]"),
    ("--h nan", "--h must lie in (0, 0.25]"),
    ("--step-size 0.2", "--step-size: give every size once"),
    ("--step-size 7", "--step-size must lie in (0, 1]"),
    ("--images some", "--images"),
    ("--points 1", "--points must be at least 2"),
    ("--extent 0.5", "--extent must lie in (0, 0.25]"),
    ("--fraction 0.001", "selects no image of 60"),
    ("--dataset digts", "did you mean digits"),
    ("--data-dir .", "--data-dir is for tfds:"),
    ("--track digit", "did you mean digits"),
    ("--out file/runs", "cannot write"),
    ("--wide", "--wide"),
    ("stray", "stray"),
]


def test_transfer_victims_are_measured_where_they_are_named() -> None:
    tiny = request().setting
    assert request(names=("velo", "smooth")).recipes == {
        "velo": tiny.track.transfer["velo"],
        "smooth": tiny.recipes["smooth"],
    }
    assert list(request(names=()).recipes) == ["smooth", "standard"]


@pytest.mark.parametrize(("mistake", "hint"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake: str, hint: str, command: Run) -> None:
    Path("file").write_text("no folder")
    code, out, err = command(*words(*mistake.split()))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert err.endswith(f"{lines[0]}\n")
    assert hint in lines[0]
    assert [path.name for path in Path.cwd().iterdir()] == ["file"]


def test_a_finished_measurement_is_published_once(
    command: Run, finished: Finished, tmp_path: Path
) -> None:
    code, out, err = command("publish", str(finished.folder))
    target = Path("results", "smoothness", "digits", finished.folder.name)
    assert (code, out.strip()) == (0, str(target)), err
    assert files(target, ".csv", ".png", ".json") == files(finished.folder, ".csv", ".png", ".json")
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    code, out, err = command("publish", str(finished.folder))
    assert (code, out) == (2, "")
    assert "never overwritten" in err
