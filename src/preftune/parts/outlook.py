"""Before the first step of a run: its arithmetic, its memory and its time, by the functions of `preftune plan`.

    seconds of a step = FLOPs / (share * rate)      share of `planning`, rate of plain matrix products, measured now

So the seconds are a range, and of a model too small to fill the device they are too few. Drawing responses, a token at
a time, is bound by reading weights and not by products: no such share is known of it, so the seconds of a first rollout
are told when they have been measured.
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

from preftune.config.rl import PpoConfig
from preftune.config.sections import TrainingConfig
from preftune.data.columns import column
from preftune.engine.clock import Clock
from preftune.engine.run import Run
from preftune.engine.sharding import own_part
from preftune.models.cost import MOMENTS, Shape, Work, flops, forward_flops, memory
from preftune.models.load import LoadedModel
from preftune.parts.common import Batching
from preftune.parts.planning import SHARE_OF_PEAK, Range, sized, spoken
from preftune.parts.rollouts import Models, Sampling
from preftune.tensors import TokenGroup

__all__ = ["outlook", "outlook_of_rollouts", "pace", "product_rate", "work_of"]


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
    run.note(
        f"a step of mean lengths, on each device: {done / 1e12:.3g} TFLOP; at its fullest {sized(held.total)} "
        f"(weights and optimizer {sized(held.weights + held.masters + held.moments)}, gradients "
        f"{sized(held.gradients)}, activations {sized(held.activations)}, head {sized(held.head)}), "
        f"libraries and fragments aside; {_time(done, steps, batching.device, model.model.dtype)}"
    )


def outlook_of_rollouts(
    cfg: PpoConfig,
    run: Run,
    models: Models,
    batching: Batching,
    sampling: Sampling,
    prompts: Sequence[TokenGroup],
    *,
    steps: int,
) -> None:
    """Note `a step with every response at max_tokens: ...` of PPO or RLOO, on one device, over all prompts on average.

    What scores the responses is not counted, and of drawing them its products and its cache, but no seconds.
    """
    shapes = _shapes(models) if batching.packed and cfg.quantize == "none" else None
    if shapes is None:
        return
    policy, reference, critic = shapes
    world, lengths, reach = batching.world, column(prompts, "prompt").tolist(), [cfg.max_tokens] * cfg.n
    share = min(cfg.batch_size, len(prompts)) / len(prompts) / world.size
    mine = Work.total(Work.of(length, reach) for length in lengths).times(share)
    drawn = forward_flops(policy, mine)
    measured = sum(forward_flops(shape, mine) for shape in (policy, reference, *critic))

    passes, parts = (cfg.ppo_epochs, cfg.minibatches) if critic else (1, 1)
    again, at_once = batching.recomputed, mine.times(min(1 / parts, batching.tokens_per_batch / mine.fed))
    options: dict[str, Any] = {
        "device": batching.device.type, "moments": MOMENTS[cfg.optimizer], "recomputed": again,
        "shards": world.size if batching.sharded else 1, "rank": cfg.lora_rank,
    }  # fmt: skip
    learners = (policy, *critic)
    learnt = passes * sum(flops(one, mine, checkpointing=again == "full", rank=cfg.lora_rank) for one in learners)
    held = [memory(one, at_once, **options) for one in learners]
    stays = _bytes(models, twice=cfg.max_kl is not None) + sum(one.masters + one.moments for one in held)
    fills = sum(one.gradients + one.activations + one.head for one in held)
    rows = min(sampling.at_once, math.ceil(share * len(prompts)) * cfg.n)
    cache = rows * (max(lengths) + cfg.max_tokens) * 2 * policy.attention * policy.size
    gathered = f" and the whole policy, {sized(policy.parameters * policy.size)}" if batching.sharded else ""
    run.note(
        f"a step with every response at max_tokens, on each device: {drawn / 1e12:.3g} TFLOP to draw, "
        f"{measured / 1e12:.3g} to measure, {learnt / 1e12:.3g} to learn; at its fullest "
        f"{sized(stays + fills)} ({sized(stays)} weights and optimizers, to which drawing adds a cache of at most "
        f"{sized(cache)}{gathered}), what scores, libraries and fragments aside; to measure and learn "
        f"{_time(measured + learnt, steps, batching.device, models.policy.dtype)}; what drawing takes is told after "
        "the first step"
    )


def _shapes(models: Models) -> tuple[Shape, Shape, list[Shape]] | None:
    """Of policy, reference and, in PPO, critic, which meets no vocabulary; None where one of them is not counted."""
    policy, reference = (Shape.counted(model) for model in (models.policy, models.reference))
    if policy is None or reference is None:
        return None
    if models.critic is None:
        return policy, reference, []
    critic, own = Shape.counted(models.critic), sum(weight.numel() for weight in models.critic.parameters())
    return None if critic is None else (policy, reference, [replace(critic, vocabulary=1, parameters=own)])


def _time(done: float, steps: int, device: torch.device, dtype: torch.dtype) -> str:
    """`1 to 3 s a step, ... for 100 steps, if it reaches ...` of so many FLOPs a step."""
    rate, (low, high) = product_rate(device, dtype), SHARE_OF_PEAK
    seconds = Range(done / (high * rate), done / (low * rate))
    return (
        f"{spoken(seconds)} a step, {spoken(seconds, steps)} for {steps} steps, if it reaches {low:.0%} to {high:.0%} "
        f"of what plain products reach here, {rate / 1e12:.3g} TFLOP/s"
    )


def _bytes(models: Models, *, twice: bool) -> int:
    """Of the weights of all models on this rank, what they share counted once; `twice`: what the policy trains."""
    own = {}
    for model in (models.policy, models.reference, models.critic):
        for part in (own_part(weight)[0] for weight in (model.parameters() if model is not None else ())):
            own[part.data_ptr()] = part.nbytes
    copied = [own_part(weight)[0].nbytes for weight in models.policy.parameters() if weight.requires_grad and twice]
    return sum(own.values()) + sum(copied)


def pace(clock: Clock, tokens: int, run: Run, *, left: int, first: bool) -> dict[str, float]:
    """Completion tokens per second of the whole step, and the shares of sampling and learning.

    After the first step of a run a note says what it took, and by that the `left` ones.
    """
    seconds, shares = clock.read()
    if first and left:
        took = ", ".join(f"{name} {part * seconds:.3g} s" for name, part in shares.items())
        rest = spoken(Range(seconds, seconds), left)
        run.note(f"the first step took {seconds:.3g} s ({took}); {left} more like it take {rest}")
    return {"tokens_per_second": tokens / seconds, **{f"share_{name}": part for name, part in shares.items()}}


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
