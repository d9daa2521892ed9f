"""The verbs by which an attack enters: `new`, `check`, and `show` for those that are there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from poisonbench._options import JsonOption
from poisonbench.errors import UserError, unknown_name

if TYPE_CHECKING:
    from poisonbench.conformance import Point

MARKS = {"passed": "ok  ", "failed": "FAIL", "skipped": "-   "}


class WithAttack(TyperCommand):
    """A verb whose `--help` ends with the options of the attack, where one is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what was typed: `--help` is answered before any option is read."""
        ctx.meta["typed"] = list(args)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The attack's options; importing it takes seconds, so only where it is named."""
        super().format_epilog(ctx, formatter)
        typed = [word for text in ctx.meta.get("typed", []) for word in text.split("=", 1)]
        named = [value for option, value in zip(typed, typed[1:], strict=False) if option == "--attack"]
        if named:
            from poisonbench import _described, attacks

            formatter.write_paragraph()
            with formatter.section(f"Options of {named[-1]}"):
                rows = [
                    (f"{o.flag} {o.kind}", _said(o)) for o in _described.options(attacks.load(named[-1]))
                ]
                formatter.write_dl(rows or [("none", "")])
                for line in _set_by_tracks(named[-1]):
                    formatter.write_text(line)


def new(
    name: Annotated[str, typer.Argument(help="The attack's name, as in `my_attack`.")],
) -> None:
    """Write an attack to start from, and say what to type next.

    In a checkout it is a file in `attacks/`, elsewhere a small package in the current folder.
    """
    from poisonbench import new as files

    created = files.create(name, Path.cwd())
    print(created.path)
    print("It runs as it is. Next:", file=sys.stderr)
    print("\n".join(created.commands))


def check(
    name: Annotated[str, typer.Argument(help="An attack; see `poisonbench list`.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="Its options, to check it with: `--rounds 2`.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what the attack prints, and where errors come from.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say, point by point, whether an attack is admissible, and how to fix what is not.

    Takes a minute or two. The exit code is 1 where a point fails.
    """
    # Set before JAX is imported: everything is tiny, and most of the time would go into optimising it.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    from poisonbench import attacks, compute, conformance
    from poisonbench.progress import Progress

    if name not in attacks.names():
        raise unknown_name("attack", name, attacks.names())
    compute.setup()
    entry = conformance.Entry(name, dict(pairs(options or [])))
    if entry.given:
        entry.built()  # options that it does not have are refused before anything is checked
    began, points = time.monotonic(), []
    with Progress(f"checking {name}", len(conformance.CHECKS)) as bar:
        for rule in conformance.CHECKS:
            bar.advance(0, note=rule.title.partition(":")[0])
            with contextlib.nullcontext() if verbose else _silent():
                points.append(conformance.judge(entry, rule))
            if not as_json:
                _show_point(points[-1])
            bar.advance()
            if rule is conformance.CHECKS[0] and points[-1].status == "failed":
                break  # nothing else can be said of what is no attack
    failed = sum(point.status == "failed" for point in points)
    seconds = time.monotonic() - began
    if as_json:
        print(
            json.dumps(
                {
                    "attack": name, "admissible": not failed, "seconds": round(seconds, 1),
                    "points": [asdict(point) for point in points],
                },
                indent=1,
            )
        )  # fmt: skip
    else:
        verdict = f"not admissible: {failed} of {len(points)} points failed" if failed else "admissible"
        print(f"\n{name} is {verdict} ({seconds:.0f} s)")
    if failed:
        raise typer.Exit(1)


def show(
    name: Annotated[str, typer.Argument(help="An attack or a defence; see `poisonbench list`.")],
    as_json: JsonOption = False,
) -> None:
    """What an attack or a defence does, and its options with types and defaults."""
    from poisonbench import _described, attacks, defenses

    kinds: dict[str, Any] = {"attack": attacks, "defense": defenses}
    found = {kind: module.load(name) for kind, module in kinds.items() if name in module.names()}
    if not found:
        raise unknown_name("attack or defense", name, [*attacks.names(), *defenses.names()])
    options = {kind: _described.options(cls) for kind, cls in found.items()}
    if as_json:
        told = {
            kind: {"about": _described.described(cls), "options": [asdict(o) for o in options[kind]]}
            for kind, cls in found.items()
        }
        print(json.dumps(told, indent=1))
        return
    for kind, cls in found.items():
        print(f"{name}, {'an attack' if kind == 'attack' else 'a defence'}\n")
        print(_described.described(cls))
        for option in options[kind]:
            print(f"\n  {option.flag} {option.kind}\n      {_said(option)}")
        for line in _set_by_tracks(name) if kind == "attack" else ():
            print(f"\n  {line}")
        print()


def pairs(typed: Sequence[str]) -> list[tuple[str, str]]:
    """Options that a verb does not know, for the attack to read: `--name value` or `--name=value`.

    Raises:
        UserError: something else.
    """
    words, found = list(typed), []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected '{word}': options of an attack are written --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else ""
        found.append((name, value))
    return found


def _set_by_tracks(name: str) -> list[str]:
    """Which defaults of an attack are others on some tracks."""
    from poisonbench.tracks import TRACKS

    typed: dict[str, Mapping[str, str]] = {}
    for track in TRACKS.values():
        typed[track.name] = fixed = track.options(name, "fixed")
        if (free := track.options(name, "free")) != fixed:
            typed[f"{track.name} with free labels"] = free
    return [
        f"On {where}: {' '.join(f'--{option} {value}' for option, value in options.items())}"
        for where, options in typed.items()
        if options
    ]


def _said(option: Any) -> str:
    default = "required" if option.default is None else f"default: {option.default or 'empty'}"
    return f"{option.says} [{default}]".strip()


def _show_point(point: Point) -> None:
    print(f"{MARKS[point.status]} {': '.join(filter(None, [point.title, point.said]))}", flush=True)
    if point.fix:
        print(f"     fix: {point.fix}", flush=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what attacks print, and their bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
