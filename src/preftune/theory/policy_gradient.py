"""The reinforcement-learning oracle: J and its gradient without a sample, and what the estimators give on average.

    J(theta) = mean_x sum_y pi(y | x) (r(x, y) - beta log(pi(y | x) / pi_ref(y | x)))

Where the completions can be enumerated this is a function of the weights like any other. Following its gradient tells
what the function class can reach at all, so that what PPO, RLOO or DPO miss of it is the algorithm's: estimator noise,
bias, coverage. The expected estimators use the very equations that `preftune ppo` trains by, so that their exactness
is a statement about those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune.equations.kl import kl_divergence
from preftune.equations.optimum import expected_reward, objective
from preftune.equations.policy_gradient import (
    clipped_policy_loss,
    gae,
    kl_rewards,
    policy_gradient_loss,
    rloo_advantages,
)
from preftune.errors import ConfigError, NotFinite
from preftune.theory.enumerable import enumerate_completions

__all__ = [
    "Outcome",
    "Problem",
    "exact_gradient_policy",
    "exact_objective",
    "expected_ppo_loss",
    "expected_rloo_loss",
]


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """What is maximised. Completions are those of `enumerate_completions`, M of them, in its order."""

    prompts: Sequence[Sequence[int]]
    """P prompts as token ids."""
    rewards: Tensor
    """[P, M] or [M] r(x, y)."""
    ref_logps: Tensor
    """[P, M] log pi_ref, nats: enumerated with the same limit and temperature."""
    beta: float
    """> 0, reward per nat of KL."""
    eos_id: int
    max_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A policy, exactly; means over prompts."""

    objective: float
    """J = reward - beta kl."""
    reward: float
    """E_{y~pi} r."""
    kl: float
    """KL(pi || pi_ref) of whole responses, nats."""


def exact_objective(model: Any, problem: Problem, *, backward: bool = False) -> Outcome:
    """J(theta) by summing over all completions; with `backward`, the gradient of -J is added to the weights' `.grad`.

    One prompt at a time, forward and backward, so memory does not grow with their number. Dropout is off, arithmetic
    float64 from the logits on. Raises ConfigError on a reward or a reference that does not fit, and as
    `enumerate_completions` does; ValueError unless beta > 0.
    """
    total = torch.zeros(3, dtype=torch.float64)
    rewards = _rewards(problem)
    for prompt, rewards_M, ref_logps in zip(problem.prompts, rewards, problem.ref_logps, strict=True):
        with torch.set_grad_enabled(backward):
            found = enumerate_completions(
                model, [prompt], eos_id=problem.eos_id, max_tokens=problem.max_tokens, temperature=problem.temperature
            )
            (logps,) = found.logps
            if logps.shape != ref_logps.shape:
                raise ConfigError(
                    f"the model has {len(logps)} completions, rewards and reference are of {len(ref_logps)}"
                )
            rewards_M, ref_logps = rewards_M.to(logps), ref_logps.to(logps)
            value = objective(logps, ref_logps, rewards_M, problem.beta)
        if backward:
            (-value / len(problem.prompts)).backward()
        logps = logps.detach()
        reward, kl = expected_reward(logps, rewards_M), kl_divergence(logps, ref_logps)
        total += torch.stack([value.detach(), reward, kl]).cpu()
    return Outcome(*(total / len(problem.prompts)).tolist())


def exact_gradient_policy(model: Any, problem: Problem, *, steps: int, lr: float) -> tuple[Outcome, ...]:
    """Trains `model` in place on the exact gradient of J: `steps` of Adam, the rate falling linearly from `lr` to 0.

    The optimum that the function class can reach, no sampling in between. Returns steps + 1 outcomes: before every
    step and after the last one. Deterministic on a CPU; gradients are left empty and the mode as it was. Raises
    ConfigError on a number of steps or a rate that is not > 0, NotFinite when J or its gradient no longer is.
    """
    if steps < 1 or not (math.isfinite(lr) and lr > 0):
        raise ConfigError(f"steps={steps} must be at least 1 and lr={lr} a finite number larger than 0")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    trace = []
    for step in range(steps):
        optimizer.zero_grad()
        trace.append(exact_objective(model, problem, backward=True))
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if not (math.isfinite(trace[-1].objective) and bool(norm.isfinite())):
            found = f"J is {trace[-1].objective}, its gradient's norm {float(norm)}"
            raise NotFinite(f"{found} at step {step}; try a smaller lr than {lr}")
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return (*trace, exact_objective(model, problem))


def expected_rloo_loss(logps: Tensor, returns: Tensor) -> Tensor:
    """E over all ordered pairs (y_1, y_2) ~ pi x pi of the RLOO loss with k = 2; its gradient is that of -J; 0-d.

    `logps`, `returns` [M] log pi(y | x) and R(y) = r - beta log(pi / pi_ref), the latter a constant. What is drawn is
    drawn from the law as it is, so the probabilities carry no gradient. M^2 terms.
    """
    size = len(logps)
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size)).to(logps.device)
    losses = policy_gradient_loss(logps[pairs], rloo_advantages(returns.detach()[pairs])).mean(-1)
    return (logps.detach()[pairs].sum(-1).exp() * losses).sum()


def expected_ppo_loss(
    token_logps: Tensor,
    ref_token_logps: Tensor,
    mask: Tensor,
    score_M: Tensor,
    values: Tensor,
    *,
    beta: float,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> Tensor:
    """E over all completions of PPO's loss on the first minibatch, where every ratio is 1; 0-d.

    `token_logps`, `ref_token_logps`, `mask`, `values` [M, T] and `score_M` [M] of all completions of one prompt; the
    loss of a response is the sum over its tokens. With gamma = lambda = 1 its gradient is that of -J for any `values`
    that depend on the state alone; a smaller lambda trades variance for the bias of a wrong V. The mean over all tokens
    of a batch, which PPO trains by, is this divided by the mean length, the larger the batch the more exactly.
    """
    rewards = kl_rewards(token_logps, ref_token_logps, mask, score_M, beta)
    advantages = gae(rewards, values, mask, gamma=gamma, lam=lam)
    law = torch.where(mask, token_logps, 0.0).sum(-1).exp().detach()
    losses = clipped_policy_loss(token_logps[mask], token_logps[mask], advantages[mask])
    return (law[:, None].expand_as(mask)[mask] * losses).sum()


def _rewards(problem: Problem) -> Tensor:
    """[P, M]. Raises ConfigError on rewards or a reference for other prompts or completions, or that are not finite."""
    rewards, ref_logps = problem.rewards, problem.ref_logps
    if ref_logps.ndim != 2 or len(ref_logps) != len(problem.prompts) or rewards.shape[-1] != ref_logps.shape[1]:
        raise ConfigError(
            f"{len(problem.prompts)} prompts need ref_logps [P, M] and rewards [P, M] or [M] of the same completions, "
            f"not {list(ref_logps.shape)} and {list(rewards.shape)}"
        )
    if not bool(rewards.isfinite().all()):
        raise ConfigError(f"{int((~rewards.isfinite()).sum())} rewards are not finite: the mean reward would not be")
    return rewards.expand_as(ref_logps)
