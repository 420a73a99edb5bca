"""Divergences against torch's own, and the facts about their estimators by exact enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal
from torch.distributions.kl import kl_divergence as torch_kl

from preftune.equations.kl import (
    forward_kl,
    gaussian_kl,
    k1,
    k2,
    k3,
    kl_divergence,
    rao_blackwell_kl,
    total_variation,
)

problems = st.integers(0, 10**6)


def logits(seed: int, *shape: int, spread: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(*shape, generator=g, dtype=torch.float64)


def two_laws(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    q, p = torch.log_softmax(logits(seed, 2, 9, spread=spread), -1)
    return q, p


def expected(logps: Tensor, values: Tensor) -> Tensor:
    return (logps.exp() * values).sum(-1)


@settings(max_examples=50, deadline=None)
@given(problems, st.sampled_from([0.01, 1.0, 5.0]))
def test_divergences_are_torchs_and_bound_each_other(seed: int, spread: float) -> None:
    """KL equals torch's and is 0 only at equality; TV <= sqrt(KL / 2) (Pinsker) and TV <= 1, the same both ways."""
    q, p = torch.log_softmax(logits(seed, 2, 4, 6, spread=spread), -1)
    kl, tv = kl_divergence(q, p), total_variation(q, p)
    torch.testing.assert_close(kl, torch_kl(Categorical(logits=q), Categorical(logits=p)), rtol=1e-9, atol=1e-14)
    assert bool((tv <= (kl / 2).sqrt() + 1e-15).all()) and bool((tv <= 1).all()) and bool((tv > 0).all())
    assert torch.equal(tv, total_variation(p, q))
    assert torch.equal(kl_divergence(q, q), torch.zeros(4, dtype=torch.float64))


def test_what_is_impossible_counts_zero_or_makes_the_divergence_infinite() -> None:
    """0 log 0 = 0 on either side; mass where the other has none is infinitely far; gradients stay finite."""
    q = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64).log()
    p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    assert float(kl_divergence(q, p)) == pytest.approx(0.5 * math.log(2))
    assert kl_divergence(p, q) == math.inf
    assert kl_divergence(q, q) == 0 and total_variation(q, p) == 0.25
    q.requires_grad_()
    kl_divergence(q, p).backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and bool(q.grad.isfinite().all())


def test_two_gaussians_four_deviations_apart_are_eight_nats_apart() -> None:
    """KL(N(0,1) || N(-4,1)) = 8 either way; deviations 1 and 2 four apart give 2.318 and 8.807; 0 at overlap."""
    assert float(gaussian_kl(0, 1, -4, 1)) == float(gaussian_kl(-4, 1, 0, 1)) == 8.0
    assert float(gaussian_kl(0, 1, -4, 2)) == pytest.approx(2.318, abs=5e-4)
    assert float(gaussian_kl(-4, 2, 0, 1)) == pytest.approx(8.807, abs=5e-4)
    slide = gaussian_kl(0.0, 1.0, torch.linspace(-4, 0, 9, dtype=torch.float64), 1.0)
    assert bool((slide.diff() < 0).all()) and slide[-1] == 0


@settings(max_examples=25, deadline=None)
@given(st.floats(-5, 5), st.floats(0.1, 5), st.floats(-5, 5), st.floats(0.1, 5))
def test_gaussian_kl_is_torchs(mean: float, std: float, other_mean: float, other_std: float) -> None:
    """The closed form of torch.distributions, in float64."""
    one, other = (Normal(*(torch.tensor(v, dtype=torch.float64) for v in pair)) for pair in
                  ((mean, std), (other_mean, other_std)))  # fmt: skip
    theirs = torch_kl(one, other)
    torch.testing.assert_close(gaussian_kl(mean, std, other_mean, other_std), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("deviations", [(0.0, 1.0), (1.0, -2.0), (1.0, math.nan)])
def test_a_deviation_that_is_none_is_refused(deviations: tuple[float, float]) -> None:
    """A Gaussian has a deviation above 0."""
    with pytest.raises(ValueError, match="standard deviations must be > 0"):
        gaussian_kl(0, deviations[0], 0, deviations[1])


@settings(max_examples=25, deadline=None)
@given(problems)
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed: int) -> None:
    """E_q k1 = E_q k3 = KL(q || p) exactly; E_q k2 is off; k2 and k3 are never negative, k1 is somewhere."""
    q, p = two_laws(seed)
    exact = kl_divergence(q, p)
    torch.testing.assert_close(expected(q, k1(q - p)), exact, rtol=1e-10, atol=0)
    torch.testing.assert_close(expected(q, k3(q - p)), exact, rtol=1e-10, atol=0)
    assert abs(float(expected(q, k2(q - p)) - exact)) > 1e-6
    assert bool((k2(q - p) >= 0).all()) and bool((k3(q - p) >= 0).all()) and bool((k1(q - p) < 0).any())


def test_k3_scatters_less_than_k1_close_to_the_reference_and_more_far_from_it() -> None:
    """Its advantage is local: its deviation over y ~ q is far below that of k1 near p, and above it at one nat."""

    def deviations(spread: float) -> tuple[float, float, float]:
        p = torch.log_softmax(logits(1, 9), -1)
        q = torch.log_softmax(p + logits(2, 9, spread=spread), -1)
        exact = kl_divergence(q, p)
        one, three = (float(expected(q, (k(q - p) - exact) ** 2).sqrt()) for k in (k1, k3))
        return float(exact), one, three

    kl, one, three = deviations(0.05)
    assert kl < 0.01 and three < one / 10
    kl, one, three = deviations(3.0)
    assert kl > 0.9 and three > one


def gradient(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(torch.log_softmax(theta, -1)), theta)
    return slope


@settings(max_examples=25, deadline=None)
@given(problems)
def test_as_losses_k1_does_nothing_k2_is_right_and_k3_pulls_the_other_divergence(seed: int) -> None:
    """E_q[grad k], y fixed once drawn: 0 for k1, grad KL(q || p) for k2, grad KL(p || q) for k3."""
    theta, p = logits(seed, 9), torch.log_softmax(logits(seed + 1, 9), -1)
    weights = torch.softmax(theta, -1)  # the sampling law: not differentiated
    as_loss = {k: gradient(lambda q, k=k: (weights * k(q - p)).sum(), theta) for k in (k1, k2, k3)}
    reverse = gradient(lambda q: kl_divergence(q, p), theta)
    forward = gradient(lambda q: kl_divergence(p, q), theta)
    for k, true in ((k1, torch.zeros_like(theta)), (k2, reverse), (k3, forward)):
        torch.testing.assert_close(as_loss[k], true, rtol=1e-9, atol=1e-12)
    assert float((reverse - forward).norm()) > 1e-3


@settings(max_examples=25, deadline=None)
@given(problems)
def test_as_rewards_k1_is_right_and_k3_gives_the_difference_of_both_gradients(seed: int) -> None:
    """E_q[k grad log q]: grad KL(q || p) for k1; grad KL(q || p) - grad KL(p || q) for k3, nearly nothing near p."""

    def as_reward(k: Callable[[Tensor], Tensor], theta: Tensor, p: Tensor) -> Tensor:
        q = torch.log_softmax(theta, -1)
        return gradient(lambda moving: (q.exp() * k(q - p) * moving).sum(), theta)

    theta, p = logits(seed, 9), torch.log_softmax(logits(seed + 1, 9), -1)
    reverse = gradient(lambda q: kl_divergence(q, p), theta)
    forward = gradient(lambda q: kl_divergence(p, q), theta)
    torch.testing.assert_close(as_reward(k1, theta, p), reverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(as_reward(k3, theta, p), reverse - forward, rtol=1e-9, atol=1e-12)
    near = p + logits(seed + 2, 9, spread=1e-4)
    true = gradient(lambda q: kl_divergence(q, p), near).norm()
    assert float(as_reward(k3, near, p).norm()) < 0.01 * float(true)
    assert float(as_reward(k2, near, p).norm()) < 0.01 * float(true)


@settings(max_examples=25, deadline=None)
@given(problems)
def test_step_divergences_add_up_to_that_of_the_sequence_and_scatter_less(seed: int) -> None:
    """On all strings of three tokens: E_q sum_t KL_t = KL of the sequences, with less variance than k1."""
    size, steps = 3, 3
    tables = [[torch.log_softmax(logits(seed + 7 * t + i, size**t, size), -1) for t in range(steps)] for i in (0, 1)]
    number = torch.arange(size**steps)
    digits = [number // size ** (steps - 1 - t) for t in range(steps)]  # the first t + 1 tokens as one number
    along = [torch.stack([table[t][digits[t] // size] for t in range(steps)], 1) for table in tables]  # [27, 3, 3]
    q, p = (a.gather(-1, torch.stack(digits, 1)[..., None] % size)[..., 0].sum(-1) for a in along)
    exact = kl_divergence(q, p)
    values = rao_blackwell_kl(along[0], along[1], torch.ones(27, steps))
    torch.testing.assert_close(expected(q, values), exact, rtol=1e-10, atol=0)
    assert float(expected(q, (values - exact) ** 2)) < float(expected(q, (k1(q - p) - exact) ** 2))


def test_steps_after_the_end_do_not_count_whatever_stands_there() -> None:
    """The mask drops a step, infinities and all."""
    q, p = torch.log_softmax(logits(3, 2, 2, 4), -1)
    p = p.clone()
    p[1] = -math.inf
    assert rao_blackwell_kl(q, p, torch.tensor([1, 0])) == kl_divergence(q[0], p[0])


def test_forward_kl_turns_the_sign_of_the_samples_of_the_reference() -> None:
    """E_ref[log pi/ref] = -KL(ref || pi): `forward_kl` over y ~ ref is k1 with the roles exchanged."""
    ref, policy = two_laws(4)
    torch.testing.assert_close(expected(ref, forward_kl(policy - ref)), kl_divergence(ref, policy), rtol=1e-12, atol=0)
    assert torch.equal(forward_kl(policy - ref), k1(ref - policy))
