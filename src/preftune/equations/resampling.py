"""Samples drawn again from a sample, as weights: how often each of N items is counted. No torch.

A *statistic* is a function of such weights, [R, N] -> [R] or [R, ...], one value per row. Weights of one give the
estimate, weights of the bootstrap (Efron, 1979) its distribution, weights with one cluster at zero the jackknife. So
one statistic, vectorised once, serves all three, and whole fits are resampled like means.

Items of one cluster (answers to one prompt, say) are drawn together; clusters must be independent, items need not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Floats", "Statistic", "jackknife", "owners", "resampled", "weighted_mean"]

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

AT_ONCE = 1_000_000  # weights held at a time, 8 MB


def owners(n: int, clusters: Sequence[object] | None) -> tuple[NDArray[np.int64], int]:
    """(the cluster of each of n items [N], numbered by first appearance; their number); None: each item its own.

    Raises ValueError unless there are n labels.
    """
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise ValueError(f"{n} items need {n} cluster labels, not {len(clusters)}")
    position = {label: i for i, label in enumerate(dict.fromkeys(clusters))}
    return np.array([position[label] for label in clusters], dtype=np.int64), len(position)


def resampled(
    statistic: Statistic, n: int, *, clusters: Sequence[object] | None = None, resamples: int = 10_000, seed: int = 0
) -> Floats:
    """[resamples, ...]: the statistic of as many samples of whole clusters, drawn with replacement.

    Deterministic in `seed`. A statistic may return NaN where a sample leaves it undefined.
    """
    owner_N, groups = owners(n, clusters)
    rng = np.random.default_rng(seed)
    rows = max(1, AT_ONCE // n)
    found: list[Floats] = []
    for start in range(0, resamples, rows):
        some = min(rows, resamples - start)
        drawn = rng.integers(groups, size=(some, groups)) + groups * np.arange(some)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=some * groups).reshape(some, groups).astype(np.float64)
        found.append(statistic(counts if clusters is None else counts[:, owner_N]))
    return np.concatenate(found)


def jackknife(statistic: Statistic, n: int, *, clusters: Sequence[object] | None = None) -> Floats:
    """[G, ...]: the statistic without one cluster, for each of the G."""
    owner_N, groups = owners(n, clusters)
    rows = max(1, AT_ONCE // n)
    left_out = (np.arange(start, min(start + rows, groups)) for start in range(0, groups, rows))
    return np.concatenate([statistic((owner_N != some[:, None]).astype(np.float64)) for some in left_out])


def weighted_mean(values: ArrayLike) -> Statistic:
    """The mean of the values [N] as a statistic; of values [N, 2], the ratio of the sums of the two columns.

    NaN where a ratio's lower sum is zero.
    """
    values_N2 = np.asarray(values, np.float64)
    if values_N2.ndim == 1:
        values_N2 = np.stack([values_N2, np.ones_like(values_N2)], axis=1)

    def mean(weights_RN: Floats) -> Floats:
        above, below = (weights_RN @ values_N2).T
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)

    return mean
