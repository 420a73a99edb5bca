"""DPO's gap through other shapes, offsets and weights, derived again from probabilities."""

from __future__ import annotations

import math
from decimal import Decimal

import torch
from loss_contract import Chances, Limit, Row, World, log_ratio_reward
from rows_core import calibrated_optimum, kl_optimum, normalised, wins
from torch import Tensor

LN_2 = 0.6931471805599453

# --- the losses, derived again ---------------------------------------------------------------------------------------


def _surprise(w: Decimal, l: Decimal) -> Decimal:
    """At w, when strengths w and l compete."""
    return ((w + l) / w).ln()


def exo(q: Chances, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """Nats lost by coding the model's choices with the smoothed label's code."""
    right, wrong = wins(q, beta)
    entropy = -(right * right.ln() + wrong * wrong.ln())
    return -right * (1 - label_smoothing).ln() - wrong * label_smoothing.ln() - entropy


def discopop(q: Chances, beta: Decimal, tau: Decimal) -> Decimal:
    """The mixture of two losses: surprise at the label, and the odds against it."""
    right, wrong = wins(q, beta)
    m, rest = wins(q, beta / tau)
    return rest * -right.ln() + m * wrong / right


def rdpo(q: Chances, beta: Decimal, alpha: Decimal) -> Decimal:
    """Every token multiplies a response's strength by e^alpha."""
    w, l = (q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta
    return _surprise(w * alpha.exp() ** q.n_w, l * alpha.exp() ** q.n_l)


def odpo(q: Chances, beta: Decimal, alpha: Decimal) -> Decimal:
    """The gap of scores, to the power alpha, is l's head start."""
    return _surprise((q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta * q.score_gap**alpha)


def margin_dpo(q: Chances, beta: Decimal, alpha: Decimal) -> Decimal:
    """The same with e to the gap."""
    return _surprise((q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta * (alpha * q.score_gap).exp())


def dpop(q: Chances, beta: Decimal, penalty: Decimal) -> Decimal:
    """What w has lost of its reference probability it loses 1 + penalty times."""
    w = (q.w / q.ref_w) * min(Decimal(1), q.w / q.ref_w) ** penalty
    return _surprise(w**beta, (q.l / q.ref_l) ** beta)


def xpo(q: Chances, beta: Decimal, alpha: Decimal) -> Decimal:
    """Surprise at the label, plus alpha times the log of the two ratios' geometric mean."""
    mean_ratio = ((q.w / q.ref_w) * (q.l / q.ref_l)).sqrt()
    return -wins(q, beta)[0].ln() + alpha * mean_ratio.ln()


def ln_dpo(q: Chances, beta: Decimal) -> Decimal:
    """Strengths are geometric means over tokens."""
    return _surprise((q.w / q.ref_w) ** (beta / q.n_w), (q.l / q.ref_l) ** (beta / q.n_l))


# --- closed-form optima over all responses ---------------------------------------------------------------------------


def penalised_optimum(world: World, beta: float, alpha: float) -> Tensor:
    """pi_ref exp((r - alpha n) / beta) / Z: the reward that a token costs alpha of."""
    weights = world.reference * torch.exp((world.reward - alpha * world.length) / beta)
    return weights / weights.sum()


def margin_optimum(world: World, beta: float, alpha: float) -> Tensor:
    """Labels and scores follow one reward: z = (1 + alpha) times its gap."""
    return kl_optimum(world, beta / (1 + alpha))


def ln_dpo_optimum(world: World, beta: float) -> Tensor:
    """pi_ref exp(n (r / beta + c)), c by normalisation."""
    return normalised(world.reference.log(), world.length, world.reward / beta)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _beta(beta: float, **_: float) -> float:
    return beta


def _discopop_swap(D: Tensor, beta: float, tau: float) -> Tensor:
    """The blend of both losses at z less that at -z: logistic part, then exponential part."""
    z, lean = beta * D, torch.tanh(beta * D / (2 * tau))
    logistic = -z / 2 - lean * (torch.log(2 * torch.cosh(z / 2)))
    return logistic + lean * torch.cosh(z) - torch.sinh(z)


ROWS: dict[str, Row] = {
    "exo": Row(
        derivation=exo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "label_smoothing": 0.2},
        at_start=(2.761230709097915, 0.2231435513142097),  # -ln 2 - ln(0.000999)/2; -ln 2 - ln(0.16)/2 = ln(1.25)
        swap=lambda D, beta, label_smoothing: (
            torch.tanh(beta * D / 2) * math.log(label_smoothing / (1 - label_smoothing))
        ),
        shift="response",
        steepness=_beta,
        optimum=calibrated_optimum,
        optimum_world="certain",
        optimum_knobs={"beta": 0.8, "label_smoothing": 0.2},
    ),
    "discopop": Row(
        derivation=discopop,
        reward=log_ratio_reward,
        other={"beta": 0.1, "tau": 0.08},
        at_start=(0.8465735902799727, 0.8465735902799727),
        swap=_discopop_swap,
        shift="response",
        steepness=_beta,
        pull_at_start=(-1, -1),
    ),
    "rdpo": Row(
        derivation=rdpo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "alpha": 0.2},
        at_start=None,
        swap=None,
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "alpha": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=penalised_optimum,
        optimum_knobs={"beta": 0.5, "alpha": 0.3},
    ),
    "odpo": Row(
        derivation=odpo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "alpha": 0.5},
        at_start=None,
        swap=None,
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "alpha": 0.0}, "dpo", {"beta": 0.2}),),
    ),
    "margin_dpo": Row(
        derivation=margin_dpo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "alpha": 0.5},
        at_start=None,
        swap=None,
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "alpha": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=margin_optimum,
        optimum_knobs={"beta": 0.8, "alpha": 0.5},
    ),
    "dpop": Row(
        derivation=dpop,
        reward=log_ratio_reward,
        other={"beta": 0.1, "penalty": 5.0},
        at_start=(LN_2, LN_2),
        swap=None,
        shift=None,
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "penalty": 0.0}, "dpo", {"beta": 0.2}),),
    ),
    "xpo": Row(
        derivation=xpo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "alpha": 0.02},
        at_start=(LN_2, LN_2),
        swap=lambda D, beta, alpha: -beta * D,
        shift=None,
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "alpha": 0.0}, "dpo", {"beta": 0.2}),),
    ),
    "ln_dpo": Row(
        derivation=ln_dpo,
        reward=lambda q, beta: beta * (q.w / q.ref_w).ln() / q.n_w,
        other={"beta": 2.0},
        at_start=(LN_2, LN_2),
        swap=lambda D_token, beta: -beta * D_token,
        shift="token",
        steepness=_beta,
        limits=(Limit({"beta": 3.5}, "dpo", {"beta": 0.5}, length=7),),
        optimum=ln_dpo_optimum,
        optimum_knobs={"beta": 2.0},
    ),
}
