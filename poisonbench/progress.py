"""Progress bars on standard error, and nothing there when nobody looks."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """One bar with the time left; a context manager.

    Where standard error is no terminal, one line says what began and one that it ended, so logs
    stay readable.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        # As it is now: whoever redirects standard error while a bar is shown does not redirect the bar.
        self._console = Console(file=sys.stderr)
        self._title = title
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._rich.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if not self._console.is_terminal:
            self._console.print(f"{self._title} …", highlight=False)
        self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rich.stop()
        if not self._console.is_terminal and kind is None:
            seconds = self._rich.tasks[0].elapsed or 0.0
            self._console.print(f"{self._title}: done in {seconds:.0f} s", highlight=False)

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on, and say how things stand."""
        self._rich.update(self._task, advance=steps, note=note)


def say(text: str) -> None:
    """A line on standard error, for what is worth knowing before the end."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
