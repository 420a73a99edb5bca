"""Tiny random models of every architecture whose packed rows are claimed to be exact, and groups to feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from preftune.tensors import TokenGroup

VOCABULARY = 131
WINDOW = 5  # shorter than every sequence, so that sliding windows cut


def llama_like(kind: str, **further: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=further.pop("num_hidden_layers", 2),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # far enough from uniform that a misplaced token shows
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **further,
    )


# Gemma 3: five sliding layers, then a full one. Gemma 2: softcap in attention and on the logits.
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama_like("Llama", tie_word_embeddings=True),
    "qwen2": lambda: llama_like("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: llama_like("Qwen3", head_dim=8),
    "mistral": lambda: llama_like("Mistral", sliding_window=WINDOW),
    "gemma2": lambda: llama_like(
        "Gemma2",
        head_dim=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
    ),
    "gemma3": lambda: llama_like("Gemma3Text", head_dim=8, sliding_window=WINDOW, num_hidden_layers=6),
    "phi3": lambda: llama_like("Phi3", sliding_window=WINDOW),
    "olmo2": lambda: llama_like("Olmo2"),
    "cohere": lambda: llama_like("Cohere", logit_scale=0.3),
    "granite": lambda: llama_like("Granite", logits_scaling=3.0),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2, rotary_pct=0.5,
    ),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=dtype).eval()


def groups_of(k: int) -> list[TokenGroup]:
    """Four groups of k responses: unequal, with a shared beginning, one token long, one continuing another."""
    rng = np.random.default_rng(k)

    def draw(n: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, n).astype(np.int32)

    def group(prompt: int, *responses: np.ndarray) -> TokenGroup:
        return TokenGroup(draw(prompt), responses[:k], ((0, 1),), origin=f"row of {prompt}")

    shared, long = draw(4), draw(9)
    return [
        group(9, draw(6), draw(11), draw(2), draw(7)),
        group(3, *(np.concatenate((shared, draw(n))) for n in (5, 2, 8, 1))),
        group(12, draw(1), draw(8), draw(1), draw(1)),
        group(6, long, long[:5], long[:1], draw(3)),
    ]
