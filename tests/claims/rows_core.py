"""The first losses of the contract, derived again from probabilities: DPO and its nearest kin, and SimPO."""

from __future__ import annotations

from decimal import Decimal

import torch
from loss_contract import Chances, Limit, Row, World, log_ratio_reward
from torch import Tensor

# --- the losses, derived again ---------------------------------------------------------------------------------------


def wins(q: Chances, beta: Decimal) -> tuple[Decimal, Decimal]:
    """Bradley-Terry on strengths (pi / pi_ref)^beta: the chances that w beats l and that l beats w."""
    w, l = (q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta
    return w / (w + l), l / (w + l)


def dpo(q: Chances, beta: Decimal) -> Decimal:
    """Surprise at the label."""
    return -wins(q, beta)[0].ln()


def cdpo(q: Chances, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """Expected surprise when a fair labeller errs now and then."""
    right, wrong = wins(q, beta)
    return -((1 - label_smoothing) * right.ln() + label_smoothing * wrong.ln())


def robust(q: Chances, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """The loss of the observed label that solves "mean over flips = clean loss" for both labels at once (Cramer)."""
    right, wrong = wins(q, beta)
    keep, flip = 1 - label_smoothing, label_smoothing
    return (keep * -right.ln() - flip * -wrong.ln()) / (keep * keep - flip * flip)


def _regression(h: Decimal, tau: Decimal) -> Decimal:
    """Regress h on I/tau, I the fair coin of which response is called first; its noise, 1/(4 tau^2), taken off."""
    half = Decimal("0.5")
    return half * (h - 1 / tau) ** 2 + half * h**2 - 1 / (2 * tau) ** 2


def ipo(q: Chances, tau: Decimal) -> Decimal:
    return _regression(((q.w * q.ref_l) / (q.l * q.ref_w)).ln(), tau)


def ipo_average(q: Chances, tau: Decimal) -> Decimal:
    """Geometric means over tokens in place of the products."""
    w, l = (q.w / q.ref_w) ** (1 / Decimal(q.n_w)), (q.l / q.ref_l) ** (1 / Decimal(q.n_l))
    return _regression((w / l).ln(), tau)


def hinge(q: Chances, beta: Decimal) -> Decimal:
    """No loss once w's strength is e times l's."""
    right, wrong = wins(q, beta)
    e = Decimal(1).exp()
    return Decimal(0) if right >= e * wrong else (e * wrong / right).ln()


def simpo(q: Chances, beta: Decimal, gamma: Decimal) -> Decimal:
    """Surprise at the label when l is given a head start of e^gamma and strengths are mean token probabilities."""
    w, l = q.w ** (beta / q.n_w), q.l ** (beta / q.n_l) * gamma.exp()
    return -(w / (w + l)).ln()


# --- closed-form optima over all responses ---------------------------------------------------------------------------


def kl_optimum(world: World, beta: float, **_: float) -> Tensor:
    """pi_ref exp(r / beta) / Z."""
    weights = world.reference * torch.exp(world.reward / beta)
    return weights / weights.sum()


def calibrated_optimum(world: World, beta: float, label_smoothing: float) -> Tensor:
    """V = 2 and a certain winner: the odds over the reference are those of a right label, to the power 1/beta."""
    odds = torch.tensor([((1 - label_smoothing) / label_smoothing) ** (1 / beta), 1.0], dtype=torch.float64)
    return world.reference * odds / (world.reference * odds).sum()


def ipo_optimum(world: World, tau: float) -> Tensor:
    """pi_ref exp(P(y beats pi_ref) / tau) / Z (arXiv 2310.12036 Section 5): any preferences, transitive or not."""
    weights = world.reference * torch.exp(world.beats @ world.reference / tau)
    return weights / weights.sum()


def ipo_average_optimum(world: World, tau: float) -> Tensor:
    """pi_ref exp(n (P(y beats pi_ref) / tau + c)), c by normalisation: the same advantage pays per token."""
    return normalised(world.reference.log(), world.length, world.beats @ world.reference / tau)


def simpo_optimum(world: World, beta: float, gamma: float) -> Tensor:
    """exp(n (r / beta + c)) at gamma = 0: no trace of the reference, and long responses gain or lose by length."""
    assert gamma == 0
    return normalised(torch.zeros_like(world.reward), world.length, world.reward / beta)


def normalised(base: Tensor, length: Tensor, per_token: Tensor) -> Tensor:
    """exp(base + length (per_token + c)) with the c, found by bisection, that makes it sum to one."""
    low, high = -100.0, 100.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if torch.logsumexp(base + length * (per_token + c), 0) < 0 else (low, c)
    return torch.exp(base + length * (per_token + low))


# --- the rows ---------------------------------------------------------------------------------------------------------


def _beta(beta: float, **_: float) -> float:
    return beta


ROWS: dict[str, Row] = {
    "dpo": Row(
        derivation=dpo,
        reward=log_ratio_reward,
        other={"beta": 0.37},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=lambda D, beta: -beta * D,
        shift="response",
        steepness=_beta,
        optimum=kl_optimum,
        optimum_knobs={"beta": 0.3},
    ),
    "cdpo": Row(
        derivation=cdpo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "label_smoothing": 0.3},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=lambda D, beta, label_smoothing: -(1 - 2 * label_smoothing) * beta * D,
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "label_smoothing": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=calibrated_optimum,
        optimum_world="certain",
        optimum_knobs={"beta": 0.8, "label_smoothing": 0.2},
    ),
    "robust": Row(
        derivation=robust,
        reward=log_ratio_reward,
        other={"beta": 0.37, "label_smoothing": 0.3},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=lambda D, beta, label_smoothing: -beta * D / (1 - 2 * label_smoothing),
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "label_smoothing": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=kl_optimum,
        optimum_knobs={"beta": 0.5, "label_smoothing": 0.2},
        optimum_flips=0.2,
    ),
    "ipo": Row(
        derivation=ipo,
        reward=lambda q, tau: tau * (q.w / q.ref_w).ln(),
        other={"tau": 0.5},
        at_start=(25.0, 1.0),
        swap=lambda D, tau: -2 * D / tau,
        shift="response",
        steepness=lambda tau: 1.0,
        optimum=ipo_optimum,
        optimum_world="intransitive",
        optimum_knobs={"tau": 0.2},
    ),
    "ipo_average": Row(
        derivation=ipo_average,
        reward=lambda q, tau: tau * (q.w / q.ref_w).ln() / q.n_w,
        other={"tau": 0.25},
        at_start=(0.25, 4.0),
        swap=lambda D_token, tau: -2 * D_token / tau,
        shift="token",
        steepness=lambda tau: 1.0,
        limits=(Limit({"tau": 0.3}, "ipo", {"tau": 0.3}, length=1),),
        optimum=ipo_average_optimum,
        optimum_world="intransitive",
        optimum_knobs={"tau": 0.6},
    ),
    "hinge": Row(
        derivation=hinge,
        reward=log_ratio_reward,
        other={"beta": 0.2},
        at_start=(1.0, 1.0),
        swap=lambda D, beta: torch.where((beta * D).abs() < 1, -2 * beta * D, -torch.sign(D) * (1 + (beta * D).abs())),
        shift="response",
        steepness=_beta,
    ),
    "simpo": Row(
        derivation=simpo,
        reward=lambda q, beta: beta * q.w.ln() / q.n_w,
        other={"beta": 5.0, "gamma": 0.4},
        at_start=None,
        swap=lambda p_gap, beta, gamma: torch.log(
            (1 + torch.exp(gamma - beta * p_gap)) / (1 + torch.exp(gamma + beta * p_gap))
        ),
        shift="token",
        steepness=_beta,
        limits=(Limit({"beta": 2.0, "gamma": 0.0}, "dpo", {"beta": 2.0 / 7}, length=7, reference=False),),
        optimum=simpo_optimum,
        optimum_knobs={"beta": 2.0, "gamma": 0.0},
    ),
}
