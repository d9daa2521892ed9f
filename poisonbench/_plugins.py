"""How attacks and defences are found: by looking, never by registering.

A name is a module of the package `poisonbench.<folder>`. In a checkout those modules lie in the
top-level folder of the same name, which `extend` adds to the package's path; in a wheel they lie in
the package itself. Other people's packages add names through entry points of the group
`poisonbench.<folder>`; a plugin may not take a name that is ours, or it could pass for that row of
the leaderboard.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, MutableSequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from poisonbench.errors import UserError, unknown_name


def extend(path: MutableSequence[str], folder: str) -> None:
    """In a checkout, let the package `poisonbench.<folder>` reach the top-level `<folder>/`."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():  # never so in site-packages
        path.append(str(root / folder))


def names(folder: str) -> list[str]:
    """Every attack or defence there is, sorted, without importing any.

    Raises:
        UserError: a plugin uses a name that is taken.
    """
    ours = _ours(folder)
    theirs = [point.name for point in _entry_points(folder)]
    for name in theirs:
        if name in ours or theirs.count(name) > 1:
            raise UserError(
                f"a plugin of the group poisonbench.{folder} takes the name '{name}', which is in"
                " use: uninstall it or ask its author for another name"
            )
    return sorted(ours + theirs)


def load(folder: str, name: str, base: type) -> type:
    """The class that the module `name` defines: its one subclass of `base`.

    Raises:
        UserError: no such name, or the module does not define exactly one.
    """
    if name not in (known := names(folder)):
        raise unknown_name(folder.removesuffix("s"), name, known)
    points = {point.name: point.value for point in _entry_points(folder)}
    if name in points:
        try:
            loaded = EntryPoint(name, points[name], f"poisonbench.{folder}").load()
        except Exception as error:  # other people's code, whatever it does
            raise UserError(f"plugin '{name}' cannot be imported: {error!r}") from error
        if inspect.isclass(loaded) and issubclass(loaded, base):
            return loaded
        raise UserError(f"plugin '{name}' is not a subclass of {base.__name__}")
    module = importlib.import_module(f"poisonbench.{folder}.{name}")
    defined = [
        thing
        for thing in vars(module).values()
        if inspect.isclass(thing) and issubclass(thing, base) and thing.__module__ == module.__name__
    ]
    if len(defined) != 1:
        raise UserError(f"{module.__file__} must define one subclass of {base.__name__}")
    return defined[0]


def summary(folder: str, name: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    points = {point.name: point.module for point in _entry_points(folder)}
    try:
        spec = importlib.util.find_spec(points.get(name, f"poisonbench.{folder}.{name}"))
        if spec is None or spec.origin is None:
            return ""
        doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or ""
    except Exception as error:  # one broken file must not hide the others
        return f"cannot be read: {error}"
    return doc.splitlines()[0] if doc else ""


def options(cls: type) -> list[Field[Any]]:
    """The hyperparameters of an attack or a defence: the fields of its dataclass.

    Raises:
        UserError: it is no dataclass.
    """
    if not is_dataclass(cls):
        raise UserError(f"{cls.__name__} must be a frozen dataclass of its hyperparameters")
    return list(fields(cls))


def build(
    cls: type[Any],
    name: str,
    given: Iterable[tuple[str, str]],
    also_known: Iterable[str] = (),
    spelling: Callable[[str], str] = "--".__add__,
) -> Any:
    """An instance with the hyperparameters that a user typed.

    Args:
        cls: a frozen dataclass.
        name: what the user calls it.
        given: pairs such as `("step-size", "0.02")`.
        also_known: options such as `--seed` that were read elsewhere, to suggest for a typing
            error.
        spelling: of an option's name, as the user types it.

    Raises:
        UserError: a hyperparameter that it does not have, or a value of the wrong type or not finite.
    """
    known = {field.name.replace("_", "-"): field for field in options(cls)}
    hints = get_type_hints(cls)
    names = [*known, *(option.removeprefix("--") for option in also_known)]
    values: dict[str, Any] = {}
    for option, text in given:
        if option not in known:
            raise unknown_name(f"option of {name}", option, names, spelling)
        field = known[option]
        try:
            value = TypeAdapter(hints[field.name]).validate_strings(text)
        except ValidationError as error:
            raise UserError(f"{spelling(option)} {text}: {error.errors()[0]['msg'].lower()}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{spelling(option)} {text}: give a finite number")
        values[field.name] = value
    missing = [o for o, field in known.items() if _required(field) and field.name not in values]
    if missing:
        raise UserError(f"{name} needs {spelling(missing[0])}")
    return cls(**values)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _ours(folder: str) -> list[str]:
    package = importlib.import_module(f"poisonbench.{folder}")
    return [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]


def _entry_points(folder: str) -> list[EntryPoint]:
    return list(entry_points(group=f"poisonbench.{folder}"))
