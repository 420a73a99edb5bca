"""What each method holds in memory and does in one update, from the parts that the recipes train with.

SFT     one step on the responses of comparisons, chosen and rejected alike
DPO     one step on the comparisons, log pi_ref from the cache or from a model beside the policy
RLOO    a rollout with a reward model, one step
PPO     the same with a critic, all epochs of the rollout
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from preftune.data.packing import StepPlan
from preftune.engine.optim import Optimizer
from preftune.equations.losses import LOSSES
from preftune.equations.objective import Objective, Term
from preftune.judges.scores import Scorer as Judge
from preftune.models.attention import install
from preftune.models.reward_head import reward
from preftune.models.value_head import critic_of
from preftune.parts.common import Batching
from preftune.parts.policy_step import Learner, ppo_update, rloo_update
from preftune.parts.reference import LiveReference
from preftune.parts.rollouts import Models, Sampling, roll_out
from preftune.parts.step import Scorer
from preftune.records import Prompt, Response
from preftune.studies.rl import optimizer, seed_of
from preftune.studies.training import Gradient, imitation, preference
from preftune.studies.world import Start
from preftune.tensors import Ids, TokenGroup
from preftune.worlds.enumerable import EOS_ID, Labels

__all__ = ["METHODS", "Update"]


@dataclass(frozen=True)
class Update:
    """What a method holds and does; the policy is the first model."""

    models: Sequence[nn.Module]
    take: Callable[[int], Sequence[TokenGroup]]
    """The n-th update, from 1; returns the prompts and responses it was of."""
    optimizers: Sequence[Optimizer]
    """Whose moments are held between updates."""


def sft(start: Start, rows: Batching, size: int) -> Update:
    """Supervised fine-tuning on the responses of the pairs."""
    model, pairs = start.policy().model, start.pairs(Labels())
    groups = [TokenGroup(pair.prompt, (said,), origin=pair.origin) for pair in pairs for said in pair.responses]
    plan = StepPlan(groups, batch_size=size, seed=start.seed, shuffle=True)
    return stepping(start, [model], imitation(model, rows, plan), plan)


def dpo(start: Start, rows: Batching, size: int, *, live: bool) -> Update:
    """DPO with log pi_ref from the cache, or with the reference beside the policy."""
    model, pairs = start.policy().model, start.pairs(Labels())
    objective = Objective((Term(1.0, LOSSES["dpo"].bind(beta=1.0)),))
    reference = LiveReference(start.reference.model.requires_grad_(False), True, None) if live else start.anchor(pairs)
    plan = StepPlan(pairs, batch_size=size // 2, seed=start.seed, shuffle=True)
    gradient = preference(Scorer(model, objective, reference), objective, rows, plan)
    return stepping(start, [model, start.reference.model] if live else [model], gradient, plan)


def stepping(start: Start, models: Sequence[nn.Module], gradient: Gradient, plan: StepPlan) -> Update:
    """A gradient of the plan's steps, and the optimizer."""
    course = start.setting.preferences
    own = optimizer(models[0], course, start.seed)

    def take(step: int) -> Sequence[TokenGroup]:
        gradient(step)
        own.step(step, course.lr)
        return plan.groups_of(*divmod(step - 1, plan.steps_per_epoch))

    return Update(models, take, [own])


def reinforced(start: Start, rows: Batching, size: int, *, critic: bool) -> Update:
    """PPO, or without a critic RLOO: rollout, reward model and update."""
    how = start.setting.ppo if critic else start.setting.rloo
    loaded, judge = start.policy(), start.reward_model()
    valuer: Any = critic_of(start.reward_model()) if critic else None
    for model in (judge, valuer):
        if model is not None:
            install(model)
    models = Models(loaded.model, start.reference.model, valuer, loaded.tokenizer)
    policy = Learner(loaded.model, optimizer(loaded.model, how.course, start.seed))
    sampling = Sampling(
        n=size // len(start.prompts), max_tokens=start.world.max_tokens, at_once=size, missing_eos="none"
    )
    learner = Learner(valuer, optimizer(valuer, how.course, start.seed)) if critic else None

    def take(step: int) -> Sequence[TokenGroup]:
        rollout = roll_out(models, start.prompts, asking(start, judge, rows), rows, sampling, seed=seed_of(start, step))
        if learner is None:
            rloo_update(policy, rollout, rows, kl_coef=1.0, lr=how.course.lr, update=step)
        else:
            ppo_update(
                policy, learner, rollout, rows, how.knobs, kl_coef=1.0, lr=how.course.lr, critic_lr=how.critic_lr,
                seed=start.seed, update=step,
            )  # fmt: skip
        return rollout.groups

    held = [m for m in (loaded.model, start.reference.model, judge, valuer) if isinstance(m, nn.Module)]
    return Update(held, take, [each.optimizer for each in (policy, learner) if each is not None])


def asking(start: Start, model: object, rows: Batching) -> Judge:
    """The reward model itself, a forward per response."""
    whole = replace(rows, feed_last=True)

    @torch.no_grad()
    def judge(asked: Sequence[tuple[Prompt, Response]]) -> list[float]:
        groups = [TokenGroup(ids(start.world.prompt_ids(str(x))), (ids(said(y)),)) for x, y in asked]
        return torch.cat([reward(model, batch) for batch in whole(groups)]).tolist()

    def said(response: Response) -> list[int]:
        return [*start.world.ids(response.text), *([EOS_ID] if response.finished else [])]

    return judge


def ids(given: Sequence[int]) -> Ids:
    return np.array(given, dtype=np.int32)


METHODS: Mapping[str, Callable[[Start, Batching, int], Update]] = {
    "SFT": sft,
    "DPO": partial(dpo, live=False),
    "DPO, reference in the loop": partial(dpo, live=True),
    "RLOO": partial(reinforced, critic=False),
    "PPO": partial(reinforced, critic=True),
}
"""(start, rows, responses of an update) -> what to take."""
