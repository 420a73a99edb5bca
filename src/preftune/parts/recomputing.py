"""Which activations are recomputed, and how many tokens are computed at once, where nobody says: what memory holds.

    held = masters + moments + gradients + activations(what, tokens) + head(tokens)          models/cost.py
    the first of  none, selective, full  x  tokens_per_batch, its half, its quarter ...  with  held <= 0.7 free

Smaller micro-batches are tried before recomputing: while they fill the device they cost next to nothing, recomputing
costs a fifth to a third of a step. Neither changes a number but by rounding (smaller
micro-batches). What the estimate does not foresee is met by `fitting`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch

from preftune.config.sections import Machine, TrainingConfig
from preftune.engine.memory import free_memory
from preftune.engine.run import Run
from preftune.models.checkpointing import Recomputed
from preftune.models.cost import MOMENTS, Shape, Work, memory
from preftune.parts.planning import USABLE

__all__ = ["LEAST", "choose", "recomputation"]

LEAST = 2048
"""Tokens that still fill a device."""

Held = Callable[[Recomputed, int], float]


def choose(free: float, tokens: int, longest: int, held: Held) -> tuple[Recomputed, int]:
    """(what is recomputed, tokens at once): the first that fits, else the least.

    `held(what, tokens)`: bytes. A micro-batch has room for the `longest` row, and not less than LEAST tokens.
    """
    sizes = [tokens]
    while sizes[-1] // 2 >= max(longest, LEAST):
        sizes.append(sizes[-1] // 2)
    every = [(what, size) for what in get_args(Recomputed) for size in sizes]
    return next((one for one in every if held(*one) <= USABLE * free), every[-1])


def recomputation(
    cfg: Machine, model: Any, device: torch.device, run: Run, *, packed: bool, role: str
) -> tuple[Recomputed, int]:
    """`choose` with the memory that is free now, told in a note; of several processes the tightest decides for all.

    Nothing is recomputed where the estimate does not reach: then a lack of memory is met when it comes.
    """
    if role != "model" or not isinstance(cfg, TrainingConfig):
        return "none", cfg.tokens_per_batch  # nothing is learned by it
    world, free = run.world, free_memory(device)
    least = -world.largest(-(free or 0), "free memory")
    shape = Shape.counted(model) if packed and least and cfg.quantize == "none" else None
    if shape is None:
        run.note("activation_checkpointing auto: none, because the memory of this model or device cannot be foreseen")
        return "none", cfg.tokens_per_batch
    shards = world.size if cfg.shard else 1

    def held(what: Recomputed, tokens: int) -> float:
        """Beside the weights, which are there already, unless they are yet to be shared out."""
        parts = memory(
            shape, Work(tokens, tokens, tokens * cfg.max_length / 2), device=device.type, recomputed=what,
            rank=cfg.lora_rank, shards=shards, moments=MOMENTS[cfg.optimizer],
        )  # fmt: skip
        return parts.total - (parts.weights if shards == 1 else 0)

    what, tokens = choose(least, cfg.tokens_per_batch, cfg.max_length, held)
    run.note(
        f"activation_checkpointing auto: {what}, at most {tokens} tokens at once: about {held(what, tokens) / 1e9:.2g} "
        f"GB beside the weights, {least / 1e9:.3g} GB are free"
    )
    return what, tokens
