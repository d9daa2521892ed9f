"""Evolution strategies beside exact metagradients, for meta-training a learned optimizer.

    python -m benchmarks.estimators

writes `estimators.json`, `gradients.png` and `race.png` to `--out`. Estimators: exact metagradients of
the unsmoothed loss, of whole runs and of windows of a tenth of a run, at least ten steps; antithetic
ES, ES by signs, and PES in truncations as long (`poisonbench.metatraining.estimators`). The subject is
the small MLP optimizer on a perceptron of 1,200 parameters, meta-loss the mean over a run.

1. A race: meta-training from one start by each, with equal compute, at a short and a long run, each at
   several rates of the outer Adam, of which the one that ends best is drawn. Exact gradients of single
   runs are divided by their norms, since few long runs have norms without bound; the others are given to
   Adam as they are, for one pair's ES divided by its norm would be its sign.
2. The estimates themselves, at lengths from 10 to 1,000 steps, held against the smoothed truth
   (`estimating.py`): at the start, and at the weights that exact metagradients reached at the long run.

A benchmark that was killed goes on where it was when the same command is given again; a finished one
starts anew. Cost: about 25 minutes of one core.

Exit codes: 0, 2 for bad input, 130 where interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from jax.flatten_util import ravel_pytree
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import estimating, estimator_pictures
from benchmarks.estimating import BUDGETS, Quality, Truth
from benchmarks.pieces import Pieces
from benchmarks.report import _Frozen
from poisonbench._files import require_writable
from poisonbench.errors import UserError
from poisonbench.progress import Progress
from poisonbench.stored import Measured, hardware, provenance

RESULTS = Path(__file__).parent / "results" / "estimators"
EXACT = ("exact", "truncated")
"""Estimators whose gradients are divided by their norms in the race."""
UNCLIPPED = 1e30
"""Adam makes nothing of a gradient's scale, and a bound would be one on some estimators alone."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        lengths: of the runs that gradients are taken of.
        es_steps, other_steps, exact_steps: inner steps spent at each length, on ES, on signs and PES,
            and on exact gradients; `least` and `most` draws bound what follows from them.
        race_lengths: of the runs of the race.
        budget: of each meta-training, in forward steps.
        rates: of the outer Adam.
        width, batch: of the task.
        sigma: of the perturbations.
    """

    lengths: tuple[int, ...] = (10, 30, 100, 300, 1000)
    es_steps: int = 160_000
    other_steps: int = 80_000
    exact_steps: int = 16_000
    least: int = 16
    most: int = 1024
    race_lengths: tuple[int, ...] = (50, 500)
    budget: int = 120_000
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    width: int = 16
    batch: int = 16
    sigma: float = 0.01

    def draws(self, name: str, num_steps: int) -> int:
        """How many estimates at a length; for ES twice as dear, they are pairs."""
        exact = self.exact_steps
        spent = {"es": self.es_steps / 2, "exact": exact, "truncated": exact}.get(
            name, self.other_steps / 2
        )
        return int(np.clip(spent // num_steps, self.least, self.most))


QUICK = Sizes(
    lengths=(4, 10), es_steps=200, other_steps=100, exact_steps=100, least=4, most=8, race_lengths=(5,),
    budget=600, rates=(1e-2,), width=2, batch=4,
)  # fmt: skip


class Leg(_Frozen):
    """One meta-training of the race.

    Attributes:
        compute: forward steps spent when each validation was made.
        score: normalised final loss then.
        broken: estimates that were not finite.
        best: the weights that scored best, flattened.
    """

    estimator: str
    num_steps: int
    rate: float
    compute: tuple[float, ...]
    score: tuple[float, ...]
    broken: int
    best: list[float]


class Comparison(Measured):
    """All that was measured.

    Attributes:
        factor: forward steps that a differentiated one is worth.
        adam: the score of Adam at 1e-3, for each length of the race.
    """

    kind = "comparison of estimators"
    schema_version: Literal[1] = 1
    task: str
    optimizer: str
    sizes: dict[str, Any]
    factor: float
    race: tuple[Leg, ...]
    adam: dict[str, float]
    truths: tuple[Truth, ...]
    qualities: tuple[Quality, ...]


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    try:
        arguments = _parser().parse_args(words)
        require_writable(arguments.out)
        _run(arguments)
        return 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what it had kept", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.estimators",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few steps")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from poisonbench import compute

    compute.setup()
    sizes = QUICK if arguments.quick else Sizes()
    pieces = Pieces(arguments.out, {"sizes": repr(sizes), "hardware": hardware().model_dump()})
    if len(pieces):
        print(f"going on from {len(pieces)} results of a run that did not finish", file=sys.stderr)
    bench = Bench(sizes, pieces)
    comparison = Comparison(
        task=bench.problem.task.name, optimizer=str(bench.problem.optimizer), sizes=vars(sizes),
        factor=bench.factor, **bench.measured(),
        **provenance(f"python -m benchmarks.estimators{' --quick' if arguments.quick else ''}"),
    )  # fmt: skip
    comparison.save(arguments.out / "estimators.json")
    written = estimator_pictures.write(comparison, arguments.out)
    show(comparison)
    pieces.clear()
    for path in (arguments.out / "estimators.json", *written):
        print(f"wrote {path}", file=sys.stderr)


class Bench:
    """The subject, and what is measured of it."""

    def __init__(self, sizes: Sizes, pieces: Pieces) -> None:
        import jax

        from poisonbench.metatraining.tasks import InnerTask, load_data
        from poisonbench.metatraining.unroll import Problem
        from poisonbench.optimizers import MLPOptimizer

        task = InnerTask("mlp", "digits", 8, sizes.width, 1, sizes.batch)
        self.sizes, self.pieces = sizes, pieces
        self.problem = Problem(MLPOptimizer(), task, "mean", load_data(task))
        self.start = self.problem.optimizer.init(jax.random.key(0))
        self.factor = pieces.once(
            "factor", float, lambda: estimating.measured_factor(self.problem, self.start)
        )

    def measured(self) -> dict[str, Any]:
        """Fields of the record."""
        sizes, names = self.sizes, list(estimating.strategies(self.sizes.sigma, 10))
        races = [(n, name, rate) for n in sizes.race_lengths for name in names for rate in sizes.rates]
        once = self.pieces.once
        race = [
            once(f"race/{n}-{name}-{rate:g}", Leg, partial(self._leg, n, name, rate))
            for n, name, rate in races
        ]
        adam = {
            str(n): once(f"race/{n}-adam", float, partial(self._adam, n)) for n in sizes.race_lengths
        }
        longest = [leg for leg in race if leg.num_steps == sizes.race_lengths[-1]]
        trained = min(
            (leg for leg in longest if leg.estimator == "exact"), key=lambda leg: min(leg.score)
        )
        points = {"start": self.start, "trained": estimating.as_weights(trained.best, self.start)}
        truths, qualities = [], []
        with Progress("estimating", len(points) * len(sizes.lengths)) as bar:
            for point, weights in points.items():
                for n in sizes.lengths:
                    about, found = self._length(point, weights, n)
                    truths.append(about)
                    qualities += found
                    bar.advance(note=f"{point}, {n} steps")
        return {"race": race, "adam": adam, "truths": truths, "qualities": qualities}

    def _length(self, point: str, weights: Any, num_steps: int) -> tuple[Truth, list[Quality]]:
        sizes = self.sizes
        strategies = estimating.strategies(sizes.sigma, num_steps, max(sizes.lengths))

        def drawn(name: str) -> estimating.Sample:
            def draw() -> np.ndarray:
                draws = sizes.draws(name.removeprefix("smoothed-"), num_steps)
                found = (
                    estimating.smoothed(
                        strategies["exact"], self.problem, weights, sizes.sigma, num_steps, draws
                    )
                    if name == "smoothed-exact"
                    else estimating.sample(strategies[name], self.problem, weights, num_steps, draws)
                )
                # One more row, for what is not a gradient.
                return np.vstack([found.gradients, np.full(found.gradients.shape[1], found.broken)])

            rows = self.pieces.array(f"{point}-{num_steps}-{name}", draw)
            return estimating.Sample(rows[:-1], int(rows[-1, 0]))

        samples = {name: drawn(name) for name in strategies}
        smoothed = drawn("smoothed-exact")
        about, reference = estimating.truth(
            point, num_steps, smoothed.gradients, samples["es"].gradients
        )
        costs = {
            name: estimating.cost(strategy, num_steps, self.factor)
            for name, strategy in strategies.items()
        }
        return about, [
            estimating.quality(point, name, num_steps, sample, costs[name], costs["exact"], reference)
            for name, sample in samples.items()
        ]

    def _trainer(self, name: str, num_steps: int, rate: float) -> tuple[Any, float]:
        """A meta-training within the budget, and what one of its meta-steps costs."""
        from poisonbench.metatraining.loop import Schedule, Trainer

        strategy, runs = estimating.strategies(self.sizes.sigma, num_steps)[name], 4
        each = runs * strategy.cost(num_steps).in_steps(self.factor)
        steps = max(2, int(self.sizes.budget / each))
        schedule = Schedule(
            steps=steps, min_unroll=num_steps, max_unroll=num_steps, tasks_per_step=1, runs=runs,
            learning_rate=rate, clip=UNCLIPPED, normalise="unit" if name in EXACT else "none",
            validate_every=max(1, steps // 12), validation_runs=4,
        )  # fmt: skip
        task = [(self.problem.task, self.problem.data)]
        return Trainer(self.problem.optimizer, strategy, "mean", task, task, schedule, self.start), each

    def _leg(self, num_steps: int, name: str, rate: float) -> Leg:
        trainer, each = self._trainer(name, num_steps, rate)
        folder = self.pieces.folder / f"race/{num_steps}-{name}-{rate:g}"
        trained = trainer.train(folder / "checkpoint.safetensors", "race")
        best, _ = ravel_pytree(trained.weights)
        return Leg(
            estimator=name, num_steps=num_steps, rate=rate,
            compute=tuple(float(done * each) for done, _ in trained.validation),
            score=tuple(float(score) for _, score in trained.validation),
            broken=int(trained.steps[:, 3].sum()), best=[float(x) for x in best],
        )  # fmt: skip

    def _adam(self, num_steps: int) -> float:
        from poisonbench.metatraining.experiment import Adam

        return float(self._trainer("es", num_steps, 1e-3)[0].score(Adam(), {}).mean())


def show(comparison: Comparison) -> None:
    """Print the numbers."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(box=box.SIMPLE_HEAD, title="Cosine with the smoothed gradient, and noise")
    for title in ("weights", "steps", "estimator", "one", *(f"{b}× exact's compute" for b in BUDGETS),
                  "mean of all", "noise", "noise × cost"):  # fmt: skip
        table.add_column(title, justify="right")
    for q in comparison.qualities:
        table.add_row(
            q.point, str(q.num_steps), q.estimator, f"{q.cosine:.3f}",
            *(f"{x:.3f}" for x in q.cosine_equal), f"{q.cosine_mean:.3f}", f"{q.noise:.3g}",
            f"{q.noise_compute:.3g}",
        )  # fmt: skip
    console.print(table)
    references = Table(
        box=box.SIMPLE_HEAD, title="The references: cosines between halves, and of the two"
    )
    for title in ("weights", "steps", "exact halves", "ES halves", "agreement", "attainable"):
        references.add_column(title, justify="right")
    for t in comparison.truths:
        cosines = (t.halves, t.es_halves, t.agreement, t.attainable)
        references.add_row(t.point, str(t.num_steps), *(f"{x:.3f}" for x in cosines))
    console.print(references)
    race = Table(
        box=box.SIMPLE_HEAD, title=f"The race; a differentiated step counts {comparison.factor:.2f}"
    )
    for title in ("steps", "estimator", "rate", "first score", "best", "last", "Adam at 1e-3", "broken"):
        race.add_column(title, justify="right")
    for leg in comparison.race:
        race.add_row(
            str(leg.num_steps), leg.estimator, f"{leg.rate:g}", f"{leg.score[0]:.3f}",
            f"{min(leg.score):.3f}", f"{leg.score[-1]:.3f}",
            f"{comparison.adam[str(leg.num_steps)]:.3f}", str(leg.broken),
        )  # fmt: skip
    console.print(race)


if __name__ == "__main__":
    sys.exit(main())
