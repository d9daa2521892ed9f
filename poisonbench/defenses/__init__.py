"""What a defence is, and where to find one.

A defence is one file in `defenses/`: a frozen dataclass of its hyperparameters, derived from
`Defense`. It sees the training set that the victim is given, never which points are poisoned.
"""

from __future__ import annotations

from abc import ABC

from poisonbench import _plugins

_plugins.extend(__path__, "defenses")


class Defense(ABC):  # noqa: B024 - hooks are optional; the class is what `load` looks for
    """A change to how victims are trained; subclasses are frozen dataclasses."""


def names() -> list[str]:
    """Every defence's name, plugins included; imports none of them."""
    return _plugins.names("defenses")


def load(name: str) -> type[Defense]:
    """The defence class of that name.

    Raises:
        UserError: there is none.
    """
    loaded: type[Defense] = _plugins.load("defenses", name, Defense)
    return loaded


def summary(name: str) -> str:
    """What the defence does, in a line."""
    return _plugins.summary("defenses", name)
