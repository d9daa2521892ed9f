"""Schedules are checked by playing them on integers, with rules that know nothing of `plan`.

Claims of the docstrings of `poisonbench.metagradient.schedule` tested here:

- every step is differentiated exactly once, from the last to the first; the cursor is where each
  action needs it; only kept states are restored; nothing is kept at the end;
- `plan` counts what the schedule does: states alive, steps forward, steps differentiated;
- with leaves of one step, `(arity - 1) · d + 1` states are alive at most, where `d` is the depth of
  the tree, and exactly so many when `num_steps` is `arity ** d`; a level repeats `(arity - 1) / arity`
  of the run, so there are at most `(1 + d) · num_steps` steps forward;
- a leaf as long as the run keeps every state and repeats nothing;
- `fitting` keeps its bound, and no other tree of an arity up to 16 that keeps it repeats less;
- a bound that no tree keeps is refused, and the least that one does keep is named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest

from poisonbench.errors import UserError
from poisonbench.metagradient.schedule import (
    Action,
    Advance,
    Finish,
    Keep,
    Record,
    Restore,
    Reverse,
    fitting,
    plan,
    tree,
)

ARITIES = range(2, 17)


@dataclass
class Player:
    """A training run of `num_steps` steps whose state is the number of steps taken."""

    num_steps: int
    cursor: int = 0
    finished: bool = False
    kept: set[int] = field(default_factory=set)
    recorded: list[int] = field(default_factory=list)
    differentiated: list[int] = field(default_factory=list)
    forward: int = 0
    most_alive: int = 0

    def play(self, action: Action) -> None:
        """Do what an action says, if the rules allow it."""
        match action:
            case Keep(step):
                assert step == self.cursor
                assert step not in self.kept
                self.kept.add(step)
            case Restore(step):
                assert step in self.kept
                self.kept.remove(step)
                self.cursor = step
            case Advance(start, stop):
                assert start == self.cursor < stop
                self._step_to(stop)
            case Record(start, stop, final):
                assert start == self.cursor < stop
                assert not self.recorded, "the last leaf was not differentiated"
                assert final == (stop == self.num_steps and not self.finished)
                self.recorded = list(range(start, stop))
                self._step_to(stop if final else stop - 1)
            case Finish():
                assert self.cursor == self.num_steps
                assert not self.finished
                self.finished = True
            case Reverse(start, stop):
                assert self.finished, "there is no adjoint yet"
                assert self.recorded == list(range(start, stop))
                self.differentiated += reversed(self.recorded)
                self.recorded = []
        self.most_alive = max(self.most_alive, len(self.kept) + len(self.recorded))

    def _step_to(self, stop: int) -> None:
        self.forward += stop - self.cursor
        self.cursor = stop


def play(num_steps: int, arity: int, leaf: int) -> Player:
    player = Player(num_steps)
    for action in tree(num_steps, arity, leaf):
        player.play(action)
        assert len(player.recorded) <= leaf
    return player


def depth(num_steps: int, arity: int) -> int:
    """The least `d` with `arity ** d >= num_steps`."""
    d = 0
    while arity**d < num_steps:
        d += 1
    return d


@pytest.mark.parametrize("leaf", [1, 2, 5, 16, 1000])
@pytest.mark.parametrize("arity", ARITIES)
def test_every_step_once_from_last_to_first(arity: int, leaf: int) -> None:
    for num_steps in (*range(20), 27, 31, 32, 33, 63, 64, 65, 100, 243, 300):
        player = play(num_steps, arity, leaf)
        assert player.differentiated == list(reversed(range(num_steps)))
        assert player.finished
        assert not player.kept
        counted = plan(num_steps, arity, leaf)
        assert (counted.kept, counted.forward) == (player.most_alive, player.forward)
        assert counted.differentiated == num_steps
        if leaf >= num_steps:
            assert (counted.kept, counted.forward) == (num_steps, num_steps)


@pytest.mark.parametrize(
    ("num_steps", "arity", "leaf"),
    [(1999, 2, 1), (2000, 4, 1), (2000, 16, 7), (1024, 3, 40), (1601, 13, 2000)],
)
def test_long_runs_too(num_steps: int, arity: int, leaf: int) -> None:
    player = play(num_steps, arity, leaf)
    assert player.differentiated == list(reversed(range(num_steps)))
    assert not player.kept
    counted = plan(num_steps, arity, leaf)
    assert (counted.kept, counted.forward) == (player.most_alive, player.forward)


@pytest.mark.parametrize("arity", ARITIES)
def test_leaves_of_one_step_cost_what_they_should(arity: int) -> None:
    for num_steps in (*range(1, 70), 100, 125, 243, 256, 257, 1000):
        cost, d = plan(num_steps, arity, 1), depth(num_steps, arity)
        assert cost.kept <= (arity - 1) * d + 1
        assert cost.forward <= (1 + d) * num_steps
        if num_steps == arity**d:
            assert cost.kept == (arity - 1) * d + 1
            # Every level steps through all but the last child of its nodes; s[T] is one step more.
            assert cost.forward == d * num_steps * (arity - 1) // arity + 1


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5, 8, 13, 20])
def test_fitting_repeats_least_within_its_bound(num_steps: int) -> None:
    every = [plan(num_steps, arity, leaf) for arity in ARITIES for leaf in range(1, num_steps + 1)]
    for max_states in range(1, num_steps + 2):
        fits = [cost for cost in every if cost.kept <= max_states]
        if not fits and num_steps:
            with pytest.raises(UserError):
                fitting(num_steps, max_states)
            continue
        chosen = fitting(num_steps, max_states)
        assert chosen.kept <= max_states
        assert chosen.forward == min((cost.forward for cost in fits), default=0)
        assert play(num_steps, chosen.arity, chosen.leaf).most_alive == chosen.kept


def test_fitting_keeps_every_state_where_all_fit() -> None:
    assert fitting(50, 50).forward == 50
    assert fitting(50, 10**9).kept == 50


@pytest.mark.parametrize("num_steps", [2, 10, 100, 1000])
def test_impossible_bound_names_the_least(num_steps: int) -> None:
    with pytest.raises(UserError, match=r"need at least \d+ kept states, and 1 fit") as refused:
        fitting(num_steps, 1)
    (least,) = map(int, re.findall(r"at least (\d+)", str(refused.value)))
    assert fitting(num_steps, least).kept == least
    with pytest.raises(UserError):
        fitting(num_steps, least - 1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((-1, 2, 1), "num_steps must not be negative"),
        ((5, 1, 1), "arity must be at least 2"),
        ((5, 2, 0), "leaf must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: tuple[int, int, int], complaint: str) -> None:
    for function in (plan, tree):
        with pytest.raises(UserError, match=complaint):
            function(*arguments)
