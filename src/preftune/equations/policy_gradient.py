"""Reinforcement learning on responses: the equations of RLHF's PPO and of RLOO, after whom the details are named.

    token reward    rho_t = -beta (log pi(y_t | s_t) - log pi_ref(y_t | s_t)) + [t last] r(x, y)
    advantage       A_t = sum_{k >= 0} (gamma lambda)^k (rho_{t+k} + gamma V(s_{t+k+1}) - V(s_{t+k}))
    policy          L = -min(u_t A_t, clip(u_t, 1 - eps, 1 + eps) A_t),   u_t = pi(y_t | s_t) / pi_old(y_t | s_t)
    critic          L = 1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2),   G = A + V_old
    RLOO            L = -A_i log pi(y_i | x),   A_i = R_i - mean_{j != i} R_j,   R_i = sum_t rho_t

The state s_t is the prompt and y_<t, so V(s_t) is read where y_t is predicted; behind the last completion token, the
end of sequence or the one that the limit cut at, everything is over: no value, no reward.

Shapes: R responses, L tokens of the longest, [R, L] with a bool mask that is true on completion tokens, which stand
first in their row. A function that takes the mask reads nothing where it is false, be it NaN, and returns 0 there.
The others are elementwise on any shape: give them the completion tokens alone, `x[mask]` [C], so that no padding
reaches a mean or a gradient. Rewards, advantages and facts are detached; only losses are differentiable. A score that
is NaN stays NaN: what cannot be scored is for the caller to report.

Of what PPO on language needs (arXiv 1909.08593, and Huang et al., "The N implementation details of RLHF with PPO",
2023) the equations stand here: scores on one scale `standardised`, the missing end of sequence `with_missing_eos`,
the penalty inside the reward `kl_rewards`, its coefficient `adaptive_kl`, GAE with gamma 1 and lambda 0.95 `gae`,
whitening `whiten`, both clips `clipped_policy_loss` and `clipped_value_loss`, and what is logged about them:
`approx_kl`, `clip_fraction`, `value_clip_fraction`. No entropy bonus. Log-probs are those of the distribution that was
sampled: logits divided by the temperature, dropout off, in rollout, reference and update alike, or u is not 1 at first.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "adaptive_kl",
    "approx_kl",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "gae",
    "kl_rewards",
    "policy_gradient_loss",
    "rloo_advantages",
    "standardised",
    "value_clip_fraction",
    "whiten",
    "with_missing_eos",
]

EPSILON = 1e-8  # added to a variance before its root: equal advantages whiten to 0, not to rounding blown up


@torch.no_grad()
def kl_rewards(logps: Tensor, ref_logps: Tensor, mask: Tensor, score_R: Tensor, kl_coef: float) -> Tensor:
    """rho_t = -beta (log pi(y_t) - log pi_ref(y_t)), plus the score on the last completion token; [R, L], detached.

    `logps`, `ref_logps` [R, L] nats of the sampled tokens; `score_R` [R] r(x, y); `kl_coef` beta >= 0, score per nat.
    The estimator is k1 because a reward is multiplied by grad log pi: k1 then gives the exact gradient of
    KL(pi || pi_ref), while k3, which scatters less as a number, gives nearly none close to the reference.
    The sum over t is RLOO's return R. Source: arXiv 1909.08593 Eq. 2, per token as in its implementation.
    Raises ValueError.
    """
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be a finite number >= 0, not {kl_coef}: it is the price of one nat of KL")
    logps, ref_logps = _completions(mask, logps, ref_logps)
    if score_R.shape != mask.shape[:1]:
        raise ValueError(f"one score per response: {list(mask.shape[:1])} expected, not {list(score_R.shape)}")
    rewards = -kl_coef * (logps - ref_logps)
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, score_R[:, None].to(rewards.dtype))


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """A_t = d_t + gamma lambda A_{t+1} with d_t = rho_t + gamma V(s_{t+1}) - V(s_t); [R, L], detached.

    `rewards`, `values` [R, L] rho and V(s_t); the returns that the critic learns are A + V. lambda = 0 is the error of
    one step; lambda = 1, gamma = 1 is what is still to come less V, which makes the policy gradient unbiased for any V.
    Source: arXiv 1506.02438 Eq. 16. Raises ValueError unless gamma and lambda are in [0, 1].
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must be in [0, 1], not {gamma} and {lam}")
    rewards, values = _completions(mask, rewards, values)
    step_errors = rewards - values
    step_errors[:, :-1] += gamma * values[:, 1:]  # padding holds 0: nothing follows the last token
    advantage = torch.zeros_like(step_errors[:, 0])
    backwards = []
    for step_error in reversed(step_errors.unbind(-1)):
        advantage = step_error + gamma * lam * advantage
        backwards.append(advantage)
    return torch.stack(backwards[::-1], -1)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / std over all completion tokens together, + mean unless `shift_mean`; [R, L], 0 in padding, detached.

    The variance is divided by the number of tokens; equal values become 0. Advantages are shifted; rewards may be
    whitened too, then without the shift, which would pay for length. Whitening makes noise as large as signal: where
    all rewards are alike, leave it out. Source: the implementation of arXiv 1909.08593. Raises ValueError.
    """
    (x,) = _completions(mask, x)
    mean = x[mask].mean()
    whitened = (x - mean) * torch.rsqrt(x[mask].var(correction=0) + EPSILON)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def clipped_policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """L = -min(u A, clip(u, 1 - eps, 1 + eps) A), u = exp(log pi - log pi_old); elementwise, differentiable in `logps`.

    At u = 1 its gradient is -A grad log pi, the policy gradient; it is exactly 0 where u has left the interval in the
    direction A asked for, and never limits the way back. Source: arXiv 1707.06347 Eq. 7. ValueError unless clip > 0.
    """
    ratio = (logps - old_logps.detach()).exp()
    advantages = advantages.detach()
    bounded = ratio.clamp(1 - _positive("clip", clip), 1 + clip)
    return torch.maximum(-ratio * advantages, -bounded * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """L = 1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2); elementwise, differentiable in `values`.

    The larger of the two: a critic that moved further than `clip` (in units of the score) towards the return stops
    there, one that moved away from it comes back. Source: the implementation of arXiv 1707.06347, not its text.
    Raises ValueError unless clip > 0.
    """
    old_values, returns = old_values.detach(), returns.detach()
    _positive("clip", clip)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (bounded - returns) ** 2) / 2


@torch.no_grad()
def approx_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """mean (log pi - log pi_old)^2 / 2: how far one update has moved per token, nats, 0-d; exactly 0 before the first.

    This is k2, biased but quiet close by. Two policies of one rollout; the KL to the reference is another number.
    """
    return (logps - old_logps).square().mean() / 2


@torch.no_grad()
def clip_fraction(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """The share of tokens that `clipped_policy_loss` gives no gradient because u is outside; 0-d in [0, 1]."""
    ratio = (logps - old_logps).exp()
    _positive("clip", clip)
    return (((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))).double().mean()


@torch.no_grad()
def value_clip_fraction(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """The share of tokens where the clipped value is the worse one, so that the critic gets no gradient; in [0, 1]."""
    _positive("clip", clip)
    moved = values - old_values
    bounded = old_values + moved.clamp(-clip, clip)
    worse = (bounded - returns).abs() > (values - returns).abs()
    return (worse & (moved.abs() > clip)).double().mean()  # within the clip they differ by rounding alone


def adaptive_kl(coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) samples / horizon): a controller of log beta.

    `kl`: mean KL of whole responses of the last `samples` responses, nats, a k1 estimate below 0 included; `horizon`:
    responses that a full correction of 20 % takes. Source: arXiv 1909.08593 section 2.2. Raises ValueError on a number
    that is not > 0, and where 0.2 samples reach the horizon, because beta could become 0 or negative in one step.
    """
    for name, value in (("coef", coef), ("target", target), ("horizon", horizon), ("samples", samples)):
        _positive(name, value)
    if not math.isfinite(kl):
        raise ValueError(f"kl must be finite, not {kl}: a run that lost its KL has to stop")
    if 0.2 * samples >= horizon:
        raise ValueError(f"horizon={horizon} must be more than 0.2 * samples = {0.2 * samples:g}, or beta reaches 0")
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon)


@torch.no_grad()
def with_missing_eos(
    score_R: Tensor, finished_R: Tensor, *, rule: Literal["replace", "subtract", "none"], value: float
) -> Tensor:
    """The score of a response that wrote no end of sequence: `value`, or the score less `value`, or as it is; [R].

    "replace": the fixed score of arXiv 1909.08593, -1 there, below what answers get; the score is not read, be it NaN.
    "subtract": a penalty >= 0, so better answers stay better. "none": `value` is not read, for tasks where the limit
    ends a response in any case. Raises ValueError on another rule, a value that is not finite, a penalty below 0.
    """
    if rule == "none":
        return score_R.detach().clone()
    if not math.isfinite(value) or (rule == "subtract" and value < 0):
        raise ValueError(f"rule={rule!r} needs a finite value, >= 0 where it is subtracted, not {value}")
    if rule == "replace":
        return torch.where(finished_R, score_R, value)
    if rule == "subtract":
        return torch.where(finished_R, score_R, score_R - value)
    raise ValueError(f"rule must be replace, subtract or none, not {rule!r}")


@torch.no_grad()
def standardised(score_R: Tensor, ref_scores: Tensor, *, scale: bool = True) -> Tensor:
    """(r - mean) / std with the mean and deviation of the reference's responses `ref_scores` [N]; [R], detached.

    Puts learned rewards, known only up to a constant, on the scale that beta and the critic are set for. The shift
    changes no optimum, the division acts like beta * std. `scale` off: the shift alone. Source: arXiv 1909.08593
    section 2. Raises ValueError on scores that are not finite or, to be scaled, all equal.
    """
    mean, std = ref_scores.mean(), ref_scores.std(correction=0)
    if not bool(mean.isfinite()) or (scale and not bool(std > 0)):
        raise ValueError(f"{ref_scores.numel()} reference scores with mean {mean:g} and deviation {std:g} set no scale")
    return (score_R - mean) / (std if scale else 1.0)


@torch.no_grad()
def rloo_advantages(returns: Tensor) -> Tensor:
    """A_i = R_i - mean_{j != i} R_j over the k responses of a prompt; [P, k] from [P, k], detached.

    The others are independent of y_i, so the baseline leaves the expected gradient exact; it equals
    k / (k - 1) (R_i - mean R). A constant added to a prompt's returns changes nothing, equal returns give 0.
    Source: arXiv 2402.14740. Raises ValueError unless k >= 2.
    """
    k = returns.shape[-1]
    if returns.ndim != 2 or k < 2:
        raise ValueError(f"returns must be [prompts, k >= 2], not {list(returns.shape)}: one response leaves none out")
    returns = returns - returns[:, :1]  # so that equal returns give 0 exactly, not their rounding
    return returns - (returns.sum(-1, keepdim=True) - returns) / (k - 1)


def policy_gradient_loss(logps_R: Tensor, advantages_R: Tensor) -> Tensor:
    """L = -A log pi(y | x): REINFORCE, of whole responses, the sum of `logps` over tokens; elementwise, [R].

    Differentiable in `logps_R`; its gradient in expectation is that of -J when A is the return less a baseline that
    does not depend on y. Source: arXiv 2402.14740.
    """
    return -advantages_R.detach() * logps_R


def _completions(mask: Tensor, *padded: Tensor) -> list[Tensor]:
    """The tensors with 0 in padding. Raises ValueError on other shapes and on a mask that is no left-aligned one."""
    if mask.dtype != torch.bool or mask.ndim != 2 or any(x.shape != mask.shape for x in padded):
        found = ", ".join(str(list(x.shape)) for x in padded)
        raise ValueError(
            f"a bool mask [R, L] and tensors of its shape, not {mask.dtype} {list(mask.shape)} and {found}"
        )
    if not bool(mask[:, :1].all() & (mask[:, :-1] >= mask[:, 1:]).all()) or mask.numel() == 0:
        raise ValueError("every response has at least one completion token and its tokens stand first in the row")
    return [torch.where(mask, x, 0.0) for x in padded]


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, not {value}")
    return value
