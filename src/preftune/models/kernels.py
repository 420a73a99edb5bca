"""Attention of packed rows by fused kernels on CUDA, without a mask: variable lengths, or a block mask.

`varlen`: every segment is one sequence of a variable-length kernel. Its queries are its own tokens; its keys are
gathered, `[prefix | own]`, and the causal mask is aligned to the bottom right: the last query sees every key.

    row      [ prompt first | second ]            queries  first: P + F     second: S
    keys     [ prompt first | prompt second ]     lengths         P + F             P + S

Only prefixes are held a second time, and the gather's backward sums their gradients. Positions inside a sequence are
contiguous, so a sliding window is the kernel's own. `flex`: torch's FlexAttention, which also knows a softcap.

What a kernel makes of these arguments is measured, not believed: `models/backends`.

Legend of shapes: N tokens in the row, K gathered keys, H query heads, D head size, S segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from preftune.errors import ConfigError
from preftune.tensors import AttentionPlan

__all__ = ["VarlenPlan", "flex_attention", "softcap_of", "unsuited", "varlen_attention", "varlen_plan"]

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, slots=True)
class VarlenPlan:
    """Where each segment's queries and gathered keys begin and end."""

    q_ends: Tensor
    """[S + 1] int32, cumulative lengths of the queries, from 0."""
    k_ends: Tensor
    """[S + 1] int32, cumulative lengths of the keys, from 0."""
    keys: Tensor
    """[K] int64, the token of the row that each key is."""
    longest_q: int
    longest_k: int


def varlen_plan(plan: AttentionPlan, device: torch.device | str = "cpu") -> VarlenPlan:
    """The arguments of one call for the whole row; segments cover the row in order."""
    q_lengths = [s.end - s.start for s in plan.segments]
    keys = [(*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)) for s in plan.segments]
    k_lengths = list(map(len, keys))
    ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (q_lengths, k_lengths)]
    index = torch.tensor([k for each in keys for k in each], dtype=torch.int64, device=device)
    return VarlenPlan(ends[0], ends[1], index, max(q_lengths), max(k_lengths))


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenPlan, float, "int | None"], Tensor]
"""(q [N, H, D], k [K, H', D], v, plan, scale, window) -> [N, H, D]."""


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float, window: int | None
) -> Tensor:
    """[1, H, N, D] queries, unrepeated keys and values -> [1, N, H, D]."""
    q = query[0].transpose(0, 1)
    k, v = (each[0].transpose(0, 1).index_select(0, plan.keys) for each in (key, value))
    return _kernel()(q.contiguous(), k, v, plan, scale, window)[None]


def flex_attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, softcap: float | None) -> Tensor:
    """As `varlen_attention`, under a `BlockMask`. Forward only on a CPU."""
    capped = None if softcap is None else _cap(softcap)
    out: Tensor = _flex(query.device.type)(
        query, key, value, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=query.shape[1] > key.shape[1]
    )
    return out.transpose(1, 2)


def softcap_of(model: Any) -> float | None:
    """The softcap of the model's attention scores, as the architectures name it."""
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return None if cap is None else float(cap)


def unsuited(name: str, device: str, dtype: torch.dtype, softcap: float | None) -> str | None:
    """Why the backend cannot train such a model here; None when nothing is known against it."""
    if name not in ("varlen", "flex"):
        return None
    if device != "cuda":
        return f"{name} attention needs a CUDA device, not {device}"
    if name == "flex":
        return None
    if dtype not in HALF:
        return f"varlen attention computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if softcap is not None:
        return "varlen attention knows no softcap"
    if _torchs_own() is None and find_spec("flash_attn") is None:
        return f"varlen attention needs torch 2.11 or flash-attn; this is torch {torch.__version__}"
    return None


def _torchs_own() -> Callable[..., Any] | None:
    """torch's own variable-length attention; None before 2.11, where it took neither a scale nor a window."""
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention import varlen

    return varlen.varlen_attn if "window_size" in signature(varlen.varlen_attn).parameters else None


@functools.cache
def _kernel() -> Kernel:
    """torch's own variable-length attention (2.11 and later), else flash-attn."""
    varlen_attn = _torchs_own()
    if varlen_attn is not None:
        asks = "enable_gqa" in signature(varlen_attn).parameters  # since 2.12; before, fewer key heads said it all

        def of_torch(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, window: int | None) -> Tensor:
            groups = {"enable_gqa": q.shape[1] > k.shape[1]} if asks else {}
            out = varlen_attn(
                q, k, v, plan.q_ends, plan.k_ends, plan.longest_q, plan.longest_k,
                scale=scale, window_size=(_left(window), 0), **groups,
            )  # fmt: skip
            assert isinstance(out, Tensor)  # a pair only when more is asked for
            return out

        return of_torch
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(f"varlen attention needs torch 2.11 or flash-attn ({error}); choose sdpa") from None

    def of_flash(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, window: int | None) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q, k, v, plan.q_ends, plan.k_ends, plan.longest_q, plan.longest_k,
            softmax_scale=scale, causal=True, window_size=(_left(window), 0),
        )  # fmt: skip
        return out

    return of_flash


def _left(window: int | None) -> int:
    """Tokens before its own that a query sees: `window` counts its own too; -1 is all of them."""
    return -1 if window is None else window - 1


@functools.cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as plain

    if device != "cuda":
        return plain
    # One graph for all lengths; at the default limit dynamo falls back to the unfused form without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(plain, dynamic=True)


@functools.cache
def _cap(softcap: float) -> Callable[..., Tensor]:
    """One function object per softcap: a new one would be compiled anew."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
