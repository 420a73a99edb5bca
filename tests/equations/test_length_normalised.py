"""What averaging over tokens changes about DPO."""

from __future__ import annotations

import math

import torch

from preftune.equations.length_normalised import ln_dpo, ln_dpo_reward, ln_dpo_weights
from preftune.equations.pairwise import dpo_reward
from preftune.tensors import PairLogps, ResponseLogps


def test_a_response_is_worth_its_tokens_on_average() -> None:
    """Twice as many tokens of the same quality: twice the reward for DPO, the same for the mean."""
    ratio, length = torch.tensor([[3.0, 6.0], [10.0, 20.0]], dtype=torch.float64)
    responses = ResponseLogps(ratio - 60, ratio, length)
    assert ln_dpo_reward(responses, beta=5.0).tolist() == [1.5, 1.5]
    short, long = dpo_reward(responses, beta=0.1).tolist()
    assert long == 2 * short


def test_a_long_response_is_moved_less_and_both_lengths_count() -> None:
    """w_c n_w = w_r n_l: each token of either side is pulled with beta s(-u) over its own response's length."""
    one = torch.ones(1).double()
    pair = PairLogps(-60 * one, -60 * one, 8 * one, 2 * one, 40 * one, 5 * one, one)
    w_c, w_r = ln_dpo_weights(pair, beta=5.0)
    torch.testing.assert_close(w_c * 40, w_r * 5)
    assert float(w_c) < float(w_r)
    # 8/40 = 0.2 against 2/5 = 0.4 nats per token: wrongly ranked although the sums, 8 and 2, are right
    torch.testing.assert_close(ln_dpo(pair, beta=5.0), torch.tensor([math.log1p(math.e)], dtype=torch.float64))
