"""Direct Preference Optimization: pairs in, an aligned model out (arXiv 2305.18290).

    read pairs -> tokens -> groups                                            data/
    log pi_ref of every completion token, once, on disk                       recipes/reference.py
    packed rows -> log-probs [C] -> responses [R] -> pairs [T] -> loss [T]    the loop below
    checkpoints, metrics.jsonl, run.json, model/                              recipes/common.py, engine/

The objective of a step is the weighted mean over all its pairs, whatever the micro-batches were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from preftune.data.packing import StepPlan
from preftune.engine.clock import Clock
from preftune.engine.run import Run
from preftune.equations.losses import LOSSES, BoundLoss
from preftune.models.logprobs import score
from preftune.recipes.common import MAY_DIFFER, Batching, Loop, open_model, read_data
from preftune.recipes.configs import DpoConfig
from preftune.recipes.meters import PairMeter
from preftune.recipes.reference import Reference, certify_start
from preftune.records import RunCard
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup, total_weight

__all__ = ["DpoConfig", "main"]


def main(cfg: DpoConfig) -> RunCard:
    """Train `cfg.model` on the preference pairs of `cfg.data`; the result is a Hugging Face folder, `out/model`.

    Raises ConfigError, DataError, ArtifactError for input that is refused, and RunError when the run itself fails.
    """
    loss = LOSSES[cfg.loss]
    objective = loss.bind(**cfg.loss_knobs())
    with Run.open(cfg.out, stage="dpo", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        policy, batching = open_model(cfg.model, cfg, run)
        train, held_out = read_data(cfg, policy.tokenizer, run, kind="preferences")
        batching.check(policy.model, [*train, *held_out])

        plan = StepPlan(train, batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle)
        reference = None
        if loss.needs_reference:
            reference = Reference.of(cfg, policy, batching, [*train, *held_out], run)
            certify_start(policy.model, batching, plan.groups_of(0, 0), objective, reference, run)

        loop = Loop(cfg, run, plan, policy, peak_lr=loss.learning_rate if cfg.lr is None else cfg.lr)
        clock = Clock()
        for step, groups, lr in loop.steps():
            meter = PairMeter(objective)
            step_pairs = total_weight(groups)
            for batch in batching(groups):
                clock.lap("batches")
                logps = response_logps(policy.model, batch, reference)
                pairs = logps.pairs(batch.index)
                values_T = objective.values(pairs)
                step_loss = (values_T * pairs.weight).sum() / step_pairs
                clock.lap("forward")
                step_loss.backward()
                clock.lap("backward")
                meter.add(batch, logps, pairs, values_T)
            meter.refuse_not_finite()
            grad_norm = loop.optimizer.step(step, lr)
            clock.lap("optimizer")
            run.after_step(step, meter.metrics(clock) | {"grad_norm": grad_norm, "lr": lr})
            if held_out and loop.due(cfg.eval_every):
                loop.evaluated(evaluate(policy.model, batching, held_out, objective, reference))
                clock = Clock()

        return loop.finish(
            results=lambda: evaluate(policy.model, batching, held_out, objective, reference) if held_out else {},
            method=f"Preference pairs, loss `{cfg.loss}` with {dict(objective.knobs)}.",
        )


def response_logps(policy: nn.Module, batch: PackedBatch, reference: Reference | None) -> ResponseLogps:
    """Token log-probs [C] of policy and reference, subtracted and summed over each response [R]; float32 nats."""
    reference_C = reference.lookup(batch) if reference else None
    return ResponseLogps.from_tokens(score(policy, batch), batch.lengths, reference_C)


def evaluate(
    policy: nn.Module,
    batching: Batching,
    groups: Sequence[TokenGroup],
    objective: BoundLoss,
    reference: Reference | None,
) -> dict[str, Any]:
    """Loss, implicit-reward accuracy and margin on held-out pairs, with 95 % intervals over pairs."""
    meter = PairMeter(objective)
    with torch.no_grad():
        for batch in batching(groups):
            logps = response_logps(policy, batch, reference)
            pairs = logps.pairs(batch.index)
            meter.add(batch, logps, pairs, objective.values(pairs))
    return meter.held_out()
