"""Kullback-Leibler divergences: exact on enumerated responses, estimated from samples, and of two Gaussians.

Legend: q policy, p reference, y ~ q a sample, log-ratio = log q(y) - log p(y) in nats, summed over completion tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "forward_kl",
    "gaussian_kl",
    "k1",
    "k2",
    "k3",
    "kl_divergence",
    "rao_blackwell_kl",
    "total_variation",
]


def kl_divergence(logps: Tensor, other_logps: Tensor) -> Tensor:
    """KL(q || p) = sum_y q(y) log(q(y) / p(y)) >= 0, nats; [...] from [..., M] log-probs, 0 log 0 = 0.

    `logps`, `other_logps`: log q and log p over the same M responses, each summing to 1; -inf is a probability of 0.
    Infinite when q puts mass where p has none. Differentiable in both.
    """
    log_ratio = torch.where(logps.isneginf(), 0.0, logps - other_logps)
    return (logps.exp() * log_ratio).sum(-1)


def total_variation(logps: Tensor, other_logps: Tensor) -> Tensor:
    """TV(q, p) = 1/2 sum_y |q(y) - p(y)| in [0, 1], at most sqrt(KL / 2); [...] from [..., M] log-probs."""
    return (logps.exp() - other_logps.exp()).abs().sum(-1) / 2


def gaussian_kl(
    mean: float | Tensor, std: float | Tensor, other_mean: float | Tensor, other_std: float | Tensor
) -> Tensor:
    """KL(N(m, s^2) || N(m', s'^2)) = log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2, nats, float64; broadcasts.

    Symmetric only for equal deviations: means 0 and -4 with deviation 1 are 8 nats apart, either way.
    Raises ValueError on a deviation that is not > 0.
    """
    m, s, other_m, other_s = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std, other_mean, other_std))
    if not (bool((s > 0).all()) and bool((other_s > 0).all())):
        raise ValueError(f"standard deviations must be > 0, not {std} and {other_std}")
    return (other_s / s).log() + (s**2 + (m - other_m) ** 2) / (2 * other_s**2) - 0.5


def k1(log_ratio: Tensor) -> Tensor:
    """k1(y) = log(q(y) / p(y)), y ~ q: unbiased for KL(q || p), single values of either sign; nats.

    As a reward, detached and multiplied by the score grad log q(y), it gives the exact gradient of KL(q || p).
    As a loss to differentiate its expected gradient is zero: E_q[grad log q] = 0.
    Source: the names are those of Schulman's note "Approximating KL Divergence" (2020).
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """k2(y) = (log q(y)/p(y))^2 / 2, y ~ q: biased for KL(q || p), never negative, less scattered than k1; nats.

    As a loss it gives the exact gradient of KL(q || p). As a reward it is wrong: nearly zero close to the reference.
    """
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """k3(y) = p(y)/q(y) - 1 - log(p(y)/q(y)), y ~ q: unbiased for KL(q || p), never negative; nats.

    Unbiased where q covers p. Less scattered than k1 close to the reference only, far more once they are apart.
    As a loss it gives the gradient of the other divergence, KL(p || q). As a reward it gives the difference of the
    two gradients, which vanishes near the reference: a penalty by k3 is no penalty there.
    """
    return torch.expm1(-log_ratio) + log_ratio


def rao_blackwell_kl(step_logps: Tensor, other_step_logps: Tensor, mask: Tensor) -> Tensor:
    """sum_t KL(q(. | x, y_<t) || p(. | x, y_<t)) along y ~ q: unbiased for KL(q || p) of whole responses; nats, [...].

    `step_logps`, `other_step_logps`: [..., T, V] log-probs of the whole vocabulary at every step of the response;
    `mask`: [..., T], true where the step wrote a completion token, the end of sequence included. Each step is summed
    over the vocabulary instead of sampled, so no estimator of a step's share from y_<t scatters less.
    Its own gradient misses how the prefixes' probability moves: as a loss it needs the score term as well.
    """
    per_step = kl_divergence(step_logps, other_step_logps)
    return torch.where(mask.bool(), per_step, 0.0).sum(-1)


def forward_kl(log_ratio_R: Tensor) -> Tensor:
    """k(y) = -log(pi(y|x) / pi_ref(y|x)), whose mean over y ~ pi_ref is KL(pi_ref || pi); [R] nats, detached.

    `log_ratio_R`: [R] log-ratios summed over completion tokens. Take the mean over all responses, chosen and
    rejected, each once: one side of the pairs alone is a selected sample.

    An unbiased estimate when the reference itself wrote the responses (at temperature 1, untruncated): single values
    may be negative, the mean is not in expectation. Hence also a theorem: on such data the mean log-ratio must fall
    below zero as soon as the policy moves, so some drop of the chosen log-probability is no fault.
    When another model wrote the responses this is only a drift, how much less likely the data became, of either
    sign. It is never KL(pi || pi_ref), the penalty of the RL problem: that one needs samples from the policy.
    """
    return -log_ratio_R.detach()
