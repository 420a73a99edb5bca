"""Losses that hold the log-ratio of each response to a target of its own. Notation as in `pairwise`.

DPO sees only the gap D = a - b and lets both fall together. These also see a and b, so a constant added to both does
not cancel: the missing log Z(x) is read as zero, that is, log-ratios are taken for rewards over beta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.equations.contract import Loss
from preftune.equations.knobs import NonNegative, Positive
from preftune.equations.pairwise import dpo_reward
from preftune.tensors import PairLogps

__all__ = [
    "LOSSES",
    "apo_at_start",
    "apo_down",
    "apo_down_weights",
    "apo_zero",
    "apo_zero_weights",
    "cal_dpo",
    "cal_dpo_at_start",
    "cal_dpo_weights",
    "nca",
    "nca_at_start",
    "nca_weights",
    "sppo",
    "sppo_at_start",
    "sppo_weights",
]


# --- targets in nats -------------------------------------------------------------------------------------------------


def sppo(pairs: PairLogps, *, beta: Positive = 1e-3) -> Tensor:
    """L = (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2: a hard label's win rate of 1 or 0, less one half, over beta.

    1/beta is the paper's eta, the step of a multiplicative-weights update: log-ratios are regressed on
    eta (P(y beats pi) - 1/2). The target of 500 nats is never reached, so the pull on both sides is nearly constant.

    Addresses: likelihood displacement, and preferences that no reward explains.
    Reads: log-ratios summed over tokens, each response alone.
    Elsewhere: the authors' code halves the sum and reads win rates estimated by a preference model; tools that take
    hard labels do not halve. We do not: the value is the paper's, and no adaptive optimizer notices.
    Source: arXiv 2405.00675 Eq. 4.7, the objective of Algorithm 1, with P = 1 and 0 (eta of its experiments).
    """
    return (pairs.chosen_log_ratio - 1 / (2 * beta)) ** 2 + (pairs.rejected_log_ratio + 1 / (2 * beta)) ** 2


def sppo_weights(pairs: PairLogps, *, beta: Positive = 1e-3) -> tuple[Tensor, Tensor]:
    """w_c = 2 (1/(2 beta) - a), w_r = 2 (b + 1/(2 beta)): negative beyond the targets."""
    target = 1 / (2 * beta)
    return 2 * (target - pairs.chosen_log_ratio), 2 * (pairs.rejected_log_ratio + target)


def sppo_at_start(*, beta: float) -> float:
    """1 / (2 beta^2)."""
    return 1 / (2 * beta**2)


def cal_dpo(pairs: PairLogps, *, beta: Positive = 2e-3, calibration: NonNegative = 0.5) -> Tensor:
    """L = -log s(D) + c [(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2]: DPO at beta = 1 plus `sppo` with weight c.

    c = `calibration`. beta sets the targets, +-250 nats by default, and nothing else: implicit rewards beta a and
    beta b are held to +-1/2. Beside such targets the logistic term is felt only on pairs that are ranked wrongly or
    barely right. c = 0 is `dpo` with beta = 1.

    Addresses: likelihood displacement; implicit rewards on no scale in particular.
    Reads: log-ratios summed over tokens, each response also alone.
    Elsewhere: the authors' code has c = 1/2 and no beta in the sigmoid, which one would expect from DPO; another tool
    has c = 1. The code averages the squares over the batch before adding them to each row: the same mean, but rows
    that mix. We follow the authors' numbers and square row by row.
    Source: arXiv 2412.14516 Eq. 10 (pseudocode: Algorithm 1; beta and c of the authors' code).
    """
    gap = pairs.chosen_log_ratio - pairs.rejected_log_ratio
    return calibration * sppo(pairs, beta=beta) - logsigmoid(gap)


def cal_dpo_weights(
    pairs: PairLogps, *, beta: Positive = 2e-3, calibration: NonNegative = 0.5
) -> tuple[Tensor, Tensor]:
    """w_c = s(-D) + 2 c (1/(2 beta) - a), w_r = s(-D) + 2 c (b + 1/(2 beta))."""
    push_T = torch.sigmoid(pairs.rejected_log_ratio - pairs.chosen_log_ratio)
    up_T, down_T = sppo_weights(pairs, beta=beta)
    return push_T + calibration * up_T, push_T + calibration * down_T


def cal_dpo_at_start(*, beta: float, calibration: float) -> float:
    """ln 2 + c / (2 beta^2)."""
    return math.log(2.0) + calibration * sppo_at_start(beta=beta)


# --- each response classified against the reference ------------------------------------------------------------------


def nca(pairs: PairLogps, *, beta: Positive = 0.01) -> Tensor:
    """L = -log s(R_w) - [log s(-R_w) + log s(-R_l)] / 2, R = beta log(pi / pi_ref): labelled or merely sampled?

    Noise contrast: the chosen response is the one signal, both responses are its noise with weight 1/2 each. As
    signal and as half noise at once, a chosen response settles at R_w = ln 2, where pi would win twice as often as
    chance; the loss is bounded below. The optimum is R = ln(2 P(y beats the reference)) wherever that normalises.

    Addresses: likelihood displacement, chosen log-probs that fall with the rejected ones.
    Reads: log-ratios summed over tokens, each response alone.
    Elsewhere: without the noise of the chosen response, -log s(R_w) - log s(-R_l), nothing is bounded: that is what
    some tools call bco_pair when they drop its running mean, and the authors biasedNCA.
    Source: arXiv 2402.05369 Table 1, NCA on preference data (derived in Section 4; beta of its experiments).
    """
    r_w, r_l = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    return -logsigmoid(r_w) - (logsigmoid(-r_w) + logsigmoid(-r_l)) / 2


def nca_weights(pairs: PairLogps, *, beta: Positive = 0.01) -> tuple[Tensor, Tensor]:
    """w_c = beta [s(-R_w) - s(R_w) / 2], negative beyond R_w = ln 2; w_r = beta s(R_l) / 2."""
    r_w, r_l = beta * pairs.chosen_log_ratio, beta * pairs.rejected_log_ratio
    return beta * (torch.sigmoid(-r_w) - torch.sigmoid(r_w) / 2), beta * torch.sigmoid(r_l) / 2


def nca_at_start() -> float:
    """2 ln 2."""
    return 2 * math.log(2.0)


def apo_zero(pairs: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = s(-beta a) + s(beta b): chosen up and rejected down, each from where the reference has it.

    For chosen responses that are better than the model's own and rejected ones that are worse. The pull
    beta s(u) s(-u) is largest at u = 0 and vanishes both ways: pairs that are ranked very wrongly are given up.

    Addresses: likelihood displacement, where the chosen responses are better than what the policy writes.
    Reads: log-ratios summed over tokens, each response alone.
    Source: arXiv 2408.06266 Eq. 7 (APO-zero).
    """
    return torch.sigmoid(-beta * pairs.chosen_log_ratio) + torch.sigmoid(beta * pairs.rejected_log_ratio)


def apo_zero_weights(pairs: PairLogps, *, beta: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = beta s(beta a) s(-beta a), w_r = beta s(beta b) s(-beta b)."""
    return beta * _slope(beta * pairs.chosen_log_ratio), beta * _slope(beta * pairs.rejected_log_ratio)


def apo_down(pairs: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = s(beta a) + s(-z): both down, rejected further.

    For a model that is already better than both responses: what the pair still teaches is the direction from one to
    the other. A fresh policy's chosen response is not moved at all: its two pulls cancel at a = b = 0.

    Addresses: data that are worse than the policy, whose imitation would harm it.
    Reads: log-ratios summed over tokens, the chosen one also alone.
    Source: arXiv 2408.06266 Eq. 8 (APO-down).
    """
    z = beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)
    return torch.sigmoid(beta * pairs.chosen_log_ratio) + torch.sigmoid(-z)


def apo_down_weights(pairs: PairLogps, *, beta: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = beta [s(z) s(-z) - s(beta a) s(-beta a)], w_r = beta s(z) s(-z)."""
    push_T = _slope(beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio))
    return beta * (push_T - _slope(beta * pairs.chosen_log_ratio)), beta * push_T


def apo_at_start() -> float:
    """1, for both."""
    return 1.0


def _slope(u: Tensor) -> Tensor:
    """s'(u) = s(u) s(-u)."""
    return torch.sigmoid(u) * torch.sigmoid(-u)


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="sppo",
        function=sppo,
        weights=sppo_weights,
        reward=dpo_reward,
        at_start=sppo_at_start,
        learning_rate=5e-7,  # arXiv 2405.00675
    ),
    Loss(
        name="cal_dpo",
        function=cal_dpo,
        weights=cal_dpo_weights,
        reward=dpo_reward,
        at_start=cal_dpo_at_start,
        learning_rate=5e-7,  # as sppo, most of which it is
    ),
    Loss(
        name="nca",
        function=nca,
        weights=nca_weights,
        reward=dpo_reward,
        at_start=nca_at_start,
        learning_rate=5e-6,  # arXiv 2402.05369, batch 32
    ),
    Loss(
        name="apo_zero",
        function=apo_zero,
        weights=apo_zero_weights,
        reward=dpo_reward,
        at_start=apo_at_start,
        learning_rate=2e-7,  # arXiv 2408.06266
    ),
    Loss(
        name="apo_down",
        function=apo_down,
        weights=apo_down_weights,
        reward=dpo_reward,
        at_start=apo_at_start,
        learning_rate=2e-7,  # arXiv 2408.06266
    ),
)
"""The losses above."""
