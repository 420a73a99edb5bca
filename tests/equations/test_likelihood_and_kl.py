"""Likelihood per token, and the divergence that the training data can estimate."""

from __future__ import annotations

import torch

from preftune.equations.kl import forward_kl
from preftune.equations.likelihood import negative_log_likelihood
from preftune.equations.stats import mean_interval


def two_policies() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    reference, policy = torch.softmax(torch.randn(2, 7, generator=g, dtype=torch.float64), dim=-1)
    return reference, policy


def test_negative_log_likelihood_is_the_cross_entropy_of_each_token() -> None:
    """One value per token, the loss torch computes from logits, nothing averaged."""
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(9, 5, generator=g), torch.randint(0, 5, (9,), generator=g)
    logps = torch.log_softmax(logits, -1)[torch.arange(9), targets]
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logps), expected)


def test_forward_kl_is_the_divergence_in_expectation_under_the_reference() -> None:
    """The mean of its values over y ~ pi_ref is KL(pi_ref || pi), hence never negative, and exactly 0 at pi_ref."""
    reference, policy = two_policies()
    values = forward_kl(policy.log() - reference.log())
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=reference), torch.distributions.Categorical(probs=policy)
    )
    torch.testing.assert_close((reference * values).sum(), divergence, rtol=1e-12, atol=0)
    assert float(divergence) > 0.1
    assert torch.equal(forward_kl(torch.zeros(3)), torch.zeros(3))


def test_forward_kl_from_samples_covers_the_truth_only_when_the_reference_wrote_them() -> None:
    """Samples of the reference give the divergence; samples of the policy give minus the other divergence, a drift."""
    reference, policy = two_policies()
    log_ratio = policy.log() - reference.log()
    divergence = float((reference * -log_ratio).sum())
    g = torch.Generator().manual_seed(1)
    by_reference = mean_interval(forward_kl(log_ratio[torch.multinomial(reference, 4000, True, generator=g)]), 0.999)
    by_policy = mean_interval(forward_kl(log_ratio[torch.multinomial(policy, 4000, True, generator=g)]), 0.999)
    assert by_reference.low < divergence < by_reference.high
    assert by_policy.high < 0 < divergence


def test_forward_kl_is_a_number_to_log() -> None:
    """No gradient flows through it."""
    assert not forward_kl(torch.ones(2, requires_grad=True)).requires_grad
