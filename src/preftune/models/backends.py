"""Which attention kernel trains this model on this device: the fastest that was seen to be right.

CPU, MPS, float32      sdpa      one call per segment, short groups in blocks
CUDA, bfloat16         varlen    one variable-length call for the whole row
CUDA, softcap          flex      FlexAttention under a block mask
"""

from __future__ import annotations

from typing import Any

import torch

from preftune.errors import ConfigError
from preftune.models.attention import BACKENDS, Layout
from preftune.models.kernels import softcap_of, unsuited
from preftune.tensors import AttentionPlan, Segment

__all__ = ["choose_backend", "disagreement"]

DISAGREEMENT = {torch.float64: 1e-12, torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Allowed relative error of a fused kernel: a few times its rounding (TF32 in float32); a wrong mask gives 0.3."""

_ROW = AttentionPlan(
    (
        *(Segment(0, 150), Segment(150, 190, 0, 110), Segment(190, 193, 0, 110)),
        *(Segment(193, 260), Segment(260, 297, 193, 211)),
    ),
    297,
)


def choose_backend(model: Any, asked: str = "auto") -> tuple[str, str]:
    """(backend for training, why): what was asked for, else the fastest that is right here.

    A fused kernel is right when it agrees with plain products on this device, in value and in gradient, with this
    model's heads, window and softcap. Raises ConfigError when the one that was asked for is not.
    """
    device, softcap = model.device.type, softcap_of(model)
    if asked == "auto" and device != "cuda":
        return "sdpa", f"fused kernels need CUDA, not {device}"
    name = asked if asked != "auto" else "varlen" if softcap is None else "flex"
    problem = unsuited(name, device, model.dtype, softcap)
    if problem is None and name in ("varlen", "flex"):
        problem = _disagrees(model, name, softcap)
    if problem is None:
        return name, "asked for" if asked != "auto" else "one fused kernel, equal to plain products here"
    if asked != "auto":
        raise ConfigError(f"{problem}; set --attention auto")
    return "sdpa", problem


def _disagrees(model: Any, name: str, softcap: float | None) -> str | None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shape = (heads, getattr(config, "num_key_value_heads", None) or heads, size)
    try:
        worst = max(disagreement(name, model.device, model.dtype, shape, window, softcap) for window in (None, 48))
    except Exception as error:  # a kernel may refuse in any way: the run does not end for it
        return f"{name} attention does not run here ({type(error).__name__}: {str(error).splitlines()[0]})"
    allowed = DISAGREEMENT[model.dtype]
    return None if worst <= allowed else f"{name} attention is off by {worst:.1g} here, at most {allowed:g} allowed"


def disagreement(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None = None,
    softcap: float | None = None,
) -> float:
    """Largest relative error (root mean square) of output and gradients of a backend against `dense` in float64.

    On a row of two groups, three and two responses; `shape`: query heads, key/value heads, head size.
    """
    draw = torch.Generator().manual_seed(0)
    heads, kv_heads, size = shape
    q, k, v, pull = (
        torch.randn(1, n, _ROW.length, size, generator=draw, dtype=torch.float64).to(device, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    found = []
    for backend, kind in ((name, dtype), ("dense", torch.float64)):
        inputs = [each.detach().to(kind).requires_grad_() for each in (q, k, v)]
        out = BACKENDS[backend](inputs[0], inputs[1], inputs[2], Layout(_ROW, backend), size**-0.5, window, softcap)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, pull.transpose(1, 2).to(kind))))
    return max(float((ours.double() - true).norm() / true.norm()) for ours, true in zip(*found, strict=True))
