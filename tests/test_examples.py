"""The packages in `examples/` are found by their entry points, and are admissible.

Claims tested here:

- each is built by its own build backend, and what is in its wheel is all it takes;
- `poisonbench check` finds nothing to fix in it; where what it wraps is not installed, that is not
  tested, and said;
- the wrapper of the Adversarial Robustness Toolbox has under forty lines;
- the package that `poisonbench new` writes is built and found like them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commandline import Run

from poisonbench import attacks

EXAMPLES = Path(__file__).parents[1] / "examples"
needs_examples = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason=f"no {EXAMPLES}: it is in a checkout only"
)


def install(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pip install --no-deps --target` does: build the wheel, and unpack it on the path."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip(f"NOT TESTED: hatchling, which builds {project.name}, is not installed")
    copy, dist, target = (tmp_path / name for name in ("copy", "dist", "target"))
    shutil.copytree(project, copy)
    dist.mkdir()
    script = f"import hatchling.build as b; b.build_wheel({str(dist)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=copy, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    monkeypatch.syspath_prepend(target)


@needs_examples
def test_the_package_is_found_and_admissible(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(EXAMPLES / "poisonbench-gaussian", tmp_path, monkeypatch)
    assert "gaussian_class" in attacks.names()
    code, out, err = command("check", "gaussian_class", "--json")
    assert [point for point in json.loads(out)["points"] if point["status"] == "failed"] == []
    assert code == 0, err


@needs_examples
def test_what_examples_import_is_there() -> None:
    """Also where what else they import is not installed."""
    names = [
        (node.module, alias.name)
        for source in EXAMPLES.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("poisonbench.")
        for alias in node.names
    ]
    assert len({module for module, _ in names}) >= 2
    assert [pair for pair in names if not hasattr(importlib.import_module(str(pair[0])), pair[1])] == []


@needs_examples
def test_the_toolbox_is_found_and_admissible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (EXAMPLES / "poisonbench-art").glob("src/*/__init__.py")
    assert len(source.read_text("utf-8").splitlines()) < 40
    install(EXAMPLES / "poisonbench-art", tmp_path, monkeypatch)
    assert "art_pgd" in attacks.names()
    if importlib.util.find_spec("art") is None:
        pytest.skip(
            "NOT TESTED: examples/poisonbench-art: the Adversarial Robustness Toolbox is not installed"
        )
    # In a process of its own: the toolbox warns of much when it is imported.
    script = f"import sys; sys.path[:0] = {sys.path!r}; from poisonbench.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "check", "art_pgd", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [point for point in json.loads(done.stdout)["points"] if point["status"] == "failed"] == []
    assert done.returncode == 0


def test_a_new_package_is_found(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command("new", "my_attack")
    assert code == 0
    path, *commands = out.splitlines()
    package = tmp_path / "poisonbench-my-attack"
    assert Path(path) == package / "src" / "poisonbench_my_attack" / "__init__.py"
    assert commands == [
        "uv pip install --editable poisonbench-my-attack", "poisonbench check my_attack",
        "poisonbench run --attack my_attack",
    ]  # fmt: skip
    install(package, tmp_path / "elsewhere", monkeypatch)
    assert "my_attack" in attacks.names()
    assert attacks.load("my_attack").__name__ == "MyAttack"
    assert attacks.summary("my_attack").startswith("One line that says")
