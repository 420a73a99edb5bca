"""The index-pair form of the DPO paper's listing, and the implicit reward."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from preftune.equations.pairwise import dpo, dpo_loss, implicit_reward
from preftune.tensors import PairIndex, ResponseLogps


def responses(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    policy = -40 + 6 * torch.randn(count, generator=g, dtype=torch.float64)
    return policy.requires_grad_(), -40 + 6 * torch.randn(count, generator=g, dtype=torch.float64)


def test_index_pair_form_equals_pair_form() -> None:
    """dpo_loss over positions is dpo over the pairs they name, in value and in gradient."""
    policy, reference = responses(5)
    chosen, rejected = torch.tensor([0, 0, 3, 4]), torch.tensor([1, 2, 1, 0])
    losses, rewards = dpo_loss(policy, reference, chosen, rejected, beta=0.3)
    index = PairIndex(chosen, rejected, torch.ones(4))
    pairs = ResponseLogps(policy, policy - reference, torch.ones(5).double()).pairs(index)
    torch.testing.assert_close(losses, dpo(pairs, beta=0.3), rtol=1e-12, atol=0)
    (by_index,) = torch.autograd.grad(losses.sum(), policy)
    (by_pair,) = torch.autograd.grad(dpo(pairs, beta=0.3).sum(), policy)
    torch.testing.assert_close(by_index, by_pair, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rewards, 0.3 * (policy - reference).detach())


def test_losses_carry_gradient_and_rewards_do_not() -> None:
    """The rewards are numbers to log: nothing flows back through them."""
    policy, reference = responses(2)
    losses, rewards = dpo_loss(policy, reference, torch.tensor([0]), torch.tensor([1]), beta=0.1)
    assert losses.requires_grad and losses.shape == (1,)
    assert not rewards.requires_grad and rewards.shape == (2,)
    assert not implicit_reward(policy, beta=0.1).requires_grad


def test_a_response_in_three_pairs_gets_the_sum_of_three_gradients() -> None:
    """The gradient of response 0, which beats three others, is the sum of -beta s(-z) over its three pairs."""
    policy, reference = responses(4, seed=1)
    losses, _ = dpo_loss(policy, reference, torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]), beta=0.2)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    ratio = ((policy - reference).exp() ** 0.2).detach()
    lost = ratio[1:] / (ratio[0] + ratio[1:])
    torch.testing.assert_close(grad, torch.cat([-0.2 * lost.sum()[None], 0.2 * lost]), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("empty", [torch.empty(0), torch.empty(0, dtype=torch.int64)], ids=["float", "int64"])
def test_no_pairs_give_no_losses_and_all_rewards(empty: Tensor) -> None:
    """T = 0 is a batch like any other: its sum is 0 and its gradient is 0."""
    policy, reference = responses(3)
    losses, rewards = dpo_loss(policy, reference, empty, empty, beta=0.1)
    assert losses.shape == (0,) and rewards.shape == (3,)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert torch.equal(grad, torch.zeros(3).double())


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([0, 3], [1, 2], "yw_idxs must lie in [0, 3), found 0 to 3"),
        ([0, 1], [-1, 2], "yl_idxs must lie in [0, 3), found -1 to 2"),
        ([0, 2], [1, 2], "pair 1 compares response 2 with itself"),
        ([0, 1], [1], "yw_idxs and yl_idxs must both be [T], not [2] and [1]"),
        ([[0]], [[1]], "yw_idxs and yl_idxs must both be [T], not [1, 1] and [1, 1]"),
        ([0.0], [1.0], "yw_idxs must hold integer positions, not torch.float32"),
        ([True], [False], "yw_idxs must hold integer positions, not torch.bool"),
    ],
)
def test_a_wrong_index_is_refused(chosen: list[int], rejected: list[int], message: str) -> None:
    """A position outside [0, B) would be another response, a mask another meaning: both raise, with the numbers."""
    policy, reference = responses(3)
    with pytest.raises(ValueError, match=re.escape(message)):
        dpo_loss(policy, reference, torch.tensor(chosen), torch.tensor(rejected), beta=0.1)


def test_policy_and_reference_of_other_shapes_are_refused() -> None:
    """[B] against [B, 1] would broadcast to [B, B]."""
    policy, reference = responses(3)
    with pytest.raises(ValueError, match=re.escape("must both be [B], not [3] and [3, 1]")):
        dpo_loss(policy, reference[:, None], torch.tensor([0]), torch.tensor([1]), beta=0.1)
