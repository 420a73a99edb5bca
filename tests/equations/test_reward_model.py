"""Losses of a reward model against decimals: what they read, what they cannot see, and how hard they pull."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from preftune.equations.bradley_terry import ranking_log_prob
from preftune.equations.reward_model import (
    bradley_terry,
    bradley_terry_weights,
    plackett_luce,
    plackett_luce_weights,
)

ETA = 0.3


def rewards(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_decimals(r_w: float, r_l: float, margin: float, eta: float) -> float:
    """log(1 + e^-(r_w - r_l - m)) + eta (r_w + r_l)^2 with fifty digits."""
    with localcontext() as context:
        context.prec = 50
        w, l, m = Decimal(r_w), Decimal(r_l), Decimal(margin)
        return float((1 + (-(w - l - m)).exp()).ln() + Decimal(eta) * (w + l) ** 2)


@pytest.mark.parametrize("eta", [0.0, ETA])
@pytest.mark.parametrize("margin", [0.0, 1.7])
def test_a_pair_costs_what_decimals_say(margin: float, eta: float) -> None:
    """L = -log s(r_w - r_l - m) + eta (r_w + r_l)^2, to rounding, from margins of -60 to 60 nats."""
    r_w = torch.cat([rewards(40), torch.tensor([30.0, -30.0, 0.0], dtype=torch.float64)])
    r_l = torch.cat([rewards(40, seed=1), torch.tensor([-30.0, 30.0, 0.0], dtype=torch.float64)])
    found = bradley_terry(r_w, r_l, torch.full_like(r_w, margin), centering=eta)
    expected = [by_decimals(w, l, margin, eta) for w, l in zip(r_w.tolist(), r_l.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-13)


def test_a_margin_is_a_lead_to_be_won() -> None:
    """At r_w - r_l = m the loss is ln 2: the chosen response must lead by the margin to be an even chance."""
    margin = rewards(9).abs()
    at_margin = bradley_terry(margin + 4, torch.full_like(margin, 4.0), margin)
    assert at_margin.tolist() == pytest.approx([0.6931471805599453] * 9, rel=1e-13)


def test_a_constant_of_the_prompt_is_seen_by_centring_only() -> None:
    """r + c(x) costs what r costs; with centring the mean 0 is cheapest and c from it costs eta (2 c)^2 more."""
    r, rank, shift = rewards(5, 4), torch.tensor([[1, 2, 3, 4]] * 5), rewards(5, seed=7)[:, None]
    for loss, args in ((bradley_terry, lambda x: (x[:, 0], x[:, 1])), (plackett_luce, lambda x: (x, rank))):
        torch.testing.assert_close(loss(*args(r + shift)), loss(*args(r)), rtol=1e-11, atol=1e-12)
        used = r[:, :2] if loss is bradley_terry else r
        mean = used.mean(-1, keepdim=True)
        at = [loss(*args(r - mean + c), centering=ETA) for c in (-0.5, 0.0, 0.5)]
        torch.testing.assert_close(at[0] - at[1], torch.full_like(at[0], ETA), rtol=1e-10, atol=0)  # eta (2 * 0.5)^2
        torch.testing.assert_close(at[2] - at[1], torch.full_like(at[0], ETA), rtol=1e-10, atol=0)


@pytest.mark.parametrize("eta", [0.0, ETA])
def test_two_ranked_responses_are_a_pair(eta: float) -> None:
    """K = 2: values and weights of Plackett-Luce are those of Bradley-Terry, whichever stands first."""
    r = rewards(12, 2)
    rank = torch.tensor([[1, 2], [2, 1]] * 6)
    r_w, r_l = r.gather(1, rank.argsort(1)).unbind(1)
    torch.testing.assert_close(
        plackett_luce(r, rank, centering=eta), bradley_terry(r_w, r_l, centering=eta), rtol=1e-12, atol=1e-14
    )
    expected = torch.stack(bradley_terry_weights(r_w, r_l, centering=eta), 1).gather(1, rank.argsort(1).argsort(1))
    torch.testing.assert_close(plackett_luce_weights(r, rank, centering=eta), expected, rtol=1e-12, atol=1e-14)


def test_a_ranking_costs_its_negative_log_likelihood() -> None:
    """Best drawn first from all, then the next from the rest: the sum over draws of `ranking_log_prob`."""
    r = rewards(6, 5)
    order = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    rank = order.argsort(1) + 1
    torch.testing.assert_close(plackett_luce(r, rank), -ranking_log_prob(r.gather(1, order)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("eta", [0.0, ETA])
def test_the_weights_are_minus_the_gradient(eta: float) -> None:
    """Autograd agrees to rounding: pairs with margins, rankings with ties and with absent responses."""
    r_w, r_l, margin = (rewards(50, seed=s).requires_grad_() for s in range(3))
    bradley_terry(r_w, r_l, margin.detach(), centering=eta).sum().backward()
    found = bradley_terry_weights(r_w.detach(), r_l.detach(), margin.detach(), centering=eta)
    for weight, leaf in zip(found, (r_w, r_l), strict=True):
        torch.testing.assert_close(weight, -leaf.grad, rtol=1e-12, atol=1e-13)
    r = rewards(4, 4).requires_grad_()
    rank = torch.tensor([[1, 2, 3, 4], [2, 1, 2, 3], [3, 1, 2, 0], [0, 2, 0, 1]])
    plackett_luce(r, rank, centering=eta).sum().backward()
    torch.testing.assert_close(plackett_luce_weights(r.detach(), rank, centering=eta), -r.grad, rtol=1e-12, atol=1e-13)


def test_an_absent_response_matters_nowhere() -> None:
    """A NaN in the place of rank 0 changes neither the value nor a gradient."""
    r, rank = rewards(1, 4), torch.tensor([[2, 0, 1, 3]])
    r[0, 1] = torch.nan
    leaf = r.clone().requires_grad_()
    value = plackett_luce(leaf, rank, centering=ETA)
    value.sum().backward()
    present = [0, 2, 3]
    torch.testing.assert_close(value.detach(), plackett_luce(r[:, present], rank[:, present], centering=ETA))
    assert leaf.grad is not None and leaf.grad.isfinite().all() and float(leaf.grad[0, 1]) == 0
