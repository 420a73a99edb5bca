"""Resampling by weights, and what is built on it: against definitions, other derivations and simulation."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest

from preftune.equations.resampling import jackknife, owners, resampled, weighted_mean
from preftune.equations.stats import (
    bootstrap,
    equivalence,
    holm,
    mean_interval,
    mean_p,
    paired_bootstrap,
    paired_difference,
    seeds_and_prompts,
    share,
    wilson,
)

RNG = np.random.default_rng


# --- weights ---------------------------------------------------------------------------------------------------------


def test_resampled_weights_count_whole_clusters() -> None:
    """Items of a cluster have equal weights, every sample draws as many clusters as there are."""
    clusters = ["b", "a", "b", "c", "a", "b"]
    seen = resampled(lambda w: w, 6, clusters=clusters, resamples=500)
    assert seen.shape == (500, 6)
    assert (seen[:, 0] == seen[:, 2]).all() and (seen[:, 0] == seen[:, 5]).all() and (seen[:, 1] == seen[:, 4]).all()
    assert (seen[:, [0, 1, 3]].sum(1) == 3).all() and np.abs(seen.mean(0) - 1).max() < 0.15
    assert owners(6, clusters)[0].tolist() == [0, 1, 0, 2, 1, 0]


def test_resamples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks or at once: the same samples of one seed."""
    whole = resampled(weighted_mean(np.arange(50.0)), 50, resamples=300)
    monkeypatch.setattr("preftune.equations.resampling.AT_ONCE", 800)
    assert (resampled(weighted_mean(np.arange(50.0)), 50, resamples=300) == whole).all()


def test_the_bootstrap_of_a_mean_has_its_exact_distribution() -> None:
    """Three values, all 27 samples: share of each mean among 20,000 resamples."""
    values = np.array([0.0, 1.0, 3.0])
    exact = np.array([np.mean(sample) for sample in product(values, repeat=3)])
    drawn = resampled(weighted_mean(values), 3, resamples=20_000)
    for mean in np.unique(exact.round(9)):
        assert np.mean(np.isclose(drawn, mean)) == pytest.approx(np.mean(np.isclose(exact, mean)), abs=0.012)


def test_the_jackknife_leaves_each_cluster_out_once() -> None:
    """Means without the cluster, by deletion."""
    values, clusters = RNG(0).normal(size=7), list("aabbbcd")
    by_hand = [np.mean([v for v, c in zip(values, clusters, strict=True) if c != gone]) for gone in "abcd"]
    assert jackknife(weighted_mean(values), 7, clusters=clusters) == pytest.approx(by_hand)


def test_ten_thousand_resamples_of_a_thousand_prompts_take_less_than_a_second() -> None:
    """Processor time, percentile and BCa."""
    values, start = RNG(1).normal(size=1000), time.process_time()
    paired_bootstrap(values, 0 * values, method="bca")
    assert time.process_time() - start < 1


def test_bca_is_the_percentile_interval_where_nothing_is_skewed_and_moves_where_it_is() -> None:
    """Symmetric values: no bias, no acceleration. Skewed ones: both ends move to the long tail."""
    half = RNG(2).normal(size=100)
    for values, moved in ((np.r_[half, -half], 0), (RNG(3).exponential(size=60), 1)):
        plain, bca = (paired_bootstrap(values, 0 * values, method=m) for m in ("percentile", "bca"))  # type: ignore[arg-type]
        assert (bca.low - plain.low) == pytest.approx(0, abs=0.01) if not moved else bca.low > plain.low
        assert (bca.high - plain.high) == pytest.approx(0, abs=0.01) if not moved else bca.high > plain.high + 0.01


def test_bca_is_its_published_formula() -> None:
    """z0 and a of the law-school kind of example, computed item by item, give the quantiles that are used."""
    from statistics import NormalDist

    values = RNG(4).exponential(size=15)
    drawn = resampled(weighted_mean(values), 15, resamples=4000)
    phi = NormalDist()
    z0 = phi.inv_cdf(np.mean(drawn < values.mean()))
    gone = np.array([np.delete(values, i).mean() for i in range(15)])
    a = sum((gone.mean() - gone) ** 3) / (6 * sum((gone.mean() - gone) ** 2) ** 1.5)
    ends = [phi.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in (-1.959964, 1.959964)]
    found = paired_bootstrap(values, 0 * values, method="bca", resamples=4000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, ends)), rel=1e-3)
    assert a == pytest.approx(sum((values - values.mean()) ** 3) / (6 * sum((values - values.mean()) ** 2) ** 1.5))


def test_an_undefined_statistic_has_no_interval_and_undefined_resamples_are_left_out() -> None:
    """0 / 0 is NaN in the estimate; in a resample it is left out."""
    assert math.isnan(bootstrap(weighted_mean(np.zeros((3, 2))), 3).low)
    found = bootstrap(weighted_mean(np.array([[1.0, 1.0], [0.0, 0.0]])), 2, resamples=100)
    assert (found.low, found.high) == (1, 1)


# --- means and shares with clusters -----------------------------------------------------------------------------------


def test_clusters_of_one_change_nothing_and_copies_change_nothing() -> None:
    """Own labels: Student's interval. Every value k times in one cluster: the interval of the values once."""
    values = RNG(5).normal(size=20)
    once = mean_interval(values)
    assert mean_interval(values, clusters=list(range(20))) == once
    copied = mean_interval(np.repeat(values, 4), clusters=[i // 4 for i in range(80)])
    assert (copied.estimate, copied.low, copied.high) == pytest.approx((once.estimate, once.low, once.high))
    assert mean_interval([1.0, 2.0], clusters=["p", "p"]).high == math.inf


def test_paired_difference_is_of_the_differences() -> None:
    """Student's t of first - second; the bootstrap of the same is close."""
    rng = RNG(6)
    common, gain, prompts = rng.normal(0, 9, 300), rng.normal(0.3, 1, 300), [i // 3 for i in range(300)]
    found = paired_difference(common + gain, common, clusters=prompts)
    other = paired_bootstrap(common + gain, common, clusters=prompts)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.02)
    with pytest.raises(ValueError, match="paired items need equal lengths, not 1, 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_a_clustered_share_that_shows_no_spread_counts_clusters() -> None:
    """20 prompts, 3 wins each, all won: as sure as 20 by Student's t, less than 60; one prompt says nothing."""
    all_won = share(np.ones(60), clusters=[i // 3 for i in range(60)])
    assert all_won.high == 1 and wilson(20, 20).low - 0.03 < all_won.low < wilson(20, 20).low < wilson(60, 60).low
    single = share([1.0, 1.0, 0.0], clusters=["p"] * 3)
    assert (single.low, single.high, single.n) == (0, 1, 3)
    with pytest.raises(ValueError, match=r"a share needs successes in \[0, 1\]"):
        share([2.0, 1.0, 0.0], clusters=["p", "p", "q"])


def test_opposed_verdicts_in_a_cluster_do_not_count_for_more_than_their_number() -> None:
    """One win and one loss per prompt, or nearly: no spread between prompts, yet never surer than independent ones."""
    for verdicts in ([1.0, 0.0] * 30, [1.0, 1.0, 0.0, 0.0] + [1.0, 0.0] * 28):
        opposed = share(verdicts, clusters=[i // 2 for i in range(60)])
        assert opposed.low <= wilson(30, 60).low and opposed.high >= wilson(30, 60).high


# --- tests -----------------------------------------------------------------------------------------------------------


def test_the_p_value_is_the_level_that_just_excludes_the_null() -> None:
    """mean_interval at level 1 - p ends at the null, with and without clusters."""
    values = RNG(7).normal(0.4, 1, 24)
    for clusters in (None, [i // 2 for i in range(24)]):
        p = mean_p(values, 0.1, clusters=clusters)
        interval = mean_interval(values, 1 - p, clusters=clusters)
        assert min(abs(interval.low - 0.1), abs(interval.high - 0.1)) < 1e-9
    assert mean_p([2.0, 2.0], 2.0) == 1 and mean_p([2.0, 2.0]) == 0
    with pytest.raises(ValueError, match="2 or more are needed"):
        mean_p([1.0, 2.0], clusters=["p", "p"])


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    """Six normal values: P(p < alpha) = alpha."""
    p = np.array([mean_p(row) for row in RNG(8).normal(size=(3000, 6))])
    for alpha in (0.01, 0.05, 0.5):
        assert np.mean(p < alpha) == pytest.approx(alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / 3000))


def test_holm_by_its_steps() -> None:
    """Smallest times m, next times m - 1, never falling, at most 1; in the order given."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.9, 0.4]) == pytest.approx((0.9, 0.8)) and holm([0.6, 0.7]) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"p-values lie in \[0, 1\]"):
        holm([1.2])


def test_holm_keeps_the_chance_of_any_false_rejection() -> None:
    """Ten true hypotheses: without it 40 % of the families hold a false rejection, with it 5 %."""
    p = RNG(9).random((4000, 10))
    assert np.mean(p.min(1) < 0.05) > 0.35
    assert np.mean([min(holm(row)) < 0.05 for row in p]) == pytest.approx(0.049, abs=0.014)


def test_equivalence_is_the_interval_of_twice_alpha_inside_the_margin() -> None:
    """p < alpha exactly when the 90 % interval lies within +- margin."""
    rng, agree = RNG(10), []
    for _ in range(200):
        values, clusters = rng.normal(0.1, 1, 60), [i // 2 for i in range(60)]
        found = equivalence(values, 0 * values, 0.4, clusters=clusters)
        inside = found.difference.low > -0.4 and found.difference.high < 0.4
        agree.append(found.shown)
        assert found.shown == inside == (found.p < 0.05)
    assert 0.1 < np.mean(agree) < 0.95
    with pytest.raises(ValueError, match="an equivalence margin is above 0"):
        equivalence([1.0, 2.0], [1.0, 2.0], 0)


def test_equivalence_is_claimed_wrongly_at_most_alpha_of_the_time() -> None:
    """The truth exactly at the margin: 5 % of claims."""
    draws = RNG(11).normal(0.5, 1, size=(3000, 40))
    claimed = np.mean([equivalence(row, np.zeros(40), 0.5).shown for row in draws])
    assert claimed == pytest.approx(0.05, abs=0.016)


# --- seeds and prompts -----------------------------------------------------------------------------------------------


def test_seeds_and_prompts_have_the_variance_of_their_components() -> None:
    """The squared half width over t^2 averages to the variance of the mean over fresh tables: no part counted twice."""
    rng, S, P = RNG(12), 40, 30
    width, means = [], []
    for _ in range(400):
        table = rng.normal(0, 0.5, (S, 1)) + rng.normal(0, 0.7, P) + rng.normal(0, 1.5, (S, P))
        found = seeds_and_prompts(table)
        width.append((found.high - found.low) ** 2 / 4)
        means.append(found.estimate)
    assert np.mean(width) == pytest.approx(4.0 * np.var(means), rel=0.2)
    assert np.var(means) == pytest.approx(0.25 / S + 0.49 / P + 2.25 / (S * P), rel=0.25)


def test_without_an_effect_of_seeds_or_prompts_the_table_reduces_to_one_of_them() -> None:
    """Rows alike: Student's t over prompts. Columns alike: over seeds. Prompts of their own: over seed means."""
    x = RNG(13).normal(size=9)
    rows, columns = seeds_and_prompts(np.tile(x, (4, 1))), seeds_and_prompts(np.tile(x[:, None], (1, 4)))
    for found in (rows, columns):
        assert (found.low, found.high) == pytest.approx((mean_interval(x).low, mean_interval(x).high))
    table = RNG(14).normal(size=(5, 7))
    own = seeds_and_prompts(table, same_prompts=False)
    assert (own.low, own.high) == pytest.approx((mean_interval(table.mean(1)).low, mean_interval(table.mean(1)).high))
    with pytest.raises(ValueError, match="1 seeds and 3 prompts do not tell how either varies"):
        seeds_and_prompts([[1.0, 2.0, 3.0]])
