"""Reward against KL: what a method reaches at a price, and whether another does better at the same one.

    E_m(k) = the upper concave envelope of the points (KL, reward) of method m and of the reference (0, r_ref), at k;
             beyond the largest KL it stays where it is

KL is convex, so the policy that answers with one or the other of two policies lies above the line between their
points: E_m(k) is reached by mixing policies that were found, and says no more than the points do. Two methods are only
ever compared at equal KL. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preftune.equations.stats import Interval, mean_interval

__all__ = ["Matched", "Points", "Verdict", "area", "beaten", "compare", "differences", "envelope", "within"]

Points = Sequence[tuple[float, float]]
"""(KL, reward) of policies."""
Seeds = Mapping[int, Points]
"""seed -> the points of one method, the reference's among them."""
Verdict = Literal["confirmed", "contradicted", "cannot be told"]


def envelope(points: Points, at: ArrayLike) -> NDArray[np.float64]:
    """[K] E(k) at every k of `at`, nats >= 0. Raises ValueError without a point at KL 0."""
    ordered = sorted(points)
    if not ordered or ordered[0][0] > 1e-9:
        raise ValueError("an envelope starts at the reference: give its point, KL 0 and its reward")
    hull: list[tuple[float, float]] = []
    for x, y in ordered:
        if hull and y <= hull[-1][1]:
            continue  # costs more and brings no more
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (x, y)):
            hull.pop()
        if len(hull) == 1 and x <= hull[0][0]:
            hull.pop()
        hull.append((x, y))
    kl, reward = zip(*hull, strict=True)
    return np.interp(np.asarray(at, dtype=np.float64), kl, reward)


def area(points: Points, limit: float) -> float:
    """Mean of E(k) - r_ref over k in [0, limit]: the hypervolume that the points dominate, per nat."""
    grid = np.linspace(0, limit, 1001)
    reached = envelope(points, grid)
    return float(np.trapezoid(reached - reached[0], grid) / limit)


def beaten(ours: Points, theirs: Points) -> int:
    """How many of `theirs` are dominated: some single point of `ours` has no more KL and no less reward."""
    return sum(any(kl <= k and reward >= r for kl, reward in ours) for k, r in theirs)


@dataclass(frozen=True)
class Matched:
    """Method A less method B at equal KL, over seeds."""

    at: tuple[float, ...]
    differences: tuple[Interval, ...]
    """Of E_A(k) - E_B(k); all of them hold together with the stated level (Bonferroni)."""

    @property
    def verdict(self) -> Verdict:
        """Of "A has more reward than B at every KL": one clear counter-example contradicts it."""
        if all(difference.low > 0 for difference in self.differences):
            return "confirmed"
        return "contradicted" if any(difference.high < 0 for difference in self.differences) else "cannot be told"


def compare(ours: Seeds, theirs: Seeds, at: Sequence[float], level: float = 0.95) -> Matched:
    """Both methods at the KL of `at`; ValueError as `differences`."""
    return Matched(tuple(at), differences(ours, theirs, at, 1 - (1 - level) / len(at)))


def differences(ours: Seeds, theirs: Seeds, at: Sequence[float], level: float = 0.95) -> tuple[Interval, ...]:
    """E_A(k) - E_B(k) at every k of `at`: paired within a seed, each with its own interval over seeds.

    Raises ValueError when the seeds are not the same.
    """
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(f"a comparison is paired by seed: {sorted(ours)} and {sorted(theirs)} differ")
    by_seed = np.stack([envelope(ours[seed], at) - envelope(theirs[seed], at) for seed in ours])
    return tuple(mean_interval(column, level) for column in by_seed.T)


def within(gaps: Interval, bound: float) -> Verdict:
    """Of "the mean gap is at most `bound`"."""
    return "confirmed" if gaps.high <= bound else "contradicted" if gaps.low > bound else "cannot be told"


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])
