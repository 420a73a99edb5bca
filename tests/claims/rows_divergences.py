"""f-DPO and chi-PO derived again from probabilities, with the policies that pay these prices for their rewards."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import torch
from loss_contract import Chances, Limit, Row, World
from torch import Tensor

LN_2 = 0.6931471805599453

# --- the losses, derived again ---------------------------------------------------------------------------------------


def surprise(margin: Decimal) -> Decimal:
    """-log of the chance e^m / (1 + e^m), by the smaller of the two exponentials: margins here reach 1e17."""
    return (1 + (-abs(margin)).exp()).ln() + max(-margin, Decimal(0))


def capped(power: Decimal) -> Decimal:
    """Powers of probability ratios end at e^40."""
    return min(power, Decimal(40).exp())


def logistic(reward: Callable[..., Decimal]) -> Callable[..., Decimal]:
    """Surprise at the label under Bradley-Terry on reward(pi, ref, knobs)."""
    return lambda q, **knobs: surprise(reward(q.w, q.ref_w, **knobs) - reward(q.l, q.ref_l, **knobs))


def forward_kl_reward(pi: Decimal, ref: Decimal, beta: Decimal) -> Decimal:
    """The share of the reference that is missing from pi, priced."""
    return beta * (1 - capped(ref / pi))


def alpha_reward(pi: Decimal, ref: Decimal, beta: Decimal, alpha: Decimal) -> Decimal:
    return beta / alpha * (1 - capped((ref / pi) ** alpha))


def js_reward(pi: Decimal, ref: Decimal, beta: Decimal) -> Decimal:
    """Against the mixture of both."""
    return beta * (2 * pi / (pi + ref)).ln()


def chipo_reward(pi: Decimal, ref: Decimal, beta: Decimal) -> Decimal:
    """Zero where pi = ref."""
    return beta * (capped(pi / ref) - 1 + (pi / ref).ln())


def chipo(q: Chances, beta: Decimal, r_max: Decimal) -> Decimal:
    margin = chipo_reward(q.w, q.ref_w, beta) - chipo_reward(q.l, q.ref_l, beta)
    return surprise(sorted((-2 * r_max, margin, 2 * r_max))[1])


# --- closed-form optima over all responses ---------------------------------------------------------------------------


def totalling_one(mass: Callable[[float], Tensor]) -> Tensor:
    """mass(c) at the c, found by bisection, where it sums to one; it grows with c and may be infinite or nan above."""
    low, high = -200.0, 200.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if bool(mass(c).sum() < 1) else (low, c)
    return mass(low)


def forward_kl_optimum(world: World, beta: float) -> Tensor:
    """pi_ref / (1 - r / beta - c), as far as that is positive."""
    return totalling_one(lambda c: world.reference / (1 - world.reward / beta - c).clamp(min=0))


def alpha_optimum(world: World, beta: float, alpha: float) -> Tensor:
    """pi_ref (1 - alpha (r / beta + c))^(-1/alpha)."""
    return totalling_one(
        lambda c: world.reference * (1 - alpha * (world.reward / beta + c)).clamp(min=0) ** (-1 / alpha)
    )


def js_optimum(world: World, beta: float) -> Tensor:
    """pi_ref e^s / (2 - e^s), s = r / beta + c."""

    def mass(c: float) -> Tensor:
        e_s = torch.exp(world.reward / beta + c)
        return world.reference * torch.where(e_s < 2, e_s / (2 - e_s), torch.inf)

    return totalling_one(mass)


def chipo_optimum(world: World, beta: float, r_max: float) -> Tensor:
    """pi_ref W0(e^s), s = r / beta + c, where no reward gap reaches the clip."""
    assert float(world.reward.max() - world.reward.min()) < 2 * r_max
    return totalling_one(lambda c: world.reference * lambert_w0_exp(world.reward / beta + c))


def lambert_w0_exp(s: Tensor) -> Tensor:
    """W0(e^s): w + ln w = s by Newton's method from the left, where a concave function's steps never overshoot."""
    w = torch.sigmoid(s)
    for _ in range(60):
        w = w - (w + w.log() - s) / (1 + 1 / w)
    return w


# --- the rows ---------------------------------------------------------------------------------------------------------


def _beta(beta: float, **_: float) -> float:
    return beta


ROWS: dict[str, Row] = {
    "fdpo_forward_kl": Row(
        derivation=logistic(forward_kl_reward),
        reward=lambda q, beta: forward_kl_reward(q.w, q.ref_w, beta),
        other={"beta": 0.37},
        at_start=(LN_2, LN_2),
        swap=None,
        shift=None,
        steepness=_beta,
        limits=(Limit({"beta": 0.2}, "fdpo_alpha", {"beta": 0.2, "alpha": 1.0}),),
        optimum=forward_kl_optimum,
        optimum_knobs={"beta": 0.5},
    ),
    "fdpo_js": Row(
        derivation=logistic(js_reward),
        reward=lambda q, beta: js_reward(q.w, q.ref_w, beta),
        other={"beta": 0.37},
        at_start=(LN_2, LN_2),
        swap=None,
        shift=None,
        steepness=_beta,
        optimum=js_optimum,
        optimum_knobs={"beta": 0.5},
    ),
    "fdpo_alpha": Row(
        derivation=logistic(alpha_reward),
        reward=lambda q, beta, alpha: alpha_reward(q.w, q.ref_w, beta, alpha),
        other={"beta": 0.37, "alpha": 0.3},
        at_start=(LN_2, LN_2),
        swap=None,
        shift=None,
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "alpha": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=alpha_optimum,
        optimum_knobs={"beta": 0.5, "alpha": 0.4},
    ),
    "chipo": Row(
        derivation=chipo,
        reward=lambda q, beta: chipo_reward(q.w, q.ref_w, beta),
        other={"beta": 0.37, "r_max": 2.0},
        at_start=(LN_2, LN_2),
        swap=None,
        shift=None,
        steepness=_beta,
        optimum=chipo_optimum,
        optimum_knobs={"beta": 0.5, "r_max": 5.0},
    ),
}
