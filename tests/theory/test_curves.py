"""The drawn functions at the values they must have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from preftune.equations.optimum import optimal_policy
from preftune.theory.curves import crossover_beta, loss_of_u, reward_gap, slope_of_u, uniform_token_shift


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


US = torch.logspace(-3, 3, 61, dtype=torch.float64)


@pytest.mark.parametrize(("u", "loss"), [(1.0, 0.693147), (0.1, 2.397895), (10.0, 0.0953102)])
def test_the_loss_has_its_known_values(u: float, loss: float) -> None:
    """ln 2 at u = 1, ln 11 at one tenth, ln 1.1 at ten, beta = 1."""
    assert float(loss_of_u(f64(u), 1.0)) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_the_loss_falls_and_is_convex(beta: float) -> None:
    """log(1 + u^-beta) as written; (ln 2, inf) below u = 1 and (0, ln 2) above; every chord lies above the curve."""
    loss = loss_of_u(US, beta)
    assert loss.tolist() == pytest.approx([math.log1p(u**-beta) for u in US.tolist()], rel=1e-13)
    assert bool((loss.diff() < 0).all())
    assert bool((loss[US < 0.999] > math.log(2)).all()) and bool((loss[US > 1.001] < math.log(2)).all())
    assert bool((loss.diff() / US.diff()).diff().gt(0).all())
    assert float(loss_of_u(f64(1.0), beta)) == pytest.approx(math.log(2), rel=1e-15)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_the_slope_is_the_derivative(beta: float) -> None:
    """-beta / (u (1 + u^beta)): by autograd, and -1/(u (1 + u)) at beta = 1."""
    u = US.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss_of_u(u, beta).sum(), u)
    torch.testing.assert_close(slope_of_u(US, beta), by_autograd, rtol=1e-12, atol=0)
    if beta == 1:
        torch.testing.assert_close(by_autograd, -1 / (US * (1 + US)), rtol=1e-12, atol=0)


def test_extreme_u_gives_finite_losses() -> None:
    """u^-beta would overflow; the loss there is -beta log u, and 0 at the other end."""
    assert loss_of_u(f64(1e-300, 1e300), 2.0).tolist() == pytest.approx([600 * math.log(10), 0.0])


@pytest.mark.parametrize(("u", "beta"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_u_and_beta_are_positive(u: float, beta: float) -> None:
    """A ratio of probabilities is, and a price."""
    for curve in (loss_of_u, slope_of_u):
        with pytest.raises(ValueError, match="both must be > 0, found"):
            curve(f64(u), beta)


@pytest.mark.parametrize(("level", "gap"), [(0.95, 5.0239), (0.99, 6.6746)])
def test_a_reward_gap_buys_a_probability(level: float, gap: float) -> None:
    """'this is a' at beta = 1: 5.02 nats for 95 %, 6.67 for 99 %, and pi_r with that gap has that probability."""
    found = reward_gap(level, 1 / 9, 1.0)
    assert found == pytest.approx(gap, abs=1e-4)
    pi_r = optimal_policy(f64(8 / 9, 1 / 9).log(), f64(0.0, found), 1.0)
    assert float(pi_r.exp()[1]) == pytest.approx(level, rel=1e-12)
    three = optimal_policy(f64(0.8, 0.1, 0.1).log(), f64(0.0, 3 * reward_gap(level, 0.1, 1.0), 0.0), 3.0)
    assert float(three.exp()[1]) == pytest.approx(level, rel=1e-12)


def test_two_responses_meet_at_the_crossover() -> None:
    """beta = gap / ln 8: half and half there; 4.809 for a gap of 10."""
    beta = crossover_beta(10.0, 8.0)
    assert beta == pytest.approx(10 / 2.0794415, rel=1e-7)
    pi_r = optimal_policy(f64(8 / 9, 1 / 9).log(), f64(0.0, 10.0), beta)
    assert pi_r.exp().tolist() == pytest.approx([0.5, 0.5], rel=1e-12)


def test_a_uniform_token_costs_its_logarithm() -> None:
    """10.82 nats for every extra token at V = 50257, in either direction, nothing at equal length."""
    assert uniform_token_shift(50_257, 12, 11) == pytest.approx(10.8249, abs=1e-4)
    assert uniform_token_shift(50_257, 8, 11) == pytest.approx(-3 * 10.824905, rel=1e-6)
    assert uniform_token_shift(50_257, 11, 11) == 0


def test_what_has_no_answer_is_refused() -> None:
    """Certain probabilities, prices of nothing, crossovers that do not exist."""
    for arguments in ((1.0, 0.1, 1.0), (0.5, 0.0, 1.0), (0.5, 0.1, 0.0)):
        with pytest.raises(ValueError, match=r"needs probabilities in \(0, 1\) and beta > 0"):
            reward_gap(*arguments)
    for arguments in ((0.0, 8.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="there is a crossover for a gap > 0 and a ratio > 1 only"):
            crossover_beta(*arguments)
