"""The limit that `benchmarks/` divides by is the arithmetic of a packed step, counted by torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.data.packing import pack
from preftune.models.attention import install
from preftune.models.logprobs import score
from preftune.tensors import TokenGroup

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTHS = [(31, 17, 12), (5, 3, 9), (40, 2, 2)]


def benchmark(name: str) -> ModuleType:
    """A file of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


LIMIT = benchmark("limit")
SHAPE = LIMIT.Shape(hidden=32, intermediate=48, layers=3, heads=4, kv_heads=2, vocabulary=97, head_size=8)


def groups() -> list[TokenGroup]:
    """Random ids of LENGTHS; the first token of a response tells the two apart."""
    rng = np.random.default_rng(0)

    def ids(n: int, first: int) -> np.ndarray:
        return np.concatenate(([first], rng.integers(10, 90, n - 1))).astype(np.int32)

    return [TokenGroup(ids(p, 3), (ids(c, 5), ids(r, 6)), ((0, 1),)) for p, c, r in LENGTHS]


def test_matrix_products_of_a_packed_step_are_the_limit() -> None:
    """Body and head of a step through our rows take 6 N_b U + 6 V d T FLOP, less what nobody reads, to the last one.

    That is 6 M (U - T): the last layer's feed-forward of M weights on prompt tokens (`models/last_layer.py`).
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    assert install(model) is None
    batch = pack(groups())
    with FlopCounterMode(display=False) as counter:
        score(model, batch).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "bmm" not in str(op))
    attention = LIMIT.limit_flops(LENGTHS, SHAPE) - LIMIT.limit_flops(LENGTHS, without_attention())
    unread = LIMIT.unique_tokens(LENGTHS) - sum(c + r for _, c, r in LENGTHS)
    assert products == LIMIT.limit_flops(LENGTHS, SHAPE) - attention - 6 * 3 * 32 * 48 * unread
    assert LIMIT.unique_tokens(LENGTHS) == batch.plan.length  # type: ignore[union-attr]


def without_attention() -> object:
    """SHAPE with the same matrices whose attention is free: one head of size 0, its projections moved to the MLP."""
    moved = SHAPE.body // SHAPE.layers / (3 * SHAPE.hidden)
    return LIMIT.Shape(32, moved, 3, 0, 0, 97, 8)


def test_attention_counts_every_visible_pair() -> None:
    """The rest is 3.5 * 4 layers d_attn FLOP for each (query, key) pair of prompt and responses."""
    p, c, r = 400, 90, 60
    causal = lambda n: n * (n + 1) // 2  # noqa: E731
    visible = causal(p) + p * (c + r) + causal(c) + causal(r)
    attention = LIMIT.limit_flops([(p, c, r)], SHAPE) - LIMIT.limit_flops([(p, c, r)], without_attention())
    assert attention == pytest.approx(3.5 * 4 * 3 * 4 * 8 * visible, rel=5e-3)


def test_matrix_products_are_timed() -> None:
    """Between a millionth and a millionfold of what any processor does, so that no unit is lost."""
    assert 1e7 < LIMIT.gemm_rate("float32", size=128, seconds=0.01) < 1e13
