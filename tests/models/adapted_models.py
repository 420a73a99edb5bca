"""What tests of adapters share: tiny models of several architectures, an adapter on them, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from preftune.models.adapters import AdapterSpec, Base, attach
from preftune.models.load import LoadedModel, load
from preftune.tensors import TokenGroup

SMALL = {"vocab_size": 97, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": WIDE | {"tie_word_embeddings": True},
    "Qwen3": WIDE | {"head_dim": 8},
    "Gemma2": WIDE | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Phi": WIDE | {"num_key_value_heads": 4},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
LORA, DORA = AdapterSpec(rank=4, alpha=8.0), AdapterSpec(rank=4, alpha=8.0, dora=True)
IDS = torch.arange(10, 30)[None]
BASE = Base("nowhere", "0" * 64, "float64")


def build(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SMALL, **KINDS[kind])
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def group(prompt: int, *lengths: int, seed: int = 0) -> TokenGroup:
    draw = np.random.default_rng(seed)
    sizes = (prompt, *lengths)
    first, *rest = (draw.integers(3, 97, n).astype(np.int32) for n in sizes)
    return TokenGroup(first, tuple(rest), ((0, 1),), origin=f"pairs.jsonl:{seed}")


GROUPS = [group(9, 6, 11, seed=1), group(4, 3, 7, seed=2)]


def moved(model: Any, seed: int = 1) -> Any:
    """The adapter as training could have left it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return model


def adapted(folder: Path, spec: AdapterSpec = LORA, dtype: torch.dtype = torch.float32) -> LoadedModel:
    loaded = load(folder, dtype=dtype)
    base = Base(str(folder), loaded.weights_sha256, str(dtype).removeprefix("torch."))
    attach(loaded.model, spec, base, seed=0)
    return loaded


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits
