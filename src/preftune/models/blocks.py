"""Attention of whole groups by matrix products: some queries at a time, and no key that comes after them.

    S = softcap(scale q k^T) + mask,  P = softmax(S),  o = P v       of a part: queries [start, end), keys [0, end)
    dP = do v^T,  dS = P (dP - sum_k P dP)
    dv += P^T do,  dk += scale dS^T q,  dq = scale dS k              dS times softcap's slope first

Half of what one product of all queries with all keys computes is hidden by causality. Cut into parts of PART queries
it is not computed, nor are P's zeros kept; what else is hidden, siblings and windows, is masked. P is kept for the
backward while it is small, and computed again where it is not. In bfloat16 S is rounded to bfloat16, as in the eager
attention of transformers; torch's flash attention keeps it in float32.

Legend of shapes: n tokens of the block, H query heads, K key heads, D head size, Q queries of a part, E = its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["KEPT_BYTES", "PART", "Part", "attend_in_parts", "parts_of"]

PART = 128
"""Queries at a time. Measured in bfloat16 on 200 to 1700 tokens: 64 and 256 take up to a tenth longer."""
KEPT_BYTES = 2**25
"""Of P, per layer and block: 32 heads in bfloat16 on 1000 tokens, less than what else autograd keeps of them."""


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """Queries `[start, end)` of a block on its keys `[0, end)`."""

    start: int
    end: int
    mask: Tensor
    """[Q, E] 0 or -inf, added to the scores."""


def parts_of(n: int, visible: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> tuple[Part, ...]:
    """The parts of a block of n tokens; `visible(rows, columns)` is [Q, E] bool. Masks are made like `like`."""
    count = max(1, round(n / PART))
    parts = []
    for start, end in pairwise(n * i // count for i in range(count + 1)):
        hidden = ~visible(torch.arange(start, end), torch.arange(end)).to(like.device)
        parts.append(Part(start, end, like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))))
    return tuple(parts)


def attend_in_parts(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part], scale: float, softcap: float | None
) -> Tensor:
    """[1, H, n, D] queries, unrepeated keys and values [1, K, n, D] -> [1, n, H, D]."""
    size = query.shape[1] * sum((p.end - p.start) * p.end for p in parts) * query.element_size()
    keep = size <= KEPT_BYTES and softcap is None and torch.is_grad_enabled()
    out: Tensor = _Attention.apply(query, key, value, parts, scale, softcap, keep)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor,
        parts: Sequence[Part], scale: float, softcap: float | None, keep: bool,
    ) -> Tensor:  # fmt: skip
        k, v, heads = key[0], value[0], query.shape[1]
        out, kept = [], []
        for part in parts:
            probabilities, _ = _probabilities(_queries(query, part, len(k)), k, part, scale, softcap)
            some = torch.bmm(probabilities, v[:, : part.end])
            out.append(some.view(1, heads, part.end - part.start, -1).transpose(1, 2))
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.parts, ctx.scale, ctx.softcap = parts, scale, softcap
        return torch.cat(out, 1) if len(out) > 1 else out[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        k, v, heads = key[0], value[0], query.shape[1]
        upstream = upstream.transpose(1, 2)
        wide = torch.promote_types(k.dtype, torch.float32)  # of sums over parts
        to_query = torch.empty_like(query)
        to_key, to_value = (torch.zeros(each.shape, dtype=wide, device=each.device) for each in (k, v))
        for i, part in enumerate(ctx.parts):
            q, up = (_queries(each, part, len(k)) for each in (query, upstream))
            P, slope = (kept[i], None) if kept else _probabilities(q, k, part, ctx.scale, ctx.softcap)
            to_value[:, : part.end] += torch.bmm(P.transpose(1, 2), up)
            pull = torch.bmm(up, v[:, : part.end].transpose(1, 2))
            pull = torch._softmax_backward_data(pull, P, -1, P.dtype)
            if slope is not None:
                pull.mul_(slope)
            to_key[:, : part.end] += torch.bmm(pull.transpose(1, 2), q)
            some = torch.bmm(pull, k[:, : part.end]).mul_(ctx.scale)
            to_query[0, :, part.start : part.end] = some.view(heads, part.end - part.start, -1)
        to_key = to_key.mul_(ctx.scale).to(k.dtype)
        return to_query, to_key[None], to_value.to(v.dtype)[None], None, None, None, None


def _queries(of: Tensor, part: Part, key_heads: int) -> Tensor:
    """[1, H, n, D] -> [K, H / K * Q, D]: a part's rows, the heads that share a key head below one another."""
    return of[0, :, part.start : part.end].reshape(key_heads, -1, of.shape[-1])


def _probabilities(
    q: Tensor, k: Tensor, part: Part, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """[K, H / K * Q, E] P, and softcap's slope where there is one."""
    scores, keys, slope = q.new_empty(*q.shape[:2], part.end), k[:, : part.end].transpose(1, 2), None
    masked = scores.view(len(k), -1, *part.mask.shape)
    if softcap is None:
        masked.copy_(part.mask)
        scores.baddbmm_(q, keys, alpha=scale)
    else:
        scores.baddbmm_(q, keys, beta=0, alpha=scale / softcap).tanh_()
        slope = 1 - scores.square()
        masked.mul_(softcap).add_(part.mask)
    return torch.softmax(scores, -1), slope
