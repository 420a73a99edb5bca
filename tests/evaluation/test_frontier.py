"""Methods compared at equal KL: envelopes, areas, counts and verdicts against hand-made and brute-force answers."""

from __future__ import annotations

import numpy as np
import pytest

from preftune.equations.stats import Interval
from preftune.evaluation.frontier import Matched, area, beaten, compare, differences, envelope, within

START = (0.0, 1.0)


def cloud(seed: int) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [START, *((float(k), float(r)) for k, r in zip(rng.uniform(0.1, 6, 12), rng.normal(2, 1, 12), strict=True))]


@pytest.mark.parametrize("seed", range(6))
def test_the_envelope_is_the_best_mixture_of_two_policies(seed: int) -> None:
    """E(k) equals the largest reward of any mixture of two points whose mean KL is at most k, by brute force."""
    points = cloud(seed)
    at = np.linspace(0, 8, 33)
    shares = np.linspace(0, 1, 2001)[:, None]
    for k, found in zip(at, envelope(points, at), strict=True):
        best = max(
            float(np.where(shares * a[0] + (1 - shares) * b[0] <= k, shares * a[1] + (1 - shares) * b[1], -9).max())
            for a in points
            for b in points
        )
        assert best - 1e-9 <= found <= best + 3e-3  # the shares are a grid


def test_order_repetition_and_worse_points_change_nothing() -> None:
    """The envelope depends on the set of points only, and a point below it does not move it."""
    points = [START, (1.0, 2.0), (3.0, 3.0)]
    more = [(3.0, 3.0), (2.0, 2.2), (3.0, 3.0), (0.5, 0.2), *points[::-1], (5.0, 2.9)]
    at = (0.0, 0.5, 1.0, 2.0, 3.0, 10.0)
    assert envelope(points, at).tolist() == envelope(more, at).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_a_method_that_only_loses_stays_at_the_reference() -> None:
    """Where no policy beats the reference, the reference itself is the best mixture."""
    assert envelope([START, (2.0, 0.5)], (0.0, 1.0, 4.0)).tolist() == [1.0, 1.0, 1.0]


def test_an_envelope_without_the_reference_is_refused() -> None:
    """Without the point at KL 0 the envelope would be drawn from nowhere."""
    for points in ([], [(0.5, 1.0)]):
        with pytest.raises(ValueError, match="starts at the reference"):
            envelope(points, (1.0,))


def test_the_area_is_that_of_the_polygon() -> None:
    """A ramp of height 2 over 1 nat and flat to 4 has mean (1 + 6) / 4."""
    assert area([START, (1.0, 3.0)], 4.0) == pytest.approx((0.5 * 2 + 3 * 2) / 4, abs=1e-5)


def test_dominance_needs_one_point_that_is_no_worse_in_both() -> None:
    """A point is beaten by another of no more KL and no less reward; between two points nothing counts."""
    assert beaten([(1.0, 2.0)], [(1.0, 2.0), (1.0, 2.1), (0.9, 2.0), (5.0, -1.0)]) == 2
    assert beaten([(0.0, 1.0), (2.0, 3.0)], [(1.0, 1.9)]) == 0


def test_differences_are_paired_by_seed() -> None:
    """A shift between worlds that both methods share leaves an interval of width 0, in the sign of A - B."""
    ours = {s: [(0.0, s), (1.0, s + 2.0)] for s in range(4)}
    theirs = {s: [(0.0, s), (1.0, s + 1.5)] for s in range(4)}
    (found,) = differences(ours, theirs, (1.0,))
    assert (found.estimate, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 4)
    with pytest.raises(ValueError, match="paired by seed"):
        differences(ours, {0: theirs[0]}, (1.0,))


def test_together_intervals_are_wider() -> None:
    """All intervals of a comparison hold at once, so each is wider than alone."""
    rng = np.random.default_rng(0)
    ours = {s: [START, (1.0, 2.0 + rng.normal())] for s in range(5)}
    theirs = {s: [START, (1.0, 2.0)] for s in range(5)}
    alone = differences(ours, theirs, (1.0, 2.0))
    together = compare(ours, theirs, (1.0, 2.0)).differences
    assert all(t.high - t.low > a.high - a.low for a, t in zip(alone, together, strict=True))
    assert compare(ours, theirs, (1.0,)).differences == differences(ours, theirs, (1.0,))


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        (((0.1, 0.3), (0.2, 0.4)), "confirmed"),
        (((0.1, 0.3), (-0.1, 0.4)), "cannot be told"),
        (((0.1, 0.3), (-0.4, -0.1)), "contradicted"),
        (((-0.1, 0.3), (-0.1, 0.4)), "cannot be told"),
    ],
)
def test_dominance_is_confirmed_everywhere_and_contradicted_anywhere(
    ends: tuple[tuple[float, float], ...], verdict: str
) -> None:
    """Every interval above 0 confirms, one below 0 contradicts, anything else tells nothing."""
    found = tuple(Interval((low + high) / 2, low, high, 5) for low, high in ends)
    assert Matched((1.0, 2.0), found).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.02, "confirmed"), (0.01, 0.03, "cannot be told"), (0.021, 0.03, "contradicted")],
)
def test_a_bound_holds_when_the_whole_interval_keeps_it(low: float, high: float, verdict: str) -> None:
    """Within a bound is said of the interval, not of the estimate."""
    assert within(Interval((low + high) / 2, low, high, 5), 0.02) == verdict
