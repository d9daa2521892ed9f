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
    from scipy import stats

    if len(measured) < 2 or not claimed:
        raise UserError("an interval needs at least 2 seeds: one accuracy alone is never a result")
    x, y = np.asarray(claimed, np.float64), np.asarray(measured, np.float64)
    excess, spread = float(x.mean() - y.mean()), max(float(y.std(ddof=1)), least)
    quantile = float(stats.t.ppf((1 + confidence) / 2, len(y) - 1))
    half = quantile * spread * float(np.sqrt(1 / len(x) + 1 / len(y)))
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
