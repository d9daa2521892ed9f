"""How sure we are: paired intervals, and ranks with ties.

A clean and a poisoned victim share initialisation, data order and augmentation, so their accuracies
are paired and the drop of one seed is a difference of two trainings that differ in the poison
alone. Over `n` seeds with differences `d_i` the drop is reported as

    mean(d) ± t(n - 1) · s(d) / √n,

Student's 95 % interval for the mean over the victims' randomness, for this poison and test set.

**The rule by which attacks are ranked.** All attacks of a table are judged by the same seeds, so two
attacks A and B are compared by the paired differences of their drops, `d_A,i - d_B,i`: what a seed does
to every victim cancels, as far as code and hardware are the same. Student's statistic of their mean,

    t = mean(d_A - d_B) · √n / s(d_A - d_B),

has n - 1 degrees of freedom where the two cost alike. A table of k attacks makes m = k (k - 1) / 2
such comparisons, and at a level of 5 % each, some would part by chance alone. Holm's correction (1979)
keeps the chance of even one wrong order in the whole table below 5 %, however the comparisons depend on
each other: the pairs are taken from the largest |t| down, and the one that follows r parted pairs parts
too where its two-sided p is at most 0.05 / (m - r); the first that does not ends it.

A ranks above B where the two part and A costs more. An attack's rank is one more than the number of
attacks that rank above it. Two attacks of different ranks need not be told apart from one another. Ranks
never come from the best of several seeds. An entry that was measured again on hidden seeds is ranked by
those drops; they have nothing in common with the others' seeds that would cancel, and Student's
statistic of differences of independent samples holds in whatever order they are paired.

**Whether an attack works** is another question, with fewer answers: whether it costs more than every
control. Its statistic is the least of those over the controls: it is significant where each of them is,
so their number needs no correction, though each further control takes power (an intersection-union
test; Berger, 1982). Holm's correction is over the attacks of the table, not over its pairs. Were it
over pairs, as by the second version, each weak attack that somebody adds would make it much harder for
any other to be shown to work: with 100 attacks and five controls the largest t over ten seeds would
have to be 8.9, where 5.3 will do.

Rules have versions. A change of the rule is a new version, and earlier ones stay, so that the tables of
their time can be made again from the records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict

from poisonbench.errors import UserError

CONFIDENCE = 0.95
CERTAIN = 0.99
"""Of what is held against somebody: a claim that one honest author in two hundred would see flagged."""
ROUNDING = 1e-9
"""In points: below it, two accuracies are one."""
ROWS = 512
"""Rows of a table whose pairs are held in memory at a time."""
Above = Iterator[Bool[np.ndarray, "rows k"]]
"""For some rows of a table at a time, which rows rank above each."""


class Interval(BaseModel):
    """A mean with its confidence interval, in the unit of the data.

    Attributes:
        mean: of the sample.
        low, high: ends of the interval.
        n: size of the sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        # Adding zero turns a rounded -0.00 into 0.00.
        return f"{round(self.mean, 2) + 0:.2f} ± {self.half:.2f}"


def as_columns(name: str, interval: Interval | None) -> dict[str, float | None]:
    """A mean and its interval as three columns of a table; empty where there is none."""
    mean, low, high = (None,) * 3 if interval is None else (interval.mean, interval.low, interval.high)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


@cache  # a board asks for the same few of them ten thousand times
def quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Student's, of a two-sided interval of that confidence."""
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, freedom))


def mean_interval(sample: Sequence[float]) -> Interval:
    """Student's interval for the mean.

    Raises:
        UserError: fewer than two values, of which no interval can be made.
    """
    if len(sample) < 2:
        raise UserError("an interval needs at least 2 seeds: one accuracy alone is never a result")
    return _mean_interval(tuple(sample))


def paired_drop(clean: Sequence[float], poisoned: Sequence[float]) -> Interval:
    """The accuracy lost, in points: mean of `clean - poisoned`, seed by seed.

    Raises:
        UserError: the two do not have the same length, or fewer than two seeds.
    """
    if len(clean) != len(poisoned):
        raise UserError(f"{len(clean)} clean and {len(poisoned)} poisoned victims are not pairs")
    return mean_interval([c - p for c, p in zip(clean, poisoned, strict=True)])


def excess_interval(
    claimed: Sequence[float], measured: Sequence[float], confidence: float = CERTAIN, least: float = 0.0
) -> Interval:
    """By how much the mean of a claimed sample exceeds that of a measured one.

    An honest claim has the distribution of the measurement: its victims differ in nothing but their
    seeds. So the measured spread s holds for both, and with n claimed and m measured values

        mean(claimed) - mean(measured) ± t(m - 1) · s · √(1/n + 1/m).

    The claimed spread is not used: whoever makes up a mean can make up a spread that would hide it.

    Args:
        claimed: what somebody says, in the unit of the result.
        measured: what it is held against.
        confidence: of the interval.
        least: the least spread there can be, such as that of values that come in steps.

    Raises:
        UserError: no claim, or fewer than two measured values.
    """
    if len(measured) < 2 or not claimed:
        raise UserError("an interval needs at least 2 seeds: one accuracy alone is never a result")
    x, y = np.asarray(claimed, np.float64), np.asarray(measured, np.float64)
    excess, spread = float(x.mean() - y.mean()), max(float(y.std(ddof=1)), least)
    half = quantile(len(y) - 1, confidence) * spread * float(np.sqrt(1 / len(x) + 1 / len(y)))
    return Interval(mean=excess, low=excess - half, high=excess + half, n=min(len(x), len(y)))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval | None:
    """Fieller's interval for the ratio of two means, from pairs.

    The ratios r for which mean(x - r y) is not told from zero, by Student's interval of the paired
    values: between the roots of

        (x̄ - r ȳ)² = t²(n - 1) · (s_xx - 2 r s_xy + r² s_yy) / n.

    Args:
        numerators: x, one for each pair.
        denominators: y.

    Returns:
        The interval; None where the mean of the denominators is not told from zero itself, and a ratio
        to it says nothing.

    Raises:
        UserError: fewer than two pairs.
    """
    if len(numerators) < 2 or len(numerators) != len(denominators):
        raise UserError("an interval needs at least two pairs")
    x, y = np.asarray(numerators, float), np.asarray(denominators, float)
    number = len(x)
    t = quantile(number - 1)
    s = np.cov(x, y) * t**2 / number
    a, b, c = y.mean() ** 2 - s[1, 1], x.mean() * y.mean() - s[0, 1], x.mean() ** 2 - s[0, 0]
    if a <= 0:
        return None
    root = float(np.sqrt(max(b**2 - a * c, 0.0)))
    return Interval(mean=float(x.mean() / y.mean()), low=(b - root) / a, high=(b + root) / a, n=number)


@lru_cache(maxsize=2**17)  # a board of ten thousand records asks for each of theirs several times
def _mean_interval(sample: tuple[float, ...]) -> Interval:
    values = np.asarray(sample, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = quantile(len(values) - 1) * float(error)
    mean = float(values.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, n=len(values))


def _above_by_intervals(drops: Float[np.ndarray, "k n"]) -> Above:
    """Which rows' whole intervals lie above each row's."""
    intervals = [mean_interval(row) for row in drops.tolist()]
    lows = np.array([interval.low for interval in intervals])
    highs = np.array([interval.high for interval in intervals])
    for first in range(0, len(lows), ROWS):
        yield lows[None, :] > highs[first : first + ROWS, None]


def _above_by_holm(drops: Float[np.ndarray, "k n"]) -> Above:
    """Which rows part from each row and lie above it, by paired differences and Holm's correction."""
    from scipy import stats

    number, seeds = drops.shape
    pairs, parted, least = number * (number - 1) // 2, 0, np.inf
    while parted < pairs:
        # All pairs at the level of the next one: those are parted whatever their order, and if they
        # are no more than before, the next one is not.
        least = float(stats.t.isf((1 - CONFIDENCE) / 2 / (pairs - parted), seeds - 1))
        found = sum(int((t >= least).sum()) for t in _paired_statistics(drops))
        if found == parted:
            break
        parted = found
    return (t >= least for t in _paired_statistics(drops))


def _exceeding_by_holm(drops: Float[np.ndarray, "k n"], some: Collection[int]) -> Bool[np.ndarray, " k"]:
    """Which rows cost more than every one of some, by Holm's correction over all the other rows."""
    from scipy import stats

    exceeding = np.ones(len(drops), bool)
    if not some:
        return exceeding
    exceeding[list(some)] = False
    others = np.flatnonzero(exceeding)
    least = np.full(len(drops), np.inf)
    for part in _paired_statistics(drops, sorted(some)):
        least = np.minimum(least, part.min(0))
    order = others[np.argsort(-least[others])]
    levels = stats.t.isf((1 - CONFIDENCE) / 2 / np.arange(len(order), 0, -1), drops.shape[1] - 1)
    exceeding[order] = np.logical_and.accumulate(least[order] >= levels)
    return exceeding


def _paired_statistics(
    drops: Float[np.ndarray, "k n"], which: Sequence[int] | None = None
) -> Iterator[Float[np.ndarray, "rows k"]]:
    """Student's statistic of `d_column - d_row`, some rows at a time: a table may have thousands.

    Args:
        drops: of all rows.
        which: rows that are asked about, by default all; columns are all.
    """
    number, seeds = drops.shape
    means = drops.mean(1)
    centred = drops - means[:, None]
    spread = (centred**2).sum(1)
    asked = np.arange(number) if which is None else np.asarray(which, int)
    for first in range(0, len(asked), ROWS):
        rows = asked[first : first + ROWS]
        difference = means[None, :] - means[rows, None]
        squares = spread[None, :] + spread[rows, None] - 2 * centred[rows] @ centred.T
        # What rounding leaves of a difference of equals is nothing, and of a spread no more than that.
        difference[np.abs(difference) < ROUNDING] = 0
        error = np.sqrt(np.maximum(squares, ROUNDING**2) / (seeds - 1) / seeds)
        yield difference / error


@dataclass(frozen=True)
class Rule:
    """How a table is put in order.

    Attributes:
        statement: the rule in words, for the pages.
        above: of the drops `[k, n]` of k attacks on n seeds, which attacks rank above each.
        exceeding: of such drops and some of their rows, which rows cost more than each of these; by
            default those that rank above each.
    """

    statement: str
    above: Callable[[Float[np.ndarray, "k n"]], Above]
    exceeding: Callable[[Float[np.ndarray, "k n"], Collection[int]], Bool[np.ndarray, " k"]] | None = (
        None
    )

    def ranks(self, drops: Sequence[Sequence[float]]) -> list[int]:
        """Each attack's rank, from 1: one more than the number of attacks that rank above it.

        Args:
            drops: for each attack its drop in points, seed by seed, over the same seeds for all.

        Raises:
            UserError: fewer than two seeds.
        """
        return self.ranks_and_above(drops, ())[0]

    def ranks_and_above(
        self, drops: Sequence[Sequence[float]], some: Collection[int]
    ) -> tuple[list[int], list[bool]]:
        """Each attack's rank, and whether it costs more than each of some, such as the controls.

        Args:
            drops: as of `ranks`.
            some: which rows.

        Raises:
            UserError: fewer than two seeds.
        """
        if not drops:
            return [], []
        if len(drops[0]) < 2:
            raise UserError("ranks need at least 2 seeds: one accuracy alone is never a result")
        table = np.asarray(drops, np.float64)
        ranks: list[int] = []
        above_some = np.ones(len(drops), bool)
        for part in self.above(table):
            for row in () if self.exceeding else some:
                if len(ranks) <= row < len(ranks) + len(part):
                    above_some &= part[row - len(ranks)]
            ranks += (1 + part.sum(1)).tolist()
        if self.exceeding:
            above_some = self.exceeding(table, some)
        return ranks, above_some.tolist()


RULES: Mapping[int, Rule] = {
    1: Rule(
        "A row ranks above another only where its whole interval lies above the other's. Its rank is one"
        " more than the number of rows that rank above it.",
        _above_by_intervals,
    ),
    2: Rule(
        "Two rows are compared by the differences of their drops, seed by seed, with Student's test, at"
        " 5 % for the table as a whole (Holm's correction over all its pairs of rows). Where that tells"
        " them apart, the one that costs more ranks above. A row's rank is one more than the number of"
        " rows that rank above it.",
        _above_by_holm,
    ),
    3: Rule(
        "Two rows are compared by the differences of their drops, seed by seed, with Student's test, at"
        " 5 % for the table as a whole (Holm's correction over all its pairs of rows). Where that tells"
        " them apart, the one that costs more ranks above. A row's rank is one more than the number of"
        " rows that rank above it. That an attack lies above the controls is tested apart: it does where"
        " the same test shows that it costs more than each of them, at 5 % for all attacks of the table"
        " (Holm's correction over the attacks). The two questions differ, and so may their answers: an"
        " attack may be above controls that share its rank.",
        _above_by_holm,
        _exceeding_by_holm,
    ),
}
"""Every version of the rule that ranks attacks."""
CURRENT = 3
"""The version that tables are made by."""
