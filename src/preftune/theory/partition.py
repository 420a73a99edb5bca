"""Why log Z(x) = log sum_y pi_ref(y|x) exp(r(x,y)/beta) is not computed: how many terms it has, and what they cost.

A vocabulary of V tokens has V^T responses of exactly T tokens; of at most T tokens before the end of sequence there
are V^0 + V^1 + ... + V^T. Both are exact whole numbers here. Where few enough, the sum is carried out term by term.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from preftune.equations.optimum import log_partition
from preftune.errors import ConfigError

__all__ = [
    "LOGP_BYTES",
    "TERMS_PER_SECOND",
    "YEAR",
    "brute_force_log_partition",
    "partition_seconds",
    "partition_terms",
]

TERMS_PER_SECOND = 10**12
"""A machine far beyond any that scores whole responses: a million million of them per second."""
LOGP_BYTES = 8
"""Memory of one term, a float64."""
YEAR = 31_557_600
"""Seconds: 365.25 days."""
_AT_ONCE = 65_536  # responses scored together


def partition_terms(vocabulary: int, length: int, *, up_to: bool = False) -> int:
    """V^T, the responses of exactly T tokens; `up_to`: of T or fewer, each closed by an end mark that V leaves out.

    Exact. Raises ConfigError unless `vocabulary` >= 1 and `length` >= 0.
    """
    if vocabulary < 1 or length < 0:
        raise ConfigError(f"needs a vocabulary >= 1 and a length >= 0, not {vocabulary} and {length}")
    return sum(vocabulary**t for t in range(length + 1)) if up_to else vocabulary**length


def partition_seconds(terms: int, *, terms_per_second: int = TERMS_PER_SECOND) -> float:
    """Seconds that adding up `terms` terms takes at that rate."""
    return terms / terms_per_second


def brute_force_log_partition(
    ref_logps: Callable[[Tensor], Tensor],
    rewards: Callable[[Tensor], Tensor],
    vocabulary: int,
    length: int,
    beta: float,
    *,
    budget: int = 1_000_000,
) -> float:
    """log Z over all V^T responses of T >= 1 tokens, every term computed; nats.

    `ref_logps`, `rewards`: [N, T] int64 token ids in [0, V) -> [N] log pi_ref and reward, float64. Raises ConfigError
    when there are more than `budget` terms: it refuses before it starts, not when memory ends.
    """
    terms = partition_terms(vocabulary, length)
    if length < 1 or terms > budget:
        raise ConfigError(
            f"Z over {vocabulary} tokens and length {length} has {_power(terms)} terms, allowed are lengths >= 1 and "
            f"{budget:,} terms; DPO needs none of them, because log Z cancels in every pair"
        )
    parts = []
    for first in range(0, terms, _AT_ONCE):
        number_N = torch.arange(first, min(first + _AT_ONCE, terms))
        tokens_NT = torch.stack([number_N // vocabulary**t % vocabulary for t in range(length)], -1)
        parts.append(log_partition(ref_logps(tokens_NT), rewards(tokens_NT), beta))
    return float(torch.logsumexp(torch.stack(parts), 0))


def _power(terms: int) -> str:
    """A whole number in words a message can hold."""
    return f"{terms:,}" if terms < 10**15 else f"about 10^{len(str(terms)) - 1}"
