"""One rollout -> one update of the policy: PPO (arXiv 1707.06347, 1909.08593) or RLOO (arXiv 2402.14740).

    ppo_update(policy, critic, rollout, batching, knobs, *, kl_coef, lr, critic_lr, seed, update) -> metrics
    rloo_update(policy, rollout, batching, *, kl_coef, lr, update) -> metrics

`policy` and `critic` are `Learner`s: a model and its own optimizer. They share no weight, so each has its learning rate
and its gradient is clipped alone: one optimizer over both would let a large value error shorten the policy's step, and
the usual value coefficient would do nothing else, because Adam divides it out again. `update` counts rollouts from 1.
Neither needs a run folder; weights change in place, random numbers are a function of (seed, update).

An update's gradient is that of a mean over all completion tokens (PPO) or responses (RLOO) of the minibatch, however it
is split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preftune.engine.optim import Optimizer
from preftune.equations.policy_gradient import (
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_rewards,
    policy_gradient_loss,
    rloo_advantages,
    value_clip_fraction,
    whiten,
)
from preftune.errors import RunError
from preftune.models.logprobs import score_tokens
from preftune.models.value_head import token_values
from preftune.parts.common import Batching
from preftune.parts.policy_meter import Means
from preftune.parts.rollouts import Rollout, rows_of
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup

__all__ = ["Learner", "PpoKnobs", "ppo_update", "rloo_update"]


@dataclass(frozen=True)
class Learner:
    """A model and the optimizer of its weights."""

    model: Any
    optimizer: Optimizer


@dataclass(frozen=True, kw_only=True)
class PpoKnobs:
    """What PPO does with a rollout; the defaults are those of its published use on language."""

    epochs: int = 4
    """Passes over the rollout, each in a fresh permutation of its prompts."""
    minibatches: int = 1
    """Optimizer steps per pass; a prompt's responses stay together."""
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    """Scale token rewards to variance 1, keeping their mean; advantages are whitened in any case."""


def ppo_update(
    policy: Learner,
    critic: Learner,
    rollout: Rollout,
    batching: Batching,
    knobs: PpoKnobs,
    *,
    kl_coef: float,
    lr: float,
    critic_lr: float,
    seed: int,
    update: int,
) -> dict[str, float]:
    """epochs * minibatches steps of both; what was seen on the way as means over tokens. Raises NotFinite, RunError."""
    if rollout.values is None:
        raise RunError("PPO needs the values of the rollout: give it a critic")
    mask = rollout.mask
    rewards = kl_rewards(rollout.logps, rollout.ref_logps, mask, rollout.scores, kl_coef)
    if knobs.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    raw = gae(rewards, rollout.values, mask, gamma=knobs.gamma, lam=knobs.lam)
    returns, advantages = raw + rollout.values, whiten(raw, mask)
    seen = Means()
    first = (update - 1) * knobs.epochs * knobs.minibatches + 1
    tables = rollout.logps, advantages, rollout.values, returns
    for step, groups in enumerate(_minibatches(rollout.groups, knobs, seed, update), start=first):
        tokens = sum(len(response) for group in groups for response in group.responses)
        work = partial(_ppo_gradient, policy, critic, rollout, tables, knobs, tokens, step == first)
        seen.take(batching.fit(batching.share(groups), work, partial(_forget, policy, critic)))
        seen.add(1, grad_norm=policy.optimizer.step(step, lr), critic_grad_norm=critic.optimizer.step(step, critic_lr))
    explained = 1 - raw[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-12)
    means = seen.means(batching.world)
    return means | {
        "ratio_var": means["ratio_var"] - (means["ratio_mean"] - 1) ** 2,
        "value_mean": float(rollout.values[mask].mean()),
        "return_mean": float(returns[mask].mean()),
        "return_var": float(returns[mask].var(correction=0)),
        "explained_variance": float(explained),
    }


def _ppo_gradient(
    policy: Learner,
    critic: Learner,
    rollout: Rollout,
    tables: tuple[Tensor, ...],
    knobs: PpoKnobs,
    tokens: int,
    is_first: bool,
    batches: Sequence[PackedBatch],
) -> Means:
    """Add the gradients of these micro-batches, of a minibatch of so many tokens, to the parameters of both."""
    seen = Means()
    for batch, rows in zip(batches, rows_of(batches, rollout.groups), strict=True):
        old, advantage, value, target = _tokens(rows, rollout.mask, *tables)
        logps = score_tokens(policy.model, batch, temperature=rollout.temperature).logps
        values = token_values(critic.model, batch)
        if not batch.groups:  # this rank has no row left, but the others need its part of the weights
            (logps.sum() + values.sum()).backward()
            continue
        policy_loss = clipped_policy_loss(logps, old, advantage, clip=knobs.clip)
        value_loss = clipped_value_loss(values, value, target, clip=knobs.value_clip)
        ((policy_loss.sum() + value_loss.sum()) / tokens).backward()
        ratio = (logps.detach() - old).exp()
        seen.add(
            len(old),
            policy_loss=policy_loss.detach().mean(),
            value_loss=value_loss.detach().mean(),
            approx_kl=approx_kl(logps, old),
            clip_fraction=clip_fraction(logps, old, advantage, clip=knobs.clip),
            value_clip_fraction=value_clip_fraction(values, value, target, clip=knobs.value_clip),
            ratio_mean=ratio.mean(),
            ratio_var=(ratio - 1).square().mean(),  # less (mean - 1)^2, later: however the step is split
        )
        if is_first:
            seen.add(len(old), first_approx_kl=approx_kl(logps, old))
    return seen


def rloo_update(
    policy: Learner, rollout: Rollout, batching: Batching, *, kl_coef: float, lr: float, update: int
) -> dict[str, float]:
    """One step along the unbiased gradient of J: whole responses as actions, baseline the prompt's other responses.

    A prompt with a single scored response has no baseline: it is left out and counted in `alone`. Raises RunError when
    no prompt has two.
    """
    groups = [group for group in rollout.groups if len(group.responses) >= 2]
    if not groups:
        raise RunError("no prompt of the rollout has two scored responses, which leave-one-out compares; raise n")
    returns = kl_rewards(rollout.logps, rollout.ref_logps, rollout.mask, rollout.scores, kl_coef).sum(-1)
    sizes = [len(group.responses) for group in rollout.groups]
    advantages = torch.cat([
        rloo_advantages(own[None])[0] if len(own) >= 2 else torch.zeros_like(own) for own in returns.split(sizes)
    ])  # fmt: skip
    responses = sum(len(group.responses) for group in groups)

    def gradient(batches: Sequence[PackedBatch]) -> Means:
        seen = Means()
        for batch, rows in zip(batches, rows_of(batches, rollout.groups), strict=True):
            (old,) = _tokens(rows, rollout.mask, rollout.logps)
            logps = score_tokens(policy.model, batch, temperature=rollout.temperature).logps
            if not batch.groups:  # as above
                logps.sum().backward()
                continue
            loss = policy_gradient_loss(ResponseLogps.from_tokens(logps, batch.lengths).policy, advantages[rows])
            (loss.sum() / responses).backward()
            seen.add(len(loss), policy_loss=loss.detach().mean())
            seen.add(len(old), first_approx_kl=approx_kl(logps, old))
        return seen

    seen = batching.fit(batching.share(groups), gradient, partial(_forget, policy))
    seen.add(1, grad_norm=policy.optimizer.step(update, lr))
    return seen.means(batching.world) | {
        "advantage_std": float(advantages.std(correction=0)),
        "alone": sum(size < 2 for size in sizes),
    }


def _forget(*learners: Learner) -> None:
    """The gradients of an attempt for which there was no memory."""
    for learner in learners:
        learner.model.zero_grad()
        learner.optimizer.zero_grad()


def _minibatches(groups: Sequence[TokenGroup], knobs: PpoKnobs, seed: int, update: int) -> Iterator[list[TokenGroup]]:
    """Every pass a fresh permutation, a function of (seed, update, pass), cut into equal parts.

    Inside a part prompts keep their order: a sum does not mind, and with one part the rows are packed as in the
    rollout, so that the first ratio is 1 to the last bit.
    """
    for epoch in range(knobs.epochs):
        order = np.random.default_rng([seed, update, epoch]).permutation(len(groups))
        for part in np.array_split(order, min(knobs.minibatches, len(groups))):
            yield [groups[i] for i in sorted(part)]


def _tokens(rows: Tensor, mask: Tensor, *tables: Tensor) -> list[Tensor]:
    """Of each table [R, L] the completion tokens [C] of these rows, in the order of a batch."""
    return [table[rows][mask[rows]] for table in tables]
