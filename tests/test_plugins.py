"""Attacks and defences are found by looking, those of other people's packages too.

Claims of `poisonbench._plugins` tested here:

- names come from the files that are there and from entry points, sorted, and nothing is imported to
  list or to summarise them; files that begin with `_` are private;
- a plugin is loaded from its entry point; one that takes a name in use, or that is no subclass, is
  refused; an unknown name comes with the nearest ones;
- hyperparameters are what the dataclass says: typed, required where there is no default, and every
  mistake names the option;
- every attack and every defence has a docstring whose first line says what it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from abc import ABC
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest

import poisonbench
from poisonbench import _plugins, attacks, conformance, defenses
from poisonbench.attacks import Attack
from poisonbench.defenses import Defense
from poisonbench.errors import UserError

KINDS = {"attacks": (attacks, Attack), "defenses": (defenses, Defense)}
ALL = [(folder, name) for folder in KINDS for name in _plugins.names(folder)]


def entry(name: str, value: str, folder: str = "attacks") -> EntryPoint:
    return EntryPoint(name, value, f"poisonbench.{folder}")


def install(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    """As if packages with these entry points were installed."""
    monkeypatch.setattr(
        _plugins, "entry_points", lambda group: [point for point in points if point.group == group]
    )


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with an attack, outside the package."""
    (tmp_path / "their_attack.py").write_text(
        textwrap.dedent('''
            """What theirs does.

            And more.
            """

            from dataclasses import dataclass
            from poisonbench.attacks import Attack

            @dataclass(frozen=True)
            class Theirs(Attack):
                strength: float = 1.0

                def craft(self, task, key, journal):
                    raise NotImplementedError

            def not_a_class(): ...

            class NoAttack: ...
        ''')
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_attack", raising=False)
    return "their_attack"


def test_the_built_in_names() -> None:
    assert {"label_flip", "mgd", "noise", "none"} <= set(attacks.names())
    assert "none" in defenses.names()
    for folder in KINDS:
        found = _plugins.names(folder)
        assert found == sorted(set(found))
        assert not [name for name in found if name.startswith("_")]


def test_listing_imports_nothing() -> None:
    script = """
        import json, sys
        from poisonbench import _plugins
        names = {folder: _plugins.names(folder) for folder in ("attacks", "defenses")}
        lines = [_plugins.summary(folder, name) for folder in names for name in names[folder]]
        packages = ("poisonbench.attacks.", "poisonbench.defenses.")
        loaded = [module for module in sys.modules if module.startswith(packages)]
        print(json.dumps([names, loaded, lines]))
    """
    root = Path(poisonbench.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    names, loaded, lines = json.loads(done.stdout)
    assert names == {folder: _plugins.names(folder) for folder in KINDS}
    assert loaded == []
    assert all(lines)


@pytest.mark.parametrize(("folder", "name"), ALL)
def test_each_is_one_frozen_dataclass_with_a_summary(folder: str, name: str) -> None:
    module, base = KINDS[folder]
    cls = module.load(name)
    assert issubclass(cls, base)
    doc = sys.modules[cls.__module__].__doc__ or ""
    assert module.summary(name) == doc.splitlines()[0]
    conformance.require_described(cls, doc, base)


def test_files_with_an_underscore_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = attacks.names()
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    (tmp_path / "_shared.py").write_text("raise RuntimeError")
    assert attacks.names() == before
    (tmp_path / "zebra.py").write_text("raise RuntimeError")
    assert attacks.names() == [*before, "zebra"]


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_defines_exactly_one(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks, "__path__", [*attacks.__path__, str(tmp_path)])
    name = f"crowd_of_{count}"
    classes = "".join(f"class A{i}(Attack): ...\n" for i in range(count))
    (tmp_path / f"{name}.py").write_text(f"from poisonbench.attacks import Attack\n{classes}")
    with pytest.raises(UserError, match="must define one subclass of Attack"):
        attacks.load(name)


def test_a_plugin_is_found_and_loaded(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry("theirs", f"{plugin}:Theirs"), entry("other", "x:y", "defenses"))
    assert "theirs" in attacks.names()
    assert "theirs" not in defenses.names()
    assert attacks.summary("theirs") == "What theirs does."
    assert plugin not in sys.modules
    built = attacks.build("theirs", [("strength", "2.5")])
    assert attacks.config(built) == {"strength": 2.5}


@pytest.mark.parametrize("folder", KINDS)
def test_a_plugin_may_not_take_our_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry("none", "their_attack:Theirs", folder))
    for look in (lambda: _plugins.names(folder), lambda: KINDS[folder][0].load("none")):
        with pytest.raises(UserError, match="takes the name 'none', which is in use"):
            look()


def test_two_plugins_may_not_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry("theirs", "a:A"), entry("theirs", "b:B"))
    with pytest.raises(UserError, match="takes the name 'theirs', which is in use"):
        attacks.names()


@pytest.mark.parametrize("thing", ["not_a_class", "NoAttack"])
def test_a_plugin_must_be_a_subclass(thing: str, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry("theirs", f"{plugin}:{thing}"))
    with pytest.raises(UserError, match="plugin 'theirs' is not a subclass of Attack"):
        attacks.load("theirs")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("no_such_module_at_all:Theirs", id="no module"),
        pytest.param("their_attack:Missing", id="no such class"),
    ],
)
def test_a_broken_plugin_is_named(value: str, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, entry("theirs", value))
    with pytest.raises(UserError, match="theirs"):
        attacks.load("theirs")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("mdg", "no attack called 'mdg'; did you mean mgd"),
        ("nois", "did you mean noise"),
        ("", "no attack called ''; known: "),
        ("../attacks/mgd", "no attack called"),
        ("_plugins", "no attack called"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest(typed: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        attacks.load(typed)


def test_an_unknown_defence_is_called_a_defence() -> None:
    with pytest.raises(UserError, match="no defense called 'nothing'"):
        defenses.load("nothing")


@dataclass(frozen=True)
class Sample(ABC):
    """Hyperparameters of every kind."""

    must: int
    step_size: float = 0.1
    wild: bool = False
    mode: Literal["a", "b"] = "a"
    limit: int | None = None


def build(*given: tuple[str, str]) -> Sample:
    return _plugins.build(Sample, "sample", given, also_known=["--seed"])


def test_hyperparameters_are_typed_by_their_annotations() -> None:
    given = [("must", "3"), ("step-size", "1e-3"), ("wild", "true"), ("mode", "b"), ("limit", "4")]
    assert build(*given) == Sample(3, 1e-3, True, "b", 4)
    assert build(("must", "3")) == Sample(3)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ([], "sample needs --must"),
        ([("must", "x")], "--must x: input should be a valid integer"),
        ([("must", "")], "--must"),
        ([("must", "1.5")], "--must 1.5"),
        ([("must", "1"), ("step-size", "inf")], "--step-size inf: give a finite number"),
        ([("must", "1"), ("step-size", "nan")], "--step-size nan: give a finite number"),
        ([("must", "1"), ("mode", "c")], "--mode c: input should be 'a' or 'b'"),
        ([("must", "1"), ("wild", "perhaps")], "--wild perhaps"),
        ([("must", "1"), ("step_size", "1")], "did you mean --step-size"),
        ([("must", "1"), ("stepsize", "1")], "did you mean --step-size"),
        ([("must", "1"), ("sead", "1")], "did you mean --seed"),
    ],
)
def test_a_mistake_names_the_option(given: list[tuple[str, str]], hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        build(*given)
    assert "\n" not in str(caught.value)


def test_no_hyperparameter_hides_behind_an_option_of_a_verb() -> None:
    import typer

    from poisonbench.cli import app

    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    taken = {option for verb in ("run", "craft") for p in verbs[verb].params for option in p.opts}
    hidden = [
        f"{name} --{field.name}"
        for name in attacks.names()
        for field in fields(attacks.load(name))
        if f"--{field.name.replace('_', '-')}" in taken
    ]
    assert hidden == []
