"""Intervals cover the truth as often as they say."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from preftune.equations.stats import (
    Interval,
    mean_interval,
    mean_share,
    paired_bootstrap,
    quantiles,
    ratio_interval,
    wilson,
)


def test_statistics_run_without_torch() -> None:
    """Reports and web pages import this on machines that have no torch."""
    code = "import sys, preftune.equations.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_interval_reads_as_estimate_and_ends() -> None:
    """The printed form is the estimate with its ends in brackets."""
    assert str(Interval(0.5, 0.25, 0.75, 8)) == "0.5 [0.25, 0.75]"


# --- shares ----------------------------------------------------------------------------------------------------------


def test_wilson_is_the_set_of_shares_a_score_test_accepts() -> None:
    """At its ends |share - p| is exactly z standard errors of p: the definition, not the formula."""
    interval = wilson(37, 80)
    for p in (interval.low, interval.high):
        assert abs(37 / 80 - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / 80), rel=1e-12)
    assert interval.low < interval.estimate == 37 / 80 < interval.high


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_covers_as_often_as_it_says(level: float) -> None:
    """Summed over all outcomes of n = 40, coverage averages to the level over shares and is never far below it."""
    n = 40
    intervals = [wilson(k, n, level) for k in range(n + 1)]
    coverage = []
    for p in np.linspace(0.02, 0.98, 97):
        chance = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        coverage.append(sum(c for c, i in zip(chance, intervals, strict=True) if i.low <= p <= i.high))
    assert abs(np.mean(coverage) - level) < 0.01
    assert min(coverage) > level - 0.12


def test_wilson_with_ties_as_halves_is_conservative() -> None:
    """Outcomes 0, 1/2 and 1: the interval still covers the expected score, more often than it says."""
    rng = np.random.default_rng(0)
    scores = rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.4, 0.4], size=(2000, 60))
    hits = [i.low <= 0.6 <= i.high for i in (wilson(float(row.sum()), 60) for row in scores)]
    assert np.mean(hits) > 0.97
    assert wilson(30.5, 60).estimate == 30.5 / 60


def test_wilson_keeps_inside_zero_and_one() -> None:
    """All or nothing gives one-sided intervals that end exactly at 0 or 1, and are not empty."""
    assert wilson(0, 20).low == 0.0 and 0.1 < wilson(0, 20).high < 0.2
    assert wilson(20, 20).high == 1.0 and 0.8 < wilson(20, 20).low < 0.9


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_an_impossible_share_is_refused(successes: float, n: int) -> None:
    """More successes than trials, or no trial, is an error of the caller."""
    with pytest.raises(ValueError, match="a share needs n >= 1 and 0 <= successes <= n"):
        wilson(successes, n)


def test_the_mean_of_shares_is_the_set_of_means_a_score_test_accepts() -> None:
    """At its ends the mean is t standard errors away, each shrunk as sqrt(m (1 - m)) from here to there; 6 clusters."""
    shares, clusters = [1.0, 0.9, 1.0, 1.0, 0.75, 1.0, 0.95, 1.0, 1.0], [0, 0, 1, 1, 2, 3, 4, 4, 5]
    mean, t = np.mean(shares), 2.570581835636314  # of 5 degrees of freedom
    found, symmetric = mean_share(shares, clusters=clusters), mean_interval(shares, clusters=clusters)
    error = (symmetric.high - mean) / t
    for m in (found.low, found.high):
        assert abs(mean - m) == pytest.approx(t * error * math.sqrt(m * (1 - m) / (mean * (1 - mean))), rel=1e-9)
    assert found.low < symmetric.low < found.estimate == mean < found.high < 1 < symmetric.high


def test_the_mean_of_shares_tends_to_the_mean_where_no_end_is_near() -> None:
    """Of 400 uniform numbers: half as wide as if they were verdicts, and Student's t interval to a hundredth of it."""
    shares = np.random.default_rng(0).random(400)
    found, same = mean_share(shares), mean_interval(shares)
    width = same.high - same.low
    assert found.low == pytest.approx(same.low, abs=width / 100) and found.n == 400
    assert found.high == pytest.approx(same.high, abs=width / 100)
    assert width < 0.6 * (wilson(200, 400).high - wilson(200, 400).low)


def test_shares_without_spread_count_as_one_verdict_a_cluster() -> None:
    """Never seen is not never; of one cluster nothing is known."""
    ones = mean_share([1.0] * 20, clusters=[i // 2 for i in range(20)])
    assert 0.6 < ones.low < wilson(10, 10).low and ones.high == 1.0  # t of 9 degrees of freedom in place of z
    assert mean_share([0.3, 0.3, 0.3]).high - 0.3 > 0.3
    assert mean_share([0.0, 0.5], clusters=["x", "x"]) == Interval(0.25, 0.0, 1.0, 2)
    for outside in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"shares lie in \[0, 1\]"):
            mean_share([0.5, outside])


# --- means -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "t"),
    [(2, 12.706204736), (3, 4.302652730), (4, 3.182446305), (11, 2.228138852), (31, 2.042272456), (121, 1.979930405)],
)
def test_t_interval_has_the_tabulated_quantile(n: int, t: float) -> None:
    """Half its width over s / sqrt(n) is the 97.5 % quantile of Student's t in any table."""
    values = np.random.default_rng(n).normal(size=n)
    interval = mean_interval(values)
    unit = values.std(ddof=1) / math.sqrt(n)
    assert (interval.high - interval.low) / 2 / unit == pytest.approx(t, rel=1e-8)
    assert interval.estimate == pytest.approx(values.mean())


def test_t_quantiles_join_where_the_series_gives_way_to_its_expansion() -> None:
    """From 200 to 201 degrees of freedom, and far beyond, the width moves smoothly to the normal one."""

    def t(n: int, level: float) -> float:
        values = np.arange(n, dtype=float)
        return (mean_interval(values, level).high - values.mean()) / (values.std(ddof=1) / math.sqrt(n))

    for level in (0.5, 0.95, 0.999):
        before, at, after, beyond = (t(n, level) for n in (200, 201, 202, 203))
        assert (at - after) == pytest.approx(((before - at) + (after - beyond)) / 2, rel=2e-3)
    assert t(200_000, 0.95) == pytest.approx(1.959963984540054, rel=1e-4)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_interval_covers_as_often_as_it_says_for_five_values(level: float) -> None:
    """Five normal values: with z instead of t the coverage would be 0.88 for 0.95."""
    samples = np.random.default_rng(1).normal(3.0, 2.0, size=(6000, 5))
    hits = [i.low <= 3.0 <= i.high for i in (mean_interval(row, level) for row in samples)]
    assert abs(np.mean(hits) - level) < 4 * math.sqrt(level * (1 - level) / 6000)


def test_one_value_has_no_spread() -> None:
    """Nothing is known of how one value varies: the interval is infinite rather than absent or zero."""
    assert mean_interval([2.5]) == Interval(2.5, -math.inf, math.inf, 1)


@pytest.mark.parametrize("function", [mean_interval, quantiles])
def test_missing_and_infinite_values_are_refused(function: Callable[..., object]) -> None:
    """A NaN would turn the whole interval into one silently."""
    with pytest.raises(ValueError, match="found 2 not finite of 3"):
        function([1.0, math.nan, math.inf])
    with pytest.raises(ValueError, match="found 0 not finite of 0"):
        function([])


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_a_level_is_a_probability(level: float) -> None:
    """95 for 95 % is refused."""
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
        mean_interval([1.0, 2.0], level)


def test_quantiles_lie_between_order_statistics() -> None:
    """0..100 has its quantiles at 100 p."""
    assert quantiles(np.arange(101.0)) == pytest.approx((5.0, 50.0, 95.0))
    assert quantiles([3.0, 1.0], (0.0, 0.25, 1.0)) == pytest.approx((1.0, 1.5, 3.0))


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def test_paired_bootstrap_covers_as_often_as_it_says() -> None:
    """Skewed paired differences, n = 80: the interval covers their mean about 95 times in 100."""
    rng = np.random.default_rng(2)
    hits = []
    for seed in range(400):
        common = rng.normal(0, 10, 80)
        interval = paired_bootstrap(common + rng.exponential(1.0, 80), common, resamples=600, seed=seed)
        hits.append(interval.low <= 1.0 <= interval.high)
    assert 0.905 < np.mean(hits) < 0.975


def test_pairing_removes_what_both_sides_share() -> None:
    """The interval depends on the differences alone: a common part of any size cancels."""
    rng = np.random.default_rng(3)
    gain, common = rng.normal(0.5, 1, 200), rng.normal(0, 100, 200)
    paired, bare = paired_bootstrap(gain + common, common), paired_bootstrap(gain, np.zeros(200))
    assert (paired.low, paired.high) == pytest.approx((bare.low, bare.high))
    assert paired.estimate == pytest.approx(gain.mean()) and paired.n == 200
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * gain.std() / math.sqrt(200), rel=0.1)


def test_clusters_widen_the_interval_to_what_independence_allows() -> None:
    """Eight answers to one prompt share most of their noise: only drawing whole prompts covers the truth."""
    rng = np.random.default_rng(4)
    prompts = [f"prompt {i}" for i in range(50) for _ in range(8)]
    covered = {True: 0, False: 0}
    for seed in range(150):
        difference = np.repeat(rng.normal(0, 1, 50), 8) + rng.normal(0, 0.3, 400)
        for clustered in covered:
            interval = paired_bootstrap(
                difference, np.zeros(400), clusters=prompts if clustered else None, resamples=400, seed=seed
            )
            covered[clustered] += interval.low <= 0.0 <= interval.high
    assert covered[True] / 150 > 0.88
    assert covered[False] / 150 < 0.65


def test_clusters_of_unequal_size_weigh_by_their_items() -> None:
    """The mean is over items, not over clusters: a difference that never varies has an interval without width."""
    clusters = ["a"] * 9 + ["b"] * 2 + ["c"]
    assert paired_bootstrap([3.0] * 12, [1.0] * 12, clusters=clusters, resamples=200) == Interval(2.0, 2.0, 2.0, 12)


def test_bootstrap_is_deterministic_in_its_seed_and_refuses_unequal_lengths() -> None:
    """The same seed gives the same interval, another one another; unpaired data raise."""
    values = np.random.default_rng(5).normal(size=30)
    first = paired_bootstrap(values, np.zeros(30), resamples=500)
    assert paired_bootstrap(values, np.zeros(30), resamples=500) == first
    assert paired_bootstrap(values, np.zeros(30), resamples=500, seed=1) != first
    with pytest.raises(ValueError, match="paired items need equal lengths, not 30, 29"):
        paired_bootstrap(values, np.zeros(29))
    with pytest.raises(ValueError, match="paired items need equal lengths, not 30, 30, 2"):
        paired_bootstrap(values, np.zeros(30), clusters=["a", "b"])


def test_a_ratio_of_sums_is_a_mean_where_its_denominator_is_constant() -> None:
    """Equal denominators: the interval of the mean over them, clusters or not; no denominator is refused."""
    values = np.random.default_rng(6).normal(2, 1, 24)
    for clusters in (None, [i // 3 for i in range(24)]):
        found, mean = (
            ratio_interval(values, np.full(24, 4.0), clusters=clusters),
            mean_interval(values, clusters=clusters),
        )
        for end in ("estimate", "low", "high"):
            assert getattr(found, end) == pytest.approx(getattr(mean, end) / 4)
    for below in (np.zeros(24), np.ones(23)):
        with pytest.raises(ValueError, match="a ratio needs as many values below as above, whose sum is not 0"):
            ratio_interval(values, below)
