"""How far a model is from another one, measured on responses whose tokens are known: KL of whole responses.

For responses y ~ writer, and both laws tempered as the sampler tempered them:

    KL(writer || other) = E sum_t KL(writer(. | x, y_<t) || other(. | x, y_<t))      Rao-Blackwellised
                        = E sum_t log(writer(y_t | ...) / other(y_t | ...))          k1

Each response gives one value of either; their mean is the estimate, and the interval is over prompts. The first needs
both models whole, in blocks of the vocabulary; the second only the log-probs of what was written. With responses of
the policy this is KL(pi || ref), the penalty of the RL problem; with those of the reference it is KL(ref || pi).

Several processes take the micro-batches in turn and know the numbers of all, to the last bit those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune.data.packing import by_group
from preftune.engine.parallel import ALONE, World
from preftune.models.logprobs import score_tokens
from preftune.tensors import PackedBatch, TokenGroup

__all__ = ["Divergence", "divergences", "log_ratios"]

Batching = Callable[[Sequence[TokenGroup]], Iterable[PackedBatch]]


@dataclass(frozen=True, slots=True)
class Divergence:
    """What one response of the writer says about KL(writer || other), nats."""

    rao_blackwell: float
    """sum_t of the exact divergence of the next-token laws: >= 0, and 0 for equal models."""
    k1: float
    """log writer(y) - log other(y), of either sign."""
    other_logp: float
    """log other(y), for a writer whose law is known only by what it told of y."""
    tokens: int
    """Completion tokens, end mark included."""


@torch.no_grad()
def divergences(
    writer: Any,
    other: Any,
    groups: Sequence[TokenGroup],
    batching: Batching,
    *,
    temperature: float = 1.0,
    world: World = ALONE,
) -> list[list[Divergence]]:
    """One `Divergence` per response of every group, in their order; `temperature` > 0 divides the logits of both.

    Sums over tokens are float64. Both models were prepared by `attention.install` where `batching` packs. Raises
    RunError when the vocabularies differ in size.
    """

    def measured(batch: PackedBatch) -> list[Any]:
        # A token's divergence is KL(reference || model): the writer takes the reference's part.
        scores = score_tokens(other, batch, reference_model=writer, divergence=True, temperature=temperature)
        assert scores.divergence is not None and scores.reference is not None
        kl_R = _sums(scores.divergence, batch)
        k1_R = _sums(scores.reference.double() - scores.logps.double(), batch)
        return list(zip(kl_R, k1_R, _sums(scores.logps, batch), batch.lengths.tolist(), strict=True))

    found = _by_group(groups, batching, measured, world)
    return [[Divergence(*numbers) for numbers in of_group] for of_group in found]


@torch.no_grad()
def log_ratios(
    policy: Any, reference: Any, groups: Sequence[TokenGroup], batching: Batching, *, world: World = ALONE
) -> list[list[float]]:
    """log pi(y) - log ref(y) of every response of every group, nats, subtracted token by token."""

    def measured(batch: PackedBatch) -> list[float]:
        scores = score_tokens(policy, batch, reference_model=reference)
        assert scores.reference is not None
        return _sums(scores.logps.double() - scores.reference.double(), batch)

    return _by_group(groups, batching, measured, world)


def _by_group(
    groups: Sequence[TokenGroup], batching: Batching, measured: Callable[[PackedBatch], list[Any]], world: World
) -> list[list[Any]]:
    """What is `measured` of the responses of each micro-batch, by group."""
    return by_group(
        groups, batching(groups), lambda batches: world.in_turn(batches, measured, "log-probs of the responses")
    )


def _sums(values_C: Tensor, batch: PackedBatch) -> list[float]:
    """[R] per response, float64."""
    owner_C = torch.repeat_interleave(batch.lengths)
    total_R = values_C.new_zeros(len(batch.lengths), dtype=torch.float64)
    return total_R.index_add(0, owner_C, values_C.double()).tolist()
