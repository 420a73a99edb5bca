"""The Kullback-Leibler divergence that the training data alone can estimate."""

from __future__ import annotations

from torch import Tensor

__all__ = ["forward_kl"]


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
