"""The functions that the derivation draws: what a reward gap buys, the loss against u, what a uniform reference adds.

Tensors of any shape, float64 in the page; nats throughout.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["crossover_beta", "loss_of_u", "reward_gap", "slope_of_u", "uniform_token_shift"]


def loss_of_u(u: Tensor, beta: float) -> Tensor:
    """L(u) = -log s(beta log u) = log(1 + u^-beta): DPO's loss where u > 0 is the ratio of the two likelihood ratios.

    u = [pi(y_w|x) / pi_ref(y_w|x)] / [pi(y_l|x) / pi_ref(y_l|x)]; with a reference that does not tell the responses
    apart it is pi(y_w|x) / pi(y_l|x). Falls from infinity through ln 2 at u = 1 to 0; convex for beta > 0.
    Raises ValueError unless every u > 0 and beta > 0.
    """
    _check_u(u, beta)
    return softplus(-beta * u.log())


def slope_of_u(u: Tensor, beta: float) -> Tensor:
    """dL/du = -beta / (u (1 + u^beta)) < 0: -1 / (u (1 + u)) at beta = 1."""
    _check_u(u, beta)
    return -beta * (-beta * u.log()).sigmoid() / u


def reward_gap(probability: float, ref_probability: float, beta: float) -> float:
    """The reward, above all other responses' common one, at which pi_r gives a response this probability.

    r = beta (logit p - logit p_ref), from p / (1 - p) = p_ref / (1 - p_ref) exp(r / beta). Raises ValueError unless
    both probabilities lie in (0, 1) and beta > 0.
    """
    if not (0 < probability < 1 and 0 < ref_probability < 1 and beta > 0):
        raise ValueError(
            f"needs probabilities in (0, 1) and beta > 0, not {probability}, {ref_probability} and beta {beta}"
        )
    return beta * (_logit(probability) - _logit(ref_probability))


def crossover_beta(gap: float, ref_ratio: float) -> float:
    """beta = gap / log(ref_ratio): where pi_r finds two responses equally likely.

    The worse one is `ref_ratio` > 1 times as likely under the reference, the better one has `gap` > 0 more reward.
    Raises ValueError otherwise: then there is no such beta.
    """
    if not (gap > 0 and ref_ratio > 1):
        raise ValueError(f"there is a crossover for a gap > 0 and a ratio > 1 only, not {gap} and {ref_ratio}")
    return gap / math.log(ref_ratio)


def uniform_token_shift(vocabulary: int, chosen_length: int, rejected_length: int) -> float:
    """log of C_l / C_w = (n_w - n_l) log V: what a reference uniform over tokens adds to log u, nats.

    Uniform over tokens means C = V^-n for n tokens, so the constant cancels between responses of one length only.
    """
    return (chosen_length - rejected_length) * math.log(vocabulary)


def _check_u(u: Tensor, beta: float) -> None:
    if not (bool((u > 0).all()) and beta > 0):
        raise ValueError(f"u is a ratio of probabilities and beta a price: both must be > 0, found {u} and beta {beta}")


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)
