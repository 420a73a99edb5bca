"""Losses of a pair that read more than the pair: all pairs of the optimizer step, or earlier steps.

Letters as in `pairwise`: a, b the log-ratios of y_w and y_l, D = a - b, z = beta D, s() the logistic sigmoid, e the
`label_smoothing`. "The step" is everything between two updates of the weights, never a micro-batch: the caller hands
over all its T pairs at once, so that no value depends on how the step was cut. Sorted values, batch means and running
means count every pair once, whatever its weight, which the caller applies to the values as always.

A running number is a keyword argument marked `State`; its `..._update` is called with the rows of a training step
(never of an evaluation) before the values of that step are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.equations.contract import Loss
from preftune.equations.knobs import NonNegative, Positive, Share, Smoothing, State
from preftune.equations.pairwise import dpo_reward, logistic_at_start
from preftune.tensors import PairLogps

__all__ = [
    "LOSSES",
    "aot",
    "aot_unpaired",
    "aot_unpaired_weights",
    "aot_weights",
    "bco_pair",
    "bco_pair_at_start",
    "bco_pair_update",
    "bco_pair_weights",
    "beta_dpo",
    "beta_dpo_update",
    "beta_dpo_weights",
    "running_mean",
]

LEAST_BETA = 1e-3
"""`beta_dpo` lets no step fall below it, as its authors' code does: a negative beta would reverse every label."""
MOMENTUM = 0.9
"""Of `beta_dpo`'s running threshold and spread; the paper's m."""


# --- AOT: one distribution above another -----------------------------------------------------------------------------


def aot(pairs: PairLogps, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0) -> Tensor:
    """L = -log s(beta (G_(k) - R_(k))), G = log pi(y_w)/pi(y_l), R the same of pi_ref, each sorted: by quantile.

    Every quantile of the policy's gap is to exceed the same quantile of the reference's (first-order stochastic
    dominance): of all ways to match the two lists, sorting costs least. A pair's value is that of its own G against
    the R of equal rank; a step of one pair is `dpo`. label_smoothing smooths as in `cdpo`, 0 is the paper.

    Addresses: per-pair losses reward the average margin and leave bad tails alone.
    Reads: sums over tokens; reference; all pairs of the step.
    Elsewhere: tools sort within the micro-batch, whose size then changes the loss; here it is always the step.
    Source: arXiv 2406.05882 Section 3 (paired), beta of its experiments.
    """
    z = beta * _dominance(pairs)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def aot_weights(pairs: PairLogps, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta [(1 - e) - s(z)], z of the pair's own G and the R of equal rank."""
    weight_T = beta * ((1 - label_smoothing) - torch.sigmoid(beta * _dominance(pairs)))
    return weight_T, weight_T


def aot_unpaired(pairs: PairLogps, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0) -> Tensor:
    """L = -log s(beta (a_(k) - b_(k))), a and b each sorted over the step: the chosen, as a set, above the rejected.

    Every quantile of the chosen responses' log-ratio is to exceed the same quantile of the rejected ones', so who
    was compared with whom does not matter, and log Z(x), which a pair cancels, stays in. A pair's value is that of
    its own a against the b of equal rank; a step of one pair is `dpo`. label_smoothing smooths as in `cdpo`.

    Addresses: chosen and rejected responses that do not answer the same prompts; bad tails.
    Reads: sums over tokens; reference; all pairs of the step.
    Elsewhere: as for `aot`.
    Source: arXiv 2406.05882 Section 3 (unpaired), beta of its experiments.
    """
    z = beta * _quantile_gap(pairs.chosen_log_ratio, pairs.rejected_log_ratio)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def aot_unpaired_weights(
    pairs: PairLogps, *, beta: Positive = 0.01, label_smoothing: Smoothing = 0.0
) -> tuple[Tensor, Tensor]:
    """beta [(1 - e) - s(z)]: w_c for the pair's own a, w_r where its b was matched with another pair's a."""
    a, b = pairs.chosen_log_ratio, pairs.rejected_log_ratio
    weight_T = beta * ((1 - label_smoothing) - torch.sigmoid(beta * _quantile_gap(a, b)))
    by_rank = weight_T[a.argsort(stable=True)]
    return weight_T, by_rank[_rank(b)]


def _dominance(pairs: PairLogps) -> Tensor:
    """G minus the R of equal rank [T], as D plus a difference between two pairs' R: gradient through D alone."""
    log_ratio = _gap(pairs)
    R = (pairs.chosen - pairs.rejected - log_ratio).detach()
    return log_ratio + (R - R.sort(stable=True).values[_rank(log_ratio.detach() + R)])


def _quantile_gap(upper: Tensor, lower: Tensor) -> Tensor:
    """[T] each of `upper` minus that of `lower` which has the same rank; equal numbers rank in the order of rows."""
    return upper - lower.sort(stable=True).values[_rank(upper)]


def _rank(values: Tensor) -> Tensor:
    """[T] how many stand before each one in ascending order."""
    return values.argsort(stable=True).argsort()


# --- beta-DPO: beta from the step, outliers left out -----------------------------------------------------------------


def beta_dpo(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    keep: Share = 0.8,
    threshold: State = 0.0,
    spread: State = 0.0,
    step: State = 0.0,
) -> Tensor:
    """L = -log s(beta_step D), beta_step = beta [1 + alpha (mean M - M_0)] over the pairs kept, M = beta D; others 0:
    DPO with the step's own beta, outliers left out.

    A step whose pairs are already far apart gets a larger beta, hence a tighter rein. A share `keep` of the pairs
    is drawn without replacement with odds exp(-(M - M_0)^2 / (2 sigma^2)); M_0 = `threshold` and sigma = `spread`
    are running means. A kept pair counts T/kept times, so that the mean over the step is the mean over the kept.
    The draw is a function of `step` alone: it is the same after a resume and on every device.

    Addresses: one beta for pairs that differ a little and pairs that differ a lot; outliers, wrong labels among them.
    Reads: sums over tokens; reference; all pairs of the step; state.
    Elsewhere: the authors' code takes M = D in nats, without beta, so its alpha acts 1/beta times stronger; it lets
    evaluation batches move M_0 and sigma; and at the start, where all M agree, it divides by sigma = 0. Here M is the
    reward margin, only training steps count, and sigma = 0 draws evenly. Both keep beta_step >= 0.001.
    Source: arXiv 2407.08639 Algorithm 1 (batch-level beta, filtering; alpha, `keep`, momentum of its experiments).
    """
    share_T, beta_step = _drawn(pairs, beta, alpha, keep, threshold, spread, step)
    return -logsigmoid(beta_step * _gap(pairs)) * share_T


def beta_dpo_weights(
    pairs: PairLogps,
    *,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.6,
    keep: Share = 0.8,
    threshold: State = 0.0,
    spread: State = 0.0,
    step: State = 0.0,
) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta_step s(-beta_step D) T/kept where kept, else 0; beta_step carries no gradient."""
    share_T, beta_step = _drawn(pairs, beta, alpha, keep, threshold, spread, step)
    weight_T = beta_step * torch.sigmoid(-beta_step * _gap(pairs)) * share_T
    return weight_T, weight_T


def beta_dpo_update(
    pairs: PairLogps, *, beta: float, alpha: float, keep: float, threshold: float, spread: float, step: float
) -> Mapping[str, float]:
    """Threshold and spread move by a tenth of the way to mean and standard deviation of M in this step."""
    if not len(pairs.weight):
        return {"threshold": threshold, "spread": spread, "step": step}
    M = beta * _gap(pairs).double()
    return {
        "threshold": MOMENTUM * threshold + (1 - MOMENTUM) * float(M.mean()),
        "spread": MOMENTUM * spread + (1 - MOMENTUM) * float(M.std(correction=0)),
        "step": step + 1,
    }


def _drawn(
    pairs: PairLogps, beta: float, alpha: float, keep: float, threshold: float, spread: float, step: float
) -> tuple[Tensor, float]:
    """([T] T/kept for pairs that were drawn and 0 for the others, beta_step).

    Drawing one by one without replacement is a race: exponential clocks of rates exp(-(M - M_0)^2 / (2 sigma^2)),
    the first ones to ring are kept. In logarithms no rate vanishes, however far off a pair is.
    """
    gap = _gap(pairs).detach()
    M = beta * gap.double()
    total = len(M)
    if not total:
        return torch.zeros_like(gap), beta
    clock = torch.empty(total, dtype=torch.float64)
    clock.exponential_(generator=torch.Generator().manual_seed(int(step)))
    log_ring = clock.log().to(M.device)
    if spread > 0:
        log_ring = log_ring + ((M - threshold) / spread) ** 2 / 2
    kept = log_ring.topk(max(1, round(keep * total)), largest=False).indices
    beta_step = beta * (1 + alpha * (float(M[kept].mean()) - threshold))
    return torch.zeros_like(gap).index_fill(0, kept, total / len(kept)), max(beta_step, LEAST_BETA)


# --- BCO: chosen or rejected, seen by a classifier -------------------------------------------------------------------


def bco_pair(pairs: PairLogps, *, beta: Positive = 0.1, reward_sum: State = 0.0, reward_count: State = 0.0) -> Tensor:
    """L = -log s(beta a - d) - log s(-(beta b - d)): a classifier of chosen against rejected, logit beta a - d.

    d is the mean of all rewards so far, beta a and beta b, this step's included. Whatever d is, the loss is an upper
    bound of `dpo`; d = 0 is the biased form of NCA. Each response is judged alone, so the likelihood of the chosen
    one is held up by itself; the classifier's best logit is that of the odds of being chosen.

    Addresses: chosen responses that lose likelihood together with the rejected ones.
    Reads: sums over tokens; reference; state.
    Elsewhere: a well-known trainer has dropped d from its bco_pair (d = 0 for ever) and its documentation prints
    DPO's formula under this name; other tools keep d, as the paper does (Eq. 7, a moving average). Here it is the
    mean of all rewards, and part of every checkpoint.
    Source: arXiv 2404.04656 Theorem 3 (the loss with its reward shift).
    """
    d = running_mean(reward_sum, reward_count)
    return -logsigmoid(beta * pairs.chosen_log_ratio - d) - logsigmoid(d - beta * pairs.rejected_log_ratio)


def bco_pair_weights(
    pairs: PairLogps, *, beta: Positive = 0.1, reward_sum: State = 0.0, reward_count: State = 0.0
) -> tuple[Tensor, Tensor]:
    """w_c = beta s(d - beta a), w_r = beta s(beta b - d): each side by its own distance from d."""
    d = running_mean(reward_sum, reward_count)
    w_c = beta * torch.sigmoid(d - beta * pairs.chosen_log_ratio)
    return w_c, beta * torch.sigmoid(beta * pairs.rejected_log_ratio - d)


def bco_pair_update(pairs: PairLogps, *, beta: float, reward_sum: float, reward_count: float) -> Mapping[str, float]:
    """The rewards of both sides join the mean."""
    rewards = beta * torch.cat([pairs.chosen_log_ratio, pairs.rejected_log_ratio]).double()
    return {"reward_sum": reward_sum + float(rewards.sum()), "reward_count": reward_count + len(rewards)}


def bco_pair_at_start() -> float:
    """2 ln 2: all rewards are 0, and so is their mean."""
    return 2 * math.log(2.0)


def running_mean(reward_sum: float, reward_count: float) -> float:
    """d, the mean of all rewards so far; 0 before the first one."""
    return reward_sum / max(reward_count, 1.0)


def _gap(pairs: PairLogps) -> Tensor:
    """D = a - b [T]."""
    return pairs.chosen_log_ratio - pairs.rejected_log_ratio


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="aot",
        function=aot,
        weights=aot_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        coupled=True,
        learning_rate=5e-7,  # as DPO's kin at this beta; no rate of its own is known to us
    ),
    Loss(
        name="aot_unpaired",
        function=aot_unpaired,
        weights=aot_unpaired_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        coupled=True,
        learning_rate=5e-7,  # as aot
    ),
    Loss(
        name="beta_dpo",
        function=beta_dpo,
        weights=beta_dpo_weights,
        reward=dpo_reward,
        at_start=None,  # ln 2 on the mean, but a dropped pair has 0 and a kept one more
        coupled=True,
        update=beta_dpo_update,
        learning_rate=5e-7,  # the original DPO code base, of which its authors' is a copy
    ),
    Loss(
        name="bco_pair",
        function=bco_pair,
        weights=bco_pair_weights,
        reward=dpo_reward,
        at_start=bco_pair_at_start,
        update=bco_pair_update,
        learning_rate=5e-7,  # as DPO's; the gradient's scale is the same
    ),
)
"""The losses above."""
