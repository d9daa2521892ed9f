"""In which order to visit the states of a training run backwards, and which to keep.

A metagradient needs the states `s[T-1], …, s[0]` in reverse, but training makes them forwards. Kept
states cost memory, and what is not kept is run again. Three schedules:

- `store_all` keeps every state and repeats nothing.
- `tree` is REPLAY's lazy k-ary tree: cut the run into k segments, keep the state at the start of
  each, go into the last one first, cut it again, and free each kept state as its segment is entered.
  With leaves of one step and T = k^d, at most `(k - 1) · d + 1` states are alive, and every level of
  the tree repeats `(k - 1) / k` of the run.
- `binomial` repeats the fewest steps possible for a given number of states. With c of them beside
  the one that is differentiated, r sweeps reach `β(c, r) = C(c + r, c)` steps, and a run of T steps,
  `β(c, r - 1) < T ≤ β(c, r)`, takes `r · T - β(c + 1, r - 1)` steps forward.

What is short enough, a *leaf*, is run once more with every state recorded, then differentiated from
its last step to its first. The states between the root and the current leaf are all that exist at any
time, and they come and go as on a stack: the last one kept is the first restored.

A schedule is a stream of actions on a *cursor*, the one state that is being stepped. It knows
nothing of arrays, so what it costs can be counted without running it: see `plan`.

References:
    Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
    https://arxiv.org/abs/2503.13751 (REPLAY). Griewank and Walther, "Algorithm 799: revolve",
    ACM TOMS 26(1), 2000 (binomial schedules).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Literal

from poisonbench.errors import UserError

Schedule = Literal["auto", "store_all", "tree", "binomial"]


@dataclass(frozen=True)
class Keep:
    """Store the cursor, which is at `step`."""

    step: int


@dataclass(frozen=True)
class Restore:
    """Move the cursor to the kept state of `step`, and forget the kept one."""

    step: int


@dataclass(frozen=True)
class Advance:
    """Step the cursor from `start` to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Record:
    """Store the states `start … stop - 1` in the leaf; step on to `stop` where it is the end."""

    start: int
    stop: int
    final: bool

    @property
    def forward(self) -> int:
        """Steps run forward: the last recorded state needs no step after it."""
        return self.stop - self.start - (not self.final)


@dataclass(frozen=True)
class Finish:
    """The cursor is at the end of training: evaluate the objective and its gradient."""


@dataclass(frozen=True)
class Reverse:
    """Pull the adjoint back through the steps `stop - 1 … start`, from the states in the leaf."""

    start: int
    stop: int


Action = Keep | Restore | Advance | Record | Finish | Reverse


def tree(num_steps: int, arity: int, leaf: int) -> Iterator[Action]:
    """REPLAY's lazy k-ary tree over `num_steps` steps.

    Args:
        num_steps: length of the training run; 0 is a run that does nothing.
        arity: children of each node (k), at least 2.
        leaf: the most steps that a leaf may have.

    Raises:
        UserError: an argument out of its range.
    """
    at_least(0, num_steps=num_steps)
    at_least(2, arity=arity)
    at_least(1, leaf=leaf)
    if num_steps == 0:
        return iter((Finish(),))
    return _descend(0, num_steps, arity, leaf, final=True)


def binomial(num_steps: int, max_states: int, leaf: int | None = None) -> Iterator[Action]:
    """The schedule with the fewest steps forward among those that keep `max_states` at most.

    Args:
        num_steps: length of the training run; 0 is a run that does nothing.
        max_states: states that may be alive at once, a leaf's included and the cursor not.
        leaf: the most steps that a leaf may have; None for as many as there is room for. The
            number of steps forward does not depend on it.

    Raises:
        UserError: an argument out of its range; a single state for more than one step.
    """
    at_least(0, num_steps=num_steps)
    at_least(min(2, num_steps), max_states=max_states)
    at_least(1, leaf=1 if leaf is None else leaf)
    if num_steps == 0:
        return iter((Finish(),))
    return _bisect(num_steps, max_states, max_states if leaf is None else leaf)


def _descend(start: int, stop: int, arity: int, leaf: int, *, final: bool) -> Iterator[Action]:
    # Invariant: the cursor is at `start`; when we return, steps `start … stop - 1` are
    # differentiated and no state at or after `start` is kept.
    length = stop - start
    if length <= leaf:
        yield from _leaf(start, stop, final=final)
        return
    children = min(arity, length)
    bounds = [start + length * i // children for i in range(children + 1)]
    for here, there in zip(bounds[:-2], bounds[1:-1], strict=True):
        yield Keep(here)
        yield Advance(here, there)
    yield from _descend(bounds[-2], stop, arity, leaf, final=final)
    for here, there in zip(bounds[-3::-1], bounds[-2:0:-1], strict=True):
        yield Restore(here)
        yield from _descend(here, there, arity, leaf, final=False)


def _bisect(num_steps: int, room: int, leaf: int) -> Iterator[Action]:
    # Parts still to be differentiated, the last one first, each with the states that there is
    # room for when it comes to it. A list and not recursion, which would be as deep as the run.
    waiting = [(0, num_steps, room)]
    while waiting:
        start, stop, room = waiting.pop()
        final = stop == num_steps
        if not final:
            yield Restore(start)
        while stop - start > min(leaf, room):
            middle = start + _first_part(stop - start, room - 1)
            yield Keep(start)
            yield Advance(start, middle)
            waiting.append((start, middle, room))
            start, room = middle, room - 1
        yield from _leaf(start, stop, final=final)


def _first_part(length: int, others: int) -> int:
    """How far to step before the next state is kept, with `others` states beside the leaf's one.

    Any split works that leaves both parts as few sweeps as the closed form gives them: `r - 1` at
    most over the first, with all states, and `r` over the second, with one state less.
    """
    if others >= length - 1:
        return 1
    sweeps = 1
    while comb(others + sweeps, others) < length:
        sweeps += 1
    return min(
        comb(others + sweeps - 1, others),
        length - comb(others + sweeps - 2, others - 1),
    )


def _leaf(start: int, stop: int, *, final: bool) -> Iterator[Action]:
    yield Record(start, stop, final)
    if final:
        yield Finish()
    yield Reverse(start, stop)


def at_least(least: int, **arguments: int) -> None:
    """Refuse arguments below `least`.

    Raises:
        UserError: it names the first.
    """
    for name, value in arguments.items():
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
