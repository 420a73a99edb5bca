"""Numbers with their uncertainty. No torch: reports and web pages use this too.

`level` is the probability with which the interval covers the truth over repeated samples, in (0, 1).
All of them take the n observations as independent; where they are not (several pairs of one prompt, several samples
of one answer), say so with `clusters`: one label per item, and only items of different labels need be independent.
`docs/statistics.md` tells how often each of them covers the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from preftune.equations.resampling import Floats, Statistic, jackknife, owners, resampled, weighted_mean

__all__ = [
    "Equivalence", "Interval", "bootstrap", "calibration_error", "equivalence", "holm", "mean_interval", "mean_p",
    "mean_share", "paired_bootstrap", "paired_difference", "quantiles", "ratio_interval", "seeds_and_prompts", "share",
    "wilson",
]  # fmt: skip

NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its interval, all in the unit of the observations, from n of them."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Whether a mean lies within +- margin: shown, when p < alpha; else not shown, which does not mean different."""

    difference: Interval
    """With the interval of level 1 - 2 alpha, which lies inside +- margin exactly when equivalence is shown."""
    margin: float
    p: float
    shown: bool


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """A share successes/n with the score interval of Wilson (1927), inside [0, 1] also when all or none succeed.

    A tie may count as half a success: then the interval is too wide rather than too narrow, because an outcome of
    one half varies less than the coin the formula assumes. Raises ValueError unless 0 <= successes <= n, n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs n >= 1 and 0 <= successes <= n, not {successes} of {n}")
    return _wilson(successes / n, n, NORMAL.inv_cdf(_two_sided(level)), n)


def share(successes: ArrayLike, level: float = 0.95, *, clusters: Sequence[object] | None = None) -> Interval:
    """The mean of successes in [0, 1], ties as halves: Wilson's interval; where clusters hold several items, of n_eff.

    n_eff = p (1 - p) / se^2 with the clusters' standard error, at most n (Kish, 1965), and Student's t for G clusters
    in place of z. A share of 0 or 1 shows no spread: its n_eff is G, as if the items of a cluster were one.
    Raises ValueError as `wilson` does.
    """
    success_N = _finite(successes)
    n, p = len(success_N), float(success_N.mean())
    owner_N, groups = owners(n, clusters)
    if groups == n:
        return wilson(float(success_N.sum()), n, level)
    if success_N.min() < 0 or success_N.max() > 1:
        raise ValueError("a share needs successes in [0, 1]")
    quantile = _two_sided(level)
    if groups == 1:
        return Interval(p, 0.0, 1.0, n)
    variance = _standard_error(success_N, owner_N, groups) ** 2
    n_eff = float(groups) if p in (0.0, 1.0) else min(n, p * (1 - p) / variance) if variance else float(n)
    return _wilson(p, n_eff, _t_quantile(quantile, groups - 1), n)


def _wilson(share: float, n_eff: float, z: float, n: int) -> Interval:
    shrink = 1 + z**2 / n_eff
    centre = (share + z**2 / (2 * n_eff)) / shrink
    half = z * math.sqrt(share * (1 - share) / n_eff + z**2 / (4 * n_eff**2)) / shrink
    return Interval(share, 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half, n)


def mean_interval(values: ArrayLike, level: float = 0.95, *, clusters: Sequence[object] | None = None) -> Interval:
    """The mean with Student's t interval, mean +- t s / sqrt(n): exact for normal values, asymptotic for others.

    With clusters of sums S_g about the mean, s / sqrt(n) becomes sqrt(G / (G - 1) sum_g S_g^2) / n, and t has G - 1
    degrees of freedom (Cameron and Miller, 2015); each item its own cluster gives the former.
    One cluster has a mean but no spread: its interval is infinite. Raises ValueError on no value, or on a NaN.
    """
    values_N = _finite(values)
    owner_N, groups = owners(len(values_N), clusters)
    n, mean = len(values_N), float(np.mean(values_N))
    quantile = _two_sided(level)
    if groups == 1:
        return Interval(mean, -math.inf, math.inf, n)
    half = _t_quantile(quantile, groups - 1) * _standard_error(values_N, owner_N, groups)
    return Interval(mean, mean - half, mean + half, n)


def mean_share(shares: ArrayLike, level: float = 0.95, *, clusters: Sequence[object] | None = None) -> Interval:
    """The mean of numbers between 0 and 1: Wilson's interval of n_eff = p (1 - p) / se^2, with t of G clusters.

    It holds the means m with |p - m| <= t se sqrt(m (1 - m) / (p (1 - p))): a mean near an end can vary less, so none
    beyond an end is among them, and the longer arm points inwards (quasi-likelihood: Wedderburn, 1974). Far from the
    ends it is `mean_interval`; where all are equal each cluster counts as one verdict. Raises ValueError on a number
    outside [0, 1], on none, or on a NaN.
    """
    share_N = _finite(shares)
    if share_N.min() < 0 or share_N.max() > 1:
        raise ValueError(f"shares lie in [0, 1], not from {share_N.min():g} to {share_N.max():g}")
    owner_N, groups = owners(len(share_N), clusters)
    p, quantile = float(share_N.mean()), _two_sided(level)
    if groups == 1:
        return Interval(p, 0.0, 1.0, len(share_N))
    variance = _standard_error(share_N, owner_N, groups) ** 2
    n_eff = p * (1 - p) / variance if variance > 1e-24 else float(groups)  # below it is what rounding makes of 0
    return _wilson(p, n_eff, _t_quantile(quantile, groups - 1), len(share_N))


def paired_difference(
    first: ArrayLike, second: ArrayLike, level: float = 0.95, *, clusters: Sequence[object] | None = None
) -> Interval:
    """Mean of first - second over the same items, with `mean_interval`'s t interval of the differences."""
    return mean_interval(_differences(first, second, clusters), level, clusters=clusters)


def mean_p(values: ArrayLike, null: float = 0.0, *, clusters: Sequence[object] | None = None) -> float:
    """Two-sided p-value of "the mean is `null`" by the t test: below 1 - level when `mean_interval` leaves it out.

    Values that do not vary give 0, or 1 where they equal `null`. Raises ValueError on fewer than two clusters.
    """
    return 2 * min(_one_sided(values, null, clusters), 1 - _one_sided(values, null, clusters))


def holm(p_values: ArrayLike) -> tuple[float, ...]:
    """Adjusted p-values in the order given: p_(k) becomes max over j <= k of (m - j + 1) p_(j), at most 1.

    Rejecting those below alpha keeps the chance of any false rejection below alpha, whatever their dependence.
    Source: Holm (1979). Raises ValueError on a p-value outside [0, 1].
    """
    p_M = _finite(p_values)
    if p_M.min() < 0 or p_M.max() > 1:
        raise ValueError("p-values lie in [0, 1]")
    order_M = np.argsort(p_M, kind="stable")
    adjusted_M = np.empty_like(p_M)
    adjusted_M[order_M] = np.minimum(1, np.maximum.accumulate(np.arange(len(p_M), 0, -1) * p_M[order_M]))
    return tuple(adjusted_M.tolist())


def equivalence(
    first: ArrayLike,
    second: ArrayLike,
    margin: float,
    *,
    alpha: float = 0.05,
    clusters: Sequence[object] | None = None,
) -> Equivalence:
    """Two one-sided t tests: is |mean of first - second| < margin? (TOST, Schuirmann, 1987)

    `margin` > 0 is decided beforehand, in the unit of the values. Raises ValueError on fewer than two clusters.
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin is above 0, not {margin}")
    difference_N = _differences(first, second, clusters)
    p = max(1 - _one_sided(difference_N, -margin, clusters), _one_sided(difference_N, margin, clusters))
    return Equivalence(mean_interval(difference_N, 1 - 2 * alpha, clusters=clusters), margin, p, p < alpha)


def quantiles(values: ArrayLike, probabilities: Sequence[float] = (0.05, 0.5, 0.95)) -> tuple[float, ...]:
    """The quantiles of the values, linear between order statistics. Raises ValueError on no value, or on a NaN."""
    return tuple(float(q) for q in np.quantile(_finite(values), probabilities))


def bootstrap(
    statistic: Statistic,
    n: int,
    level: float = 0.95,
    *,
    clusters: Sequence[object] | None = None,
    method: Literal["percentile", "bca"] = "percentile",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Any statistic of n items (`resampling.Statistic`: weights [R, n] -> [R]) with its bootstrap interval.

    "percentile": quantiles of the resampled values. "bca": quantiles moved for median bias and for skewness, the
    latter from the jackknife over clusters (Efron, 1987); for skewed statistics of few items. Both are too narrow
    below some 20 clusters. Resamples that leave the statistic undefined (NaN) are left out; deterministic in `seed`.
    """
    upper = _two_sided(level)
    estimate = float(statistic(np.ones((1, n)))[0])
    drawn = resampled(statistic, n, clusters=clusters, resamples=resamples, seed=seed)
    drawn = drawn[~np.isnan(drawn)]
    if math.isnan(estimate) or not len(drawn):
        return Interval(estimate, math.nan, math.nan, n)
    ends = (1 - upper, upper)
    if method == "bca":
        left_out = jackknife(statistic, n, clusters=clusters)
        ends = _bca_ends(estimate, drawn, left_out[~np.isnan(left_out)], upper)
    low, high = np.quantile(drawn, ends)
    return Interval(estimate, float(low), float(high), n)


def ratio_interval(
    above: ArrayLike, below: ArrayLike, level: float = 0.95, *, clusters: Sequence[object] | None = None
) -> Interval:
    """sum above / sum below over the same n items; the interval is that of its linear part.

    ratio + (above - ratio below) / mean below is a mean like any other, see `mean_interval`. Raises ValueError on
    lengths that differ, on no value, on a NaN, and where `below` sums to 0.
    """
    above_N, below_N = _finite(above), _finite(below)
    if len(above_N) != len(below_N) or below_N.sum() == 0:
        raise ValueError(
            f"a ratio needs as many values below as above, whose sum is not 0; found {len(above_N)} above and "
            f"{len(below_N)} below that sum to {below_N.sum():g}"
        )
    ratio = float(above_N.sum() / below_N.sum())
    return mean_interval(ratio + (above_N - ratio * below_N) / below_N.mean(), level, clusters=clusters)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    level: float = 0.95,
    *,
    clusters: Sequence[object] | None = None,
    method: Literal["percentile", "bca"] = "percentile",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of first - second over the same n items, with the interval of the `bootstrap` over items or clusters.

    The mean is over items, not over clusters. Raises ValueError on lengths that differ, on no value, or on a NaN.
    """
    difference_N = _differences(first, second, clusters)
    owner_N, groups = owners(len(difference_N), clusters)
    # Sums per cluster say all there is to say about a mean, and are fewer.
    sums_G2 = np.stack([np.bincount(owner_N, weights=difference_N), np.bincount(owner_N)], axis=1)
    found = bootstrap(weighted_mean(sums_G2), groups, level, method=method, resamples=resamples, seed=seed)
    return Interval(float(difference_N.mean()), found.low, found.high, len(difference_N))


def seeds_and_prompts(values: ArrayLike, level: float = 0.95, *, same_prompts: bool = True) -> Interval:
    """The mean of values [S seeds, P prompts] as it would vary over new seeds and new prompts.

    Prompts of each seed's own: Student's t of the S seed means. The same for all seeds: variance components of the
    crossed table, Var = (MS_seed + MS_prompt - MS_rest) / (S P) with Satterthwaite's degrees of freedom. The nested
    bootstrap of the same table is no substitute: S seeds have few distinct draws, and it counts the rest twice or
    three times (Owen, 2007). Raises ValueError unless S >= 2, and P >= 2 where prompts are shared.
    """
    values_SP = np.atleast_2d(np.asarray(values, np.float64))
    _finite(values_SP)
    S, P = values_SP.shape
    if S < 2 or (same_prompts and P < 2):
        raise ValueError(f"{S} seeds and {P} prompts do not tell how either varies: 2 or more are needed")
    mean, seed_S, prompt_P = float(values_SP.mean()), values_SP.mean(1), values_SP.mean(0)
    if not same_prompts:
        found = mean_interval(seed_S, level)
        return Interval(mean, found.low, found.high, S * P)
    rest_SP = values_SP - seed_S[:, None] - prompt_P + mean
    freedom = np.array([S - 1, P - 1, (S - 1) * (P - 1)])
    squares = np.array([P * ((seed_S - mean) ** 2).sum(), S * ((prompt_P - mean) ** 2).sum(), (rest_SP**2).sum()])
    parts = squares / freedom * np.array([1, 1, -1])
    if parts[1] + parts[2] < 0:  # prompts vary less than chance makes them: their component is 0
        parts[1:] = 0
    df = float(parts.sum() ** 2 / (parts**2 / freedom).sum()) if parts.sum() > 0 else S - 1
    half = _t_quantile(_two_sided(level), max(1, int(df))) * math.sqrt(float(parts.sum()) / (S * P))
    return Interval(mean, mean - half, mean + half, S * P)


def calibration_error(
    probabilities: ArrayLike,
    outcomes: ArrayLike,
    level: float = 0.95,
    *,
    bins: int = 10,
    clusters: Sequence[object] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """ECE = sum over bins of n_b / n |mean outcome - mean probability|, with the bootstrap's percentile interval.

    Outcomes are 0, 1 or between; `bins` of equal width cut [0, 1]. A sum of absolute values is biased upwards, its
    bootstrap twice: a perfect forecast of n items spread over the bins has about sqrt(bins / n) / 3.
    `clusters` as in `paired_bootstrap`. Raises ValueError on lengths that differ or a probability outside [0, 1].
    """
    forecast_n, outcome_n = _finite(probabilities), _finite(outcomes)
    if len(forecast_n) != len(outcome_n) or forecast_n.min() < 0 or forecast_n.max() > 1:
        raise ValueError("calibration needs as many probabilities in [0, 1] as outcomes")
    bin_n = np.minimum((forecast_n * bins).astype(np.int64), bins - 1)
    surplus_nB = (outcome_n - forecast_n)[:, None] * (bin_n[:, None] == np.arange(bins))

    def error(weights_Rn: Floats) -> Floats:
        return np.asarray(np.abs(weights_Rn @ surplus_nB).sum(1) / weights_Rn.sum(1))

    return bootstrap(error, len(bin_n), level, clusters=clusters, resamples=resamples, seed=seed)


def _bca_ends(estimate: float, drawn: Floats, left_out: Floats, upper: float) -> tuple[float, float]:
    """Quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))) for z = -+ z_upper. Source: Efron (1987), 2.3 and 6.6.

    z0 from the share of draws below the estimate, a tie as half: a statistic of few values would else look biased.
    """
    below = float(np.mean(drawn < estimate) + np.mean(drawn == estimate) / 2)
    least = 1 / (2 * len(drawn))
    z0 = NORMAL.inv_cdf(min(max(below, least), 1 - least))
    pull = left_out.mean() - left_out
    spread = float((pull**2).sum())
    a = float((pull**3).sum()) / (6 * spread**1.5) if spread else 0.0
    z = NORMAL.inv_cdf(upper)
    low, high = (NORMAL.cdf(z0 + (z0 + side) / max(1 - a * (z0 + side), 1e-9)) for side in (-z, z))
    return low, high


def _differences(first: ArrayLike, second: ArrayLike, clusters: Sequence[object] | None) -> Floats:
    first_N, second_N = _finite(first), _finite(second)
    if len(first_N) != len(second_N) or (clusters is not None and len(clusters) != len(first_N)):
        lengths = [len(first_N), len(second_N)] + ([] if clusters is None else [len(clusters)])
        raise ValueError(f"paired items need equal lengths, not {', '.join(map(str, lengths))}")
    return first_N - second_N


def _standard_error(values_N: Floats, owner_N: ArrayLike, groups: int) -> float:
    """Of the mean over items, from the G sums of deviations: sqrt(G / (G - 1) sum_g S_g^2) / n."""
    sums_G = np.bincount(owner_N, weights=values_N - values_N.mean())
    return math.sqrt(groups / (groups - 1) * float((sums_G**2).sum())) / len(values_N)


def _one_sided(values: ArrayLike, null: float, clusters: Sequence[object] | None) -> float:
    """P(a mean as low as found or lower | the truth is `null`) by Student's t."""
    values_N = _finite(values)
    owner_N, groups = owners(len(values_N), clusters)
    if groups < 2:
        raise ValueError("one value, or one cluster, tells nothing of how means vary: 2 or more are needed")
    away, error = float(values_N.mean()) - null, _standard_error(values_N, owner_N, groups)
    if error == 0:
        return 0.5 if away == 0 else float(away > 0)
    return (1 + math.copysign(_t_central(math.atan(abs(away) / error / math.sqrt(groups - 1)), groups - 1), away)) / 2


def _finite(values: ArrayLike) -> Floats:
    values_n = np.asarray(values, dtype=np.float64).ravel()
    bad = int((~np.isfinite(values_n)).sum())
    if bad or not len(values_n):
        raise ValueError(f"needs at least one value and only finite ones, found {bad} not finite of {len(values_n)}")
    return values_n


def _two_sided(level: float) -> float:
    """The upper quantile of a two-sided interval: 0.975 for 0.95."""
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    return (1 + level) / 2


@lru_cache(maxsize=256)
def _t_quantile(probability: float, df: int) -> float:
    """The quantile >= 0 of Student's t: bisection in the angle of the exact series, or its expansion for large df.

    Source: Abramowitz and Stegun 26.7.3, 26.7.4 and 26.7.5; both agree to 1e-9 where they meet.
    """
    if df > 200:
        z = NORMAL.inv_cdf(probability)
        g1 = (z**3 + z) / 4
        g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + g1 / df + g2 / df**2 + g3 / df**3
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, df) < 2 * probability - 1 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_central(theta: float, df: int) -> float:
    """P(|t| < sqrt(df) tan theta) for Student's t with df degrees of freedom."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = (cosine if odd else 1.0) if df > 1 else 0.0
    total = term
    for k in range(2 + odd, df, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (theta + sine * total) * 2 / math.pi if odd else sine * total
