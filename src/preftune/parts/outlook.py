"""Before the first step of a run: its arithmetic, its memory and its time, by the functions of `preftune plan`.

    seconds of a step = FLOPs / (share * rate)      share of `planning`, rate of plain matrix products, measured now

So the seconds are a range, and of a model too small to fill the device they are too few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from preftune.config.sections import TrainingConfig
from preftune.data.columns import column
from preftune.engine.run import Run
from preftune.models.cost import MOMENTS, Shape, Work, flops, memory
from preftune.models.load import LoadedModel
from preftune.parts.common import Batching
from preftune.parts.planning import SHARE_OF_PEAK, Range, spoken
from preftune.tensors import TokenGroup

__all__ = ["outlook", "product_rate", "work_of"]


def outlook(
    cfg: TrainingConfig,
    run: Run,
    model: LoadedModel,
    batching: Batching,
    groups: Sequence[TokenGroup],
    *,
    steps: int,
    reference_in_loop: bool = False,
) -> None:
    """Note `a step: ... TFLOP, ... GB, ... s`, at mean lengths and on one device, of what the cost model counts.

    `steps` are those to come. A model whose last tokens are fed, a reward model, meets no vocabulary.
    """
    shape = Shape.counted(model.model) if batching.packed and cfg.quantize == "none" else None
    if shape is None:
        return
    if batching.feed_last:
        shape = replace(shape, vocabulary=1)
    rows = int(np.maximum(column(groups, "pairs"), 1).sum())
    mine = work_of(groups, feed_last=batching.feed_last).times(min(cfg.batch_size, rows) / rows / batching.world.size)
    at_once = mine.times(min(1.0, batching.tokens_per_batch / mine.fed))
    options: dict[str, Any] = {"rank": cfg.lora_rank, "reference_in_loop": reference_in_loop}
    held = memory(
        shape, at_once, device=batching.device.type, moments=MOMENTS[cfg.optimizer], recomputed=batching.recomputed,
        shards=batching.world.size if batching.sharded else 1, **options,
    )  # fmt: skip
    done = flops(shape, mine, checkpointing=batching.recomputed == "full", **options)
    rate = product_rate(batching.device, model.model.dtype)
    low, high = SHARE_OF_PEAK
    seconds = Range(done / (high * rate), done / (low * rate))
    run.note(
        f"a step of mean lengths, on each device: {done / 1e12:.3g} TFLOP; at its fullest {held.total / 1e9:.2g} GB "
        f"(weights and optimizer {(held.weights + held.masters + held.moments) / 1e9:.2g}, gradients "
        f"{held.gradients / 1e9:.2g}, activations {held.activations / 1e9:.2g}, head {held.head / 1e9:.2g}), "
        f"libraries and fragments aside; {spoken(seconds)} a step, {spoken(seconds, steps)} for {steps} steps, if it "
        f"reaches {low:.0%} to {high:.0%} of what plain products reach here, {rate / 1e12:.3g} TFLOP/s"
    )


def work_of(groups: Sequence[TokenGroup], *, kept: NDArray[np.bool_] | None = None, feed_last: bool = False) -> Work:
    """The sum of `Work.of` all groups, or the `kept` ones, from columns."""
    prompt, tokens, responses, squares = (
        column(groups, name) if kept is None else column(groups, name)[kept]
        for name in ("prompt", "tokens", "responses", "squares")
    )
    attended = (prompt**2 + 2 * prompt * tokens + squares).sum() / 2
    if feed_last:
        return Work(float((prompt + tokens).sum()), float(responses.sum()), float(attended))
    return Work(float((prompt + tokens - responses).sum()), float(tokens.sum()), float(attended))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of plain matrix products on this device, as it is now: the best of a few, milliseconds each."""
    size = 4096 if device.type == "cuda" else 512
    one, other, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    best = math.inf
    for _ in range(6):  # the first warms up
        began = time.perf_counter()
        torch.mm(one, other, out=out)
        float(out[0, 0])  # waits for it
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
