"""The least arithmetic of a DPO step, and how fast this machine multiplies matrices: what "share of the limit" divides.

Each unique token passes the body once, each completion token meets the vocabulary once, the reference is cached. With
N_b parameters of the body (neither embedding nor head), H = V d, prompt P, responses C and R, x attended (query, key)
pairs at A = 4 layers d_attn forward FLOP each, backward twice the forward (attention 2.5 times, since it recomputes):

    unique tokens U = P + C + R - 2 (the last token of a response is not fed)        completion tokens T = C + R
    limit = 6 N_b U + 6 H T + 3.5 A (P^2 / 2 + P (C + R) + (C^2 + R^2) / 2)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Shape", "gemm_rate", "limit_flops", "unique_tokens"]


@dataclass(frozen=True)
class Shape:
    """A Llama shape; `heads` and `kv_heads` of size `head_size`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int = 64

    @property
    def body(self) -> int:
        """Parameters in the matrices of all layers."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


Lengths = tuple[int, int, int]
"""Tokens of (prompt, chosen, rejected), the closing token of a response included."""


def unique_tokens(pairs: Iterable[Lengths]) -> int:
    """U summed over pairs."""
    return sum(p + c + r - 2 for p, c, r in pairs)


def limit_flops(pairs: Iterable[Lengths], shape: Shape) -> float:
    """FLOP of one forward and backward over the pairs; the optimizer's are left out."""
    head, per_attended = shape.vocabulary * shape.hidden, 4 * shape.layers * shape.heads * shape.head_size
    total = 0.0
    for p, c, r in pairs:
        attended = p * p / 2 + p * (c + r) + (c * c + r * r) / 2
        total += 6 * shape.body * (p + c + r - 2) + 6 * head * (c + r) + 3.5 * per_attended * attended
    return total


def gemm_rate(dtype: str, *, size: int = 1024, seconds: float = 2.0) -> float:
    """FLOP per CPU second of size^2 matrix products in `dtype`: the median over a few products at a time."""
    import torch

    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    out, rates, spent = a @ b, [], 0.0
    while spent < seconds or len(rates) < 5:
        start = time.process_time()
        for _ in range(8):
            torch.mm(a, b, out=out)
        took = time.process_time() - start
        rates.append(8 * 2 * size**3 / took)
        spent += took
    return statistics.median(rates)
