"""Whether rewards mean what they say on held-out pairs: sigmoid(margin) is the chance given to the chosen response.

    accuracy      share of pairs with a positive margin, a margin of 0 as half
    Brier score   mean (1 - p)^2, p = sigmoid(margin); 1/4 is ignorance
    ECE           sum over bins of n_b / n |accuracy in the bin - mean confidence in it|, confidence = max(p, 1 - p)

Pairs of one prompt are drawn together by the resampling. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preftune.equations.resampling import Floats
from preftune.equations.stats import Interval, bootstrap, calibration_error, paired_bootstrap, share

__all__ = ["Bin", "Calibration", "Part", "calibrate", "correlation", "ranks", "wins"]

QUARTERS, BINS = 4, 10
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose confidence lies in [low, high)."""

    low: float
    high: float
    pairs: int
    confidence: float
    """Mean of max(p, 1 - p)."""
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Part:
    """Accuracy among the pairs of one kind."""

    name: str
    pairs: int
    accuracy: Interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """A reward on held-out pairs."""

    pairs: int
    accuracy: Interval
    longest_wins: Interval
    """Accuracy of preferring the longer response: what length alone explains."""
    brier: Interval
    ece: Interval
    reliability: tuple[Bin, ...]
    """Bins that hold a pair; confidence is at least 1/2."""
    by_margin: tuple[Part, ...]
    """Quarters of |margin|, the least decided pairs first."""
    by_length: tuple[Part, ...]
    """Pairs whose chosen response is longer, shorter, or as long."""


def calibrate(margins: ArrayLike, longer_by: ArrayLike, *, clusters: Sequence[object]) -> Calibration:
    """`margins` [T] reward of chosen - rejected, nats; `longer_by` [T] their lengths, any unit; whose pairs they are.

    Raises ValueError on no pair, on a margin that is not finite, and on lengths that differ.
    """
    margin_T, longer_T = np.asarray(margins, np.float64), np.asarray(longer_by, np.float64)
    owners = list(clusters)
    won_T, p_T = wins(margin_T), 1 / (1 + np.exp(-margin_T))
    sure_T = np.maximum(p_T, 1 - p_T)

    def among(members_T: NDArray[np.bool_]) -> Interval:
        return share(won_T[members_T], clusters=[o for o, inside in zip(owners, members_T, strict=True) if inside])

    def parts(kinds: dict[str, NDArray[np.bool_]]) -> tuple[Part, ...]:
        return tuple(Part(name, int(of.sum()), among(of)) for name, of in kinds.items() if of.any())

    brier = paired_bootstrap((1 - p_T) ** 2, 0 * p_T, clusters=owners, resamples=RESAMPLES)
    quarter_T = np.argsort(np.argsort(np.abs(margin_T), kind="stable")) * QUARTERS // len(margin_T)
    bin_T = np.minimum((sure_T * BINS).astype(np.int64), BINS - 1)
    return Calibration(
        pairs=len(margin_T),
        accuracy=among(np.ones(len(margin_T), dtype=bool)),
        longest_wins=share(wins(longer_T), clusters=owners),
        brier=brier,
        ece=calibration_error(sure_T, won_T, clusters=owners, bins=BINS),
        reliability=tuple(
            Bin(b / BINS, (b + 1) / BINS, int((bin_T == b).sum()), float(sure_T[bin_T == b].mean()), among(bin_T == b))
            for b in sorted(set(bin_T.tolist()))
        ),
        by_margin=parts({f"margin_{i + 1}": quarter_T == i for i in range(QUARTERS)}),
        by_length=parts({"chosen_longer": longer_T > 0, "chosen_shorter": longer_T < 0, "same_length": longer_T == 0}),
    )


def correlation(
    first: ArrayLike, second: ArrayLike, *, clusters: Sequence[object], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Pearson's correlation of two columns [N]; Spearman's when given their `ranks`. Bootstrap over clusters.

    NaN where a column does not vary.
    """
    columns_N2 = np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)], axis=1)
    columns_N2 = columns_N2 - columns_N2.mean(0)
    a_N, b_N = columns_N2.T
    moments_N5 = np.stack([a_N, b_N, a_N**2, b_N**2, a_N * b_N], axis=1)

    def pearson(weights_RN: Floats) -> Floats:
        a, b, aa, bb, ab = (weights_RN @ moments_N5 / weights_RN.sum(1, keepdims=True)).T
        spread = np.sqrt(np.maximum(aa - a**2, 0) * np.maximum(bb - b**2, 0))
        return np.divide(ab - a * b, spread, out=np.full(len(a), np.nan), where=spread > 0)

    return bootstrap(pearson, len(a_N), clusters=clusters, resamples=resamples, seed=seed)


def ranks(values: ArrayLike) -> Floats:
    """[N] ranks from 1, equal values share the mean of theirs."""
    value_N = np.asarray(values, np.float64)
    _, at_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mean: Floats = (last - (count - 1) / 2)[at_N]
    return mean


def wins(differences: ArrayLike) -> Floats:
    """1 where positive, 1/2 where zero, else 0."""
    won: Floats = np.heaviside(np.asarray(differences, np.float64), 0.5)
    return won
