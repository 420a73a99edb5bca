"""Losses of a pair that read log-ratios per token, not per response. Notation as in `pairwise`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.equations.contract import Loss
from preftune.equations.knobs import Positive
from preftune.equations.pairwise import dpo_reward, logistic_at_start
from preftune.tensors import PairLogps, ResponseLogps

__all__ = ["LOSSES", "ln_dpo", "ln_dpo_reward", "ln_dpo_weights"]


def ln_dpo(pairs: PairLogps, *, beta: Positive = 5.0) -> Tensor:
    """L = -log s(beta (a/n_w - b/n_l)): DPO on mean log-ratios per token.

    beta multiplies a mean, so it is some 50 times DPO's: 5, or 5/n of the sum of n tokens. Another loss, not another
    scale: its optimum is pi_ref exp(n (r / beta + c)), in which the reward pays once per token.

    Addresses: length exploitation, long responses whose sums outweigh those of short ones.
    Reads: means of log-ratios per token.
    Elsewhere: a tool that shares DPO's beta of 0.1 with this loss barely moves; the default is the loss's own.
    Source: arXiv 2411.15124 Eq. 6 (beta of its preference tuning recipe).
    """
    return -logsigmoid(beta * _gap_per_token(pairs))


def ln_dpo_weights(pairs: PairLogps, *, beta: Positive = 5.0) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-u) / n_w, w_r = beta s(-u) / n_l, u = beta (a/n_w - b/n_l)."""
    pull_T = beta * torch.sigmoid(-beta * _gap_per_token(pairs))
    return pull_T / pairs.chosen_length, pull_T / pairs.rejected_length


def ln_dpo_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta log(pi / pi_ref) / n [R]."""
    return dpo_reward(responses, beta=beta) / responses.length


def _gap_per_token(pairs: PairLogps) -> Tensor:
    """a/n_w - b/n_l [T]."""
    return pairs.chosen_log_ratio / pairs.chosen_length - pairs.rejected_log_ratio / pairs.rejected_length


LOSSES = (
    Loss(
        name="ln_dpo",
        function=ln_dpo,
        weights=ln_dpo_weights,
        reward=ln_dpo_reward,
        at_start=logistic_at_start,
        learning_rate=5e-7,  # arXiv 2411.15124 for 8B parameters, batch 128; 2e-7 for 70B
    ),
)
"""The losses above."""
