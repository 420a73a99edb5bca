"""What numbers say of a claim: all three verdicts on made-up ones, intervals that hold together, values at equal KL."""

from __future__ import annotations

import numpy as np
import pytest

from preftune.equations.stats import Interval, mean_interval
from preftune.evaluation.claims import Finding, above, at_kl, inside, of_seeds


def number(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 5)


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.1, 0.3), (0.2, 0.9)], "confirmed"),
        ([(0.1, 0.3), (-0.2, 0.9)], "cannot be told"),
        ([(0.1, 0.3), (-0.2, -0.1)], "contradicted"),
        ([(-0.1, 0.1)], "cannot be told"),
    ],
)
def test_a_claim_is_judged_by_all_its_intervals(intervals: list[tuple[float, float]], verdict: str) -> None:
    """Above the bound everywhere confirms, one clearly below is a counter-example, anything else decides nothing."""
    numbers = {str(i): number(*ends) for i, ends in enumerate(intervals)}
    assert above(numbers) == verdict
    shifted = {name: Interval(n.estimate + 2, n.low + 2, n.high + 2, n.n) for name, n in numbers.items()}
    assert above(shifted, 2.0) == verdict


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.6, 0.9), (1.1, 1.9)], "confirmed"),
        ([(0.6, 0.9), (1.1, 2.1)], "cannot be told"),
        ([(0.4, 0.6)], "cannot be told"),
        ([(0.6, 0.9), (2.1, 3.0)], "contradicted"),
        ([(0.1, 0.4)], "contradicted"),
    ],
)
def test_a_range_is_judged_from_both_sides(intervals: list[tuple[float, float]], verdict: str) -> None:
    """Inside with both ends confirms, one interval wholly outside contradicts."""
    assert inside({str(i): number(*ends) for i, ends in enumerate(intervals)}, 0.5, 2.0) == verdict


def test_intervals_of_a_finding_hold_together() -> None:
    """Of k numbers each interval has level 1 - 5 % / k: k times the chance to be wrong is 5 %."""
    values = {"a": [0.1, 0.3, 0.2, 0.5], "b": [1.0, 1.1, 0.7, 1.4], "c": [0.0, 0.2, 0.1, 0.1]}
    for name, interval in of_seeds(values).items():
        assert interval == mean_interval(values[name], 1 - 0.05 / 3)
    assert of_seeds({"a": values["a"]})["a"] == mean_interval(values["a"], 0.95)


def test_values_at_equal_kl_lie_between_neighbours() -> None:
    """Linear between the policies next to a KL, whatever their order; constant beyond the last."""
    points = [(2.0, 5.0), (0.0, 3.0), (1.0, 2.0)]
    np.testing.assert_allclose(at_kl(points, [0.0, 0.5, 1.5, 9.0]), [3.0, 2.5, 3.5, 5.0], atol=1e-12)


def test_a_finding_says_claim_numbers_and_verdict() -> None:
    """What is printed has the claim, what was measured, every number with its interval and the verdict."""
    told = str(Finding("A is better", "A - B", {"KL 1": Interval(0.5, 0.25, 0.75, 5)}, "confirmed", "one world"))
    assert told == "A is better: A - B: KL 1: 0.5 [0.25, 0.75]: confirmed"
