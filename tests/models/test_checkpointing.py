"""Claims about recomputed activations: the same gradients, and what is computed twice is what was said."""

from __future__ import annotations

import importlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from preftune.data.packing import pack
from preftune.errors import ConfigError
from preftune.models import attention, checkpointing
from preftune.models.attention import BACKENDS, Layout, install
from preftune.models.checkpointing import recompute_activations
from preftune.models.kernels import _torchs_own
from preftune.models.logprobs import score
from preftune.tensors import AttentionPlan, PackedBatch, Segment, TokenGroup


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def batch() -> PackedBatch:
    draw = np.random.default_rng(0)
    prompts, responses = draw.integers(3, 300, (2, 300)), draw.integers(3, 300, (2, 2, 20))
    groups = [
        TokenGroup(p.astype(np.int32), tuple(r.astype(np.int32)), ((0, 1),))
        for p, r in zip(prompts, responses, strict=True)
    ]
    return pack(groups)


def backward(folder: Path, what: Any) -> tuple[list[torch.Tensor], Counter[str]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert install(model) is None
    recompute_activations(model, what)
    loss = score(model, batch()).sum()
    with _Counting() as counted:
        loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None], counted.calls


def test_the_gradient_is_the_same_and_only_what_was_said_is_computed_twice(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; the backward recomputes nothing, all but matrix products and attention, or all of every layer."""
    monkeypatch.setattr(attention, "_BLOCK_ELSE", 0)  # attention by a kernel, as of long groups and on accelerators
    (plain, none), (selective, some), (full, every) = (
        backward(tiny_model_folder, what) for what in ("none", "selective", "full")
    )
    for ours in (selective, full):
        assert len(ours) == len(plain) > 10
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert none["rsqrt"] == 0
    assert some["rsqrt"] == every["rsqrt"] > 0, "norms are computed again"
    assert some["mm"] == none["mm"] < every["mm"]
    assert some[kernel] == none[kernel] == 0 < every[kernel]


@pytest.mark.skipif(_torchs_own() is None, reason="torch 2.10 has no variable-length attention to use")
def test_a_variable_length_kernel_is_not_run_twice() -> None:
    """What CUDA attends with: on the meta device selective runs it once, full once more in the backward pass."""
    plan, found = AttentionPlan((Segment(0, 40), Segment(40, 60, 0, 30)), 60), []
    for what in ("selective", "full"):
        contexts: dict[str, Any] = {}
        if what == "selective":
            contexts["context_fn"] = partial(create_selective_checkpoint_contexts, checkpointing._policy)
        q, k, v = (torch.empty(1, 2, 60, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
        with _Counting() as counted:
            attend = lambda *x: BACKENDS["varlen"](*x, Layout(plan, "varlen"), 0.3, None, None)  # noqa: E731
            out = checkpoint(attend, q, k, v, use_reentrant=False, **contexts)
            out.backward(torch.empty_like(out))
        found.append(counted.calls["_varlen_attn"])
    assert found == [1, 2]


def test_what_is_held_are_operations_of_this_torch() -> None:
    """Every name but flash-attn's, whose package is not needed; a name that torch does not know would hold nothing."""
    importlib.import_module("torch.nn.attention.varlen")
    unknown = {name for name in checkpointing._HELD if not torch._C._jit_get_schemas_for_operator(name)}
    assert unknown == {"flash_attn::_flash_attn_varlen_forward"}


def test_the_kernel_of_flash_attn_is_not_run_twice() -> None:
    """An operation of its name, which is how the package registers it: once with selective, twice with full."""
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_varlen_forward(Tensor q) -> Tensor")
        library.impl("_flash_attn_varlen_forward", torch.clone, "CPU")
        found = []
        for contexts in ({"context_fn": partial(create_selective_checkpoint_contexts, checkpointing._policy)}, {}):
            with _Counting() as counted:
                out = checkpoint(_Flash.apply, torch.ones(3, requires_grad=True), use_reentrant=False, **contexts)
                out.sum().backward()
            found.append(counted.calls["_flash_attn_varlen_forward"])
    assert found == [1, 2]


class _Flash(torch.autograd.Function):
    """As flash-attn does it: the operation knows no gradient, the function around it keeps its output."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:
        out = torch.ops.flash_attn._flash_attn_varlen_forward(q)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * ctx.saved_tensors[0]


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_a_model_without_such_layers_is_refused(name: str) -> None:
    """Whatever the method is called in the transformers that is installed."""

    def enable(self: Any, how: dict[str, Any]) -> None:
        raise ValueError("not compatible")

    with pytest.raises(ConfigError, match="Layerless has no layers to recompute; set none"):
        recompute_activations(type("Layerless", (), {name: enable})(), "full")
