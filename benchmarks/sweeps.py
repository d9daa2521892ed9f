"""Cost against the length of the run and against the states kept, and what dispatch takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from benchmarks.measure import Worker
from benchmarks.pieces import Pieces
from benchmarks.problems import Setting
from benchmarks.report import Dispatch, Point, Round, Sweep
from benchmarks.ways import SCAN_CHECKPOINT, Way, equinox, ours, planned

Tell = Callable[[str], None]
SLOTS = 16
"""States that the bounded schedules of the first sweep may keep."""


def by_length(lengths: Sequence[int]) -> list[tuple[Way, int]]:
    """Ways and lengths of the first sweep."""
    return [(way, steps) for steps in lengths for way in _length_ways()]


def _length_ways() -> list[Way]:
    return [
        ours("store_all"),
        ours("tree", arity=4),
        ours("binomial", max_states=SLOTS),
        SCAN_CHECKPOINT,
        equinox("Equinox checkpointed loop", None),
    ]


def by_states(states: Iterable[int], arities: Iterable[int], steps: int) -> list[tuple[Way, int]]:
    """Ways and (one) length of the second sweep."""
    kept = [x for x in states if x <= steps]
    found = [ours("binomial", max_states=x) for x in kept]
    found += [ours("tree", arity=k) for k in arities]
    found += [equinox("Equinox checkpointed loop", x) for x in kept]
    return [(way, steps) for way in found]


def sweep(
    name: str,
    setting: Setting,
    points: Sequence[tuple[Way, int]],
    rounds: int,
    pieces: Pieces,
    tell: Tell,
) -> Sweep:
    """Measure these points in turn, round by round, in one process.

    Args:
        name: of the sweep.
        setting: the problem, whose steps each point replaces.
        points: ways and lengths; those whose package is missing are left out.
        rounds: runs of each.
        pieces: results so far.
        tell: called before each result, with what is done next.
    """
    points = [(way, steps) for way, steps in points if way.installed]
    with Worker(setting) as worker:
        prepared: set[tuple[str, int]] = set()

        def measure(way: Way, steps: int) -> Round:
            if (way.name, steps) not in prepared:
                worker.prepare(way, steps=steps, warm=False)
                prepared.add((way.name, steps))
            training = worker.seconds(None, steps=steps)
            return Round(seconds=worker.seconds(way, steps=steps), training_seconds=training)

        found: dict[tuple[str, int], list[Round]] = {(way.name, steps): [] for way, steps in points}
        for i in range(rounds):
            for way, steps in points if i % 2 == 0 else points[::-1]:
                tell(f"{name}: round {i + 1}, {way.title}, {steps} steps")
                key = f"{name}/{way.name}-{steps}-{i}"
                found[way.name, steps].append(pieces.once(key, Round, partial(measure, way, steps)))
    done = [_point(way, steps, found[way.name, steps]) for way, steps in points]
    return Sweep(setting=setting, points=tuple(done))


def _point(way: Way, steps: int, rounds: list[Round]) -> Point:
    if not way.ours:
        states = way.options.get("checkpoints")
        return Point(way=way.name, title=way.title, steps=steps, states=states, rounds=tuple(rounds))
    plan = planned(way, steps)
    return Point(
        way=way.name, title=way.title, steps=steps, states=plan.kept, forward=plan.forward,
        differentiated=plan.differentiated, rounds=tuple(rounds),
    )  # fmt: skip


def dispatch(setting: Setting, rounds: int, pieces: Pieces, tell: Tell) -> tuple[Dispatch, ...]:
    """Run the engine on a state of as many arrays as ResNet-9's, of one number each.

    All that it then does beside a few additions, Python, starting programs and keeping states, it
    does for the real step as well. So this is a bound from above on the time that is not the step's,
    and, unlike the difference of two long times, one that a busy machine does not drown.
    """
    found = []
    with Worker(setting) as worker:
        for way in (ours("store_all"), ours("tree", arity=4), ours("binomial", max_states=SLOTS)):
            tell(f"dispatch: {way.title}")

            def measure(way: Way = way) -> tuple[float, ...]:
                worker.prepare(way, warm=False)
                return tuple(worker.seconds(way) for _ in range(rounds))

            plan = planned(way, setting.steps)
            seconds = pieces.once(f"dispatch/{way.name}", tuple[float, ...], measure)
            found.append(
                Dispatch(
                    way=way.name,
                    setting=setting,
                    seconds=seconds,
                    forward=plan.forward,
                    differentiated=plan.differentiated,
                )
            )
    return tuple(found)
