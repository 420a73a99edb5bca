"""How far a policy is from the optimum it should converge to, and what the data allow, all exact on enumerated laws.

Legend: pi policy, ref reference, pi* = ref exp(u / beta) / Z the optimum for the utility u, h = log(pi* / ref).
The last dimension holds the M responses, leading ones the prompts; `logps` are nats and sum to 1 over M. The reference
gives every response a probability above 0: list only those that it can write.

`beats` [..., M, M] is the label model: P(first of (i, j) is chosen), with beats[i, j] + beats[j, i] = 1. Pairs are two
independent draws from the reference; two equal draws say nothing and are no pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from preftune.equations.kl import kl_divergence, total_variation
from preftune.equations.optimum import expected_reward, log_partition, objective, optimal_policy

__all__ = [
    "Coverage",
    "Distance",
    "Floor",
    "Sides",
    "coverage",
    "distance",
    "forced_log_ratios",
    "mean_log_ratios",
    "never_drawn",
    "sampling_floor",
]


@dataclass(frozen=True, eq=False, slots=True)
class Distance:
    """A policy beside the optimum, each [...]: 0 everywhere exactly when they are one, but for `kl_to_reference`."""

    total_variation: Tensor
    """TV(pi, pi*) in [0, 1]."""
    kl: Tensor
    """KL(pi || pi*), nats."""
    reverse_kl: Tensor
    """KL(pi* || pi), nats: large where the policy lacks what the optimum says."""
    kl_to_reference: Tensor
    """KL(pi || ref), nats; the optimum's own is what it should be."""
    reward_gap: Tensor
    """E_pi* u - E_pi u: of either sign, a policy that pays more KL may have more reward."""
    objective_gap: Tensor
    """beta log Z - J(pi) >= 0, which is beta KL(pi || pi*); computed from reward and KL, not from that identity."""


def distance(logps: Tensor, ref_logps: Tensor, utilities: Tensor, beta: float) -> Distance:
    """All distances of pi from pi*; `logps`, `ref_logps`, `utilities` [..., M]. Raises ValueError unless beta > 0."""
    best = optimal_policy(ref_logps, utilities, beta)
    return Distance(
        total_variation=total_variation(logps, best),
        kl=kl_divergence(logps, best),
        reverse_kl=kl_divergence(best, logps),
        kl_to_reference=kl_divergence(logps, ref_logps),
        reward_gap=expected_reward(best, utilities) - expected_reward(logps, utilities),
        objective_gap=beta * log_partition(ref_logps, utilities, beta) - objective(logps, ref_logps, utilities, beta),
    )


@dataclass(frozen=True, eq=False, slots=True)
class Sides:
    """A mean over the pairs of the label model, each [...]."""

    chosen: Tensor
    rejected: Tensor


def mean_log_ratios(logps: Tensor, ref_logps: Tensor, beats: Tensor) -> Sides:
    """E_w and E_l of log(pi / ref) over all pairs, nats: what training prints, without the noise of its batches."""
    return _mean_over_pairs(logps - ref_logps, ref_logps, beats)


def forced_log_ratios(ref_logps: Tensor, utilities: Tensor, beta: float, beats: Tensor) -> Sides:
    """E_w[u] / beta - log Z and E_l[u] / beta - log Z: the displacement that convergence itself demands, nats.

    log Z outgrows E_w[u] / beta as beta falls, because it follows the best responses and pairs the usual ones: then
    the optimum has less of the chosen responses than the reference, and a fall by this much is no failure.
    Raises ValueError unless beta > 0.
    """
    mean = _mean_over_pairs(utilities, ref_logps, beats)
    log_z = log_partition(ref_logps, utilities, beta)
    return Sides(mean.chosen / beta - log_z, mean.rejected / beta - log_z)


@dataclass(frozen=True, eq=False, slots=True)
class Coverage:
    """How well draws from the reference show a policy, each [...]."""

    worst: Tensor
    """max pi / ref >= 1: draws of the reference per draw of the policy that rejection sampling would need."""
    effective: Tensor
    """1 / E_ref[(pi / ref)^2] in (0, 1]: the share of a sample of the reference that counts as one of the policy."""


def coverage(logps: Tensor, ref_logps: Tensor) -> Coverage:
    """Both measures of pi / ref; `logps`, `ref_logps` [..., M], and pi may hold a probability of 0."""
    log_ratio = logps - ref_logps
    return Coverage(log_ratio.amax(-1).exp(), torch.exp(-torch.logsumexp(logps + log_ratio, -1)))


def never_drawn(logps: Tensor, ref_logps: Tensor, draws: int) -> Tensor:
    """sum_y pi(y) (1 - ref(y))^draws: the policy's expected mass on what `draws` samples of ref never show; [...]."""
    return (logps.exp() * torch.exp(draws * torch.log1p(-ref_logps.exp()))).sum(-1)


@dataclass(frozen=True, eq=False, slots=True)
class Floor:
    """What sampled labels leave uncertain, in expectation, each [...]."""

    total_variation: Tensor
    kl: Tensor


def sampling_floor(ref_logps: Tensor, utilities: Tensor, beta: float, pairs: int) -> Floor:
    """Distance from pi* of the tabular policy that minimises DPO on `pairs` draws of two, to first order in 1 / pairs.

        C = (2 pairs sum_{i<j} ref_i ref_j s(u_i - u_j) s(u_j - u_i) (e_i - e_j)(e_i - e_j)^T)^+ / beta^2
        E KL = 1/2 tr(C (diag pi* - pi* pi*^T)),    E TV = 1/2 sum_y pi*_y sqrt(2/pi) sd(h_y - E_pi* h)

    C is the covariance of the fitted h under Bradley-Terry labels (inverse Fisher information). A table learns every
    response from its own pairs; a model that shares weights between responses may be below this line. Far from it
    when `pairs` is small: the table's fit then need not even exist. O(M^3); `ref_logps`, `utilities` [..., M].
    Raises ValueError unless pairs >= 1 and beta > 0.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}")
    best = optimal_policy(ref_logps, utilities, beta).exp()
    gap = utilities[..., :, None] - utilities[..., None, :]
    together = ref_logps.exp()[..., :, None] * ref_logps.exp()[..., None, :]
    information = 2 * pairs * together * torch.sigmoid(gap) * torch.sigmoid(-gap) * beta**2
    laplacian = torch.diag_embed(information.sum(-1)) - information
    # Constants are what pairs never show and a law does not need: any weight on them leaves the results alone.
    scale = laplacian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] / laplacian.shape[-1]
    covariance = torch.linalg.inv(laplacian + scale)
    with_mean = (covariance * best[..., None, :]).sum(-1)
    of_mean = (with_mean * best).sum(-1, keepdim=True)
    variance = (covariance.diagonal(dim1=-2, dim2=-1) - 2 * with_mean + of_mean).clamp(min=0)
    return Floor(
        total_variation=(best * variance.sqrt()).sum(-1) / math.sqrt(2 * math.pi),
        kl=(best * variance).sum(-1) / 2,
    )


def _mean_over_pairs(values: Tensor, ref_logps: Tensor, beats: Tensor) -> Sides:
    """E_w[values] and E_l[values]; values [..., M]."""
    law = ref_logps.exp()
    together = law[..., :, None] * law[..., None, :]
    together = together - torch.diag_embed(together.diagonal(dim1=-2, dim2=-1))
    wins = together * beats  # row i: pairs in which i is chosen
    total = wins.sum((-2, -1))
    return Sides((wins.sum(-1) * values).sum(-1) / total, (wins.sum(-2) * values).sum(-1) / total)
