"""log P(the tied responses come first), in whatever order: what a ranking with ties says under Plackett-Luce.

A block of m responses of strengths e^s is drawn without replacement from among itself and the responses ranked
worse, whose total strength is e^rest. Ties leave the order inside the block open, so its m! orders are summed:

    P(block) = sum over orders o of prod_t e^s(o_t) / Z({o_t, .., o_m}),      Z(U) = e^rest + sum over U of e^s
             = prod e^s * H(block),      H(U) = sum over i in U of H(U - i) / Z(U),      H({}) = 1

which takes 2^m subsets instead of m! orders. Everything is in logarithms and, being tiny, in float64 on the host:
the orders differ by a few nats on sums of any size, which float32 would round away.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["TIES_AT_MOST", "log_first", "log_first_gradient", "tied_blocks"]

TIES_AT_MOST = 10
"""Responses in one block: 1024 subsets."""


def tied_blocks(rank: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of m >= 2 equal ranks with something ranked worse: (rankings [B], positions [B, m]) for each m there is.

    rank: [G, K] integers, 1 is best, 0 is absent. The last block is no event: it comes last whatever its order.
    Raises ValueError on a block of more than TIES_AT_MOST.
    """
    together = (rank[:, :, None] == rank[:, None, :]) & (rank[:, :, None] > 0)
    size = together.sum(-1)
    first = ~together.tril(-1).any(-1)
    counted = first & (size > 1) & (rank[:, None, :] > rank[:, :, None]).any(-1)
    for m in size[counted].unique().tolist():
        if m > TIES_AT_MOST:
            raise ValueError(
                f"{m} responses share one rank above others, whose orders can be summed for at most {TIES_AT_MOST}; "
                f"split the tie, rank fewer responses or use a loss of pairs"
            )
        group, leader = (counted & (size == m)).nonzero().T
        yield group, together[group, leader].nonzero()[:, 1].reshape(-1, m)


def log_first(s: Tensor, members: Tensor, worse: Tensor) -> Tensor:
    """log P(block) [B], nats, differentiable.

    s: [B, K] strengths, logarithms; members: [B, m] positions of the block; worse: [B, K] bool, never nothing.
    """
    block, rest, _ = _taken(s, members, worse)
    log_h, _ = _subsets(block, rest)
    return (block.sum(-1) + log_h[-1][:, 0]).to(s.dtype).to(s.device)


def log_first_gradient(s: Tensor, members: Tensor, worse: Tensor) -> Tensor:
    """d log P(block) / ds [B, K]: 1 in the block, less the chance of each response in every draw, averaged over orders.

    The orders are weighted by their probability given that the block came first: from the whole block down, the
    chance to be at U moves on to U - i in proportion to H(U - i).
    """
    block, rest, share = _taken(s, members, worse)
    log_h, log_z = _subsets(block, rest)
    by_block, by_rest = torch.ones_like(block), torch.zeros_like(rest)
    here = torch.ones_like(rest)[:, None]
    for size in range(block.shape[-1], 0, -1):
        subset, smaller = _layer(block.shape[-1], size)
        drawn = torch.exp(block[:, subset] - log_z[size][..., None])
        by_block = by_block.index_add(1, subset.flatten(), -(here[..., None] * drawn).flatten(1))
        by_rest = by_rest - (here * torch.exp(rest[:, None] - log_z[size])).sum(-1)
        moved = here[..., None] * log_h[size - 1][:, smaller].softmax(-1)
        here = torch.zeros_like(log_h[size - 1]).index_add(1, smaller.flatten(), moved.flatten(1))
    return (by_rest[:, None] * share).scatter(1, members.cpu(), by_block).to(s.dtype).to(s.device)


def _taken(s: Tensor, members: Tensor, worse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s of the block [B, m], log of the total strength of what is worse [B], and shares in it [B, K]."""
    wide = s.cpu().double()
    below = wide.masked_fill(~worse.cpu(), -torch.inf)
    return wide.gather(1, members.cpu()), below.logsumexp(-1), below.softmax(-1)


def _subsets(s: Tensor, rest: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(log H, log Z) of all subsets, by size 0 to m: [B, (m choose size)] each."""
    log_h, log_z = [torch.zeros_like(rest)[:, None]], [rest[:, None]]
    for size in range(1, s.shape[-1] + 1):
        subset, smaller = _layer(s.shape[-1], size)
        log_z.append(torch.logaddexp(rest[:, None], s[:, subset].logsumexp(-1)))
        log_h.append(log_h[-1][:, smaller].logsumexp(-1) - log_z[-1])
    return log_h, log_z


@cache
def _layer(m: int, size: int) -> tuple[Tensor, Tensor]:
    """Members [n, size] of the subsets of `size` out of m, and where in the layer below each leaves one of them out."""
    below = {subset: at for at, subset in enumerate(combinations(range(m), size - 1))}
    subsets = list(combinations(range(m), size))
    smaller = [[below[subset[:i] + subset[i + 1 :]] for i in range(size)] for subset in subsets]
    return torch.tensor(subsets), torch.tensor(smaller)
