"""What losses read of whole next-token distributions: KL(pi_ref || pi) and WPO's alignment, never holding [C, V].

For scored token t, with the policy's logits z and the reference's logits u, made as in `head`:

    divergence_t = sum_v p_v (log p_v - log q_v)      p = softmax(u), q = softmax(z)
                 = sum_v p_v (u_v - z_v) + logsumexp(z) - logsumexp(u)
    d divergence_t / d z = q - p                      the reference has no gradient
    alignment_t  = log q[y_t] - log sum_v q_v^2
                 = z[y_t] + logsumexp(z) - logsumexp(2 z)

Both walk the vocabulary in the blocks of `head`, with running maxima and sums per token.
Legend of shapes: C scored tokens, V vocabulary entries, B entries of one block, d hidden size of either model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from preftune.models.head import Blocks, Pull, at_targets, block_entries, pull_back

__all__ = ["token_alignment", "token_divergence"]


def token_divergence(
    hidden_Cd: Tensor,
    weight_Vd: Tensor,
    ref_hidden_Cd: Tensor,
    ref_weight_Vd: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ref_bias: Tensor | None = None,
    ref_softcap: float | None = None,
    ref_scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """[C] KL(pi_ref(.|before t) || pi(.|before t)) in nats, float32 (float64 where the policy is), differentiable.

    Gradients reach the policy's hidden states, weight and bias; none the reference's. Exactly zero, with exactly zero
    gradients, where both sides are the same numbers; otherwise rounding may leave some 1e-6 below zero in float32.
    An entry whose reference probability is zero counts nothing, whatever the policy thinks of it; one that the policy
    alone forbids (bias -inf) makes the divergence infinite. Both models share the vocabulary, not the hidden size.
    Source: arXiv 2404.11999, the summand of its sequential KL divergence.
    """
    chunk = chunk or block_entries(hidden_Cd, sides=2)
    policy = hidden_Cd, weight_Vd, bias, softcap, scale
    reference = ref_hidden_Cd, ref_weight_Vd, ref_bias, ref_softcap, ref_scale
    divergence: Tensor = _TokenDivergence.apply(*policy, *reference, chunk)
    return divergence


@torch.no_grad()
def token_alignment(
    hidden_Cd: Tensor,
    weight_Vd: Tensor,
    targets_C: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """[C] log pi(y_t) - log sum_v pi(v)^2 in nats, detached: how likely the token is, measured by a sampled one.

    Zero for every token of a uniform distribution, never below zero for the likeliest token, and without lower bound
    for tokens the policy would not write. float32 (float64 from a float64 model). Source: arXiv 2406.11827 Section 3.
    """
    blocks = Blocks(hidden_Cd, weight_Vd, bias, softcap, scale, chunk or block_entries(hidden_Cd))
    maximum = blocks.lowest()
    total, squares, at_target = (torch.zeros_like(maximum) for _ in range(3))
    for low, logits, _ in blocks:
        at_target = at_targets(logits, targets_C, low, at_target)
        higher = torch.maximum(maximum, logits.amax(1))
        shrink, odds = (maximum - higher).exp_(), logits.sub_(higher[:, None]).exp_()
        total.mul_(shrink).add_(odds.sum(1))
        squares.mul_(shrink.square_()).add_(odds.square_().sum(1))
        maximum = higher
    return (at_target - maximum) + (total.log() - squares.log())


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        ref_softcap: float | None,
        ref_scale: float,
        chunk: int,
    ) -> Tensor:
        ctx.settings = (softcap, scale, chunk), (ref_softcap, ref_scale, chunk)
        policy = Blocks(hidden, weight, bias, *ctx.settings[0])
        reference = Blocks(ref_hidden, ref_weight, ref_bias, *ctx.settings[1])
        highest, ref_highest = policy.lowest(), policy.lowest()
        total, ref_total, gap = (torch.zeros_like(highest) for _ in range(3))
        for (_, z, _), (_, u, _) in zip(policy, reference, strict=True):
            z_higher, u_higher = torch.maximum(highest, z.amax(1)), torch.maximum(ref_highest, u.amax(1).to(z.dtype))
            difference = u - z
            total.mul_((highest - z_higher).exp_()).add_(z.sub_(z_higher[:, None]).exp_().sum(1))
            p = u.to(z.dtype).sub_(u_higher[:, None]).exp_()
            shrink = (ref_highest - u_higher).exp_()
            ref_total.mul_(shrink).add_(p.sum(1))
            # Not 0 * inf: what the reference rules out counts nothing.
            gap.mul_(shrink).add_(difference.mul_(p).masked_fill_(p == 0, 0.0).sum(1))
            highest, ref_highest = z_higher, u_higher
        lse, ref_lse = highest + total.log(), ref_highest + ref_total.log()
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lse, ref_lse)
        # The maxima are subtracted from each other first: lse's own rounding would be that of a number of their size.
        return gap / ref_total + (highest - ref_highest) + (total.log() - ref_total.log())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, lse, ref_lse = ctx.saved_tensors
        policy = Blocks(hidden, weight, bias, *ctx.settings[0])
        reference = Blocks(ref_hidden, ref_weight, ref_bias, *ctx.settings[1])

        def pulls() -> Iterator[Pull]:
            """q - p."""
            for (low, z, room), (_, u, _) in zip(policy, reference, strict=True):
                slope = policy.slope(z)
                z.sub_(lse[:, None]).exp_().sub_(u.sub_(ref_lse[:, None]).exp_())
                yield low, z if slope is None else z.mul_(slope), room, None

        return *pull_back(policy, pulls(), grad_C, ctx.needs_input_grad[:3], hidden), *(None,) * 8
