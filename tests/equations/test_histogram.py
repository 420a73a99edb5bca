"""Histograms count every value once, and adding them up is counting together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from preftune.equations.histogram import BINS, histogram, merged

numbers = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=60)


@given(numbers)
@example([23.0, -5e-324])  # so little below 0 that half of it is 0
def test_every_value_is_in_its_bin(values: list[float]) -> None:
    """Counted by hand: [i w, (i + 1) w); no bin is empty at either end; half the width would need too many bins."""
    width, first, *counts = histogram(values)
    assert counts == [sum(i * width <= v < (i + 1) * width for v in values) for i in range(first, first + len(counts))]
    assert sum(counts) == len(values) and len(counts) <= BINS and counts[0] and counts[-1]
    if width > 2.0**-10:
        half = width / 2
        assert max(values) // half - min(values) // half >= BINS


@given(st.lists(numbers, min_size=1, max_size=5))
def test_merging_is_counting_together(parts: list[list[float]]) -> None:
    """The merged histogram is that of all values, in bins as narrow as the widest part allows: to the count."""
    found = merged([histogram(part) for part in parts] + [[]])
    together = [value for part in parts for value in part]
    widest = max(histogram(part)[0] for part in parts)
    assert found == histogram(together, least=widest)


def test_lengths_are_counted_in_whole_tokens() -> None:
    """With least 1 a bin holds whole numbers; equal values are one bin; nothing has no histogram."""
    assert histogram([3, 5, 5, 8], least=1.0) == [1.0, 3, 1, 0, 2, 0, 0, 1]
    assert histogram([7.0] * 9, least=1.0) == [1.0, 7, 9]
    assert histogram([]) == merged([]) == merged([[], []]) == []
    assert histogram([math.nan, 1.0, math.inf], least=1.0) == [1.0, 1, 1]
    assert histogram(np.arange(100), least=1.0)[0] == 8.0


def test_a_width_that_is_no_power_of_two_could_not_be_merged() -> None:
    """It is refused."""
    with pytest.raises(ValueError, match=r"least must be a power of two, not 0\.1"):
        histogram([1.0], least=0.1)
