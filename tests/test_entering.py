"""From an empty file: `poisonbench new`, and what `show` and `--help` say of an attack.

Claims of `poisonbench.new` and of the verbs tested here:

- in a checkout, from any folder of it, a file in `attacks/` that is the template under another name, and
  the three next commands; elsewhere a package in the current folder;
- refused in one line, and nothing written: names that cannot be imported, Python's own words and
  modules, names in use, what is there already, a folder that cannot be written;
- `show` and `run --attack NAME --help` list every option with its type and default, inherited ones too;
  `run --help` imports no attack.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Run, refused

import poisonbench
from poisonbench import _described, attacks
from poisonbench._plugins import options
from poisonbench.templates import attack as template
from poisonbench.tracks import TRACKS


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout-like folder, with attacks that poisonbench looks into."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "attacks").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path / "attacks")])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("below", ["", "docs"])
def test_in_a_checkout_it_is_one_file(
    below: str, command: Run, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout / below)
    code, out, err = command("new", "my_attack")
    path, *commands = out.splitlines()
    assert code == 0, err
    assert Path(path) == checkout / "attacks" / "my_attack.py"
    assert commands == [
        "poisonbench check my_attack", "poisonbench run --attack my_attack",
        'poisonbench submit runs/digits/my_attack-* --author "Your Name"',
    ]  # fmt: skip
    assert files(checkout) == {"pyproject.toml", "attacks/my_attack.py"}
    written = Path(path).read_text("utf-8")
    assert written == Path(str(template.__file__)).read_text("utf-8").replace("Template(", "MyAttack(")
    assert "class MyAttack(Attack):" in written
    assert "my_attack" in attacks.names()


def test_the_template_has_about_forty_lines_and_no_gradient() -> None:
    lines = Path(str(template.__file__)).read_text("utf-8").splitlines()
    assert len(lines) <= 60
    assert not [line for line in lines if "grad" in line]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("My_Attack", "small letters"),
        ("1st", "a letter first"),
        ("my-attack", "'_'"),
        ("_mine", "a letter first"),
        ("../mine", "cannot name an attack"),
        ("naïve", "cannot name an attack"),
        ("a" * 65, "up to 64"),
        ("", "cannot name an attack"),
        ("lambda", "no word of Python's own"),
        ("json", "'json' is a module of Python itself: choose another name, as json_attack"),
        ("mgd", "there is an attack called 'mgd' already"),
    ],
)
def test_a_name_that_cannot_be_had(name: str, hint: str, command: Run, checkout: Path) -> None:
    assert hint in refused(command, "new", name)
    assert files(checkout) == {"pyproject.toml"}


def test_nothing_is_overwritten(command: Run, tmp_path: Path, checkout: Path) -> None:
    assert command("new", "mine")[0] == 0
    (checkout / "attacks" / "mine.py").write_text("of worth")
    assert "there is an attack called 'mine' already" in refused(command, "new", "mine")
    # What is no attack, such as a link that leads nowhere, is not overwritten either.
    (checkout / "attacks" / "theirs.py").symlink_to("nowhere")
    refused(command, "new", "theirs")
    assert (checkout / "attacks" / "mine.py").read_text() == "of worth"
    assert (checkout / "attacks" / "theirs.py").is_symlink()


def test_no_package_is_overwritten(command: Run, tmp_path: Path) -> None:
    (tmp_path / "poisonbench-mine").mkdir()
    assert "is there already, and is not overwritten" in refused(command, "new", "mine")
    assert files(tmp_path) == set()


def test_a_folder_that_cannot_be_written(command: Run, checkout: Path) -> None:
    (checkout / "attacks").rmdir()
    (checkout / "attacks").write_text("no folder")
    assert "cannot write" in refused(command, "new", "mine")
    assert (checkout / "attacks").read_text() == "no folder"


@pytest.mark.parametrize("name", attacks.names())
def test_show_tells_every_option(name: str, command: Run) -> None:
    code, out, _ = command("show", name)
    assert code == 0
    assert attacks.summary(name) in out
    for field in options(attacks.load(name)):
        assert f"\n  --{field.name.replace('_', '-')} " in out
    assert out.count("[default: ") + out.count("[required]") >= len(options(attacks.load(name)))
    told = json.loads(command("show", name, "--json")[1])["attack"]["options"]
    assert [option["flag"] for option in told] == [
        o.flag for o in _described.options(attacks.load(name))
    ]
    assert all(option["says"] for option in told)


def test_what_a_class_says_of_an_option_hides_what_it_inherits() -> None:
    mgd, es = (attacks.load(name) for name in ("mgd", "es"))
    assert "metagradients rank" in _described.said_of(mgd, "start_seeds")
    assert "metagradients" not in _described.said_of(es, "start_seeds")
    assert _described.said_of(mgd, "momentum") == _described.said_of(es, "momentum") != ""


def test_what_tracks_set_is_told(command: Run) -> None:
    track = TRACKS["cifar10-small"]
    fixed, free = track.options("mgd", "fixed"), track.options("mgd", "free")
    assert fixed["start"] != free["start"]
    for where, preset in (("cifar10-small", fixed), ("cifar10-small with free labels", free)):
        line = f"On {where}: " + " ".join(f"--{name} {value}" for name, value in preset.items())
        assert line in command("show", "mgd")[1]
        assert line in " ".join(command("run", "--attack", "mgd", "--help")[1].split())
    assert track.options("es", "free") == track.options("es", "fixed") != {}
    assert "cifar10-small with free labels" not in command("show", "es")[1]
    assert "On cifar10" not in command("show", "noise")[1]


def test_show_of_a_defence_and_of_nothing(command: Run) -> None:
    assert "spectral, a defence" in command("show", "spectral")[1]
    out = command("show", "none")[1]
    assert "none, an attack" in out
    assert "none, a defence" in out
    assert "no attack or defense called 'mdg'; did you mean mgd" in refused(command, "show", "mdg")


@pytest.mark.parametrize(
    "words", [["--attack", "mgd"], ["--attack=mgd"], ["--seed", "1", "--attack", "mgd"]]
)
@pytest.mark.parametrize("verb", ["run", "craft"])
def test_help_lists_the_options_of_the_attack_that_is_named(
    verb: str, words: list[str], command: Run
) -> None:
    code, out, _ = command(verb, *words, "--help")
    assert code == 0
    assert "--track" in out
    _, told = out.split("Options of mgd:")
    for option in _described.options(attacks.load("mgd")):
        assert f"  {option.flag} " in told
    assert "[default: 45]" in told


def test_help_of_an_attack_that_is_not_there(command: Run) -> None:
    assert "did you mean mgd" in refused(command, "run", "--attack", "mdg", "--help")


def test_help_alone_imports_no_attack() -> None:
    script = (
        "import sys; sys.argv[1:] = ['run', '--help']\n"
        "import poisonbench.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit:\n"
        "    print([m for m in sys.modules if m == 'jax' or m.startswith('poisonbench.attacks')])"
    )
    path = os.pathsep.join(
        filter(None, [str(Path(poisonbench.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert "Options of" not in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
