"""Activations recomputed in the backward pass instead of held: all of a layer, or all but its matrix products.

    none        everything is held; nothing is computed twice
    selective   outputs of linear layers and of fused attention are held, what lies between is cheap and computed again
    full        one hidden state per layer is held; every layer is computed again, a third more arithmetic

No number changes: what is computed again is computed alike.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from preftune.errors import ConfigError

__all__ = ["Recomputed", "recompute_activations"]

Recomputed = Literal["none", "selective", "full"]

_HELD = frozenset({
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
})  # fmt: skip
"""Expensive, with outputs of the size of a hidden state. Scores of block attention grow with the square: not held.

By name: the last two, `varlen` of torch and of flash-attn, are operations only once their module is imported. What is
compiled as a whole, `flex`, shows no operation in here and is computed again.
"""


def recompute_activations(model: Any, what: Recomputed) -> None:
    """From now on in training mode. Raises ConfigError when the architecture has no layers that can be recomputed."""
    if what == "none":
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    newer = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.23, which warns of the older name
    try:
        (model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable)(how)
    except ValueError as error:
        raise ConfigError(
            f"activation_checkpointing {what}: {type(model).__name__} has no layers to recompute; set none"
        ) from error
    model.train()  # transformers checkpoints in training mode only; dropout is 0 everywhere


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    held = operation.name() in _HELD
    return CheckpointPolicy.MUST_SAVE if held else CheckpointPolicy.PREFER_RECOMPUTE
