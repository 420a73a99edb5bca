"""Supervised fine-tuning: demonstrations in, a model that imitates them out.

On preference data the chosen side is imitated (Preferred-FT, arXiv 2305.18290, section 4): the way to a reference
policy when there is no SFT model. The prompt is never trained on; every completion token counts the same:

    L = - sum over tokens of weight * log pi(token | before) / sum over tokens of weight
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from preftune.config.stages import SftConfig
from preftune.data.columns import joined
from preftune.data.packing import StepPlan
from preftune.engine.clock import Clock
from preftune.equations.likelihood import negative_log_likelihood
from preftune.models.logprobs import score
from preftune.parts.adapting import to_train
from preftune.parts.common import MAY_DIFFER, Batching, Loop, open_model
from preftune.parts.ending import opened
from preftune.parts.meters import TokenMeter, token_weights
from preftune.parts.outlook import outlook
from preftune.parts.reading import read_data
from preftune.records import RunCard
from preftune.tensors import PackedBatch, TokenGroup

__all__ = ["SftConfig", "main"]


def main(cfg: SftConfig) -> RunCard:
    """Fine-tune `cfg.model` on the responses of `cfg.data`; the result is a Hugging Face folder, `out/model`."""
    with opened(cfg.out, stage="sft", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        model, batching = open_model(cfg.model, cfg, run, read=to_train(cfg, cfg.seed))
        train, held_out = read_data(cfg, model, run, kind="demonstrations")
        batching.check(model.model, joined(train, held_out))

        plan = StepPlan(train, batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle)
        loop = Loop(cfg, run, plan, model, peak_lr=cfg.lr)
        outlook(cfg, run, model, batching, train, steps=loop.total_steps - loop.step)
        clock = Clock()
        for step, groups, lr in loop.steps():
            work = partial(one_step, model.model, groups, clock)
            meter, batches = batching.fit(batching.share(groups), work, loop.forget)
            meter.join(run.world, batches)
            meter.refuse_not_finite()
            grad_norm = loop.optimizer.step(step, lr)
            clock.lap("optimizer")
            run.after_step(step, meter.metrics(clock) | {"grad_norm": grad_norm, "lr": lr})
            if held_out and loop.due(cfg.eval_every):
                loop.evaluated(evaluate(model.model, batching, held_out))
                clock = Clock()

        return loop.finish(
            results=lambda: evaluate(model.model, batching, held_out) if held_out else {},
            method="Supervised fine-tuning: mean negative log-likelihood of the completion tokens.",
        )


def one_step(
    model: nn.Module, groups: Sequence[TokenGroup], clock: Clock, batches: Sequence[PackedBatch]
) -> tuple[TokenMeter, Sequence[PackedBatch]]:
    """Add the gradient of these micro-batches, a share of the step of `groups`, to the model's parameters."""
    meter = TokenMeter()
    step_tokens = sum(group.weight * len(r) for group in groups for r in group.responses)
    clock.lap("batches")
    for batch in batches:
        values_C = negative_log_likelihood(score(model, batch))
        step_loss = (values_C * token_weights(batch)).sum() / step_tokens
        clock.lap("forward")
        step_loss.backward()
        clock.lap("backward")
        meter.add(batch, values_C)
    return meter, batches


def evaluate(model: nn.Module, batching: Batching, groups: Sequence[TokenGroup]) -> dict[str, Any]:
    """Loss and perplexity per completion token on held-out responses, with a 95 % interval over responses."""

    @torch.no_grad()
    def measured(batches: Sequence[PackedBatch]) -> TokenMeter:
        meter = TokenMeter()
        for batch in batches:
            meter.add(batch, negative_log_likelihood(score(model, batch)))
        return meter

    meter = TokenMeter()
    for part in batching.in_parts(groups, measured):
        meter.extend(part)
    meter.join(batching.world)
    return meter.held_out()
