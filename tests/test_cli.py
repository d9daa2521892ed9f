"""Bad input is one line and exit code 2; results go to standard output, all else to standard error.

Claims of `poisonbench.cli` tested here:

- every mistake that a user can make at the command line ends with exit code 2 and one line on
  standard error that begins with `error: ` and names what to change: no traceback, nothing on
  standard output, no file written;
- training that blows up says at which metastep and what to lower, and its checkpoint stays usable;
- `--help` of every verb works and does not import JAX;
- `--json` prints JSON and nothing else; without it, `craft` and `publish` print a path;
- a recorded command names no path of the machine;
- `leaderboard --check` writes nothing, and exits 1 where a table is out of date;
- an interruption exits 130 and says that the same command continues.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commandline import Run, cli, refused

import poisonbench
from poisonbench import _options, attacks, harness, runs
from poisonbench.errors import UserError
from poisonbench.journal import Journal
from poisonbench.records import Record
from poisonbench.threat import PoisonSet
from poisonbench.tracks import TRACKS

SIZES = ["--train-size", "100", "--val-size", "50", "--test-size", "50"]
RECIPE = ["--set", "network=cnn", "--set", "width=2", "--set", "epochs=1", "--set", "batch_size=50"]
TINY = [*SIZES, *RECIPE]
CHEAP = ["--start", "random", "--steps", "3", "--check-seeds", "2"]


def everything(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*"))


MISTAKES = [
    ("nonsense", "No such command 'nonsense'"),
    ("list --jsn", "--jsn"),
    ("run --attack", "--attack"),
    ("run --attack mdg", "no attack called 'mdg'; did you mean mgd"),
    ("run --attack noise --dataset digts", "did you mean digits"),
    ("run --attack noise --dataset cifar10", "did you mean tfds:cifar10"),
    ("run --attack noise --dataset tfds:cifr10 --data-dir .", "did you mean cifar10"),
    ("run --attack noise --dataset tfds:cifar10 --data-dir missing", "missing is not a folder"),
    ("run --attack noise --dataset tfds:cifar10 --data-dir .", "holds no prepared cifar10"),
    ("run --attack noise --data-dir .", "--data-dir is for tfds:"),
    ("run --attack noise --track digit", "did you mean digits"),
    ("run --attack noise --set smoth.width=2", "did you mean smooth"),
    ("run --attack noise --set widht=2", "did you mean width"),
    ("run --attack noise --set width", "field=value"),
    ("run --attack noise --set width=two", "--set width=two"),
    ("run --attack noise --set epochs=0", "epochs must be at least 1"),
    ("run --attack noise --set batch_size=101", "batch_size 101 is larger"),
    ("run --attack noise --set optimizer=sdg", "did you mean"),
    ("run --attack noise --set optimizer_options={}x", "optimizer_options"),
    ("run --attack noise --fraction 0", "--fraction must lie strictly between 0 and 1"),
    ("run --attack noise --fraction 1", "--fraction must lie strictly between 0 and 1"),
    ("run --attack noise --fraction 2", "--fraction must lie strictly between 0 and 1"),
    ("run --attack noise --fraction nan", "--fraction must lie strictly between 0 and 1"),
    ("run --attack noise --fraction -0.1", "--fraction must lie strictly between 0 and 1"),
    ("run --attack noise --fraction some", "--fraction"),
    ("run --attack noise --fraction 0.009", "selects no image of 100: use at least 0.01"),
    ("run --attack noise --labels maybe", "--labels must be 'fixed' or 'free'"),
    ("run --attack noise --radius 0", "--radius"),
    ("run --attack noise --radius 256", "--radius"),
    ("run --attack noise --resolution 4", "at least 8×8"),
    ("run --attack noise --resolution 9", "--resolution 9 would enlarge"),
    ("run --attack noise --train-size 0", "--train-size"),
    ("run --attack noise --train-size 5000", "--train-size"),
    ("run --attack noise --val-size 5000", "--val-size"),
    ("run --attack noise --test-size 5000", "--test-size"),
    ("run --attack noise --seeds 1", "--seeds must be at least 2"),
    ("run --attack noise --seed -1", "--seed"),
    ("run --attack noise --seed x", "--seed"),
    pytest.param("run --attack noise --seed 4294967296", "--seed"),
    ("run --attack noise stray", "unexpected 'stray'"),
    ("run --attack noise --steps 3", "no option of noise called '--steps'"),
    ("run --attack mgd --stepsize 3", "did you mean --step-size"),
    ("run --attack mgd --step-size", "--step-size"),
    ("run --attack mgd --step-size wide", "--step-size wide"),
    ("run --attack mgd --step-size 0", "--step-size must be above 0"),
    ("run --attack mgd --step-size nan", "--step-size nan: give a finite number"),
    ("run --attack mgd --steps -1", "--steps must not be negative"),
    ("run --attack mgd --steps 1.5", "--steps 1.5"),
    ("run --attack mgd --check-every 0", "--check-every must be at least 1"),
    ("run --attack mgd --momentum 1", "--momentum must lie in"),
    ("run --attack mgd --update adm", "--update adm"),
    ("run --attack mgd --start flips --radius 8", "give --labels free"),
    ("run --attack label_flip --radius 8", "label_flip needs wrong labels: give --labels free"),
    pytest.param("run --attack label_flip --labels free --source 3", "--target"),
    pytest.param(
        "run --attack label_flip --labels free --spread concentrated --source 3 --target 99",
        "--target 99: classes go from 0 to 9",
    ),
    ("run --attack noise --out file/runs", "cannot write"),
    ("evaluate", "Missing argument"),
    ("evaluate nowhere.safetensors", "cannot read nowhere.safetensors"),
    ("evaluate file", "not a valid poison file"),
    ("evaluate folder", "cannot read folder"),
    ("publish nowhere", "cannot read nowhere/record.json"),
    ("publish folder", "cannot read folder/record.json"),
    ("leaderboard --results nowhere", "--results nowhere is not a folder"),
    ("leaderboard --results file", "--results file is not a folder"),
    ("leaderboard --results bad", "bad/record.json is not a valid record"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "hint"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: str, hint: str, command: Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    for name in ("folder", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "record.json").write_text('{"track": 1}')
    before = everything(tmp_path)
    verb, *rest = words.split()
    # Options that come twice count as last given, so the mistake stands after what is right.
    tiny = [*SIZES, *RECIPE] if verb == "run" and "--dataset" not in rest else []
    assert hint in refused(command, verb, *tiny, *rest)
    assert everything(tmp_path) == before


def test_without_a_verb_it_shows_the_help(command: Run) -> None:
    code, out, err = command()
    assert code in (0, 2)
    assert "Commands:\n" in out + err
    assert not err.startswith("error: ")


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("run --data-dir /home/ada/tfds --seed 1", "run --data-dir DIR --seed 1"),
        ("verify x.zip --secret=mine", "verify x.zip --secret=FILE"),
        ("run --out /home/ada/runs --json", "run --out PATH/runs --json"),
        ("run --out=/home/ada/runs", "run --out=PATH/runs"),
        ("evaluate /home/ada/a=b/poison.safetensors", "evaluate PATH/poison.safetensors"),
        ("run --out runs/mine --set smooth.width=8", "run --out runs/mine --set smooth.width=8"),
    ],
)
def test_a_recorded_command_names_no_path_of_the_machine(
    typed: str, recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/poisonbench", *typed.split()])
    assert _options.command() == f"poisonbench {recorded}"


def test_a_download_that_fails_is_one_line(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tensorflow_datasets as tfds

    from poisonbench import _tfds

    def fail(**options: object) -> None:
        raise ConnectionError("no route to host")

    unprepared = SimpleNamespace(data_path=tmp_path / "cifar10", download_and_prepare=fail, url_infos={})
    monkeypatch.setattr(tfds, "builder", lambda name, **options: unprepared)
    monkeypatch.setattr(_tfds, "cache_folder", lambda kind: tmp_path / "cache")
    line = refused(command, "run", "--attack", "noise", "--dataset", "tfds:cifar10")
    assert "cannot download cifar10: ConnectionError: no route to host" in line
    assert "--data-dir" in line
    assert everything(tmp_path) == []


@pytest.mark.slow
def test_training_that_blows_up_names_metastep_and_remedy(command: Run, tmp_path: Path) -> None:
    words = ["craft", *TINY, "--fraction", "0.1", *CHEAP, "--set", "learning_rate=1e30"]
    for _ in range(2):  # the second goes on from the checkpoint, and says the same
        line = refused(command, *words)
        assert "at metastep 0, training breaks down" in line
        assert "NaN or infinite after step 1 of 2" in line
        assert "--set smooth.learning_rate=" in line
    (checkpoint,) = tmp_path.rglob("*.safetensors")
    assert checkpoint.name == "checkpoint.safetensors"
    arrays = Journal(checkpoint.parent).restore()
    assert arrays is not None
    assert int(arrays["done"]) == 0


def outside(script: str) -> str:
    """Standard output of a Python script in another process."""
    root = Path(poisonbench.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return done.stdout


def test_help_of_every_verb_does_not_import_jax() -> None:
    out = outside(
        """
        import contextlib, sys
        import typer
        from poisonbench import cli

        verbs = list(typer.main.get_command(cli.app).commands)
        for words in [[], *([verb] for verb in verbs)]:
            sys.argv = ["poisonbench", *words, "--help"]
            try:
                cli.main()
            except SystemExit as exit_:
                print("exit", exit_.code)
        heavy = {"jax", "flax", "tensorflow_datasets", "matplotlib", "pandas", "sklearn"}
        print("heavy", sorted(heavy & set(sys.modules)))
        print("verbs", *verbs)
        """
    )
    *_, heavy, verbs = out.splitlines()
    names = verbs.split()[1:]
    assert {"run", "craft", "evaluate", "list", "publish", "leaderboard"} <= set(names)
    assert out.count("exit 0") == len(names) + 1
    assert out.count("Usage: poisonbench") == len(names) + 1
    assert heavy == "heavy []"


@pytest.mark.parametrize("as_json", [False, True])
def test_list_shows_everything_there_is(as_json: bool, command: Run) -> None:
    code, out, err = command("list", *(["--json"] if as_json else []))
    assert (code, err) == (0, "")
    if as_json:
        known = json.loads(out)
        assert set(known) == {"attacks", "defenses", "datasets", "tracks"}
        assert list(known["attacks"]) == attacks.names()
        assert set(known["tracks"]) == set(TRACKS)
        assert all(line for group in known.values() for line in group.values())
    else:
        for name in [*attacks.names(), *TRACKS, "tfds:<name>"]:
            assert f"\n  {name} " in out


def test_an_attack_gets_what_its_track_sets_for_the_game(
    monkeypatch: pytest.MonkeyPatch, command: Run
) -> None:
    seen: list[Any] = []

    def noted(request: Any, *_: Any, **__: Any) -> None:
        seen.append(request.attack)
        raise UserError("far enough")

    monkeypatch.setattr(runs, "run", noted)
    base = ["run", "--attack", "mgd", "--track", "cifar10-small"]
    for words in ([], ["--steps", "5"], ["--labels", "free"], ["--labels", "free", "--goal", "error"]):
        assert command(*base, *words)[0] == 2
    assert [(a.start, a.steps) for a in seen] == [
        ("pixels", 24),
        ("pixels", 5),
        ("pair", 8),
        ("pair", 8),
    ]
    assert [a.temperature for a in seen] == [1, 1, 0.5, 0.5]


def test_craft_prints_the_path_and_evaluate_takes_it(command: Run, tmp_path: Path) -> None:
    code, out, err = command("craft", "--attack", "noise", *TINY, "--fraction", "0.1")
    path = Path(out.strip())
    assert code == 0, err
    assert path.parts[:2] == ("runs", "digits")
    poison = PoisonSet.load(path)

    code, out, err = command("craft", "--attack", "noise", *TINY, "--fraction", "0.1", "--json")
    assert (code, json.loads(out)) == (0, {"poison": str(path), "hash": poison.hash})

    words = ["evaluate", str(path), *TINY, "--seeds", "2", "--name", "theirs", "--json"]
    code, out, err = command(*words)
    assert code == 0, err
    record = Record.model_validate_json(out)
    assert (record.attack, record.poison_hash) == ("theirs", poison.hash)
    assert record.command == f"poisonbench {' '.join(words)}"


def test_run_with_json_prints_the_record_alone(command: Run, tmp_path: Path) -> None:
    words = ["run", "--attack", "none", *TINY, "--fraction", "0.1", "--seeds", "2"]
    code, out, err = command(*words, "--json", "--out", "elsewhere")
    assert code == 0, err
    record = Record.model_validate_json(out)
    assert json.loads(out)["victims"]
    assert [victim.drop.mean for victim in record.victims] == [0, 0]
    assert "training victims" in err
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}
    (stored,) = (tmp_path / "elsewhere").rglob("record.json")
    assert Record.load(stored) == record

    code, out, _ = command(*words, "--out", "elsewhere")
    assert code == 0
    assert str(stored.relative_to(tmp_path)) in out

    words = ["evaluate", str(stored.parent), *RECIPE, "--seeds", "2", "--json"]
    code, out, err = command(*words)
    assert code == 0, err  # its data are those of the run: no size is given
    assert Record.model_validate_json(out).victims == record.victims


def test_the_table_is_whole_on_80_columns(command: Run) -> None:
    words = ["run", "--attack", "none", *TINY, "--fraction", "0.1", "--seeds", "2"]
    code, out, _ = command(*words)
    assert code == 0
    assert out.count("0.00 ± 0.00") == 4
    assert "…" not in out


def test_publish_then_leaderboard_then_check(command: Run, tmp_path: Path) -> None:
    words = ["run", "--attack", "none", *TINY, "--fraction", "0.1", "--seeds", "2", "--json"]
    assert command(*words)[0] == 0
    (stored,) = (tmp_path / "runs").rglob("record.json")
    code, out, err = command("publish", str(stored.parent))
    assert code == 0, err
    assert out.strip() == f"results/digits/none/none/{stored.parent.name}"
    assert "never overwritten" in refused(command, "publish", str(stored.parent))

    before = everything(tmp_path)
    code, out, err = command("leaderboard", "--check")
    assert code == 1
    assert "results/README.md" in out
    assert err.startswith("error: ")
    assert everything(tmp_path) == before

    assert command("leaderboard")[0] == 0
    page = (tmp_path / "results" / "README.md").read_bytes()
    assert page
    assert command("leaderboard", "--check") == (0, "", "")
    (tmp_path / "results" / "README.md").write_bytes(page + b"and more\n")
    assert command("leaderboard", "--check")[0] == 1
    assert (tmp_path / "results" / "README.md").read_bytes() == page + b"and more\n"
    assert command("leaderboard")[0] == 0
    assert (tmp_path / "results" / "README.md").read_bytes() == page


@pytest.mark.parametrize("module", [runs.data, harness], ids=["loading", "training"])
def test_an_interruption_says_that_the_same_command_continues(
    module: object, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "evaluate" if module is harness else "load", interrupted)
    code, out, err = command("run", "--attack", "none", *TINY, "--seeds", "2", "--fraction", "0.1")
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("record.json"))
    assert "the same command goes on from what it had kept" in err


def test_a_defect_of_ours_keeps_its_traceback(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr(runs, "run", broken)
    monkeypatch.setattr(sys, "argv", ["poisonbench", "run", "--attack", "none"])
    with pytest.raises(ValueError, match="ours"):
        cli.main()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")]
)
def test_too_little_memory_is_one_line(
    error: Exception, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(runs, "run", full)
    assert refused(command, "run", "--attack", "none").startswith("error: out of memory: ")


def test_the_command_in_a_record_is_what_was_typed(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[runs.Request] = []

    def stop(request: runs.Request, *arguments: object, **options: object) -> None:
        seen.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", stop)
    typed = ["run", "--attack", "mgd", "--steps=7", "--step-size", "0.5", "--set", "smooth.width=2"]
    command(*typed, "--seed", "3", "--seeds", "4", "--out", "a folder")
    (request,) = seen
    assert request.command.startswith("poisonbench run --attack mgd --steps=7 --step-size 0.5")
    assert request.command.endswith("--out 'a folder'")
    config = attacks.config(request.attack)
    assert (config["steps"], config["step_size"]) == (7, 0.5)
    assert (request.seed, request.setting.seeds) == (3, (0, 1, 2, 3))
