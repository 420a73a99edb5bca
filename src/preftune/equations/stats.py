"""Numbers with their uncertainty. No torch: reports and web pages use this too.

`level` is the probability with which the interval covers the truth over repeated samples, in (0, 1).
All of them take the n observations as independent; where they are not (several pairs of one prompt, several samples
of one answer), say so with `clusters` in `paired_bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "calibration_error", "mean_interval", "paired_bootstrap", "quantiles", "share", "wilson"]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the ends of its interval, all in the unit of the observations, from n of them."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.estimate:.4g} [{self.low:.4g}, {self.high:.4g}]"


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """A share successes/n with the score interval of Wilson (1927), inside [0, 1] also when all or none succeed.

    A tie may count as half a success: then the interval is too wide rather than too narrow, because an outcome of
    one half varies less than the coin the formula assumes. Raises ValueError unless 0 <= successes <= n, n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs n >= 1 and 0 <= successes <= n, not {successes} of {n}")
    z = NormalDist().inv_cdf(_two_sided(level))
    share, shrink = successes / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / shrink
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean with Student's t interval, mean +- t s / sqrt(n): exact for normal values, asymptotic for others.

    One value has a mean but no spread: its interval is infinite. Raises ValueError on no value, or on a NaN.
    """
    values_n = _finite(values)
    n, mean = len(values_n), float(np.mean(values_n))
    quantile = _two_sided(level)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = _t_quantile(quantile, n - 1) * float(np.std(values_n, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def quantiles(values: ArrayLike, probabilities: Sequence[float] = (0.05, 0.5, 0.95)) -> tuple[float, ...]:
    """The quantiles of the values, linear between order statistics. Raises ValueError on no value, or on a NaN."""
    return tuple(float(q) for q in np.quantile(_finite(values), probabilities))


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    level: float = 0.95,
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of first - second over the same n items, with the percentile interval of the bootstrap over items.

    `clusters`: one label per item; items of one label (answers to one prompt, say) are then drawn together and need
    not be independent. Deterministic in `seed`. Percentile intervals are too narrow below some 20 items or clusters.
    Raises ValueError on lengths that differ, on no value, or on a NaN.
    """
    first_n, second_n = _finite(first), _finite(second)
    if len(first_n) != len(second_n) or (clusters is not None and len(clusters) != len(first_n)):
        lengths = [len(first_n), len(second_n)] + ([] if clusters is None else [len(clusters)])
        raise ValueError(f"paired items need equal lengths, not {', '.join(map(str, lengths))}")
    difference_n = first_n - second_n
    labels = range(len(difference_n)) if clusters is None else clusters
    position = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    owner_n = [position[label] for label in labels]
    sums_G = np.bincount(owner_n, weights=difference_n)
    counts_G = np.bincount(owner_n)
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // len(sums_G))  # keeps the drawn positions under 8 MB
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(len(sums_G), size=(min(rows, resamples - start), len(sums_G)))
        means.append(sums_G[drawn].sum(1) / counts_G[drawn].sum(1))
    upper = _two_sided(level)
    low, high = np.quantile(np.concatenate(means), (1 - upper, upper))
    return Interval(float(difference_n.mean()), float(low), float(high), len(difference_n))


def share(successes: ArrayLike, level: float = 0.95, *, clusters: Sequence[object] | None = None) -> Interval:
    """The mean of successes in [0, 1], ties as halves: Wilson's interval, or over `clusters` where items share one.

    Raises ValueError as `wilson` and `paired_bootstrap` do.
    """
    success_n = _finite(successes)
    if clusters is None or len(set(clusters)) == len(success_n):
        return wilson(float(success_n.sum()), len(success_n), level)
    return paired_bootstrap(success_n, np.zeros_like(success_n), level, clusters=clusters, resamples=2000)


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
    labels = range(len(forecast_n)) if clusters is None else clusters
    position = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    owner_n = np.array([position[label] for label in labels])

    def error(count_n: NDArray[np.float64]) -> float:
        surplus_B = np.bincount(bin_n, weights=count_n * (outcome_n - forecast_n), minlength=bins)
        return float(np.abs(surplus_B).sum() / count_n.sum())

    rng, groups = np.random.default_rng(seed), len(position)
    drawn = (np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(resamples))
    upper = _two_sided(level)
    low, high = np.quantile([error(count_G[owner_n].astype(np.float64)) for count_G in drawn], (1 - upper, upper))
    return Interval(error(np.ones(len(owner_n))), float(low), float(high), len(owner_n))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
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
        z = NormalDist().inv_cdf(probability)
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
