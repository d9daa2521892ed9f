"""An attack to start from: a file in a checkout, and elsewhere a package of one's own.

In a checkout a file in `attacks/` is all it takes. Elsewhere, poisonbench finds an attack by an entry
point of the group `poisonbench.attacks`, which takes a package: a `pyproject.toml` and the same file.
"""

from __future__ import annotations

import keyword
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from poisonbench import attacks
from poisonbench._files import require_writable, unwritable, write_text
from poisonbench.errors import UserError

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{package}"
version = "0.1.0"
description = "The attack {name} for poisonbench"
requires-python = ">=3.11"
dependencies = ["poisonbench"]

[project.entry-points."poisonbench.attacks"]
{name} = "{module}:{cls}"
"""


@dataclass(frozen=True)
class Created:
    """What was written, and what to type next.

    Attributes:
        path: the file of the attack.
        commands: three of them.
    """

    path: Path
    commands: tuple[str, str, str]


def create(name: str, where: Path) -> Created:
    """Write the template under a name.

    Args:
        name: of the attack.
        where: the current folder. Below a checkout that poisonbench runs from, its `attacks/` gets a
            file; anywhere else this folder gets a package.

    Raises:
        UserError: the name cannot be had, something is there already, or nothing can be written.
    """
    _require_name(name)
    folder = _attacks_of_checkout(where)
    check, run = f"poisonbench check {name}", f"poisonbench run --attack {name}"
    text = _template(name)
    if folder is not None:
        path = folder / f"{name}.py"
        _require_absent(path)
        write_text(path, text)
        submit = f'poisonbench submit runs/digits/{name}-* --author "Your Name"'
        return Created(path, (check, run, submit))
    package = f"poisonbench-{name.replace('_', '-')}"
    module = package.replace("-", "_")
    target = where / package
    _require_absent(target)
    named = {"package": package, "name": name, "module": module, "cls": _class_name(name)}
    _write_whole(
        target, {"pyproject.toml": PYPROJECT.format(**named), f"src/{module}/__init__.py": text}
    )
    path = target / "src" / module / "__init__.py"
    return Created(path, (f"uv pip install --editable {package}", check, run))


def _require_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name[:80]!r} cannot name an attack: use up to 64 small letters, digits and '_', a letter"
            " first, and no word of Python's own"
        )
    if name in sys.stdlib_module_names:
        raise UserError(f"'{name}' is a module of Python itself: choose another name, as {name}_attack")
    if name in attacks.names():
        raise UserError(f"there is an attack called '{name}' already: choose another name")


def _attacks_of_checkout(where: Path) -> Path | None:
    """The folder of attacks that poisonbench looks into, if `where` lies in the same checkout."""
    for place in map(Path, attacks.__path__):
        checkout = place.parent
        if (checkout / "pyproject.toml").is_file() and where.resolve().is_relative_to(
            checkout.resolve()
        ):
            return place
    return None


def _template(name: str) -> str:
    text = Path(__file__).with_name("templates").joinpath("attack.py").read_text("utf-8")
    return text.replace("class Template(", f"class {_class_name(name)}(")


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_") if word)


def _require_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path} is there already, and is not overwritten: choose another name")


def _write_whole(target: Path, files: dict[str, str]) -> None:
    """A folder of files, which appears when all are in it."""
    require_writable(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        built = Path(temporary) / target.name
        for name, text in files.items():
            write_text(built / name, text)
        try:
            built.rename(target)
        except OSError as error:
            raise unwritable(target, error) from None
