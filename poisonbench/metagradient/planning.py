"""What a schedule costs, counted without running it; and the one that fits a bound.

A tree's node costs what its length says, whatever its place, so trees are counted by their lengths;
binomial schedules are played. Either count is that of a run: the tests play every schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from poisonbench.errors import UserError, unknown_name
from poisonbench.metagradient.schedule import (
    Action,
    Advance,
    Keep,
    Record,
    Restore,
    Schedule,
    at_least,
    binomial,
    tree,
)


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
        state_bytes: size of one state, where it is known; in a run that is one leaf, of what is
            recorded of it.
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

    @property
    def one_leaf(self) -> bool:
        """Whether nothing is kept but the recorded states of a single leaf."""
        return self.longest == self.num_steps

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
    recorded_bytes: int | None = None,
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
        recorded_bytes: size of what a leaf needs of a state, where that is less. It counts for
            `store_all`, which keeps nothing but one leaf.

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
    at_least(0, num_steps=num_steps)
    if schedule not in get_args(Schedule):
        raise unknown_name("schedule", schedule, get_args(Schedule))
    bound = _bound(max_states, memory, state_bytes)
    if schedule in ("auto", "store_all"):
        recorded = state_bytes if recorded_bytes is None or leaf is not None else recorded_bytes
        of_one_leaf = _bound(max_states, memory, recorded)
        if schedule == "store_all" or of_one_leaf is None or num_steps <= of_one_leaf:
            schedule, bound, state_bytes = "store_all", of_one_leaf, recorded
        else:
            schedule = "binomial"
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


def _bound(max_states: int | None, memory: int | str | None, size: int | None) -> int | None:
    if max_states is not None or memory is None:
        return max_states
    if size is None:
        raise UserError("a plan within memory needs state_bytes, or give max_states instead")
    return in_bytes(memory) // max(1, size)


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
    if match is not None:
        number *= (1024 if match[3] else 1000) ** (" KMGT".index(match[2].upper() or " "))
    if not 0 <= number < math.inf:
        raise UserError(f"cannot read '{size}' as a size: write it as '2GiB' or '500MB'")
    return int(number)


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
    at_least(2, arity=arity)
    if leaf is not None:
        at_least(1, leaf=leaf)
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
