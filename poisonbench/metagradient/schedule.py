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

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import comb
from typing import Literal, get_args

from poisonbench.errors import UserError, unknown_name

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
    _at_least(0, num_steps=num_steps)
    _at_least(2, arity=arity)
    _at_least(1, leaf=leaf)
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
    _at_least(0, num_steps=num_steps)
    _at_least(min(2, num_steps), max_states=max_states)
    _at_least(1, leaf=1 if leaf is None else leaf)
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


@dataclass(frozen=True)
class Plan:
    """What a schedule costs, counted; `print` shows it as a table.

    Attributes:
        schedule: `store_all`, `tree` or `binomial`.
        num_steps: length of the training run.
        arity: children of each node, for a tree.
        max_states: the bound that a binomial schedule was made for.
        leaf: the most steps that a leaf may have; None for as many as there is room for.
        kept: the most states alive at once, the leaf's included and the cursor's not.
        longest: steps of the longest leaf.
        forward: steps run forward without being differentiated.
        differentiated: steps run forward and differentiated: `num_steps`, each once.
        state_bytes: size of one state, where it is known.
    """

    schedule: Schedule
    num_steps: int
    arity: int | None
    max_states: int | None
    leaf: int | None
    kept: int
    longest: int
    forward: int
    differentiated: int
    state_bytes: int | None = None

    @property
    def bytes(self) -> int | None:
        """Size of all states alive at once, where that of one is known."""
        return None if self.state_bytes is None else self.kept * self.state_bytes

    def actions(self) -> Iterator[Action]:
        """The schedule itself."""
        return _actions(self.schedule, self.num_steps, self.arity, self.max_states, self.leaf)

    def __str__(self) -> str:
        title = {"tree": f"tree of arity {self.arity}"}.get(self.schedule, self.schedule)
        times = self.forward / max(1, self.num_steps)
        rows = [
            ("schedule", f"{title}, leaves of up to {self.longest:,} steps"),
            ("training steps", f"{self.num_steps:,}"),
            ("states kept", f"{self.kept:,}"),
            ("steps forward", f"{self.forward:,} ({times:.2f} × the training run)"),
            ("steps differentiated", f"{self.differentiated:,}"),
        ]
        if self.bytes is not None:
            rows.append(("memory of states", f"{self.bytes / 2**20:,.1f} MiB"))
        return "\n".join(f"{name:<22}{value}" for name, value in rows)


def plan(
    num_steps: int,
    schedule: Schedule = "auto",
    *,
    arity: int = 4,
    leaf: int | None = None,
    max_states: int | None = None,
    memory: int | str | None = None,
    state_bytes: int | None = None,
) -> Plan:
    """Choose a schedule and count what it costs, without running it.

    Args:
        num_steps: length of the training run.
        schedule: `auto` repeats the fewest steps that the bound allows: `store_all` where every
            state fits, else `binomial`.
        arity: children of each node of a tree.
        leaf: the most steps that a leaf may have; None for the longest that fits. A tree without
            any bound gets leaves as long as they are within the `(k - 1) · ceil(log_k T) + 1` states of
            a tree with leaves of one step.
        max_states: bound on the states alive at once.
        memory: the same bound in bytes, or as `"2GiB"`; needs `state_bytes`. Ignored where
            `max_states` is given.
        state_bytes: size of one state; see `poisonbench.metagradient.state_bytes`.

    Raises:
        UserError: an argument out of its range; a bound that the schedule cannot keep (the message
            says the least that it can).

    Example:
        >>> print(plan(1000, "binomial", max_states=20))
        schedule              binomial, leaves of up to 20 steps
        training steps        1,000
        states kept           20
        steps forward         2,770 (2.77 × the training run)
        steps differentiated  1,000
    """
    _at_least(0, num_steps=num_steps)
    if schedule not in get_args(Schedule):
        raise unknown_name("schedule", schedule, get_args(Schedule))
    bound = max_states
    if bound is None and memory is not None:
        if state_bytes is None:
            raise UserError("a plan within memory needs state_bytes, or give max_states instead")
        bound = in_bytes(memory) // max(1, state_bytes)
    if schedule == "auto":
        schedule = "store_all" if bound is None or num_steps <= bound else "binomial"
    if schedule == "tree":
        chosen = _tree_within(num_steps, arity, leaf, bound)
    elif schedule == "binomial":
        if bound is None:
            raise UserError("a binomial schedule needs a bound: give max_states or memory")
        _require(min(2, num_steps), bound, num_steps, schedule, state_bytes)
        chosen = _counted("binomial", num_steps, None, max(1, min(bound, num_steps)), leaf)
    else:
        _require(num_steps, num_steps if bound is None else bound, num_steps, schedule, state_bytes)
        chosen = _counted("store_all", num_steps, None, None, leaf)
    _require(chosen.kept, chosen.kept if bound is None else bound, num_steps, schedule, state_bytes)
    return replace(chosen, state_bytes=state_bytes)


def in_bytes(size: int | str) -> int:
    """A number of bytes, from itself or from text such as `"2GiB"`, `"500 MB"`.

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(size, str):
        return size
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE)
    try:
        number = float(match[1]) if match else float("nan")
    except ValueError:
        number = float("nan")
    if match is None or not number >= 0:
        raise UserError(f"cannot read '{size}' as a size: write it as '2GiB' or '500MB'")
    unit = (1024 if match[3] else 1000) ** (" KMGT".index(match[2].upper() or " "))
    return int(number * unit)


def _actions(
    schedule: Schedule, num_steps: int, arity: int | None, max_states: int | None, leaf: int | None
) -> Iterator[Action]:
    if schedule == "binomial":
        assert max_states is not None
        return binomial(num_steps, max_states, leaf)
    return tree(num_steps, *_shape(schedule, num_steps, arity, leaf))


def _shape(schedule: Schedule, num_steps: int, arity: int | None, leaf: int | None) -> tuple[int, int]:
    """Arity and longest leaf of a tree."""
    if schedule == "store_all":
        # All in one leaf; or, with shorter leaves, each kept at its start.
        return max(2, num_steps), max(1, num_steps) if leaf is None else leaf
    assert arity is not None
    assert leaf is not None
    return arity, leaf


def _counted(
    schedule: Schedule, num_steps: int, arity: int | None, max_states: int | None, leaf: int | None
) -> Plan:
    if schedule == "binomial":
        actions = _actions(schedule, num_steps, arity, max_states, leaf)
        kept, longest, forward = _streamed_cost(actions)
    elif num_steps == 0:
        kept = longest = forward = 0
    else:
        children, most = _shape(schedule, num_steps, arity, leaf)
        kept, longest, forward = _tree_cost(num_steps, children, most)
        forward += 1  # to s[T], for the objective
    return Plan(schedule, num_steps, arity, max_states, leaf, kept, longest, forward, num_steps)


def _streamed_cost(actions: Iterator[Action]) -> tuple[int, int, int]:
    """Most states alive, longest leaf and steps forward."""
    kept = peak = longest = forward = 0
    for action in actions:
        match action:
            case Keep():
                kept += 1
            case Restore():
                kept -= 1
            case Advance(start, stop):
                forward += stop - start
            case Record(start, stop):
                forward += action.forward
                longest = max(longest, stop - start)
                peak = max(peak, kept + stop - start)
    return peak, longest, forward


@lru_cache(maxsize=65536)
def _tree_cost(length: int, arity: int, leaf: int) -> tuple[int, int, int]:
    """The same of a tree's node, but for the step to s[T]; nodes of one length cost the same."""
    if length <= leaf:
        return length, length, length - 1
    children = min(arity, length)
    bounds = [length * i // children for i in range(children + 1)]
    costs = [
        _tree_cost(there - here, arity, leaf)
        for here, there in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    # The i-th child is entered with i states kept before it.
    kept = max(i + cost[0] for i, cost in enumerate(costs))
    forward = bounds[-2] + sum(cost[2] for cost in costs)
    return kept, max(cost[1] for cost in costs), forward


def _tree_within(num_steps: int, arity: int, leaf: int | None, bound: int | None) -> Plan:
    """The tree of that arity with the longest leaves that the bound allows."""
    _at_least(2, arity=arity)
    if leaf is not None:
        _at_least(1, leaf=leaf)
        return _counted("tree", num_steps, arity, None, leaf)
    depth = 0
    while arity**depth < num_steps:
        depth += 1
    limit = (arity - 1) * depth + 1 if bound is None else bound
    low, high = 1, max(1, min(limit, num_steps))
    while low < high:
        middle = (low + high + 1) // 2
        fits = _counted("tree", num_steps, arity, None, middle).kept <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return _counted("tree", num_steps, arity, None, low)


def _require(
    least: int, bound: int, num_steps: int, schedule: Schedule, state_bytes: int | None
) -> None:
    if bound < least:
        size = "" if state_bytes is None else f" ({least * state_bytes:,} bytes)"
        raise UserError(
            f"{num_steps} steps by '{schedule}' need at least {least} kept states{size}, and"
            f" {max(0, bound)} fit: raise max_states or memory, or train for fewer steps"
        )


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
