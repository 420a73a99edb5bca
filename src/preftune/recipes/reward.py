"""A reward model: preferences in, a scalar score of responses out (Bradley-Terry, arXiv 2305.18290 section 3).

    read rows -> tokens -> groups                                              data/
    packed rows, responses fed whole -> reward at the last token [R]           models/reward_head.py
    pairs [T] or rankings [G] -> Bradley-Terry or Plackett-Luce                equations/reward_model.py
    checkpoints, metrics.jsonl, run.json, model/                               parts/common.py, engine/

A reward is known up to a c(x) only; here c is one number, chosen so that reference samples have mean reward 0.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.config.stages import RewardConfig
from preftune.data.answers import answer_groups
from preftune.data.columns import joined
from preftune.data.offers import Offer, first_without
from preftune.data.packing import StepPlan
from preftune.engine.clock import Clock
from preftune.engine.run import Run
from preftune.equations.reward_model import bradley_terry, plackett_luce
from preftune.equations.ties import TIES_AT_MOST
from preftune.errors import DataError
from preftune.models.load import LoadedModel
from preftune.models.reward_head import OFFSET, check_ends, check_rewards, load_reward_model, reward
from preftune.parts.adapting import to_train
from preftune.parts.common import MAY_DIFFER, Batching, Loop, open_model
from preftune.parts.ending import opened
from preftune.parts.outlook import outlook
from preftune.parts.reading import read_data
from preftune.parts.reward_meter import RewardMeter
from preftune.records import RunCard, SampledResponses, from_json
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup, total_weight

__all__ = ["RewardConfig", "main"]

_LACKS: dict[Offer, str] = {
    "pairs": "compares no two responses: a reward model learns from comparisons",
    "rankings": "states no order of its responses; give ranks or scores, or choose --loss bt",
    "scores": "has no score for each of its responses, which --margin reads; give scores, or leave --margin out",
}


def main(cfg: RewardConfig) -> RunCard:
    """Train a reward model from `cfg.model` on the preferences of `cfg.data`; the result is `out/model`.

    Raises ConfigError, DataError, ArtifactError for input that is refused, and RunError when the run itself fails.
    """
    with opened(cfg.out, stage="reward", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        read = to_train(cfg, cfg.seed, partial(load_reward_model, seed=cfg.seed))
        model, batching = open_model(cfg.model, cfg, run, read=read)
        batching = replace(batching, feed_last=True)
        train, held_out = read_comparisons(cfg, model, run)
        samples = reference_samples(cfg, model, run) if cfg.reference_samples else train
        everything = joined(train, held_out, samples if samples is not train else ())
        check_ends(model.model, everything)
        batching.check(model.model, everything, check=check_rewards)

        plan = StepPlan(train, batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle)
        loop = Loop(cfg, run, plan, model, peak_lr=cfg.lr)
        outlook(cfg, run, model, batching, train, steps=loop.total_steps - loop.step)
        clock = Clock()
        for step, groups, lr in loop.steps():
            work = partial(one_step, cfg, model.model, groups, clock)
            meter, batches = batching.fit(batching.share(groups), work, loop.forget)
            meter.join(run.world, batches)
            meter.refuse_not_finite()
            grad_norm = loop.optimizer.step(step, lr)
            clock.lap("optimizer")
            run.after_step(step, meter.metrics(clock) | {"grad_norm": grad_norm, "lr": lr})
            if held_out and loop.due(cfg.eval_every):
                loop.evaluated(evaluate(cfg, model.model, batching, held_out))
                clock = Clock()

        def results() -> dict[str, Any]:
            centred = centre(model.model, batching, samples)
            return (evaluate(cfg, model.model, batching, held_out, centred[OFFSET]) if held_out else {}) | centred

        return loop.finish(results=results, method=f"A reward model, loss `{cfg.described()}`; see its `{OFFSET}`.")


def one_step(
    cfg: RewardConfig, model: nn.Module, groups: Sequence[TokenGroup], clock: Clock, batches: Sequence[PackedBatch]
) -> tuple[RewardMeter, Sequence[PackedBatch]]:
    """Add the gradient of these micro-batches, a share of the step of `groups`, to the model's parameters."""
    meter = RewardMeter(cfg.unit)
    step_weight = total_weight(groups) if cfg.loss == "bt" else sum(group.weight for group in groups)
    clock.lap("batches")
    for batch in batches:
        rewards_R = reward(model, batch)
        if not batch.groups:  # this rank has no row left, but the others need its part of the weights
            rewards_R.sum().backward()
            continue
        values, weight = losses(cfg, rewards_R, batch)
        step_loss = (values * weight).sum() / step_weight
        clock.lap("forward")
        step_loss.backward()
        clock.lap("backward")
        meter.add(batch, rewards_R, values, weight)
    return meter, batches


def losses(cfg: RewardConfig, rewards_R: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """(values, weights) of the batch's pairs [T] or rankings [G], nats."""
    if cfg.loss == "bt":
        index = batch.index
        margin = cfg.margin * index.score_gap if cfg.margin and index.score_gap is not None else 0.0
        r_w, r_l = rewards_R[index.chosen], rewards_R[index.rejected]
        return bradley_terry(r_w, r_l, margin, centering=cfg.centering), index.weight
    lists = ResponseLogps(rewards_R, rewards_R, batch.lengths.to(rewards_R.dtype)).lists(batch.groups)
    return plackett_luce(lists.log_ratio, lists.rank, centering=cfg.centering), lists.weight


@torch.no_grad()
def evaluate(
    cfg: RewardConfig, model: nn.Module, batching: Batching, groups: Sequence[TokenGroup], offset: float = 0.0
) -> dict[str, Any]:
    """Loss, accuracy, calibration and the longest-wins baseline on held-out comparisons, with 95 % intervals."""

    def measured(batches: Sequence[PackedBatch]) -> RewardMeter:
        meter = RewardMeter(cfg.unit, offset)
        for batch in batches:
            rewards_R = reward(model, batch)
            if batch.groups:
                meter.add(batch, rewards_R, *losses(cfg, rewards_R, batch))
        return meter

    meter = RewardMeter(cfg.unit, offset)
    for part in batching.in_parts(groups, measured):
        meter.extend(part)
    meter.join(batching.world)
    return meter.held_out()


@torch.no_grad()
def centre(model: Any, batching: Batching, samples: Sequence[TokenGroup]) -> dict[str, float]:
    """Set the model's `reward_offset` to the mean reward of the samples: a row of weight 2 counts twice."""

    def scored(batches: Sequence[PackedBatch]) -> list[tuple[float, float]]:
        each = ((batch, [group.weight for group in batch.groups for _ in group.responses]) for batch in batches)
        return [pair for batch, weights in each for pair in zip(reward(model, batch).tolist(), weights, strict=True)]

    found = [pair for part in batching.in_parts(samples, scored) for pair in part]
    parts = batching.world.gather(found, "the rewards of the reference samples")
    values, weight = np.array([pair for part in parts for pair in part]).T
    offset = float(np.average(values, weights=weight))
    setattr(model.config, OFFSET, offset)
    std = float(np.sqrt(np.average((values - offset) ** 2, weights=weight)))
    return {OFFSET: offset, "reference_samples": len(values), "reference_std": std}


def read_comparisons(
    cfg: RewardConfig, model: LoadedModel, run: Run
) -> tuple[Sequence[TokenGroup], Sequence[TokenGroup]]:
    """(train, held-out) groups. Raises DataError naming the first row that lacks what the loss reads."""
    train, held_out = read_data(cfg, model, run, kind="preferences")
    wanted: dict[Offer, bool] = {"pairs": True, "scores": cfg.margin > 0, "rankings": cfg.loss != "bt"}
    for offer, is_read in wanted.items():
        if is_read and (lacking := first_without(joined(train, held_out), offer)):
            raise DataError(f"{lacking} {_LACKS[offer]}")
    for group in joined(train, held_out) if cfg.loss != "bt" else ():
        tied = Counter(rank for rank in group.ranks if rank != max(group.ranks))
        if max(tied.values(), default=0) > TIES_AT_MOST:
            raise DataError(f"{group.origin}: more than {TIES_AT_MOST} responses share a rank; choose --loss bt")
    return train, held_out


def reference_samples(cfg: RewardConfig, model: LoadedModel, run: Run) -> list[TokenGroup]:
    """The responses of `cfg.reference_samples`, a file that `preftune sample` wrote. Raises DataError."""
    path = Path(str(cfg.reference_samples))
    asked = []
    try:
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            record = from_json(line)
            if not isinstance(record, SampledResponses):
                raise ValueError(f"line {number} is a {type(record).__name__}, not sampled responses")
            asked += [(record.prompt, response) for response in record.responses]
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise DataError(
            f"{path}: cannot be read as samples ({problem}); `preftune sample` writes such a file"
        ) from None
    groups, _ = answer_groups(model.tokenizer, asked)
    if not groups:
        raise DataError(f"{path} holds no response to centre rewards on")
    run.record(hashes={"reference_samples": hashlib.sha256(text.encode()).hexdigest()})
    run.note(f"reference samples: {len(asked)} responses of {len(groups)} prompts from {path}")
    return groups
