"""A claim, what was measured of it over seeds, and what that says: confirmed, contradicted or not to be told.

    confirmed       every interval lies above the bound
    contradicted    some interval lies below it
    cannot be told  otherwise

The intervals of one finding hold together (`of_seeds` divides 5 % by their number), so one that clearly lies on the
wrong side is a counter-example and no accident. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preftune.equations.stats import Interval, mean_interval
from preftune.evaluation.frontier import Verdict

__all__ = ["Finding", "above", "at_kl", "inside", "of_seeds"]


@dataclass(frozen=True)
class Finding:
    """A claim as it was measured."""

    claim: str
    """In the words of those who make it."""
    measured: str
    """What the numbers are; the claim holds where they are what the verdict asks for."""
    numbers: Mapping[str, Interval]
    verdict: Verdict
    limits: str
    """What it cannot show."""

    def __str__(self) -> str:
        numbers = "; ".join(f"{name}: {number}" for name, number in self.numbers.items())
        return f"{self.claim}: {self.measured}: {numbers}: {self.verdict}"


def of_seeds(values: Mapping[str, Sequence[float]], level: float = 0.95) -> dict[str, Interval]:
    """Means over seeds, Student's t; all intervals hold together with probability `level` (Bonferroni)."""
    return {name: mean_interval(seeds, 1 - (1 - level) / len(values)) for name, seeds in values.items()}


def above(numbers: Mapping[str, Interval], bound: float = 0.0) -> Verdict:
    """Of "all of these are larger than `bound`"."""
    if all(number.low > bound for number in numbers.values()):
        return "confirmed"
    return "contradicted" if any(number.high < bound for number in numbers.values()) else "cannot be told"


def inside(numbers: Mapping[str, Interval], low: float, high: float) -> Verdict:
    """Of "all of these lie in [low, high]"."""
    if all(low <= number.low and number.high <= high for number in numbers.values()):
        return "confirmed"
    outside = any(number.high < low or number.low > high for number in numbers.values())
    return "contradicted" if outside else "cannot be told"


def at_kl(points: Sequence[tuple[float, float]], at: ArrayLike) -> NDArray[np.float64]:
    """[K] what a method's policies (KL, value) have at every KL of `at`: linear between neighbours in KL.

    Beyond the smallest and the largest KL the value stays; give the reference's point, KL 0, among them.
    """
    kl, values = zip(*sorted(points), strict=True)
    return np.interp(np.asarray(at, dtype=np.float64), kl, values)
