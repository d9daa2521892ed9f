"""The command line, run in the process of the tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Run = Callable[..., tuple[int, str, str]]


def unchecked() -> ModuleType:
    """The command line without run-time type checks: typer hands over contexts of a class of its own."""
    spec = importlib.util.find_spec("poisonbench.cli")
    assert spec is not None
    assert spec.origin is not None
    plain = importlib.util.spec_from_file_location("unchecked_cli", spec.origin)
    assert plain is not None
    assert plain.loader is not None
    module = importlib.util.module_from_spec(plain)
    plain.loader.exec_module(module)
    return module


cli = unchecked()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["poisonbench", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    return run


def refused(command: Run, *words: str) -> str:
    """The one line of error that these words end with."""
    code, out, err = command(*words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert err.endswith(f"{errors[0]}\n")
    assert "Traceback" not in err
    return errors[0]
