"""The records that cross functions: frozen, with shape, dtype and unit on every field.

Legend of shapes
    N  tokens in one packed row            K  responses of one group
    C  completion tokens that are scored   R  responses in one batch
    P  prompt tokens                       T  preference pairs in one batch
All log-probabilities are natural (nats), float32 unless a test says float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "AttentionPlan",
    "Ids",
    "PackedBatch",
    "PairIndex",
    "PairLogps",
    "ResponseLogps",
    "Segment",
    "TokenGroup",
    "total_weight",
]

Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False, slots=True)
class TokenGroup:
    """One prompt with K responses as token ids, and the pairs between them.

    K = 1 without pairs is a demonstration (supervised fine-tuning); K = 2 with one pair is the usual DPO row.
    """

    prompt: Ids
    """[P] ids, P >= 1: the first completion token needs something to be predicted from."""
    responses: tuple[Ids, ...]
    """K arrays of ids, each >= 1 long; a finished response ends with exactly one end-of-sequence id."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(chosen, rejected) positions into `responses`."""
    weight: float = 1.0
    origin: str = ""
    """`file:line` of the row, for every message about it."""

    def __post_init__(self) -> None:
        assert len(self.prompt) >= 1 and all(len(r) >= 1 for r in self.responses), self.origin
        assert all(w != l and max(w, l) < len(self.responses) for w, l in self.pairs), self.origin


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries `[start, end)` of a row attend causally to themselves and fully to keys `[prefix_start, prefix_end)`."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Who sees whom in one packed row: the segments tile `[0, N)` in order; nothing else is visible."""

    segments: tuple[Segment, ...]
    length: int
    """N."""


@dataclass(frozen=True, eq=False, slots=True)
class PairIndex:
    """T pairs as positions into the R responses of a batch."""

    chosen: Tensor
    """[T] int64 in [0, R)."""
    rejected: Tensor
    """[T] int64 in [0, R)."""
    weight: Tensor
    """[T] float32, > 0."""

    def to(self, device: torch.device | str) -> PairIndex:
        return PairIndex(self.chosen.to(device), self.rejected.to(device), self.weight.to(device))


@dataclass(frozen=True, eq=False, slots=True)
class PackedBatch:
    """One micro-batch: what the model is fed, where completion tokens are predicted, and whose they are.

    Packed (`plan` given): one row `[1, N]`; every group is `[shared prefix | rest 1 | rest 2 ...]`, the last
    token of a response is not fed, positions continue from the prefix for every response.
    Padded (`plan` None): one row per response `[R, S]` with an ordinary `attention_mask`.

    Scored tokens are ordered by group, response, time; response r owns `lengths[r]` consecutive ones.
    """

    input_ids: Tensor
    """[1, N] or [R, S] int64."""
    position_ids: Tensor
    """Same shape, int64."""
    plan: AttentionPlan | None
    attention_mask: Tensor | None
    """[R, S] int64 with 1 on real tokens, only when padded."""
    predict_at: Tensor
    """[C] int64: position, in the flattened input, whose hidden state predicts the scored token."""
    targets: Tensor
    """[C] int64: the scored token."""
    lengths: Tensor
    """[R] int64: scored tokens of each response, end-of-sequence included."""
    index: PairIndex
    groups: tuple[TokenGroup, ...]
    """The groups inside, for messages and for looking up cached reference log-probs."""

    @property
    def real_tokens(self) -> int:
        """Tokens fed that are not padding: the unique tokens of this micro-batch."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            predict_at=self.predict_at.to(device),
            targets=self.targets.to(device),
            lengths=self.lengths.to(device),
            index=self.index.to(device),
        )


@dataclass(frozen=True, eq=False, slots=True)
class PairLogps:
    """What a pairwise loss may read: T pairs, chosen and rejected side by side, nats."""

    chosen: Tensor
    """[T] log pi(y_w | x), summed over completion tokens."""
    rejected: Tensor
    """[T] log pi(y_l | x)."""
    chosen_log_ratio: Tensor
    """[T] log pi(y_w | x) - log pi_ref(y_w | x), subtracted token by token before summing; 0 without reference."""
    rejected_log_ratio: Tensor
    """[T] the same for y_l."""
    chosen_length: Tensor
    """[T] completion tokens of y_w, end-of-sequence included, as float."""
    rejected_length: Tensor
    """[T] the same for y_l."""
    weight: Tensor
    """[T] how much the pair counts."""


@dataclass(frozen=True, eq=False, slots=True)
class ResponseLogps:
    """Sequence log-probabilities of R responses, nats."""

    policy: Tensor
    """[R] sum over completion tokens of log pi."""
    log_ratio: Tensor
    """[R] sum over completion tokens of (log pi - log pi_ref), subtracted first; 0 without reference."""
    length: Tensor
    """[R] completion tokens, as float."""

    @classmethod
    def from_tokens(cls, logps_C: Tensor, lengths_R: Tensor, reference_C: Tensor | None = None) -> ResponseLogps:
        """Sum token log-probs [C], ordered by response, over the `lengths_R` tokens of each response."""
        owner_C = torch.repeat_interleave(torch.arange(len(lengths_R), device=logps_C.device), lengths_R)

        def per_response(values_C: Tensor) -> Tensor:
            return values_C.new_zeros(len(lengths_R)).index_add(0, owner_C, values_C)

        policy_R = per_response(logps_C)
        ratio_R = torch.zeros_like(policy_R) if reference_C is None else per_response(logps_C - reference_C)
        return cls(policy_R, ratio_R, lengths_R.to(policy_R.dtype))

    def pairs(self, index: PairIndex) -> PairLogps:
        """The T pairs of `index`; a response in several pairs receives the sum of their gradients."""
        w, l = index.chosen, index.rejected
        return PairLogps(
            self.policy[w],
            self.policy[l],
            self.log_ratio[w],
            self.log_ratio[l],
            self.length[w],
            self.length[l],
            index.weight,
        )


def total_weight(groups: Sequence[TokenGroup]) -> float:
    """Sum over all pairs of the groups of their weight: the global denominator of an optimizer step."""
    return float(sum(g.weight * len(g.pairs) for g in groups))
