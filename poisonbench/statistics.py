"""How sure we are: paired intervals, and ranks with ties.

A clean and a poisoned victim share initialisation, data order and augmentation, so their accuracies
are paired and the drop of one seed is a difference of two trainings that differ in the poison
alone. Over `n` seeds with differences `d_i` the drop is reported as

    mean(d) ± t(n - 1) · s(d) / √n,

Student's 95 % interval for the mean over the victims' randomness, for this poison and test set.

An attack ranks above another only where its whole interval lies above the other's. An attack's rank
is one more than the number of attacks that rank above it; those that share it cannot be told apart
from the best among them. Ranks never come from the best of several seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from poisonbench.errors import UserError

CONFIDENCE = 0.95
CERTAIN = 0.99
"""Of what is held against somebody: a claim that one honest author in two hundred would see flagged."""


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

    def __str__(self) -> str:
        # Adding zero turns a rounded -0.00 into 0.00.
        return f"{round(self.mean, 2) + 0:.2f} ± {(self.high - self.low) / 2:.2f}"

    def above(self, other: Interval) -> bool:
        """Whether the two intervals are apart, this one higher."""
        return self.low > other.high


def mean_interval(sample: Sequence[float]) -> Interval:
    """Student's interval for the mean.

    Raises:
        UserError: fewer than two values, of which no interval can be made.
    """
    from scipy import stats

    if len(sample) < 2:
        raise UserError("an interval needs at least 2 seeds: one accuracy alone is never a result")
    values = np.asarray(sample, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * error)
    mean = float(values.mean())
    return Interval(mean=mean, low=mean - half, high=mean + half, n=len(values))


def paired_drop(clean: Sequence[float], poisoned: Sequence[float]) -> Interval:
    """The accuracy lost, in points: mean of `clean - poisoned`, seed by seed.

    Raises:
        UserError: the two do not have the same length, or fewer than two seeds.
    """
    if len(clean) != len(poisoned):
        raise UserError(f"{len(clean)} clean and {len(poisoned)} poisoned victims are not pairs")
    return mean_interval([c - p for c, p in zip(clean, poisoned, strict=True)])


def ranks(intervals: Sequence[Interval]) -> list[int]:
    """Each interval's rank, from 1 for the highest; ties share a rank."""
    return [1 + sum(other.above(mine) for other in intervals) for mine in intervals]


def difference_interval(
    sample: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """Welch's interval for the difference of two means, of samples that are not paired.

    Raises:
        UserError: fewer than two values in one of them.
    """
    from scipy import stats

    if min(len(sample), len(other)) < 2:
        raise UserError("an interval needs at least 2 seeds: one accuracy alone is never a result")
    x, y = np.asarray(sample, np.float64), np.asarray(other, np.float64)
    difference = float(x.mean() - y.mean())
    # Not `ttest_ind`, which warns where one sample's values are alike, as a harmless poison's drops are.
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if a + b < 1e-20:  # rounding: of values that are all alike no interval can be made but a point
        return Interval(mean=difference, low=difference, high=difference, n=min(len(x), len(y)))
    freedom = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(a + b))
    return Interval(
        mean=difference, low=difference - half, high=difference + half, n=min(len(x), len(y))
    )


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
    from scipy import stats

    if len(numerators) < 2 or len(numerators) != len(denominators):
        raise UserError("an interval needs at least two pairs")
    x, y = np.asarray(numerators, float), np.asarray(denominators, float)
    number = len(x)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1))
    s = np.cov(x, y) * t**2 / number
    a, b, c = y.mean() ** 2 - s[1, 1], x.mean() * y.mean() - s[0, 1], x.mean() ** 2 - s[0, 0]
    if a <= 0:
        return None
    root = float(np.sqrt(max(b**2 - a * c, 0.0)))
    return Interval(mean=float(x.mean() / y.mean()), low=(b - root) / a, high=(b + root) / a, n=number)
