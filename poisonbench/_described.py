"""An attack or a defence in words: its docstrings, and its options with types and defaults."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from poisonbench import _plugins


@dataclass(frozen=True)
class Option:
    """An option on the command line.

    Attributes:
        flag: as typed, `--step-size`.
        kind: its type, or the words that it may be.
        default: as text; None where it must be given.
        says: what its docstring says; empty where nothing does.
    """

    flag: str
    kind: str
    default: str | None
    says: str


def options(cls: type) -> list[Option]:
    """A class's options, in the order in which it declares them, inherited ones included.

    Raises:
        UserError: it is no dataclass.
    """
    hints = get_type_hints(cls)
    found = []
    for field in _plugins.options(cls):
        default = None if field.default is MISSING else str(field.default)
        if field.default_factory is not MISSING:
            default = str(field.default_factory())
        flag = f"--{field.name.replace('_', '-')}"
        found.append(Option(flag, _kind(hints[field.name]), default, said_of(cls, field.name)))
    return found


def said_of(cls: type, name: str) -> str:
    """What `Attributes:` say of a field, in one line: the class's own or else those that it inherits."""
    for declares in cls.__mro__:
        _, _, attributes = inspect.cleandoc(declares.__doc__ or "").partition("Attributes:\n")
        entry = re.search(rf"^ +{name}: *(.*(?:\n {{5,}}.*)*)", attributes, re.MULTILINE)
        if entry:
            return " ".join(entry[1].split())
    return ""


def described(cls: type) -> str:
    """The docstrings of the module and of the class, which leaves its options to `options`."""
    module = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    own = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[0].rstrip()
    return "\n\n".join(part for part in (module, own) if part)


def _kind(hint: Any) -> str:
    """In words that fit a line: `int`, `int | None`, `a | b` of a `Literal`."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
