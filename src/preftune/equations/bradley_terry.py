"""How rewards become preferences: Bradley-Terry for a pair, Plackett-Luce for a ranking.

    p(y_1 > y_2 | x) = e^r_1 / (e^r_1 + e^r_2) = s(r_1 - r_2)                        s() = logistic sigmoid

Both read differences of rewards only, so a c(x) added to every reward of one prompt is seen by neither: that is why
log Z(x) drops out of DPO. Two directions are kept apart by name: the *objective*, a mean log-likelihood <= 0 that is
maximised, and the *cost* = -objective >= 0 that is minimised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["bt_cost", "bt_log_prob", "bt_objective", "bt_prob", "ranking_log_prob"]


def bt_log_prob(r_1: Tensor, r_2: Tensor) -> Tensor:
    """log p(y_1 > y_2 | x) = log s(r_1 - r_2), any shape, nats, <= 0. Source: arXiv 2305.18290 Eq. 1."""
    return logsigmoid(r_1 - r_2)


def bt_prob(r_1: Tensor, r_2: Tensor) -> Tensor:
    """p(y_1 > y_2 | x) = s(r_1 - r_2), any shape; with the order swapped it is the rest to 1."""
    return torch.sigmoid(r_1 - r_2)


def bt_objective(r_w: Tensor, r_l: Tensor, weight: Tensor | None = None) -> Tensor:
    """E_{(x, y_w, y_l) ~ D} log s(r_w - r_l), to be MAXIMISED; a scalar, nats per pair, <= 0.

    `r_w`, `r_l`: [T] rewards of the chosen and the rejected response of T >= 1 pairs. `weight`: [T], > 0, how often
    each pair counts: weight 2 is the pair given twice, and the order of pairs is nothing. Raises ValueError on
    shapes that differ. Source: arXiv 2305.18290 Eq. 2 without its minus sign.
    """
    weight_T = torch.ones_like(r_w) if weight is None else weight
    if not r_w.shape == r_l.shape == weight_T.shape or r_w.ndim != 1 or len(r_w) == 0:
        shapes = ", ".join(str([*tensor.shape]) for tensor in (r_w, r_l, weight_T))
        raise ValueError(f"r_w, r_l and weight must all be [T] with T >= 1, not {shapes}")
    return (weight_T * bt_log_prob(r_w, r_l)).sum() / weight_T.sum()


def bt_cost(r_w: Tensor, r_l: Tensor, weight: Tensor | None = None) -> Tensor:
    """-E log s(r_w - r_l), to be MINIMISED: the negative of `bt_objective`, >= 0. Source: arXiv 2305.18290 Eq. 2."""
    return -bt_objective(r_w, r_l, weight)


def ranking_log_prob(rewards: Tensor) -> Tensor:
    """log p(y_1 > y_2 > ... > y_K | x) = sum_k [r_k - log sum_{j >= k} e^r_j]: the best is drawn first, then the next.

    `rewards`: [..., K], best response first, nats; K = 2 is Bradley-Terry, K = 1 is certain. Over all K! orders of
    the same rewards the probabilities sum to 1. Source: Plackett-Luce, arXiv 2305.18290 Eq. 18.
    """
    rest = torch.logcumsumexp(rewards.flip(-1), dim=-1).flip(-1)
    return (rewards - rest).sum(-1)
