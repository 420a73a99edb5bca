"""What each anchored loss holds its responses to, and where well-known implementations of it differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from preftune.equations.anchored import (
    apo_down,
    apo_down_weights,
    apo_zero_weights,
    cal_dpo,
    cal_dpo_weights,
    nca,
    nca_weights,
    sppo,
    sppo_weights,
)
from preftune.equations.losses import LOSSES
from preftune.equations.pairwise import dpo, dpo_weights
from preftune.tensors import PairLogps


def pairs(a: Tensor, b: Tensor) -> PairLogps:
    """Pairs with these log-ratios, of responses whose reference log-prob is -60."""
    one = torch.ones_like(a)
    return PairLogps(a - 60, b - 60, a, b, 5 * one, 5 * one, one)


def one_pair(a: float, b: float) -> PairLogps:
    return pairs(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))


def spread(low: float, high: float, count: int = 401) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


@pytest.mark.parametrize("name", ["sppo", "cal_dpo", "nca"])
def test_a_chosen_response_that_falls_with_its_rejected_one_is_pulled_up_harder(name: str) -> None:
    """Both log-ratios lowered together: DPO sees no difference, an anchored loss pulls chosen up more and more."""
    fall = spread(0, 200)
    a, b = 3 - fall, -2 - fall
    w_c, w_r = LOSSES[name].bind().weights(pairs(a, b))
    assert (w_c.diff() > 0).all() and (w_r.diff() < 0).all()
    torch.testing.assert_close(dpo_weights(pairs(a, b))[0], dpo_weights(one_pair(3, -2))[0].expand(401))


# --- SPPO ------------------------------------------------------------------------------------------------------------


def test_sppo_settles_at_its_two_targets() -> None:
    """No loss and no pull at a = 1/(2 beta), b = -1/(2 beta): 500 nats by default; beyond, both are pulled back."""
    at, beyond = one_pair(500, -500), one_pair(501, -501)
    assert float(sppo(at)) == 0 and [float(w) for w in sppo_weights(at)] == [0, 0]
    assert [float(w) for w in sppo_weights(beyond)] == [-2, -2]


def test_sppo_on_hard_labels_is_the_soft_regression_up_to_a_constant() -> None:
    """Mean over labels won with chance P: (a - (P - 1/2)/beta)^2 plus the labels' variance, as the paper regresses."""
    a, beta = spread(-40, 40), 0.05
    zero = torch.zeros_like(a)
    for P in (0.1, 0.5, 0.9):
        won, lost = sppo(pairs(a, zero), beta=beta) - 100, sppo(pairs(zero, a), beta=beta) - 100
        soft = (a - (P - 0.5) / beta) ** 2
        torch.testing.assert_close(P * won + (1 - P) * lost, soft + P * (1 - P) / beta**2, rtol=1e-12, atol=1e-9)


def test_sppo_is_the_sum_of_both_squares_and_nearly_linear() -> None:
    """Not half the sum, as the authors' code has it; at ordinary log-ratios each side is pulled with 1000 +- 4 %."""
    assert float(sppo(one_pair(0, 0), beta=0.5)) == 2
    for w in sppo_weights(pairs(spread(-20, 20), spread(20, -20))):
        assert float((w - 1000).abs().max()) <= 40


# --- Cal-DPO ---------------------------------------------------------------------------------------------------------


def test_cal_dpo_holds_the_log_ratios_to_its_targets() -> None:
    """At +-1/(2 beta) only the logistic pull s(-1/beta) is left, e^-500 by default: it settles there."""
    assert float(cal_dpo(one_pair(250, -250))) == pytest.approx(math.exp(-500), rel=1e-9, abs=0)
    w_c, w_r = cal_dpo_weights(one_pair(5, -5), beta=0.1)
    assert float(w_c) == float(w_r) == pytest.approx(1 / (1 + math.exp(10)), rel=1e-12)
    assert all(float(w) < 0 for w in cal_dpo_weights(one_pair(251, -251)))


def test_cal_dpo_has_no_beta_in_its_sigmoid() -> None:
    """On the line a + b = 0 at the same squares, swapping the pair costs D nats more, not beta D."""
    right, wrong = one_pair(5, -5), one_pair(-5, 5)
    squares = 0.5 * (sppo(wrong, beta=2e-3) - sppo(right, beta=2e-3))
    assert float(cal_dpo(wrong) - cal_dpo(right) - squares) == pytest.approx(10, abs=1e-6)
    assert float(dpo(wrong, beta=2e-3) - dpo(right, beta=2e-3)) == pytest.approx(0.02, abs=1e-9)


def test_cal_dpo_weighs_its_squares_by_one_half() -> None:
    """c = 1/2 as in the authors' code, 1 on demand as in another tool: the difference is half the squares."""
    a, b = spread(-20, 20), spread(15, -25)
    half, whole = cal_dpo(pairs(a, b)), cal_dpo(pairs(a, b), calibration=1.0)
    torch.testing.assert_close(whole - half, sppo(pairs(a, b), beta=2e-3) / 2, rtol=1e-12, atol=0)


def test_cal_dpo_squares_row_by_row() -> None:
    """Averaging the squares over the batch first, as released, has the same mean; its rows depend on one another."""
    a, b = spread(-20, 20), spread(15, -25)
    c = 1 / (2 * 2e-3)
    released = torch.log1p(torch.exp(b - a)) + 0.5 * (((a - c) ** 2).mean() + ((b + c) ** 2).mean())
    ours = cal_dpo(pairs(a, b))
    assert float(ours.mean()) == pytest.approx(float(released.mean()), rel=1e-12)
    assert float((ours - released).abs().max()) > 1000


# --- NCA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.3])
def test_nca_settles_at_a_reward_of_ln_2(beta: float) -> None:
    """w_c is positive below R_w = ln 2, 0 there and negative above, whatever the rejected response does."""
    for R_l in (-3.0, 0.0, 2.0):
        R_w = math.log(2) + spread(-1, 1, 3)
        w_c, _ = nca_weights(pairs(R_w / beta, torch.full_like(R_w, R_l / beta)), beta=beta)
        assert float(w_c[0]) > 0.1 * beta and abs(float(w_c[1])) < 1e-15 and float(w_c[2]) < -0.1 * beta


def test_nca_has_a_lowest_value() -> None:
    """3/2 ln 3 - ln 2, reached at R_w = ln 2 with the rejected response gone; biasedNCA would go down to 0."""
    R = spread(-30, 30, 601)
    grid = torch.cartesian_prod(R, R)
    values = nca(pairs(grid[:, 0], grid[:, 1]), beta=1.0)
    lowest = 1.5 * math.log(3) - math.log(2)
    assert float(values.min()) >= lowest
    assert float(nca(one_pair(math.log(2), -60), beta=1.0)) == pytest.approx(lowest, rel=1e-12)
    biased = torch.nn.functional.softplus(-grid[:, 0]) + torch.nn.functional.softplus(grid[:, 1])
    assert float(biased.min()) < 1e-12


# --- APO -------------------------------------------------------------------------------------------------------------


def test_apo_zero_gives_up_responses_that_are_very_wrong() -> None:
    """Its pulls are largest at the reference, the same both ways, and gone 400 nats from it."""
    u = spread(-400, 400)
    w_c, w_r = apo_zero_weights(pairs(u, u))
    assert int(w_c.argmax()) == int(w_r.argmax()) == 200
    torch.testing.assert_close(w_c, w_c.flip(0))
    assert float(w_c[0]) < 1e-16 < float(w_c[200])


def test_apo_down_lowers_both_and_rejected_further() -> None:
    """From the reference rejected goes down first; then chosen follows: descent ends with b < a < 0."""
    a, b = torch.zeros(1).double(), torch.zeros(1).double()
    w_c, w_r = apo_down_weights(pairs(a, b))
    assert float(w_c) == 0 and float(w_r) == pytest.approx(0.025)
    before = float(apo_down(pairs(a, b)))
    for _ in range(2000):
        w_c, w_r = apo_down_weights(pairs(a, b))
        a, b = a + 5 * w_c, b - 5 * w_r
    assert float(b) < float(a) - 20 < -20
    assert float(apo_down(pairs(a, b))) < 0.5 < before
