"""Losses of a reward model: how its scalar rewards explain which responses were preferred.

    r_w, r_l   rewards of the chosen and the rejected response            m   margin: by how much r_w should lead
    eta        centring: pulls the rewards of a prompt to mean 0          s() = logistic sigmoid

Pairs and rankings say nothing about a c(x) added to all rewards of a prompt, so without centring no loss reads it.
Every loss gives one value per pair [T] or per ranking [G], nats, differentiable; the caller weighs, and divides by the
weight of the whole optimizer step. Beside each stand its gradient weights, -dL/dr of every response: positive pulls a
reward up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.equations import listwise
from preftune.equations.bradley_terry import bt_log_prob
from preftune.equations.knobs import NonNegative
from preftune.tensors import ListLogps

__all__ = ["bradley_terry", "bradley_terry_weights", "plackett_luce", "plackett_luce_weights"]


def bradley_terry(r_w: Tensor, r_l: Tensor, margin: Tensor | float = 0.0, *, centering: NonNegative = 0.0) -> Tensor:
    """L = -log s(r_w - r_l - m) + eta (r_w + r_l)^2, [T].

    `margin` [T] or a number, nats: the lead asked for, such as a gap of scores. Calibration is that of s(r_w - r_l)
    only at m = 0. Source: arXiv 2305.18290 Eq. 2; margin arXiv 2307.09288 Eq. 2; centring arXiv 2312.09244.
    """
    return -bt_log_prob(r_w - margin, r_l) + centering * (r_w + r_l) ** 2


def bradley_terry_weights(
    r_w: Tensor, r_l: Tensor, margin: Tensor | float = 0.0, *, centering: NonNegative = 0.0
) -> tuple[Tensor, Tensor]:
    """(s(m - r_w + r_l) - 2 eta (r_w + r_l), -s(m - r_w + r_l) - 2 eta (r_w + r_l)), [T] each."""
    pull, centre = torch.sigmoid(margin - r_w + r_l), 2 * centering * (r_w + r_l)
    return pull - centre, -pull - centre


def plackett_luce(rewards: Tensor, rank: Tensor, *, centering: NonNegative = 0.0) -> Tensor:
    """L = -log p(ranking) + eta (2 mean_k r_k)^2, [G]: best drawn first, then the next; K = 2 is `bradley_terry`.

    `rewards` [G, K]; `rank` [G, K] int64, 1 is best, equal numbers tie, 0 is absent. Ties are summed over their orders,
    as `listwise.plackett_luce` says. Raises ValueError on a tie of more responses than can be summed.
    Source: arXiv 2305.18290 Eq. 18.
    """
    return listwise.plackett_luce(_as_lists(rewards, rank), beta=1.0) + centering * (2 * _mean(rewards, rank)) ** 2


def plackett_luce_weights(rewards: Tensor, rank: Tensor, *, centering: NonNegative = 0.0) -> Tensor:
    """Each draw pulls what it drew and pushes what it left; less 8 eta mean r / K, [G, K], 0 where absent."""
    pull = listwise.plackett_luce_weights(_as_lists(rewards, rank), beta=1.0)
    present = (rank > 0).to(rewards.dtype)
    centre = 8 * centering * _mean(rewards, rank) / present.sum(-1)
    return pull - centre[:, None] * present


def _mean(rewards: Tensor, rank: Tensor) -> Tensor:
    """[G] mean reward of the responses that are there."""
    return rewards.masked_fill(rank == 0, 0.0).sum(-1) / (rank > 0).sum(-1)


def _as_lists(rewards: Tensor, rank: Tensor) -> ListLogps:
    """Rewards in the place of beta log-ratios: what a reward model scores, DPO's policy scores implicitly."""
    one, no_score = torch.ones_like(rewards), torch.full_like(rewards, torch.nan)
    return ListLogps(rewards, rewards, one, rank, no_score, one[:, 0])
