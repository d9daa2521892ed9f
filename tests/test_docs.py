"""The engine's page is what its docstrings and plans give, and its example runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    if not (DOCS / "build.py").is_file():
        pytest.skip(f"no {DOCS}: the pages are in a checkout only")
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_generated_one(build: ModuleType) -> None:
    assert (DOCS / "engine.md").read_text("utf-8") == build.page()


def test_the_example_runs_and_prints_what_it_says(
    build: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = re.findall(r"```(?:python|text)\n(.*?)```", build.page(), re.DOTALL)[:2]
    names: dict[str, Any] = {}
    exec(compile(code, "engine.md", "exec"), names)
    assert capsys.readouterr().out == said
    assert names["gradient"].shape == (256,)
    assert float(jnp.abs(names["gradient"]).min()) > 0
