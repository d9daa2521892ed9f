"""Intervals cover what they claim to cover, and ranks tie where attacks do not part.

Claims of `poisonbench.statistics` tested here:

- the interval is Student's: numbers computed by hand, and scipy's own interval;
- it covers the true mean in about 95 % of simulated samples, also of five only; the same check
  catches an interval that takes the normal distribution for Student's;
- drops are paired: what the two victims of a seed have in common does not widen the interval;
- fewer than two seeds, and lists that are no pairs, are refused in one line;
- a rank is one more than the number of attacks that rank above: by paired differences and Holm's
  correction, as worked out pair by pair with scipy; what all victims of a seed have in common does not
  matter; of attacks that are all alike, some part in at most 5 % of tables, and without the correction
  in most;
- by the first version of the rule it is the number of intervals that lie wholly above;
- an attack is above the controls where the third version shows that it costs more than each of them, by
  Holm's correction over attacks, as worked out attack by attack with scipy; of attacks that are all like
  the controls, some are in at most 5 % of tables; more weak attacks cost little;
- neither the order of the list nor a lucky seed changes a rank.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from poisonbench.errors import UserError
from poisonbench.statistics import (
    CURRENT,
    RULES,
    Interval,
    excess_interval,
    mean_interval,
    paired_drop,
    ratio_interval,
)


def span(low: float, high: float) -> list[float]:
    """Two drops whose interval ends there."""
    half = (high - low) / 2 / float(stats.t.ppf(0.975, 1))
    return [(low + high) / 2 - half, (low + high) / 2 + half]


@pytest.mark.parametrize(
    ("sample", "mean", "half"),
    [
        # s = √2.5, t(4) = 2.776445: half = 2.776445 · √(2.5 / 5)
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 1.963243),
        # s = √2, t(1) = 12.706205: half = 12.706205 · √(2 / 2)
        ([4.0, 6.0], 5.0, 12.706205),
        ([7.0, 7.0, 7.0], 7.0, 0.0),
    ],
)
def test_interval_by_hand(sample: list[float], mean: float, half: float) -> None:
    interval = mean_interval(sample)
    assert interval.mean == pytest.approx(mean)
    assert interval.high - interval.mean == pytest.approx(half, abs=1e-5)
    assert interval.mean - interval.low == pytest.approx(half, abs=1e-5)
    assert interval.n == len(sample)


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_interval_is_scipys(n: int) -> None:
    sample = np.random.default_rng(n).normal(3.0, 2.0, n)
    low, high = stats.t.interval(0.95, n - 1, loc=sample.mean(), scale=stats.sem(sample))
    interval = mean_interval(sample.tolist())
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_interval_covers_the_mean() -> None:
    samples = np.random.default_rng(0).normal(1.0, 3.0, (1500, 5))
    intervals = [mean_interval(sample) for sample in samples.tolist()]
    covered = np.mean([i.low <= 1.0 <= i.high for i in intervals])
    # Four standard errors of a share of 0.95 in 1,500 are 0.023.
    assert abs(covered - 0.95) < 0.023

    def normal(i: Interval) -> bool:
        half = (i.high - i.mean) * stats.norm.ppf(0.975) / stats.t.ppf(0.975, 4)
        return bool(abs(i.mean - 1.0) <= half)

    assert abs(np.mean([normal(i) for i in intervals]) - 0.95) > 0.023


def test_drop_is_paired() -> None:
    clean = [98.0, 90.0, 94.0, 70.0]
    poisoned = [c - drop for c, drop in zip(clean, [2.0, 2.5, 1.5, 2.0], strict=True)]
    drop = paired_drop(clean, poisoned)
    assert drop == mean_interval([2.0, 2.5, 1.5, 2.0])
    assert drop.high - drop.low < 2 < mean_interval(clean).high - mean_interval(clean).low


def test_identical_victims_lose_exactly_nothing() -> None:
    scores = [98.7, 97.3, 99.1]
    assert paired_drop(scores, scores) == Interval(mean=0.0, low=0.0, high=0.0, n=3)


@pytest.mark.parametrize("sample", [[], [90.0]])
def test_fewer_than_two_are_refused(sample: list[float]) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*at least 2 seeds[^\n]*$"):
        mean_interval(sample)
    with pytest.raises(UserError, match="at least 2 seeds"):
        paired_drop(sample, sample)


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(UserError, match=r"^3 clean and 2 poisoned victims are not pairs$"):
        paired_drop([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("drops", "expected"),
    [
        ([], []),
        ([span(1, 2)], [1]),
        ([span(1, 2), span(3, 4), span(5, 6)], [3, 2, 1]),
        # The first overlaps the second and the second the third, but not the first the third.
        ([span(4, 6), span(3, 5), span(1, 3.5)], [1, 1, 2]),
        # Two above: the next rank is 3, not 2.
        ([span(8, 9), span(8, 9), span(1, 2)], [1, 1, 3]),
        ([span(2, 3), span(1, 2.1)], [1, 1]),
        ([span(0, 0), span(0, 0)], [1, 1]),
        ([span(0, 100), span(50, 51), span(49, 49.5)], [1, 1, 2]),
    ],
)
def test_ranks_by_intervals(drops: list[list[float]], expected: list[int]) -> None:
    assert RULES[1].ranks(drops) == expected
    pairs = list(zip(drops, expected, strict=True))
    for shuffled in itertools.permutations(pairs):
        assert RULES[1].ranks([row for row, _ in shuffled]) == [rank for _, rank in shuffled]


def above_by_hand(drops: np.ndarray) -> np.ndarray:
    """Holm's procedure as it is written: one pair after the other, by p."""
    pairs = list(itertools.combinations(range(len(drops)), 2))
    tests = [stats.ttest_rel(drops[a], drops[b]) for a, b in pairs]
    above = np.zeros(len(drops), int)
    for done, i in enumerate(np.argsort([test.pvalue for test in tests])):
        if tests[i].pvalue > 0.05 / (len(pairs) - done):
            break
        a, b = pairs[i]
        above[b if tests[i].statistic > 0 else a] += 1
    return above


@pytest.mark.parametrize("seed", range(8))
def test_ranks_are_holms(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    drops = rng.normal(size=(9, 6)) + np.linspace(0, 6, 9)[:, None] + 5 * rng.normal(size=6)
    expected = [1 + above for above in above_by_hand(drops)]
    assert len(set(expected)) > 1
    assert RULES[2].ranks(drops.tolist()) == expected
    order = rng.permutation(9)
    assert RULES[2].ranks(drops[order].tolist()) == [expected[i] for i in order]
    monkeypatch.setattr("poisonbench.statistics.ROWS", 2)
    assert RULES[2].ranks(drops.tolist()) == expected


def test_above_all_of_some_is_above_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    drops = rng.normal(size=(9, 8)) + np.linspace(0, 6, 9)[:, None] + 5 * rng.normal(size=8)
    pairs = list(itertools.product(range(9), range(9)))
    for rule in (RULES[1], RULES[2]):
        above = {(a, b): rule.ranks_and_above(drops.tolist(), [b])[1][a] for a, b in pairs}
        assert rule.ranks(drops.tolist()) == [1 + sum(above[a, b] for a in range(9)) for b in range(9)]
        for size in (1, 3):
            monkeypatch.setattr("poisonbench.statistics.ROWS", size)
            ranks, over = rule.ranks_and_above(drops.tolist(), [0, 2])
            assert ranks == rule.ranks(drops.tolist())
            assert over == [above[a, 0] and above[a, 2] for a in range(9)]
            assert sum(over) < 9
    assert sum(RULES[2].ranks_and_above(drops.tolist(), [0, 2])[1]) > 0, "or nothing was tested"
    assert RULES[2].ranks_and_above([[1.0, 2.0]], [0]) == ([1], [False])
    assert RULES[2].ranks_and_above([], []) == ([], [])


def exceeding_by_hand(drops: np.ndarray, controls: list[int]) -> list[bool]:
    """An attack's p is the largest over controls; Holm's procedure as it is written, over attacks."""
    p = {
        row: max(
            stats.ttest_rel(drops[row], drops[c]).pvalue if drops[row].mean() > drops[c].mean() else 1.0
            for c in controls
        )
        for row in range(len(drops))
        if row not in controls
    }
    found = [False] * len(drops)
    for done, row in enumerate(sorted(p, key=p.__getitem__)):
        if p[row] > 0.05 / (len(p) - done):
            break
        found[row] = True
    return found


@pytest.mark.parametrize("seed", range(8))
def test_above_controls_is_holms_over_attacks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    drops = rng.normal(size=(9, 6)) + np.linspace(0, 6, 9)[:, None] + 5 * rng.normal(size=6)
    controls = [2, 0]
    expected = exceeding_by_hand(drops, controls)
    assert 0 < sum(expected) < 7
    for size in (512, 1):
        monkeypatch.setattr("poisonbench.statistics.ROWS", size)
        assert RULES[3].ranks_and_above(drops.tolist(), controls) == (
            RULES[2].ranks(drops.tolist()), expected,
        )  # fmt: skip
    assert RULES[3].ranks_and_above(drops.tolist(), ())[1] == [True] * 9
    assert RULES[3].ranks_and_above([[1.0, 2.0]], [0]) == ([1], [False])


def test_attacks_like_the_controls_are_rarely_above_them() -> None:
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(400, 12, 10)) + rng.normal(size=(400, 1, 10))
    found = np.mean([any(RULES[3].ranks_and_above(table.tolist(), [0])[1]) for table in tables])
    assert found < 0.05 + 0.033  # three standard errors


def test_weak_attacks_hide_no_strong_one() -> None:
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(12, 101, 10))  # of a hundred weak ones, five are controls
    tables[:, 0] += 3.5
    found = {
        version: sum(RULES[version].ranks_and_above(t.tolist(), range(1, 6))[1][0] for t in tables)
        for version in (2, 3)
    }
    assert found[3] > 6 > 3 > found[2]


def test_what_a_seed_does_to_all_does_not_matter() -> None:
    luck = np.array([0.0, 40.0, -30.0, 20.0, -10.0])
    better = luck + np.array([2.0, 2.1, 1.9, 2.0, 2.1])
    worse = luck + np.array([1.0, 1.1, 0.9, 1.1, 1.0])
    assert RULES[2].ranks([worse.tolist(), better.tolist()]) == [2, 1]
    assert RULES[1].ranks([worse.tolist(), better.tolist()]) == [1, 1]


def test_alike_attacks_rarely_part() -> None:
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(400, 12, 10)) + rng.normal(size=(400, 1, 10))
    parted = np.mean([max(RULES[2].ranks(table.tolist())) > 1 for table in tables])
    # Three standard errors of a share of 0.05 in 400 are 0.033.
    assert parted < 0.05 + 0.033
    alone = [
        min(stats.ttest_rel(a, b).pvalue for a, b in itertools.combinations(table, 2)) < 0.05
        for table in tables[:50]
    ]
    assert np.mean(alone) > 0.5, "without a correction most tables have an order of their own"


def test_equal_rows_and_constant_differences() -> None:
    rows = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [0.5, 1.5, 2.5]]
    assert RULES[2].ranks(rows) == [2, 2, 1, 4]
    rounded = [[0.1 + 0.2, 1.0, 2.0], [0.3, 1.0, 2.0]]
    assert RULES[2].ranks(rounded) == [1, 1]
    with pytest.raises(UserError, match="at least 2 seeds"):
        RULES[2].ranks([[1.0], [2.0]])
    assert max(RULES) == CURRENT


def test_fiellers_interval_by_simulation() -> None:
    """Of many samples, 95 in 100 intervals hold the true ratio."""
    rng = np.random.default_rng(0)
    ratio, held, bounded = 0.4, 0, 0
    for _ in range(2000):
        y = 2 + rng.normal(size=6)
        x = ratio * y + 0.5 * rng.normal(size=6)
        interval = ratio_interval(x.tolist(), y.tolist())
        if interval is not None:
            bounded += 1
            held += interval.low <= ratio <= interval.high
            assert interval.low <= interval.mean <= interval.high
    assert bounded > 1500
    assert held / bounded == pytest.approx(0.95, abs=0.02)


def test_fiellers_interval_of_a_sure_denominator_is_students() -> None:
    x = [1.0, 2.0, 3.0, 2.5]
    interval = ratio_interval(x, [4.0] * 4)
    assert interval is not None
    student = mean_interval([value / 4 for value in x])
    assert (interval.low, interval.mean, interval.high) == pytest.approx(
        (student.low, student.mean, student.high)
    )
    scaled = ratio_interval([10 * value for value in x], [40.0] * 4)
    assert scaled is not None
    assert (scaled.low, scaled.high) == pytest.approx((interval.low, interval.high))


def test_a_ratio_to_nothing_is_none() -> None:
    assert ratio_interval([1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]) is None
    with pytest.raises(UserError, match="two pairs"):
        ratio_interval([1.0], [1.0])


@pytest.mark.parametrize("version", RULES)
def test_one_lucky_seed_wins_no_rank(version: int) -> None:
    steady, lucky = [5.0, 5.1, 4.9, 5.0, 5.1], [4.0, 4.1, 3.9, 4.0, 30.0]
    assert RULES[version].ranks([steady, lucky]) == [1, 1]


def test_interval_reads_as_mean_and_half_width() -> None:
    assert str(Interval(mean=12.345, low=11.845, high=12.845, n=10)) == "12.35 ± 0.50"


def test_an_excess_is_held_against_the_measured_spread() -> None:
    # s = √2.5, t(4) at 99 % = 4.604095: half = 4.604095 · √2.5 · √(1/2 + 1/5)
    found = excess_interval([6.0, 8.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (4.0, 2)
    assert found.high - found.mean == pytest.approx(6.090645, abs=1e-6)
    assert found.mean - found.low == pytest.approx(6.090645, abs=1e-6)
    assert excess_interval([-93.0, 107.0], [1.0, 2.0, 3.0, 4.0, 5.0]) == found
    assert excess_interval([1.0] * 5, [1.0] * 5).low == 0
    assert excess_interval([1.0] * 5, [1.0] * 5, least=1.0).low < -1
    for samples in (([1.0], [1.0]), ([], [1.0, 2.0])):
        with pytest.raises(UserError, match="at least 2 seeds"):
            excess_interval(*samples)


def test_an_excess_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    claims, measured = rng.normal(2, 1, (4000, 10)), rng.normal(2, 1, (4000, 10))
    flagged = [
        excess_interval(c, m).low > 0 for c, m in zip(claims.tolist(), measured.tolist(), strict=True)
    ]
    assert 0.002 < np.mean(flagged) < 0.009  # 0.005 is expected
