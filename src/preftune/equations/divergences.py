"""Losses whose policy is held to the reference by another divergence than DPO's reverse KL: f-DPO and chi-PO.

    u = pi(y|x) / pi_ref(y|x)     log u is the log-ratio a of the chosen, b of the rejected response (nats, summed)
    f                             convex, f(1) = 0: the policy pays beta E_ref[f(u)]

If f'(0) = -inf, the best policy under that price has u > 0 and the reward of y is beta f'(u) plus something that is
the same for all answers to x, so it cancels in a pair as log Z does in DPO: L = -log s(beta f'(u_w) - beta f'(u_l)).
Every f' below is shifted to be 0 at u = 1: a reward is 0 where policy and reference agree, and every loss is ln 2.
The rest of the notation, and what weights are, as in `pairwise`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.equations.contract import Loss
from preftune.equations.knobs import Positive, Unit
from preftune.equations.pairwise import logistic_at_start
from preftune.tensors import PairLogps, ResponseLogps

__all__ = [
    "EXPONENT_LIMIT",
    "LOSSES",
    "chipo",
    "chipo_reward",
    "chipo_weights",
    "fdpo_alpha",
    "fdpo_alpha_reward",
    "fdpo_alpha_weights",
    "fdpo_forward_kl",
    "fdpo_forward_kl_reward",
    "fdpo_forward_kl_weights",
    "fdpo_js",
    "fdpo_js_reward",
    "fdpo_js_weights",
    "power_log",
    "power_log_slope",
]

EXPONENT_LIMIT = 40.0
"""Powers of u are held below e^40 = 2e17: the square of a weight that large is still a float32, so that a gradient
can be normed and clipped. A response beyond counts as if it stood at the limit and gets no gradient from the power."""


def power_log(log_u: Tensor, alpha: float) -> Tensor:
    """(1 - u^-alpha) / alpha, and log u at alpha = 0: a logarithm bent at will, 0 and of slope 1 at u = 1.

    Any shape; takes log u, not u. Exponents above `EXPONENT_LIMIT` are clamped to it.
    """
    if alpha == 0:
        return log_u
    exponent = -alpha * log_u
    # Not `clamp`: at the limit itself its gradient is 1, and 0 since torch 2.15.
    return -torch.expm1(torch.where(exponent > EXPONENT_LIMIT, EXPONENT_LIMIT, exponent)) / alpha


def power_log_slope(log_u: Tensor, alpha: float) -> Tensor:
    """The derivative of `power_log` by log u: u^-alpha, and 0 where the exponent is clamped."""
    exponent = -alpha * log_u
    slope = exponent.clamp(max=EXPONENT_LIMIT).exp()
    return torch.where(exponent <= EXPONENT_LIMIT, slope, torch.zeros_like(slope))


# --- f-DPO: forward KL, alpha, Jensen-Shannon ------------------------------------------------------------------------


def fdpo_forward_kl(pairs: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = -log s(beta (e^-b - e^-a)): DPO for a policy that pays KL(pi_ref || pi).

    f'(u) = 1 - 1/u. The price of giving up a response of the reference is hyperbolic, so mass is covered rather than
    sought: the optimum pi_ref / (1 - (r - c) / beta) has heavier tails than DPO's exponential. A chosen response that
    has become unlikely is pulled up e^-a times as hard; one that has become likely is let go.

    Addresses: loss of diversity under the mode-seeking reverse KL; falling chosen likelihood.
    Reads: log-ratios, sums over tokens; reference.
    Elsewhere: the exponent is clamped, at 80 by TRL, not at all by the authors' code (inf - inf is then NaN), at 40
    here, see `EXPONENT_LIMIT`; all three agree below.
    Source: arXiv 2309.16240 Theorem 1, f = -log u (beta of DPO).
    """
    return fdpo_alpha(pairs, beta=beta, alpha=1.0)


def fdpo_forward_kl_weights(pairs: PairLogps, *, beta: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-z) e^-a, w_r = beta s(-z) e^-b, z = beta (e^-b - e^-a)."""
    return fdpo_alpha_weights(pairs, beta=beta, alpha=1.0)


def fdpo_forward_kl_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta (1 - pi_ref / pi) [R], below beta."""
    return fdpo_alpha_reward(responses, beta=beta, alpha=1.0)


def fdpo_alpha(pairs: PairLogps, *, beta: Positive = 0.1, alpha: Unit = 0.5) -> Tensor:
    """L = -log s(beta (e^(-alpha b) - e^(-alpha a)) / alpha): f-DPO between reverse (alpha 0) and forward KL (1).

    f'(u) = (1 - u^-alpha) / alpha. alpha = 0 is `dpo`, the limit f' = log u, and alpha = 1 is `fdpo_forward_kl`; both
    ends are included. Small alpha loses no digits.

    Addresses: a choice between seeking modes and covering mass that reverse KL makes for you.
    Reads: log-ratios, sums over tokens; reference.
    Elsewhere: TRL's `f_alpha_divergence_coef` runs the other way, it is 1 - alpha (they meet at 0.5 only). Clamps:
    see `fdpo_forward_kl`.
    Source: arXiv 2309.16240 Theorem 1, alpha-divergence (beta of DPO; the middle alpha is ours).
    """
    return -logsigmoid(beta * (power_log(pairs.chosen_log_ratio, alpha) - power_log(pairs.rejected_log_ratio, alpha)))


def fdpo_alpha_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: Unit = 0.5) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-z) e^(-alpha a), w_r = beta s(-z) e^(-alpha b), z = beta (e^(-alpha b) - e^(-alpha a)) / alpha."""
    a, b = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    pull_T = beta * torch.sigmoid(beta * (power_log(b, alpha) - power_log(a, alpha)))
    return pull_T * power_log_slope(a, alpha), pull_T * power_log_slope(b, alpha)


def fdpo_alpha_reward(responses: ResponseLogps, *, beta: float, alpha: float) -> Tensor:
    """r^ = beta (1 - (pi_ref / pi)^alpha) / alpha [R]."""
    return beta * power_log(responses.log_ratio, alpha)


def fdpo_js(pairs: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = -log s(beta (log s(a) - log s(b))): DPO for a policy that pays the Jensen-Shannon divergence.

    f'(u) = log(2 u / (1 + u)). A reward is at most beta log 2, however likely the response becomes, so raising a
    chosen response pays less and less while lowering a rejected one goes on paying as in DPO. The gradient at the
    start is half of DPO's.

    Addresses: loss of diversity under reverse KL, without forward KL's unbounded gradients.
    Reads: log-ratios, sums over tokens; reference.
    Elsewhere: MallowsPO's code reads a variable before it is set in this branch and then drops the result.
    Source: arXiv 2309.16240 Theorem 1, f = u log u - (u + 1) log((u + 1) / 2) (beta of DPO).
    """
    return -logsigmoid(beta * (logsigmoid(pairs.chosen_log_ratio) - logsigmoid(pairs.rejected_log_ratio)))


def fdpo_js_weights(pairs: PairLogps, *, beta: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-z) s(-a), w_r = beta s(-z) s(-b), z = beta (log s(a) - log s(b))."""
    a, b = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    pull_T = beta * torch.sigmoid(beta * (logsigmoid(b) - logsigmoid(a)))
    return pull_T * torch.sigmoid(-a), pull_T * torch.sigmoid(-b)


def fdpo_js_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta log(2 pi / (pi + pi_ref)) [R], below beta log 2."""
    return beta * (math.log(2.0) + logsigmoid(responses.log_ratio))


# --- chi-PO ----------------------------------------------------------------------------------------------------------


def chipo(pairs: PairLogps, *, beta: Positive = 0.05, r_max: Positive = 5.0) -> Tensor:
    """L = -log s(clip(beta (phi(e^a) - phi(e^b)), -2 r_max, 2 r_max)), phi(u) = u + log u: KL plus chi-squared.

    DPO with one term more: phi grows like u where log u hardly grows, so moving far above the reference is dear and
    the optimum pi_ref W0(e^((r - c) / beta)), W0 Lambert's function, grows linearly with the reward where DPO's grows
    exponentially. r_max bounds the rewards; a pair whose margin is beyond 2 r_max, on either side, gets no gradient.
    Where rewards are no larger the clip does not move the optimum. At the start the gradient is twice DPO's.

    Addresses: over-optimisation: the pessimism that KL lacks where data are thin.
    Reads: log-ratios, sums over tokens; reference.
    Elsewhere: e^a of a long response overflows; here its exponent is clamped, see `EXPONENT_LIMIT`, which the paper's
    definition does not do.
    Source: arXiv 2407.13399 Eq. 9, Algorithm 1 (r_max depends on the problem: 5 asks for labels no surer
    than 1 in 22,000).
    """
    return -logsigmoid(_chipo_margin(pairs, beta).clamp(-2 * r_max, 2 * r_max))


def chipo_weights(pairs: PairLogps, *, beta: Positive = 0.05, r_max: Positive = 5.0) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-z) (1 + e^a), w_r = beta s(-z) (1 + e^b) where |z| <= 2 r_max, else 0."""
    z = _chipo_margin(pairs, beta)
    pull_T = torch.where(z.abs() <= 2 * r_max, beta * torch.sigmoid(-z), torch.zeros_like(z))
    return pull_T * _phi_slope(pairs.chosen_log_ratio), pull_T * _phi_slope(pairs.rejected_log_ratio)


def chipo_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta (u - 1 + log u) [R], u = pi / pi_ref."""
    return beta * _phi(responses.log_ratio)


def _chipo_margin(pairs: PairLogps, beta: float) -> Tensor:
    return beta * (_phi(pairs.chosen_log_ratio) - _phi(pairs.rejected_log_ratio))


def _phi(log_u: Tensor) -> Tensor:
    """u - 1 + log u: the two ends of `power_log`, f' of chi-squared and of reverse KL."""
    return power_log(log_u, -1.0) + log_u


def _phi_slope(log_u: Tensor) -> Tensor:
    return power_log_slope(log_u, -1.0) + 1


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="fdpo_forward_kl",
        function=fdpo_forward_kl,
        weights=fdpo_forward_kl_weights,
        reward=fdpo_forward_kl_reward,
        at_start=logistic_at_start,
        learning_rate=1e-6,  # as dpo, whose gradient it has at the start
    ),
    Loss(
        name="fdpo_js",
        function=fdpo_js,
        weights=fdpo_js_weights,
        reward=fdpo_js_reward,
        at_start=logistic_at_start,
        learning_rate=1e-6,  # as dpo: the optimizers named in the contract are blind to the factor 1/2 at the start
    ),
    Loss(
        name="fdpo_alpha",
        function=fdpo_alpha,
        weights=fdpo_alpha_weights,
        reward=fdpo_alpha_reward,
        at_start=logistic_at_start,
        learning_rate=1e-6,  # as dpo, whose gradient it has at the start
    ),
    Loss(
        name="chipo",
        function=chipo,
        weights=chipo_weights,
        reward=chipo_reward,
        at_start=logistic_at_start,
        learning_rate=1e-6,  # as dpo: at the start the two differ by a factor of two, to which AdamW is blind
    ),
)
"""The losses above."""
