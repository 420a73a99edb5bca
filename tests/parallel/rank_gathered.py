"""What every rank of the memory test runs: a micro-batch with a live reference, and what is gathered in the middle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_stages import parameter_groups
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.data.packing import pack
from preftune.engine.parallel import leave, world
from preftune.engine.sharding import shard
from preftune.models.attention import install
from preftune.models.layers import decoder_layers
from preftune.models.logprobs import score_tokens
from preftune.tensors import TokenGroup


def config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1280, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip


def gathered(model: Any) -> int:
    """Bytes of weights that are whole now, or arriving."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    total = 0
    for group in (group for unit in units for group in parameter_groups(unit)):
        wholes = [p._unsharded_param for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
        arriving = [group._all_gather_result.all_gather_output] if group._all_gather_result else []
        total += sum(tensor.untyped_storage().size() for tensor in (*wholes, *arriving))
    return total


def fullest(tied: bool) -> tuple[int, int]:
    """(of the policy, of the reference) at the fullest moment of the second of two micro-batches."""
    policy, reference = (LlamaForCausalLM(config(tied)).to(torch.bfloat16) for _ in range(2))
    reference.requires_grad_(False)
    seen: list[tuple[int, int]] = []

    def look(*_: Any) -> None:
        seen.append((gathered(policy), gathered(reference)))

    def inside(_: Any, __: Any, out: Any) -> None:
        look()
        if out[0].requires_grad:
            out[0].register_hook(look)

    for model in (policy, reference):
        assert install(model) is None
        shard(model, decoder_layers(model), world(), torch.device("cpu"))
        for layer in decoder_layers(model):
            layer.get_submodule("self_attn").register_forward_hook(inside)
    ids = np.arange(20, dtype=np.int32)
    for _ in range(2):
        seen.clear()
        scores = score_tokens(policy, pack([TokenGroup(ids, (ids, ids))]), reference_model=reference)
        look()
        torch.autograd.backward(scores.logps.sum())
    assert len(seen) == 4 + 4 + 1 + 4
    return max(seen, key=sum)


def main(out: Path) -> None:
    (out / f"{world().rank}.json").write_text(json.dumps([fullest(False), fullest(True)]))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
