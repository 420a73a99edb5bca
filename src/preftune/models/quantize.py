"""NF4 base weights below an adapter (QLoRA, arXiv 2305.14314) by bitsandbytes: 4 bits per weight, double quantised.

The frozen weights are rounded once, when they are loaded; products are computed in the model's dtype. The policy, its
reference and everything that is measured then belong to the rounded model, not to the one in the folder.

Only on CUDA: on a CPU bitsandbytes (0.50) rewrites the weights of a model in evaluation mode into a layout that has no
gradient, and goes on with a warning.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from preftune.errors import ConfigError

__all__ = ["loading_options"]


def loading_options(quantize: str, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` is told beyond a plain load: nothing for "none". Raises ConfigError where it cannot be."""
    if quantize == "none":
        return {}
    device = torch.device(device)
    if device.type != "cuda":
        raise ConfigError(
            f"quantize {quantize} needs a CUDA device, found {device.type} (which a model to be sharded is read on); "
            "train without it: --quantize none"
        )
    require_bitsandbytes(f"quantize {quantize}")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def require_bitsandbytes(what: str) -> None:
    """Raises ConfigError, in words, where bitsandbytes or what transformers needs to load with it is not installed."""
    for library in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"{what} needs {library}, which is not installed: pip install 'preftune[quant]' (and a CUDA device)"
            )
