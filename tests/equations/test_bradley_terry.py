"""Bradley-Terry and Plackett-Luce: probabilities that add up, read differences only, and one direction each."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.equations.bradley_terry import bt_cost, bt_log_prob, bt_objective, bt_prob, ranking_log_prob


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rewards(count: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_probability_is_the_softmax_of_two_rewards() -> None:
    """p(y_1 > y_2) = e^r_1 / (e^r_1 + e^r_2), by the definition, and log p is its logarithm."""
    for one, two in ((1.5, 0.0), (-2.0, 0.5), (0.3, 0.3)):
        by_hand = math.exp(one) / (math.exp(one) + math.exp(two))
        assert float(bt_prob(f64(one), f64(two))) == pytest.approx(by_hand, rel=1e-14)
        assert float(bt_log_prob(f64(one), f64(two))) == pytest.approx(math.log(by_hand), rel=1e-13)


def test_one_of_the_two_is_preferred() -> None:
    """p(y_1 > y_2) + p(y_2 > y_1) = 1."""
    one, two = rewards(200), rewards(200, seed=1)
    torch.testing.assert_close(bt_prob(one, two) + bt_prob(two, one), torch.ones_like(one), rtol=0, atol=1e-15)


def test_a_constant_added_to_both_rewards_changes_nothing() -> None:
    """Only differences are read: that is why log Z(x) cancels."""
    one, two = rewards(50), rewards(50, seed=1)
    torch.testing.assert_close(bt_cost(one + 100, two + 100), bt_cost(one, two), rtol=1e-12, atol=0)
    torch.testing.assert_close(ranking_log_prob(one + 100), ranking_log_prob(one), rtol=1e-11, atol=0)


def test_extreme_differences_stay_finite() -> None:
    """A margin of ten thousand nats costs ten thousand nats, not infinity; rightly ranked it costs 0."""
    assert bt_log_prob(f64(-1e4, 1e4), f64(0.0, 0.0)).tolist() == [-1e4, 0.0]
    assert float(ranking_log_prob(f64(-1e4, 0.0, 1e4))) == pytest.approx(-3e4, rel=1e-12)


def test_objective_and_cost_point_in_opposite_directions() -> None:
    """The objective is a mean log-likelihood, at most 0, that grows with the margin; the cost is its negative."""
    r_w, r_l = rewards(20).requires_grad_(), rewards(20, seed=1)
    objective, cost = bt_objective(r_w, r_l), bt_cost(r_w, r_l)
    assert float(objective.detach()) == -float(cost.detach()) < 0
    by_hand = sum(-math.log1p(math.exp(l - w)) for w, l in zip(r_w.tolist(), r_l.tolist(), strict=True)) / 20
    assert float(objective.detach()) == pytest.approx(by_hand, rel=1e-13)
    (up,), (down,) = torch.autograd.grad(objective, r_w), torch.autograd.grad(cost, r_w)
    assert bool((up > 0).all()) and bool((down < 0).all())


def test_a_weight_of_two_is_the_pair_given_twice_in_any_order() -> None:
    """The loss is a weighted mean over the data set: duplicates, permutations and the scale of weights are nothing."""
    r_w, r_l = rewards(6), rewards(6, seed=1)
    weight = f64(2, 1, 1, 3, 1, 1)
    expanded = torch.tensor([3, 0, 5, 3, 1, 0, 2, 4, 3])
    twice = bt_cost(r_w[expanded], r_l[expanded])
    torch.testing.assert_close(bt_cost(r_w, r_l, weight), twice, rtol=1e-14, atol=0)
    torch.testing.assert_close(bt_cost(r_w, r_l, 10 * weight), twice, rtol=1e-14, atol=0)
    assert abs(float(bt_cost(r_w, r_l) - twice)) > 1e-3


def test_minimising_the_cost_is_logistic_regression_on_differences() -> None:
    """With r = theta . x the gradient vanishes where iteratively reweighted least squares ends, without intercept."""
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(400, 3))
    difference *= np.where(rng.random(400) < 1 / (1 + np.exp(-difference @ [1.0, -2.0, 0.5])), 1, -1)[:, None]
    theta = np.zeros(3)
    for _ in range(25):
        p = 1 / (1 + np.exp(-difference @ theta))
        hessian = (difference * (p * (1 - p))[:, None]).T @ difference
        theta += np.linalg.solve(hessian, difference.T @ (1 - p))
    fitted = torch.tensor(theta, requires_grad=True)
    r_w = torch.tensor(difference) @ fitted
    (slope,) = torch.autograd.grad(bt_cost(r_w, torch.zeros_like(r_w)), fitted)
    assert float(slope.abs().max()) < 1e-14 and np.abs(theta).min() > 0.3


@pytest.mark.parametrize(
    ("r_w", "r_l", "weight"),
    [
        (torch.zeros(2), torch.zeros(3), None),
        (torch.zeros(2), torch.zeros(2), torch.ones(1)),
        (torch.zeros(0), torch.zeros(0), None),
        (torch.zeros(2, 2), torch.zeros(2, 2), None),
    ],
)
def test_shapes_that_do_not_fit_are_refused(r_w: Tensor, r_l: Tensor, weight: Tensor | None) -> None:
    """No silent broadcasting, no mean of nothing."""
    with pytest.raises(ValueError, match=r"must all be \[T\] with T >= 1, not \["):
        bt_cost(r_w, r_l, weight)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_all_rankings_together_are_certain(k: int) -> None:
    """The probabilities of the K! orders of K responses sum to 1."""
    values = rewards(k)
    orders = torch.stack([values[list(order)] for order in permutations(range(k))])
    assert float(ranking_log_prob(orders).exp().sum()) == pytest.approx(1, abs=1e-13)


def test_a_ranking_of_two_is_bradley_terry() -> None:
    """K = 2 is log s(r_1 - r_2)."""
    one, two = rewards(50), rewards(50, seed=1)
    torch.testing.assert_close(ranking_log_prob(torch.stack([one, two], -1)), bt_log_prob(one, two))


def test_the_best_is_drawn_first_then_the_next() -> None:
    """With weights 4, 2, 1 in this order: 4/7 times 2/3 times 1, in whole fractions."""
    expected = Fraction(4, 7) * Fraction(2, 3)
    assert float(ranking_log_prob(f64(math.log(4), math.log(2), 0.0)).exp()) == pytest.approx(
        float(expected), rel=1e-14
    )
    backwards = Fraction(1, 7) * Fraction(2, 6)
    assert float(ranking_log_prob(f64(0.0, math.log(2), math.log(4))).exp()) == pytest.approx(
        float(backwards), rel=1e-14
    )


def test_the_gradient_of_a_ranking_sums_to_zero_over_its_rewards() -> None:
    """d log p / d r_i = 1 - sum over the draws i takes part in of its share: the formula, and nothing for a shift."""
    values = rewards(4).requires_grad_()
    (slope,) = torch.autograd.grad(ranking_log_prob(values), values)
    by_hand = torch.ones(4, dtype=torch.float64)
    for first in range(4):
        by_hand[first:] -= torch.softmax(values[first:].detach(), 0)
    torch.testing.assert_close(slope, by_hand, rtol=1e-12, atol=1e-14)
    assert abs(float(slope.sum())) < 1e-14
