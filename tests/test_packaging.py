"""What users install is whole: the same names, files and results as in a checkout.

Claims of the packaging tested here, in the checkout and, with `-m wheel`, against an installed wheel:

- attacks and defences are found and load, each from a file of the package or of the checkout;
- the leaderboard is importable and finds its templates; the marker `py.typed` is there;
- the version is that of the distribution's metadata, and the command is an entry point;
- crafting and scoring a tiny run works from an unrelated folder, with nothing else on the path; so does
  `poisonbench new`, whose template is among the files;
- in the checkout alone: every configuration of pytest says the same.
"""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import importlib.resources
import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import poisonbench
from poisonbench import attacks, defenses

ROOT = Path(poisonbench.__file__).resolve().parents[1]
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()


@pytest.mark.wheel
def test_attacks_and_defences_are_found() -> None:
    assert {"label_flip", "mgd", "noise", "none"} <= set(attacks.names())
    assert "none" in defenses.names()
    for module in (attacks, defenses):
        for name in module.names():
            cls = module.load(name)
            assert cls.__module__ == f"{module.__name__}.{name}"
            assert Path(inspect.getfile(cls)).is_relative_to(ROOT)
            assert module.summary(name)


@pytest.mark.wheel
def test_the_leaderboard_finds_its_templates(tmp_path: Path) -> None:
    tables = importlib.import_module("poisonbench.leaderboard.tables")
    pages = tables.build(tmp_path)
    assert pages[Path("README.md")].startswith("#")
    site = tmp_path / "site"
    tables.update(tmp_path, site=site)
    assert {"index.html", "about.html"} <= {path.name for path in site.iterdir()}
    assert "MIT" in (site / "assets" / "datatables.LICENSE.txt").read_text("utf-8")
    places = [Path(place) for place in importlib.import_module("poisonbench.leaderboard").__path__]
    # The generated site is the repository's, and no part of what is installed.
    assert IN_CHECKOUT or not any((place / "site").exists() for place in places)


@pytest.mark.wheel
def test_it_is_typed() -> None:
    assert importlib.resources.files("poisonbench").joinpath("py.typed").is_file()


@pytest.mark.wheel
def test_the_metadata_are_those_of_the_code() -> None:
    try:
        metadata = importlib.metadata.distribution("poisonbench")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("NOT TESTED: poisonbench is not installed, only on the path")
    assert metadata.version == poisonbench.__version__
    scripts = {
        point.name: point.value for point in metadata.entry_points.select(group="console_scripts")
    }
    assert scripts["poisonbench"] == "poisonbench.cli:main"


@pytest.mark.wheel
def test_no_page_or_test_is_taken_for_a_module() -> None:
    for folder in ("attacks", "defenses", "leaderboard"):
        package = importlib.import_module(f"poisonbench.{folder}")
        places = [Path(place) for place in package.__path__]
        pages = [page for place in places for page in place.glob("*.md")]
        assert pages == [] or IN_CHECKOUT
        assert not [name for place in places for name in place.glob("test_*")]


@pytest.mark.slow
@pytest.mark.wheel
def test_a_run_works_from_an_unrelated_folder(tmp_path: Path) -> None:
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from poisonbench.cli import main; main()"
    tiny = [
        *("--train-size", "100", "--val-size", "50", "--test-size", "50"),
        *("--set", "network=cnn", "--set", "width=2", "--set", "epochs=1", "--set", "batch_size=50"),
    ]

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *words, *tiny],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    path = command("craft", "--attack", "noise", "--fraction", "0.1").strip()
    record = json.loads(command("evaluate", path, "--seeds", "2", "--name", "noise", "--json"))
    assert record["num_poison"] == 10
    assert record["code"]["version"] == poisonbench.__version__
    assert [len(victim["poisoned"]) for victim in record["victims"]] == [2, 2]
    assert {place.name for place in tmp_path.iterdir()} == {"runs"}


@pytest.mark.wheel
def test_the_template_of_an_attack_is_there(tmp_path: Path) -> None:
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from poisonbench.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "new", "my_attack"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("__init__.py")
    assert "class MyAttack(Attack):" in written.read_text("utf-8")


@pytest.mark.skipif(not IN_CHECKOUT, reason="there is no pyproject.toml beside an installed wheel")
def test_every_configuration_of_pytest_says_the_same() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"][
        "ini_options"
    ]
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tests" / "pytest.ini", "utf-8")
    ini = parser["pytest"]
    assert ini["addopts"] == pyproject["addopts"]
    for name in ("markers", "filterwarnings"):
        assert ini[name].strip().splitlines() == pyproject[name]
    assert (ROOT / "tests" / ini["pythonpath"]).resolve() == ROOT / pyproject["pythonpath"][0]
