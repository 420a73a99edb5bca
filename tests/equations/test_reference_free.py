"""What the contract suite cannot say of the losses without a reference: limits, singularities, degeneration."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from preftune.equations.losses import LOSSES
from preftune.equations.pairwise import dpo, dpo_weights
from preftune.equations.reference_free import (
    MEAN_LOGP_LIMIT,
    alphapo,
    cpo,
    cpo_weights,
    log_odds,
    nll,
    nll_weights,
    orpo,
    orpo_weights,
    simpo,
    slic_hf_weights,
    unlikelihood,
    unlikelihood_weights,
)
from preftune.tensors import PairLogps


def pairs(p_w: Tensor, p_l: Tensor, n_w: Tensor, n_l: Tensor) -> PairLogps:
    """Of means per token; log-ratios are NaN, since nothing here may read them."""
    nan = torch.full_like(p_w, torch.nan)
    return PairLogps(p_w * n_w, p_l * n_l, nan, nan, n_w, n_l, torch.ones_like(p_w))


def some_pairs(count: int = 100, *, length: int | None = None) -> PairLogps:
    g = torch.Generator().manual_seed(0)
    p_w, p_l = -3 * torch.rand(2, count, generator=g, dtype=torch.float64) - 0.05
    n_w, n_l = torch.randint(1, 40, (2, count), generator=g).double() if length is None else (length, length)
    one = torch.ones_like(p_w)
    return pairs(p_w, p_l, n_w * one, n_l * one)


# --- ORPO ------------------------------------------------------------------------------------------------------------

P = [-1e-6, -1e-5, -1e-4, -0.01, -0.3, -0.69, -0.6931471805599453, -0.7, -1.0, -5.0, -20.0, -37.0, -50.0]


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_log_odds_keep_their_digits_from_certainty_to_minus_fifty(dtype: torch.dtype, relative: float) -> None:
    """From p = -1e-6 to -50 log odds and their slope 1 / (1 - e^p) are exact to rounding; the naive form is not."""
    p = torch.tensor(P, dtype=dtype).requires_grad_()
    with localcontext(prec=60):
        chances = [Decimal(x).exp() for x in p.tolist()]
        odds = torch.tensor([float((c / (1 - c)).ln()) for c in chances], dtype=torch.float64)
        slopes = torch.tensor([float(1 / (1 - c)) for c in chances], dtype=torch.float64)
    (slope,) = torch.autograd.grad(log_odds(p).sum(), p)
    torch.testing.assert_close(log_odds(p).double(), odds, rtol=relative, atol=relative)
    torch.testing.assert_close(slope.double(), slopes, rtol=4 * relative, atol=0)
    naive = (p - torch.log1p(-torch.exp(p))).detach()
    assert float((naive.double() - odds).abs().max()) > 100 * relative


def test_orpo_pushes_a_sure_rejected_response_ever_harder() -> None:
    """w_r n_l = weight s(-o) / (1 - P_l) grows like weight / |p_l| as the rejected response becomes certain."""
    p_l = torch.tensor([-1e-2, -1e-4, -1e-6], dtype=torch.float64)
    one = torch.ones_like(p_l)
    _, w_r = orpo_weights(pairs(-one, p_l, one, 5 * one), odds_weight=0.1)
    torch.testing.assert_close(w_r * 5 * -p_l / 0.1, one, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_orpo_is_finite_at_certainty(dtype: torch.dtype) -> None:
    """A response the model holds for certain, p = 0, has the odds of the limit, and no gradient of them."""
    p = torch.tensor([0.0, -1.0, 0.0, 0.0], dtype=dtype).requires_grad_()
    q = torch.tensor([-1.0, 0.0, 0.0, -1e-30], dtype=dtype).requires_grad_()
    one = torch.ones_like(p.detach())
    value = orpo(pairs(p, q, one, one), odds_weight=0.1)
    d_w, d_l = torch.autograd.grad(value.sum(), (p, q))
    assert torch.isfinite(value).all() and torch.isfinite(d_w).all()
    assert d_l.tolist()[1:] == [0.0, 0.0, 0.0] and d_w.tolist()[2:] == [-1.0, -1.0]
    value = value.detach()
    sure = math.log(-1 / MEAN_LOGP_LIMIT) + math.log(math.e - 1)
    assert float(value[1]) == pytest.approx(1 + 0.1 * sure, rel=1e-4)
    assert float(value[2]) == pytest.approx(0.1 * math.log(2), rel=1e-6)


def test_orpos_likelihood_is_of_the_chosen_responses_own_tokens() -> None:
    """Without the odds term it is `nll`, whatever the rejected response and the other rows are."""
    data = some_pairs()
    torch.testing.assert_close(orpo(data, odds_weight=0.0), nll(data))
    torch.testing.assert_close(orpo(data, odds_weight=0.0), -data.chosen / data.chosen_length)


# --- SimPO, AlphaPO --------------------------------------------------------------------------------------------------


def test_simpo_without_margin_on_equal_lengths_is_dpo_against_any_constant_reference() -> None:
    """gamma = 0, n tokens a side: DPO at beta / n, with any reference that gives both responses the same chance."""
    data = some_pairs(length=13)
    for log_reference in (0.0, -40.0):
        a, b = data.chosen - log_reference, data.rejected - log_reference
        against = dpo(replace(data, chosen_log_ratio=a, rejected_log_ratio=b), beta=2.0 / 13)
        torch.testing.assert_close(simpo(data, beta=2.0, gamma=0.0), against, rtol=1e-12, atol=0)


def test_simpo_and_dpo_part_on_unequal_lengths() -> None:
    """With other lengths no beta makes them one loss: the ratio of the gradients is that of the lengths."""
    data = some_pairs()
    w_c, w_r = LOSSES["simpo"].bind(gamma=0.0).weights(data)
    torch.testing.assert_close(w_c / w_r, data.rejected_length / data.chosen_length)


def test_alpha_to_zero_is_simpo_by_its_series() -> None:
    """r = beta (p - alpha p^2 / 2 + ...): value = SimPO + alpha beta s(-u) (p_w^2 - p_l^2) / 2 + O(alpha^2)."""
    data = some_pairs()
    p_w, p_l = data.chosen / data.chosen_length, data.rejected / data.rejected_length
    tilt = 2.5 * torch.sigmoid(0.3 - 2.5 * (p_w - p_l)) * (p_w**2 - p_l**2) / 2
    straight = simpo(data, beta=2.5, gamma=0.3)
    for alpha in (1e-3, -1e-3, 1e-6, 1e-9, -1e-12):
        rest = alphapo(data, beta=2.5, gamma=0.3, alpha=alpha) - straight - alpha * tilt
        assert float(rest.abs().max()) < 100 * alpha**2 + 1e-14
    assert float((alphapo(data, beta=2.5, gamma=0.3, alpha=1e-3) - straight).abs().max()) > 1e-3


def test_alphapo_survives_what_powers_of_probabilities_do_not() -> None:
    """A thousand tokens of -3 nats: e^l is 0 in float64 and its power infinite; the mean's expm1 is exact."""
    long = torch.tensor([1000.0], dtype=torch.float64)
    data = pairs(torch.tensor([-3.0]).double(), torch.tensor([-2.0]).double(), long, long)
    assert torch.isinf(data.chosen.exp() ** -0.25)
    gap = 2.5 * (math.exp(0.5) - math.exp(0.75)) / 0.25
    assert float(alphapo(data, beta=2.5, gamma=0.0, alpha=0.25)) == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-12)


# --- sums of two terms -----------------------------------------------------------------------------------------------


def test_cpo_is_its_two_parts() -> None:
    """CPO = DPO against pi_ref = 1 + weight * nll, in value and in both gradient weights."""
    data = some_pairs()
    bare = replace(data, chosen_log_ratio=data.chosen, rejected_log_ratio=data.rejected)
    torch.testing.assert_close(cpo(data, beta=0.3, nll_weight=0.7), dpo(bare, beta=0.3) + 0.7 * nll(data))
    for got, preference, likelihood in zip(
        cpo_weights(data, beta=0.3, nll_weight=0.7), dpo_weights(bare, beta=0.3), nll_weights(data), strict=True
    ):
        torch.testing.assert_close(got, preference + 0.7 * likelihood)


def test_slic_only_imitates_beyond_its_margin() -> None:
    """Below delta both sides move, at delta and above only the likelihood term is left."""
    l_w, one = torch.tensor([-10.0, -8.5, -7.0, -2.0]).double(), torch.ones(4).double()
    w_c, w_r = slic_hf_weights(pairs(l_w, -10 * one, one, one), delta=3.0, nll_weight=0.5)
    assert w_c.tolist() == [1.5, 1.5, 0.5, 0.5] and w_r.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_nll_does_not_see_how_a_step_is_split() -> None:
    """Means per response add up the same in any micro-batches; a mean over a micro-batch's tokens does not."""
    one = torch.ones(4).double()
    data = pairs(torch.tensor([-4.0, -1.0, -2.0, -3.0]).double(), -one, torch.tensor([1.0, 9, 1, 1]).double(), one)

    def rows(part: slice) -> PairLogps:
        return pairs(data.chosen[part] / data.chosen_length[part], -one[part], data.chosen_length[part], one[part])

    def token_mean(part: slice) -> float:
        return float(-data.chosen[part].sum() / data.chosen_length[part].sum())

    halves = slice(0, 2), slice(2, 4)
    assert float(nll(data).sum()) == sum(float(nll(rows(half)).sum()) for half in halves) == 10.0
    assert abs(token_mean(slice(0, 4)) - sum(map(token_mean, halves)) / 2) > 0.1


# --- unlikelihood ----------------------------------------------------------------------------------------------------


def test_unlikelihood_never_rests_where_dpo_does() -> None:
    """As the rejected response falls its pull stays alpha and the value falls without bound; DPO's pull dies out."""
    depth = torch.tensor([1.0, 1e2, 1e4, 1e6], dtype=torch.float64)
    one = torch.ones_like(depth)
    data = pairs(-one, -depth, one, one)
    assert unlikelihood_weights(data, alpha=0.5)[1].tolist() == [0.5] * 4
    torch.testing.assert_close(unlikelihood(data, alpha=0.5), 1 - 0.5 * depth)
    bare = replace(data, chosen_log_ratio=data.chosen, rejected_log_ratio=data.rejected)
    assert float(dpo_weights(bare, beta=0.1)[1][-1]) == 0.0


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_unlikelihood_overstates_a_majority_and_then_runs_away(alpha: float) -> None:
    """Two thirds of labels for one of two responses: alpha = 0.2 settles above 2/3, from 1/2 on nothing is left.

    The net weights of the log-probabilities are 2/3 - alpha/3 and 1/3 - 2 alpha/3; the latter turns negative at 1/2.
    """
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    share = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    optimizer = torch.optim.SGD([theta], lr=2.0)
    for _ in range(300):
        optimizer.zero_grad()
        logp = torch.log_softmax(torch.cat([theta, torch.zeros(1).double()]), 0)
        (share * unlikelihood(pairs(logp, logp.flip(0), one, one), alpha=alpha)).sum().backward()
        optimizer.step()
    p = float(torch.sigmoid(theta.detach()))
    net_w, net_l = 2 / 3 - alpha / 3, 1 / 3 - alpha * 2 / 3
    assert p == pytest.approx(net_w / (net_w + net_l) if net_l > 0 else 1.0, abs=1e-9)
