"""log-probabilities of given tokens under a vocabulary projection that never exists as a whole.

For scored token t with hidden state h_t and target y_t, vocabulary V, projection W, bias b:

    z_t = softcap(scale * (W h_t + b))                softcap(z) = c tanh(z / c), or z
    log p_t = z_t[y_t] - logsumexp(z_t)
    d log p_t / d z_t = onehot(y_t) - softmax(z_t)

The vocabulary is walked in blocks small enough for a processor's cache; every block holds *all* C tokens. So a block's
weight gradient is one matrix product, accumulated in float32 inside it and rounded once, and the forward needs only
a running maximum m and sum per token. What it has of a block then, E = exp(z - m), is softmax(z) but for one factor per
token, f = exp(m - logsumexp), known at the end. That factor commutes with the products,

    d h = f (E W),    d W = E^T (f h),

so blocks whose E is kept, in the weight's dtype and up to a fixed number of bytes, cost 6 V d FLOP per token and the
backward never touches their elements again; the others are computed twice: 8 V d. Logits are never held as a whole.

Legend of shapes: C scored tokens, V vocabulary entries, B entries of one block, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Blocks", "Pull", "at_targets", "block_entries", "pull_back", "room_of", "token_logprobs"]

# Logits held at a time: a few megabytes on a CPU (its cache), enough to fill an accelerator elsewhere.
_BLOCK_ELEMENTS = {"cpu": 2**21}
_BLOCK_ELEMENTS_ELSE = 2**27
# Entries of a block are a multiple of it where they can be: products of odd sizes take 1 to 3 % longer.
_WHOLE = 256
# What the forward may keep for the backward, bytes.
_KEPT_BYTES = {"cpu": 2**28}
_KEPT_BYTES_ELSE = 2**32
# No 1 / f above e^40: the entries of such a block have less probability than float64 can tell from zero.
_FARTHEST = 40.0


def token_logprobs(
    hidden_Cd: Tensor,
    weight_Vd: Tensor,
    targets_C: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """[C] log softmax(softcap(scale * (hidden W^T + bias)))[target] in nats, float32 (float64 from float64 input).

    The matrix products run in the weight's dtype, all else in float32; gradients come back in the dtype of what they
    belong to. What needs no gradient costs nothing in the backward. `chunk` is the number of vocabulary entries of a
    block, by default as many as fit a fixed number of logits. `targets_C` is int64 in [0, V).
    """
    chunk = chunk or block_entries(hidden_Cd)
    differentiated = torch.is_grad_enabled() and any(
        side is not None and side.requires_grad for side in (hidden_Cd, weight_Vd, bias)
    )
    keep = _kept_blocks(hidden_Cd, weight_Vd, chunk) if differentiated else 0
    logps: Tensor = _TokenLogprobs.apply(hidden_Cd, weight_Vd, bias, targets_C, softcap, scale, chunk, keep)
    return logps


def block_entries(hidden_Cd: Tensor, sides: int = 1) -> int:
    """How many vocabulary entries of all C tokens fit the room for logits when `sides` blocks are held at once."""
    elements = _BLOCK_ELEMENTS.get(hidden_Cd.device.type, _BLOCK_ELEMENTS_ELSE)
    entries = elements // (sides * max(1, len(hidden_Cd)))
    return max(64, entries // _WHOLE * _WHOLE or entries)


def room_of(tokens: float, entries: int, hidden: int, size: int, device: str) -> float:
    """Bytes that `token_logprobs` holds for so many scored tokens, weights of `size` bytes: kept blocks, the block in
    hand in both dtypes, and hidden states with their float32 gradient."""
    logits = tokens * entries
    in_hand = min(logits, _BLOCK_ELEMENTS.get(device, _BLOCK_ELEMENTS_ELSE)) * (4 + size if size < 4 else size)
    return in_hand + min(logits * size, _KEPT_BYTES.get(device, _KEPT_BYTES_ELSE)) + tokens * hidden * (2 * size + 4)


def _kept_blocks(hidden: Tensor, weight: Tensor, chunk: int) -> int:
    """How many blocks of the vocabulary may be kept; none in float16, whose range does not hold 1 / f."""
    room = _KEPT_BYTES.get(hidden.device.type, _KEPT_BYTES_ELSE)
    blocks = room // (max(1, len(hidden)) * min(chunk, len(weight)) * weight.element_size())
    return 0 if weight.dtype == torch.float16 else min(blocks, -(-len(weight) // chunk))


class Blocks:
    """Walks the vocabulary; one workspace serves all blocks, but the first `keep` have products of their own."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        chunk: int,
        keep: int = 0,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden.to(weight.dtype), weight, bias
        self.softcap, self.scale, self.chunk = softcap, scale, chunk
        size = len(hidden) * min(chunk, len(weight))
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._product = weight.new_empty(size)
        self._logits = self._product if weight.dtype == self.dtype else weight.new_empty(size, dtype=self.dtype)
        self._kept = weight.new_empty(len(hidden) * min(keep * chunk, len(weight)))

    def lowest(self) -> Tensor:
        """[C] where a running maximum starts; not -inf, because -inf - -inf is NaN."""
        return self.hidden.new_full((len(self.hidden),), torch.finfo(self.dtype).min, dtype=self.dtype)

    def slope(self, logits: Tensor) -> Tensor | None:
        """[C, B] d softcap / d its argument, from what it gave; None where there is no softcap."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square_()

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        return self.walk(0)

    def walk(self, first: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first entry, logits [C, B] to overwrite, room [C, B] in the weight's dtype, possibly the same memory)."""
        for low in range(first, len(self.weight), self.chunk):
            rows = self.weight[low : low + self.chunk]
            shape = len(self.hidden), len(rows)
            start, size = low * len(self.hidden), shape[0] * shape[1]
            own = start + size <= len(self._kept)
            product = (self._kept[start : start + size] if own else self._product[:size]).view(shape)
            logits = product if own and product.dtype == self.dtype else self._logits[:size].view(shape)
            torch.mm(self.hidden, rows.t(), out=product)
            if logits is not product:
                logits.copy_(product)
            if self.bias is not None:
                logits.add_(self.bias[low : low + self.chunk])
            if self.scale != 1.0:
                logits.mul_(self.scale)
            if self.softcap is not None:
                logits.div_(self.softcap).tanh_().mul_(self.softcap)
            yield low, logits, product


def at_targets(logits_CB: Tensor, targets_C: Tensor, low: int, elsewhere_C: Tensor) -> Tensor:
    """[C] each token's logit of its target, where the block from entry `low` on has it; else `elsewhere`.

    Every token is asked in every block: which ones a block has would have to be read back from the device.
    """
    place, inside = _places(logits_CB, targets_C, low)
    return logits_CB[place].where(inside, elsewhere_C)


def _put_at_targets(pull_CB: Tensor, targets_C: Tensor, low: int, values_C: Tensor) -> None:
    """Write `values` where `at_targets` reads."""
    place, inside = _places(pull_CB, targets_C, low)
    pull_CB[place] = values_C.to(pull_CB.dtype).where(inside, pull_CB[place])


def _places(block_CB: Tensor, targets_C: Tensor, low: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """([C] rows, [C] columns of the targets, or the nearest ones) and [C] whether the block has the target."""
    column = targets_C - low
    nearest = column.clamp(0, block_CB.shape[1] - 1)
    return (torch.arange(len(column), device=column.device), nearest), nearest == column


Pull = tuple[int, Tensor, Tensor, Tensor | None]


def pull_back(
    blocks: Blocks, pulls: Iterator[Pull], upstream_C: Tensor, needs: Sequence[bool], like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias), each where `needs` says so; the hidden's in the dtype of `like`.

    `pulls` yields per block (first entry, G [C, B], room as of `Blocks`, f [C] or None for 1), where upstream_t f_t G_t
    is the gradient by softcap's argument: d hidden = upstream scale f (G W), d W = G^T (upstream scale f hidden);
    neither upstream nor f ever meets [C, B].
    """
    weight, bias = blocks.weight, blocks.bias
    needs_hidden, needs_weight, needs_bias = needs
    factor = (blocks.scale * upstream_C).to(blocks.dtype)
    pulled = like * factor[:, None] if needs_weight else None
    d_hidden = torch.zeros_like(like, dtype=blocks.dtype) if needs_hidden else None
    d_weight = torch.empty_like(weight) if needs_weight else None
    d_bias = bias.new_empty(bias.shape, dtype=blocks.dtype) if needs_bias and bias is not None else None
    for low, pull, room, f in pulls:
        columns = slice(low, low + pull.shape[1])
        if d_bias is not None:
            torch.mv(pull.t().to(blocks.dtype), factor if f is None else factor * f, out=d_bias[columns])
        if room is not pull:
            room.copy_(pull)
        if d_weight is not None and pulled is not None:
            right = (pulled if f is None else pulled * f[:, None]).to(weight.dtype)
            torch.mm(room.t(), right, out=d_weight[columns])
        if d_hidden is not None:
            product = torch.mm(room, weight[columns])
            d_hidden += product if f is None else product * f[:, None]
    return (
        None if d_hidden is None else d_hidden.mul_(factor[:, None]).to(like.dtype),
        d_weight,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


@dataclass(eq=False, slots=True)
class _Kept:
    """What the forward leaves to the backward."""

    at_target: Tensor
    """[C] logits of the targets."""
    blocks: list[tuple[Tensor, Tensor]]
    """(E [C, B], the maximum m [C] it was made with) of the first blocks; with softcap, its slope is a factor of E."""


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        chunk: int,
        keep: int,
    ) -> Tensor:
        blocks = Blocks(hidden, weight, bias, softcap, scale, chunk, keep)
        maximum = blocks.lowest()
        total = torch.zeros_like(maximum)
        kept = _Kept(torch.zeros_like(maximum), [])
        for i, (low, logits, room) in enumerate(blocks):
            kept.at_target = at_targets(logits, targets, low, kept.at_target)
            higher = torch.maximum(maximum, logits.amax(1))
            slope = blocks.slope(logits) if i < keep else None
            total.mul_((maximum - higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(1))
            maximum = higher
            if i < keep:
                pull = logits if slope is None else logits.mul_(slope)
                kept.blocks.append((pull if room is pull else room.copy_(pull), higher))
        lse = maximum + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.settings = softcap, scale, chunk
        ctx.kept = kept
        return kept.at_target - lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        blocks = Blocks(hidden, weight, bias, *ctx.settings)
        kept, ctx.kept = ctx.kept, _Kept(ctx.kept.at_target, [])  # used up; a second backward computes it again
        miss = (kept.at_target - lse).exp_().sub_(1)
        slope_at_target = blocks.slope(kept.at_target)
        if slope_at_target is not None:
            miss *= slope_at_target

        def pulls() -> Iterator[Pull]:
            """p - onehot, so the sign joins upstream."""
            for i, (pull, maximum) in enumerate(kept.blocks):
                low, f = i * blocks.chunk, (maximum - lse).clamp_(min=-_FARTHEST).exp_()
                _put_at_targets(pull, targets, low, miss / f)
                yield low, pull, pull, f
            for low, logits, room in blocks.walk(len(kept.blocks) * blocks.chunk):
                slope = blocks.slope(logits)
                logits.sub_(lse[:, None]).exp_()
                if slope is not None:
                    logits.mul_(slope)
                _put_at_targets(logits, targets, low, miss)
                yield low, logits, room, None

        return *pull_back(blocks, pulls(), -grad_C, ctx.needs_input_grad[:3], hidden), *(None,) * 5
