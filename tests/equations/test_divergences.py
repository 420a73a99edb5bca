"""What the contract suite cannot say of f-DPO and chi-PO: which divergence, which direction, which clamp."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from preftune.equations.divergences import EXPONENT_LIMIT, chipo, chipo_weights, fdpo_alpha, power_log, power_log_slope
from preftune.equations.losses import LOSSES
from preftune.equations.pairwise import dpo
from preftune.tensors import PairLogps, ResponseLogps

Generator = Callable[[Tensor], Tensor]
ALPHA = 0.3
GENERATORS: dict[str, tuple[dict[str, float], Generator]] = {
    "fdpo_forward_kl": ({}, lambda u: -u.log()),
    "fdpo_js": ({}, lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log()),
    "fdpo_alpha": (
        {"alpha": ALPHA},
        lambda u: (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / (ALPHA * (ALPHA - 1)),
    ),
    "chipo": ({}, lambda u: (u - 1) ** 2 / 2 + u * u.log()),
}
"""Loss -> knobs and the convex f, with f(1) = 0, of the divergence E_ref[f(pi / pi_ref)] as the papers write it."""
EVERY_DIVERGENCE = pytest.mark.parametrize("name", GENERATORS)


def pairs(a: Tensor, b: Tensor) -> PairLogps:
    one = torch.ones_like(a)
    return PairLogps(a, b, a, b, one, one, one)


def some_pairs(count: int = 200, spread: float = 3.0) -> PairLogps:
    g = torch.Generator().manual_seed(0)
    return pairs(*(spread * torch.randn(2, count, generator=g, dtype=torch.float64)))


def reward(name: str, log_u: Tensor, beta: float) -> Tensor:
    loss = LOSSES[name].bind(beta=beta, **GENERATORS[name][0])
    return loss.reward(ResponseLogps(log_u, log_u, torch.ones_like(log_u)))


@EVERY_DIVERGENCE
def test_the_reward_is_the_slope_of_the_divergence(name: str) -> None:
    """r^ = beta (f'(u) - f'(1)) for the paper's f, which is convex and 0 at u = 1."""
    f = GENERATORS[name][1]
    u = torch.logspace(-3, 3, 61, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(f(u).sum(), u)
    assert (slope.diff() > 0).all() and float(f(torch.ones(1).double())) == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(reward(name, u.detach().log(), beta=0.7), 0.7 * (slope - slope[30]))


@EVERY_DIVERGENCE
def test_the_policy_that_pays_the_divergence_for_reward_has_that_reward(name: str) -> None:
    """The maximiser of E_pi[r] - beta E_ref[f(pi / pi_ref)], found without the loss, has r^ = r + const."""
    g = torch.Generator().manual_seed(1)
    reference = torch.softmax(torch.randn(6, generator=g, dtype=torch.float64), 0)
    r = torch.randn(6, generator=g, dtype=torch.float64)
    theta = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        pi = torch.softmax(theta, 0)
        cost = 0.6 * (reference * GENERATORS[name][1](pi / reference)).sum() - (pi * r).sum()
        cost.backward()
        return cost

    optimizer.step(closure)
    log_u = torch.log_softmax(theta.detach(), 0) - reference.log()
    assert float(log_u.abs().max()) > 0.2
    excess = reward(name, log_u, beta=0.6) - r
    torch.testing.assert_close(excess, excess.mean().expand(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "scale"), [("fdpo_forward_kl", 1.0), ("fdpo_js", 0.5), ("fdpo_alpha", 1.0), ("chipo", 2.0)]
)
def test_the_first_step_is_that_of_dpo_up_to_scale(name: str, scale: float) -> None:
    """At policy == reference the weights are f''(1) times DPO's beta / 2: 1, 1/2, 1 and 2 times."""
    zero = torch.zeros(3).double()
    for beta in (0.05, 0.4):
        w_c, w_r = LOSSES[name].bind(beta=beta).weights(pairs(zero, zero))
        torch.testing.assert_close(w_c, torch.full((3,), scale * beta / 2).double())
        torch.testing.assert_close(w_r, w_c)


def test_alpha_to_zero_is_dpo_by_its_series() -> None:
    """f'(u) = log u - alpha (log u)^2 / 2 + ...: value = DPO + alpha beta s(-z) (a^2 - b^2) / 2 + O(alpha^2)."""
    data = some_pairs()
    a, b, beta = data.chosen_log_ratio, data.rejected_log_ratio, 0.4
    tilt = beta * torch.sigmoid(-beta * (a - b)) * (a**2 - b**2) / 2
    for alpha in (1e-3, 1e-6, 1e-9, 1e-12):
        rest = fdpo_alpha(data, beta=beta, alpha=alpha) - dpo(data, beta=beta) - alpha * tilt
        assert float(rest.abs().max()) < 100 * alpha**2 + 1e-14
    assert float((fdpo_alpha(data, beta=beta, alpha=1e-3) - dpo(data, beta=beta)).abs().max()) > 1e-4


def test_alpha_to_one_is_forward_kl() -> None:
    """The distance to forward KL shrinks with 1 - alpha, tenfold for tenfold."""
    data, forward = some_pairs(spread=1.0), LOSSES["fdpo_forward_kl"].bind(beta=0.4)
    far, near = (
        float((fdpo_alpha(data, beta=0.4, alpha=1 - d) - forward.values(data)).abs().max()) for d in (1e-3, 1e-4)
    )
    assert far > 1e-4 and far / near == pytest.approx(10, rel=0.01)


def test_trls_coefficient_is_one_minus_ours() -> None:
    """TRL's f'(u) = (u^(c-1) - 1) / (c - 1) is ours at alpha = 1 - c; read as our alpha it is another loss."""
    data = some_pairs()

    def trl(coefficient: float) -> Tensor:
        u_w, u_l = data.chosen_log_ratio.exp(), data.rejected_log_ratio.exp()
        gap = (u_w ** (coefficient - 1) - u_l ** (coefficient - 1)) / (coefficient - 1)
        return -torch.log(torch.sigmoid(0.1 * gap))

    for coefficient in (0.1, 0.3, 0.5, 0.9):
        torch.testing.assert_close(fdpo_alpha(data, alpha=1 - coefficient), trl(coefficient))
        same = torch.allclose(fdpo_alpha(data, alpha=coefficient), trl(coefficient))
        assert same == (coefficient == 0.5)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0])
def test_a_power_is_exact_below_the_limit_and_constant_without_gradient_beyond(alpha: float) -> None:
    """Where -alpha log u <= 40 value and slope are those of (1 - u^-alpha) / alpha; beyond, value held and slope 0."""
    edge = -EXPONENT_LIMIT / alpha
    inside = torch.tensor([edge * share for share in (1.0, 0.999, 0.5, -0.5)], dtype=torch.float64).requires_grad_()
    exact = torch.tensor([(1 - math.exp(-alpha * x)) / alpha for x in inside.tolist()], dtype=torch.float64)
    torch.testing.assert_close(power_log(inside, alpha), exact, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(power_log(inside, alpha).sum(), inside)
    torch.testing.assert_close(slope, torch.exp(-alpha * inside.detach()), rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(power_log_slope(inside.detach(), alpha), torch.exp(-alpha * inside.detach()))

    beyond = torch.tensor([edge * times for times in (1.001, 2, 1e4)], dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(power_log(beyond, alpha), exact[0].expand(3), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(power_log(beyond, alpha).sum(), beyond)
    assert slope.tolist() == power_log_slope(beyond.detach(), alpha).tolist() == [0.0, 0.0, 0.0]


def test_the_largest_gradient_can_be_normed_in_float32() -> None:
    """A chosen response at the limit is pulled by 2e16, whose square is finite; unclamped, e^100 would be infinity."""
    data = pairs(torch.tensor([-EXPONENT_LIMIT, -100.0]), torch.zeros(2))
    w_c, w_r = LOSSES["fdpo_forward_kl"].bind().weights(data)
    assert w_c.dtype == torch.float32
    assert float(w_c[0]) == pytest.approx(0.1 * math.exp(EXPONENT_LIMIT), rel=1e-5) and torch.isfinite(w_c[0] ** 2)
    assert float(w_c[1]) == 0.0 and w_r.tolist() == pytest.approx([0.1, 0.1])
    assert torch.isinf(torch.exp(torch.tensor(100.0)))


def test_chipo_pushes_inside_the_clip_and_not_outside() -> None:
    """Inside, w = beta s(-z) (1 + u); beyond a margin of 2 r_max, right or wrong, the loss is flat."""
    b = torch.zeros(5).double()
    a = torch.tensor([-30.0, -9.0, 0.5, 2.0, 5.0], dtype=torch.float64)
    z = 0.5 * (a.exp() + a - 1)
    w_c, w_r = chipo_weights(pairs(a, b), beta=0.5, r_max=2.5)
    outside = z.abs() > 5
    assert outside.tolist() == [True, False, False, False, True]
    pull = 0.5 / (1 + z.exp())
    torch.testing.assert_close(w_c, torch.where(outside, 0.0, pull * (1 + a.exp())))
    torch.testing.assert_close(w_r, torch.where(outside, 0.0, pull * 2))
    values = chipo(pairs(a, b), beta=0.5, r_max=2.5)
    torch.testing.assert_close(values, torch.log1p(torch.exp(-z.clamp(-5, 5))))
    torch.testing.assert_close(chipo(pairs(a, b), beta=0.5, r_max=1e3), torch.log1p(torch.exp(-z)))
