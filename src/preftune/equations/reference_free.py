"""Losses of a pair that need no reference: they read the policy's own log-probabilities. Notation as in `pairwise`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.equations.contract import Loss
from preftune.equations.knobs import NonNegative, Positive
from preftune.tensors import PairLogps, ResponseLogps

__all__ = ["LOSSES", "simpo", "simpo_reward", "simpo_weights"]


def simpo(pairs: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """L = -log s(beta p_w - beta p_l - gamma), p = log pi(y|x) / n: the mean log-probability per token.

    gamma is the margin asked for, inside the sigmoid and not multiplied by beta; what matters, and is tuned, is the
    ratio gamma/beta in nats per token: 0.5 here, 0.1 to 0.8 in the paper. beta is far larger than DPO's because it
    multiplies a mean, not a sum: 2 to 10. No constant at the start: the value there depends on the data.
    Source: arXiv 2405.14734 Eq. 6.
    """
    return -logsigmoid(beta * _mean_logp_gap(pairs) - gamma)


def simpo_weights(pairs: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-u) / n_w, w_r = beta s(-u) / n_l, u = beta p_w - beta p_l - gamma."""
    pull_T = beta * torch.sigmoid(gamma - beta * _mean_logp_gap(pairs))
    return pull_T / pairs.chosen_length, pull_T / pairs.rejected_length


def simpo_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta p [R], Eq. 4 of the paper."""
    return beta * responses.policy / responses.length


def _mean_logp_gap(pairs: PairLogps) -> Tensor:
    """p_w - p_l [T], nats per token."""
    return pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length


LOSSES = (
    Loss(
        name="simpo",
        function=simpo,
        weights=simpo_weights,
        reward=simpo_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=5e-7,  # the authors' repository: 3e-7 to 1e-6 by model, incoherent text at 1e-5
    ),
)
"""The losses above."""
