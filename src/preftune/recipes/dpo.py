"""Direct Preference Optimization: preferences in, an aligned model out (arXiv 2305.18290), for every loss of the table.

    read rows -> tokens -> groups                                             data/
    log pi_ref of every completion token, once, on disk                       parts/reference.py
    packed rows -> log-probs [C] -> responses [R] -> pairs, rankings or labels -> objective      parts/step.py
    checkpoints, metrics.jsonl, run.json, model/                              parts/common.py, engine/

The objective of a step is the weighted mean over all its rows, whatever the micro-batches were.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from preftune.config.stages import DpoConfig
from preftune.data.columns import joined
from preftune.data.packing import StepPlan
from preftune.engine.clock import Clock
from preftune.engine.parallel import World
from preftune.engine.run import Run
from preftune.equations.losses import LOSSES
from preftune.equations.objective import Objective, State, Term
from preftune.models.load import LoadedModel
from preftune.parts.adapting import to_train
from preftune.parts.common import MAY_DIFFER, Batching, Loop, open_model
from preftune.parts.ending import opened
from preftune.parts.meters import PreferenceMeter
from preftune.parts.outlook import outlook
from preftune.parts.preferences import read_preferences
from preftune.parts.reference import LiveReference, Reference, certify_start
from preftune.parts.step import Scorer, accumulate, score_together
from preftune.recipes.online import run_rounds
from preftune.records import RunCard
from preftune.tensors import PackedBatch, TokenGroup

__all__ = ["DpoConfig", "main", "train"]


def main(cfg: DpoConfig) -> RunCard:
    """Train once on the preferences of `cfg.data`, or in the rounds of `recipes/online.py`."""
    return run_rounds(cfg, train) if cfg.online else train(cfg)


def train(cfg: DpoConfig) -> RunCard:
    """Train `cfg.model` on the preferences of `cfg.data`; the result is a Hugging Face folder, `out/model`.

    Raises ConfigError, DataError, ArtifactError for input that is refused, and RunError when the run itself fails.
    """
    objective = Objective(tuple(Term(t.coefficient, LOSSES[t.loss].bind(**t.knobs)) for t in cfg.terms()))
    with opened(cfg.out, stage="dpo", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        policy, batching = open_model(cfg.model, cfg, run, read=to_train(cfg, cfg.seed))
        train, held_out = read_preferences(cfg, policy, objective, run)
        everything = joined(train, held_out)
        batching.check(policy.model, everything)

        plan = StepPlan(train, batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle)
        reference = reference_for(cfg, policy, batching, objective, everything, run)
        score = Scorer(policy.model, objective, reference)
        if reference:
            first = plan.groups_of(0, 0)
            certify_start(*score_together(score, batching, first), objective, reference, policy.model.dtype, run)
        live = reference if isinstance(reference, LiveReference) else None

        loop = Loop(
            cfg, run, plan, policy, peak_lr=cfg.peak_lr(),
            memory=objective.initial_state(), tensors=live.tensors if live else dict,
        )  # fmt: skip
        left = loop.total_steps - loop.step
        outlook(cfg, run, policy, batching, train, steps=left, reference_in_loop=live is not None)
        clock = Clock()
        for step, groups, lr in loop.steps():
            work = partial(one_step, score, loop.memory, groups, clock, run.world)
            loop.memory, meter = batching.fit(batching.share(groups), work, loop.forget)
            meter.refuse_not_finite()
            grad_norm = loop.optimizer.step(step, lr)
            if live:
                live.after_step(step, policy.model)
            clock.lap("optimizer")
            run.after_step(step, meter.metrics(clock) | {"grad_norm": grad_norm, "lr": lr})
            if held_out and loop.due(cfg.eval_every):
                loop.evaluated(evaluate(score, batching, held_out, loop.memory))
                clock = Clock()

        return loop.finish(
            results=lambda: evaluate(score, batching, held_out, loop.memory) if held_out else {},
            method=f"Preferences, loss `{' + '.join(described(term) for term in objective.terms)}`.",
        )


def one_step(
    score: Scorer,
    state: State,
    groups: Sequence[TokenGroup],
    clock: Clock,
    world: World,
    batches: Sequence[PackedBatch],
) -> tuple[State, PreferenceMeter]:
    """Add the gradient of these micro-batches, a share of the step of `groups`, to the policy's parameters."""
    meter = PreferenceMeter(score.objective)
    clock.lap("batches")
    return accumulate(score, batches, state, meter, clock, step=groups, world=world), meter


def reference_for(
    cfg: DpoConfig,
    policy: LoadedModel,
    batching: Batching,
    objective: Objective,
    groups: Sequence[TokenGroup],
    run: Run,
) -> Reference | LiveReference | None:
    """Cached log-probs where they are enough; the model itself where it moves or its distributions are read."""
    if "reference" not in objective.needs:
        return None
    if "divergence" in objective.needs or cfg.reference_moves():
        return LiveReference.of(cfg, policy, batching, run)
    return Reference.of(cfg, policy, batching, groups, run)


def evaluate(score: Scorer, batching: Batching, groups: Sequence[TokenGroup], state: State) -> dict[str, Any]:
    """The objective and the rewards on held-out rows, with 95 % intervals; nothing the losses remember is changed."""
    objective = score.objective
    meter = PreferenceMeter(objective)
    for some in [groups] if objective.coupled else batching.parts(groups):
        logps, ordered = score_together(score, batching, some)
        meter.add(ordered, logps, objective.evaluate(logps, ordered, state), state)
    return meter.held_out()


def described(term: Term) -> str:
    """`0.5*dpo(beta=0.1)`."""
    knobs = ", ".join(f"{name}={value:g}" for name, value in term.loss.knobs.items())
    weight = "" if term.coefficient == 1 else f"{term.coefficient:g}*"
    return f"{weight}{term.name}({knobs})"
