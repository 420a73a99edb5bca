"""The equations of PPO and RLOO against their definitions, closed cases and a small exact problem, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.equations.kl import k1, k3
from preftune.equations.policy_gradient import (
    adaptive_kl,
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_rewards,
    policy_gradient_loss,
    rloo_advantages,
    standardised,
    value_clip_fraction,
    whiten,
    with_missing_eos,
)

problems = st.integers(0, 10**6)
factors = st.sampled_from([0.0, 0.3, 0.95, 1.0])
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_mask(seed: int, rows: int = 4, longest: int = 6) -> Tensor:
    lengths = torch.randint(1, longest + 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(longest) < lengths


def litter(x: Tensor, mask: Tensor, garbage: float) -> Tensor:
    return torch.where(mask, x, garbage)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(loss: Callable[..., Tensor], at: Tensor, *rest: Tensor, **knobs: float) -> Tensor:
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at, *rest, **knobs).sum(), at)[0]


@settings(max_examples=30, deadline=None)
@given(problems, factors, factors)
def test_gae_is_its_definition(seed: int, gamma: float, lam: float) -> None:
    """A_t = sum_k (gamma lambda)^k (rho + gamma V' - V) by the double sum, each row alone and without padding."""
    mask, rewards, values = lengths_mask(seed), draws(seed, 4, 6), draws(seed + 1, 4, 6)
    found = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(mask.sum(-1).tolist()):
        r, v = rewards[row, :length], [*values[row, :length].tolist(), 0.0]
        errors = [float(r[t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(6):
            by_sum = sum((gamma * lam) ** k * errors[t + k] for k in range(max(0, length - t)))
            assert float(found[row, t]) == pytest.approx(by_sum, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(problems)
def test_gae_has_its_closed_cases(seed: int) -> None:
    """lambda = 0 is the error of one step; lambda = gamma = 1 is all that is still to come, less V."""
    mask, rewards, values = lengths_mask(seed), draws(seed, 4, 6), draws(seed + 1, 4, 6)
    r, v = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    following = torch.cat([v[:, 1:], v.new_zeros(4, 1)], 1)
    close(gae(rewards, values, mask, gamma=0.9, lam=0.0), r + 0.9 * following - v)
    close(gae(rewards, values, mask, gamma=1.0, lam=1.0), torch.where(mask, r.flip(-1).cumsum(-1).flip(-1) - v, 0.0))


def test_the_score_lands_on_the_last_completion_token() -> None:
    """-beta (log pi - log ref) everywhere, the score once, on the end of sequence; sums are r - beta log-ratio."""
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    logps, ref, score = draws(0, 3, 3), draws(1, 3, 3), numbers(5.0, -7.0, 2.0)
    found = kl_rewards(logps, ref, mask, score, 0.1)
    penalty = -0.1 * (logps - ref)
    close(found - torch.where(mask, penalty, 0.0), torch.tensor([[0, 5, 0], [0, 0, -7], [2, 0, 0]]).double())
    close(found.sum(-1), score + (penalty * mask).sum(-1))
    close(kl_rewards(logps, ref, mask, score, 0.0).sum(-1), score)


def test_a_score_that_is_not_there_is_not_made_zero() -> None:
    """A NaN score stays where it is and touches no other response."""
    mask = torch.tensor([[True, True], [True, False]])
    found = kl_rewards(draws(0, 2, 2), draws(1, 2, 2), mask, numbers(math.nan, 1.0), 0.1)
    assert found.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_padding_reaches_nothing(garbage: float) -> None:
    """With anything in padding every result is what it is with zeros there, 0 in padding; so are losses on x[mask]."""
    mask = lengths_mask(3)
    logps, ref, old, values = (draws(seed, 4, 6) for seed in range(4))
    score = draws(9, 4)
    calls: tuple[Callable[[Callable[[Tensor], Tensor]], Tensor], ...] = (
        lambda x: kl_rewards(x(logps), x(ref), mask, score, 0.2),
        lambda x: gae(x(logps), x(values), mask),
        lambda x: whiten(x(logps), mask),
        lambda x: whiten(x(logps), mask, shift_mean=False),
    )
    for rows in calls:
        found = rows(lambda x: litter(x, mask, garbage))
        assert torch.equal(found, rows(lambda x: litter(x, mask, 0.0)))
        assert bool((found[~mask] == 0).all())
    dirty = litter(logps, mask, garbage).requires_grad_()
    tokens = (litter(x, mask, garbage)[mask] for x in (old, values))
    clipped_policy_loss(dirty[mask], *tokens).mean().backward()  # type: ignore[no-untyped-call]
    assert dirty.grad is not None and bool((dirty.grad[~mask] == 0).all()) and bool(dirty.grad.isfinite().all())


@settings(max_examples=20, deadline=None)
@given(problems, st.sampled_from([1e-3, 1.0, 1e4]))
def test_whitened_values_have_mean_0_and_variance_1(seed: int, scale: float) -> None:
    """Over completion tokens alone; without the shift the mean stays and only the variance becomes 1."""
    mask, x = lengths_mask(seed, rows=5), 3 + scale * draws(seed, 5, 6)
    tokens, unshifted = whiten(x, mask)[mask], whiten(x, mask, shift_mean=False)[mask]
    variance = x[mask].var(correction=0)
    expected = variance / (variance + 1e-8)
    close(tokens.mean(), torch.zeros_like(expected), atol=1e-8)
    close(tokens.var(correction=0), expected, rtol=1e-8)
    close(unshifted - tokens, x[mask].mean().expand_as(tokens), rtol=1e-8)


def test_equal_advantages_whiten_to_nothing() -> None:
    """Equal values, or a single one, become 0 rather than rounding made as large as signal."""
    mask = torch.tensor([[True, True], [True, False]])
    assert not whiten(torch.full((2, 2), 0.1), mask).any()
    assert not whiten(draws(0, 1, 1), torch.ones(1, 1, dtype=torch.bool)).any()


def test_at_ratio_one_ppo_is_the_policy_gradient() -> None:
    """Before the first update: gradient -A, loss -A, approximate KL and both clip fractions exactly 0."""
    logps, advantages = draws(0, 12), draws(1, 12)
    close(slope(clipped_policy_loss, logps, logps, advantages), -advantages)
    close(slope(policy_gradient_loss, logps, advantages), -advantages)
    close(clipped_policy_loss(logps, logps, advantages), -advantages)
    assert approx_kl(logps, logps) == clip_fraction(logps, logps, advantages) == 0
    assert value_clip_fraction(logps, logps, advantages) == 0


def test_the_policy_clip_stops_what_went_too_far_and_nothing_else() -> None:
    """Gradient exactly 0 where the ratio left [0.8, 1.2] as A asked, -u A inside and on the way back."""
    ratio = numbers(1.3, 0.7, 1.3, 0.7, 1.1, 0.9, 1.19, 0.81)
    advantages = numbers(2.0, -2.0, -2.0, 2.0, 1.0, -1.0, 1.0, -1.0)
    stopped = torch.tensor([True, True] + [False] * 6)
    zero = torch.zeros_like(ratio)
    found = slope(clipped_policy_loss, ratio.log(), zero, advantages, clip=0.2)
    assert bool((found[stopped] == 0).all())
    close(found[~stopped], (-ratio * advantages)[~stopped])
    close(clipped_policy_loss(ratio.log(), zero, advantages)[:3], numbers(-2.4, 1.6, 2.6))
    one_by_one = zip(ratio.log()[:, None], zero[:, None], advantages[:, None], strict=True)
    assert [bool(clip_fraction(*token, clip=0.2)) for token in one_by_one] == stopped.tolist()
    assert clip_fraction(ratio.log(), zero, advantages, clip=0.2) == 0.25
    assert clip_fraction(ratio.log(), zero, advantages, clip=0.35) == 0
    close(slope(clipped_policy_loss, ratio.log(), zero, advantages, clip=0.35), -ratio * advantages)


def test_approximate_kl_is_the_half_square_and_near_the_divergence() -> None:
    """.5 mean(dlogp^2), and for samples of a nearby policy close to KL(old || new) itself."""
    assert float(approx_kl(numbers(-1.0, -2.0), numbers(-1.5, -2.0))) == pytest.approx(0.0625)
    old = torch.log_softmax(draws(0, 50), -1)
    new = torch.log_softmax(old + 0.05 * draws(1, 50), -1)
    law = (old.exp() * 1e6).round().long()
    near = approx_kl(new.repeat_interleave(law), old.repeat_interleave(law))
    assert float(near) == pytest.approx(float((old.exp() * (old - new)).sum()), rel=0.05)


def test_the_value_loss_is_the_larger_of_two() -> None:
    """1/2 max of both squares: no gradient after more than 0.2 towards the return, the whole error on the way back."""
    old, returns = numbers(0.0, 0.0, 0.0, 0.0), numbers(1.0, 1.0, 1.0, 0.1)
    values = numbers(0.5, 0.1, -0.5, 0.5)
    bounded = numbers(0.2, 0.1, -0.2, 0.2)
    close(clipped_value_loss(values, old, returns), numbers(0.8**2, 0.9**2, 1.5**2, 0.4**2) / 2)
    close(slope(clipped_value_loss, values, old, returns), numbers(0.0, -0.9, -1.5, 0.4))
    worse = (bounded - returns).abs() > (values - returns).abs()
    assert value_clip_fraction(values, old, returns) == float(worse.double().mean()) == 0.25


def test_rounding_clips_no_value() -> None:
    """Within the clip V_old + (V - V_old) is V but for its last digit: no token counts as clipped."""
    old, values, returns = draws(0, 4096).float() / 50, draws(1, 4096).float().tanh() / 10, draws(2, 4096).float()
    assert not bool((old + (values - old) == values).all()), "else nothing was rounded"
    assert value_clip_fraction(values, old, returns) == 0


def test_losses_are_differentiable_in_the_new_numbers_alone() -> None:
    """Old log-probs, advantages, old values and returns are constants even when they carry gradients."""
    new, *constants = (draws(seed, 5).requires_grad_() for seed in range(3))
    for loss in (clipped_policy_loss(new, *constants), clipped_value_loss(new, *constants)):
        found = torch.autograd.grad(loss.sum(), [new, *constants], allow_unused=True)
        assert [gradient is not None for gradient in found] == [True, False, False]
    mask = torch.ones(1, 5, dtype=torch.bool)
    facts = (kl_rewards(new[None], new[None], mask, new[:1], 0.1), gae(new[None], new[None], mask), approx_kl(new, new))
    assert not any(fact.requires_grad for fact in (*facts, whiten(new[None], mask), rloo_advantages(new[None])))


def test_the_controller_brings_the_kl_to_its_target() -> None:
    """A policy whose KL is 2 / beta^0.7, read with noise, from far on either side: within 5 % of 6 nats."""
    g = torch.Generator().manual_seed(0)
    for coef in (0.001, 50.0):
        course = []
        for _ in range(600):
            kl = 2 / coef**0.7
            coef = adaptive_kl(
                coef, kl + 0.3 * float(torch.randn((), generator=g)), target=6, horizon=1000, samples=128
            )
            course.append(kl)
        assert not 5 < course[0] < 7 and sum(course[-100:]) / 100 == pytest.approx(6, rel=0.05)


def test_the_controller_has_its_worked_values() -> None:
    """At the target nothing moves; 10 % above is 10 % of samples / horizon; beyond 20 % it is clipped, either way."""
    step = partial(adaptive_kl, 0.1, target=6.0, horizon=1000, samples=100)
    expected = {6.0: 0.1, 6.6: 0.1 * 1.01, 60.0: 0.1 * 1.02, -3.0: 0.1 * 0.98}
    assert {kl: pytest.approx(step(kl)) for kl in expected} == expected


def test_every_rule_for_a_missing_end_of_sequence() -> None:
    """Finished scores stay; unfinished ones are the value, are the score less the value, or stay."""
    score, finished = numbers(3.0, math.nan, 0.5, math.nan), torch.tensor([True, False, False, True])
    apply: Any = partial(with_missing_eos, score, finished)
    close(apply(rule="replace", value=-1.0), numbers(3.0, -1.0, -1.0, math.nan), equal_nan=True)
    close(apply(rule="subtract", value=1.0), numbers(3.0, math.nan, -0.5, math.nan), equal_nan=True)
    close(apply(rule="none", value=9.0), score, equal_nan=True)
    assert with_missing_eos(score.float(), finished, rule="replace", value=-1.0).dtype == torch.float32


def test_scores_are_put_on_the_scale_of_the_reference() -> None:
    """The reference's own scores get mean 0 and deviation 1, others follow; order and gaps in units of it stay."""
    ref = 5 + 3 * draws(0, 40)
    own = standardised(ref, ref)
    close(torch.stack([own.mean(), own.std(correction=0)]), numbers(0.0, 1.0))
    close(standardised(ref[:3] + 6, ref), own[:3] + 6 / ref.std(correction=0))
    close(standardised(ref[:3], ref, scale=False), ref[:3] - ref.mean())


@settings(max_examples=20, deadline=None)
@given(problems, st.integers(2, 6))
def test_rloo_leaves_each_response_out_of_its_own_baseline(seed: int, k: int) -> None:
    """A_i = R_i - mean of the others, by a loop; their sum is 0; a constant per prompt changes nothing."""
    returns = draws(seed, 3, k)
    others = torch.tensor([[(sum(row) - r) / (k - 1) for r in row] for row in returns.tolist()], dtype=torch.float64)
    found = rloo_advantages(returns)
    close(found, returns - others)
    close(found.sum(-1), torch.zeros(3, dtype=torch.float64))
    close(rloo_advantages(returns + 100 * draws(seed + 1, 3, 1)), found, atol=1e-10)


def test_equal_rewards_give_rloo_no_gradient() -> None:
    """Exactly none, for float32 returns that are no round number and for any k."""
    for k in range(2, 8):
        advantages = rloo_advantages(torch.full((2, k), 0.1))
        assert not slope(policy_gradient_loss, draws(0, 2, k).float(), advantages).any()


def test_k1_is_the_penalty_and_k3_in_its_place_would_remove_it() -> None:
    """As reward for y ~ pi near the reference: k1 has the gradient of KL(pi || ref), k3 less than 1 % of it."""
    logits = draws(0, 9).requires_grad_()
    logps = torch.log_softmax(logits, -1)
    ref = torch.log_softmax(logits.detach() + 0.01 * draws(1, 9), -1)
    log_ratio = (logps - ref).detach()
    (exact,) = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), logits, retain_graph=True)
    penalty = {
        name: torch.autograd.grad(
            (logps.detach().exp() * policy_gradient_loss(logps, -k)).sum(), logits, retain_graph=True
        )[0]
        for name, k in (("k1", k1(log_ratio)), ("k3", k3(log_ratio)))
    }
    close(penalty["k1"], exact)
    assert float(penalty["k3"].norm() / exact.norm()) < 0.01
    (one_token,) = kl_rewards(logps[:1, None], ref[:1, None], torch.ones(1, 1, dtype=torch.bool), numbers(0.0), 1.0)
    close(one_token, -log_ratio[:1])


MASK = torch.ones(2, 3, dtype=torch.bool)
X = torch.zeros(2, 3)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "one response": (lambda: rloo_advantages(X[:, :1]), r"k >= 2\], not \[2, 1\]"),
    "no prompts' axis": (lambda: rloo_advantages(X[0]), "k >= 2"),
    "no policy clip": (lambda: clipped_policy_loss(X, X, X, clip=0.0), "clip must be a finite number > 0, not 0.0"),
    "endless policy clip": (lambda: clipped_policy_loss(X, X, X, clip=math.inf), "clip must"),
    "no value clip": (lambda: clipped_value_loss(X, X, X, clip=-0.2), "clip must"),
    "no clip to count": (lambda: clip_fraction(X, X, X, clip=0.0), "clip must"),
    "no value clip to count": (lambda: value_clip_fraction(X, X, X, clip=math.nan), "clip must"),
    "gamma": (lambda: gae(X, X, MASK, gamma=1.1), "gamma and lam must be in"),
    "lambda": (lambda: gae(X, X, MASK, lam=-0.1), "gamma and lam must be in"),
    "a bonus for KL": (lambda: kl_rewards(X, X, MASK, X[:, 0], -0.1), "kl_coef must be"),
    "scores of tokens": (lambda: kl_rewards(X, X, MASK, X, 0.1), r"one score per response: \[2\]"),
    "another shape": (lambda: gae(X, X[:1], MASK), r"not torch.bool \[2, 3\] and \[2, 3\], \[1, 3\]"),
    "a mask of numbers": (lambda: whiten(X, MASK.long()), "bool mask"),
    "a response of nothing": (lambda: whiten(X, MASK & torch.tensor([[True], [False]])), "at least one completion"),
    "padding on the left": (lambda: gae(X, X, MASK.triu()), "tokens stand first"),
    "a hole": (lambda: gae(X, X, torch.tensor([[True, False, True]] * 2)), "tokens stand first"),
    "no response": (lambda: whiten(X[:0], MASK[:0]), "at least one completion"),
    "a horizon of 0": (lambda: adaptive_kl(0.1, 1.0, target=6.0, horizon=0, samples=8), "horizon must be"),
    "a short horizon": (lambda: adaptive_kl(0.1, 1.0, target=6.0, horizon=20, samples=100), "or beta reaches 0"),
    "a target of 0": (lambda: adaptive_kl(0.1, 1.0, target=0.0, horizon=99, samples=8), "target must be"),
    "a coefficient of 0": (lambda: adaptive_kl(0.0, 1.0, target=6.0, horizon=99, samples=8), "coef must be"),
    "a lost KL": (lambda: adaptive_kl(0.1, math.nan, target=6.0, horizon=99, samples=8), "kl must be finite"),
    "a bonus for no end": (lambda: with_missing_eos(X[0], MASK[0], rule="subtract", value=-1.0), ">= 0 where"),
    "no value": (lambda: with_missing_eos(X[0], MASK[0], rule="replace", value=math.nan), "finite value"),
    "another rule": (lambda: with_missing_eos(X[0], MASK[0], rule="drop", value=1.0), "not 'drop'"),  # type: ignore[arg-type]
    "a reference of one score": (lambda: standardised(X[0], X[0]), "set no scale"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_without_a_meaning_are_refused(call: Callable[[], object], said: str) -> None:
    """By name, with what was found."""
    with pytest.raises(ValueError, match=said):
        call()
