"""Losses that hold each log-ratio to its own target, derived again from probabilities."""

from __future__ import annotations

from decimal import Decimal

import torch
from loss_contract import Chances, Limit, Row, World, log_ratio_reward
from rows_core import wins
from torch import Tensor

LN_2 = 0.6931471805599453

# --- the losses, derived again ---------------------------------------------------------------------------------------


def sppo(q: Chances, beta: Decimal) -> Decimal:
    """Squared nats between each probability and its reference reweighted by e^(+-1/2), to the power 1/beta."""
    up = Decimal("0.5").exp() ** (1 / beta)
    return (q.w / (q.ref_w * up)).ln() ** 2 + (q.l * up / q.ref_l).ln() ** 2


def cal_dpo(q: Chances, beta: Decimal, calibration: Decimal) -> Decimal:
    """Surprise at the label, the ratios themselves being the strengths, and the squares."""
    return -wins(q, Decimal(1))[0].ln() + calibration * sppo(q, beta)


def _signal(q: Chances, beta: Decimal) -> tuple[Decimal, Decimal]:
    """The chance that each response is the policy's and not the reference's, at odds (pi / pi_ref)^beta."""
    w, l = (q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta
    return w / (1 + w), l / (1 + l)


def _noise(q: Chances, beta: Decimal) -> tuple[Decimal, Decimal]:
    w, l = (q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta
    return 1 / (1 + w), 1 / (1 + l)


def nca(q: Chances, beta: Decimal) -> Decimal:
    """Surprise at w as the one signal, and at either response, drawn by a fair coin, as noise."""
    noise_w, noise_l = _noise(q, beta)
    return -(_signal(q, beta)[0] * (noise_w * noise_l).sqrt()).ln()


def apo_zero(q: Chances, beta: Decimal) -> Decimal:
    """Chances of two errors: w taken for the reference's, l for the policy's."""
    return _noise(q, beta)[0] + _signal(q, beta)[1]


def apo_down(q: Chances, beta: Decimal) -> Decimal:
    """Chances of two errors: w taken for the policy's, l preferred to w."""
    return _signal(q, beta)[0] + wins(q, beta)[1]


# --- closed-form optima over all responses ---------------------------------------------------------------------------


def nca_optimum(world: World, beta: float) -> Tensor:
    """pi_ref 2 P(y beats another sample): at beta = 1 and pi_ref uniform it sums to one by itself."""
    assert beta == 1
    return world.reference * 2 * _win_rate(world)


def sppo_optimum(world: World, beta: float) -> Tensor:
    """log-ratios a with a + k e^a / (1 - pi_ref) = (P - 1/2) / beta: the targets are no policy, so k is paid for it."""
    target = (_win_rate(world) - 0.5) / beta
    low, high = -0.05, 100.0
    for _ in range(100):
        k = (low + high) / 2
        left, right = target - 50, target + 50
        for _ in range(100):
            a = (left + right) / 2
            above = a + k * a.exp() / (1 - world.reference) > target
            left, right = torch.where(above, left, a), torch.where(above, a, right)
        low, high = (k, high) if (world.reference * a.exp()).sum() > 1 else (low, k)
    return world.reference * a.exp()


def _win_rate(world: World) -> Tensor:
    """[V] P(y beats another response that the reference draws)."""
    others = world.reference * (1 - torch.eye(len(world.reference), dtype=torch.float64))
    return (world.beats * others).sum(1) / others.sum(1)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _beta(beta: float) -> float:
    return beta


ROWS: dict[str, Row] = {
    "sppo": Row(
        derivation=sppo,
        reward=log_ratio_reward,
        other={"beta": 0.05},
        at_start=(500_000.0, 200.0),
        swap=lambda D, beta: -2 * D / beta,
        shift=None,
        steepness=lambda beta: 1.0,
        optimum=sppo_optimum,
        optimum_world="intransitive",
        optimum_knobs={"beta": 0.5},
    ),
    "cal_dpo": Row(
        derivation=cal_dpo,
        reward=log_ratio_reward,
        other={"beta": 0.05, "calibration": 1.0},
        at_start=(62_500 + LN_2, 200 + LN_2),
        swap=lambda D, beta, calibration: -D - calibration * 2 * D / beta,
        shift=None,
        steepness=lambda beta, calibration: 1.0,
        limits=(Limit({"beta": 0.2, "calibration": 0.0}, "dpo", {"beta": 1.0}),),
    ),
    "nca": Row(
        derivation=nca,
        reward=log_ratio_reward,
        other={"beta": 0.3},
        at_start=(2 * LN_2, 2 * LN_2),
        swap=None,
        shift=None,
        steepness=_beta,
        optimum=nca_optimum,
        optimum_world="uniform",
        optimum_knobs={"beta": 1.0},
    ),
    "apo_zero": Row(
        derivation=apo_zero,
        reward=log_ratio_reward,
        other={"beta": 0.37},
        at_start=(1.0, 1.0),
        swap=None,
        shift=None,
        steepness=_beta,
    ),
    "apo_down": Row(
        derivation=apo_down,
        reward=log_ratio_reward,
        other={"beta": 0.37},
        at_start=(1.0, 1.0),
        swap=None,
        shift=None,
        steepness=_beta,
        pull_at_start=(0, 1),
    ),
}
