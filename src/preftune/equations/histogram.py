"""Histograms that can be added whatever their ranges were. No torch.

Bin i of width w = 2^k holds the values in [i w, (i + 1) w). Widths are powers of two and bins begin at multiples of
them, so two narrow bins are exactly one wider bin: histograms of different steps are merged without an error.
On the disk: [w, i of the first bin, count, count, ...], short enough for every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["BINS", "histogram", "merged"]

BINS = 24
"""At most so many bins."""


def histogram(values: ArrayLike, *, least: float = 2.0**-10) -> list[float]:
    """[width, first, counts...] of finite values, in the narrowest bins of at least `least` (a power of two).

    Values that are not finite are left out; nothing is left of nothing. Raises ValueError unless least is 2^k.
    """
    if math.frexp(least)[0] != 0.5:
        raise ValueError(f"least must be a power of two, not {least}")
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return []
    width = least
    while finite.max() // width - finite.min() // width >= BINS:
        width *= 2
    places = (finite // width).astype(np.int64)  # not floor(x / width): half of the least number is 0
    return [width, int(places.min()), *np.bincount(places - places.min()).tolist()]


def merged(histograms: Sequence[Sequence[float]], *, least: float = 0.0) -> list[float]:
    """The histogram of all their values together, in the narrowest bins of at least `least`; empty ones add nothing."""
    there = [each for each in histograms if each]
    if not there:
        return []
    width = max(least, *(each[0] for each in there))
    while True:
        counts: dict[int, int] = {}
        for own, first, *numbers in there:
            for i, count in enumerate(numbers):
                place = math.floor((first + i) * own / width)
                counts[place] = counts.get(place, 0) + int(count)
        low, high = min(counts), max(counts)
        if high - low < BINS:
            return [width, low, *(counts.get(place, 0) for place in range(low, high + 1))]
        width *= 2
