"""Multiply-adds of everything compiled that a stretch of code runs, counted program by program.

While it counts, every compiled function of the library is replaced by one that traces its program
before it runs it. What a program does inside another is counted with that one. NumPy, scikit-learn and
operations outside of any compiled function are not seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax

from benchmarks.operations import in_program

COMPILED = type(jax.jit(lambda: None))
TURNS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "train_and_score_epochs": lambda given: given[0].num_steps // given[0].recipe.epochs,
    "advance": lambda given: given[3] - given[2],
    "record": lambda given: given[5] - given[4],
    "reverse": lambda given: given[4] - given[3],
}
"""How often the while loop of a program turns, by its arguments, where its bounds are among them."""


class Count:
    """Multiply-adds so far."""

    def __init__(self) -> None:
        self.multiply_adds = 0


class _Counted:
    """A compiled function that is counted where it is called."""

    def __init__(self, function: Any, count: Count) -> None:
        self._function, self._count = function, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((arguments, named))
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            turns = TURNS.get(self._function.__name__)
            often = None if turns is None else int(turns(arguments))
            program = self._function.trace(*arguments, **named).jaxpr
            self._count.multiply_adds += in_program(program, often)
        return self._function(*arguments, **named)


@contextmanager
def counting() -> Iterator[Count]:
    """Count what the library's compiled functions do from here to the end of the block.

    Raises:
        ValueError: in the block, where a program has products in a loop whose turns nobody knows.
    """
    count = Count()
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] != "poisonbench":
                continue
            for attribute, value in list(vars(module).items()):
                if type(value) is COMPILED:
                    stack.enter_context(mock.patch.object(module, attribute, _Counted(value, count)))
        yield count
