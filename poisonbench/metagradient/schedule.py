"""In which order to visit the states of a training run backwards, and which to keep.

A metagradient needs the states `s[T-1], …, s[0]` in reverse, but training makes them forwards.
REPLAY walks a lazy k-ary tree: cut the run into k segments, keep the state at the start of each,
go into the last one first, cut it again, and free each kept state as its segment is entered. What
is short enough, a *leaf*, is run once more with every state recorded, then differentiated from
its last step to its first. Only the states on the path from the root to the current leaf exist
at any time.

With leaves of one step and T = k^d, at most `(k - 1) · d + 1` states are alive, the initial one
included, and every level of the tree repeats `(k - 1) / k` of the run; the first descent follows
the training run itself and repeats nothing. A leaf as long as the run keeps every state and repeats
nothing at all. The tree is simple and near enough; for a given number of states the binomial
schedules of revolve are optimal.

A schedule here is a stream of actions on a *cursor*, the one state that is being stepped. It knows
nothing of arrays, so what it costs can be counted without running it: see `plan`.

References:
    Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025,
    https://arxiv.org/abs/2503.13751 (REPLAY). Griewank and Walther, "Algorithm 799: revolve",
    ACM TOMS 26(1), 2000 (binomial schedules).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from poisonbench.errors import UserError


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


ARITIES = range(2, 17)

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
    if num_steps < 0:
        raise UserError(f"num_steps must not be negative, not {num_steps}")
    if arity < 2:
        raise UserError(f"arity must be at least 2, not {arity}")
    if leaf < 1:
        raise UserError(f"leaf must be at least 1 step, not {leaf}")
    if num_steps == 0:
        return iter((Finish(),))
    return _descend(0, num_steps, arity, leaf, final=True)


def _descend(start: int, stop: int, arity: int, leaf: int, *, final: bool) -> Iterator[Action]:
    # Invariant: the cursor is at `start`; when we return, steps `start … stop - 1` are
    # differentiated and no state at or after `start` is kept.
    length = stop - start
    if length <= leaf:
        yield Record(start, stop, final)
        if final:
            yield Finish()
        yield Reverse(start, stop)
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


@dataclass(frozen=True)
class Plan:
    """What a schedule costs, counted.

    Attributes:
        num_steps: length of the training run.
        arity: children of each node of the tree.
        leaf: the most steps that a leaf may have.
        kept: the most states alive at once, the leaf's included and the cursor's not.
        forward: steps run forward without being differentiated.
        differentiated: steps run forward and differentiated: `num_steps`, each once.
    """

    num_steps: int
    arity: int
    leaf: int
    kept: int
    forward: int
    differentiated: int

    def actions(self) -> Iterator[Action]:
        """The schedule itself."""
        return tree(self.num_steps, self.arity, self.leaf)


@lru_cache(maxsize=4096)
def plan(num_steps: int, arity: int = 4, leaf: int = 1) -> Plan:
    """Count what the tree costs, without running it.

    Raises:
        UserError: an argument out of its range.
    """
    kept: set[int] = set()
    peak = forward = differentiated = recorded = 0
    for action in tree(num_steps, arity, leaf):
        match action:
            case Keep(step):
                kept.add(step)
            case Restore(step):
                kept.remove(step)
            case Advance(start, stop):
                forward += stop - start
            case Record(start, stop):
                forward += action.forward
                recorded = stop - start
            case Reverse(start, stop):
                differentiated += stop - start
                recorded = 0
            case Finish():
                pass
        peak = max(peak, len(kept) + recorded)
    return Plan(num_steps, arity, leaf, peak, forward, differentiated)


def fitting(num_steps: int, max_states: int) -> Plan:
    """The tree of arity up to 16 with the fewest repeated steps that keeps at most `max_states`.

    Raises:
        UserError: no tree keeps so few; the message says how many are needed.
    """
    if num_steps <= max_states:
        return plan(num_steps, leaf=max(1, num_steps))
    # A longer leaf saves steps and costs states, so for each arity the longest that fits is best.
    candidates: list[Plan] = []
    for arity in ARITIES:
        low, high = 0, max(0, max_states)
        while low < high:
            leaf = (low + high + 1) // 2
            fits = plan(num_steps, arity, leaf).kept <= max_states
            low, high = (leaf, high) if fits else (low, leaf - 1)
        if low:
            candidates.append(plan(num_steps, arity, low))
    if not candidates:
        least = min(plan(num_steps, arity, 1).kept for arity in ARITIES)
        raise UserError(
            f"{num_steps} steps need at least {least} kept states, and {max(0, max_states)} fit: raise"
            " the memory bound or train for fewer steps"
        )
    best = min(candidates, key=lambda p: (p.forward, p.kept))
    # Room is made for the longest leaf allowed: allow no longer one than there is.
    longest = max(action.stop - action.start for action in best.actions() if isinstance(action, Record))
    return plan(num_steps, best.arity, longest)
