"""What the contract suite cannot say of AOT, beta-DPO and BCO on pairs: transport, draws, running numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from preftune.equations.losses import LOSSES
from preftune.equations.pairwise import cdpo, dpo
from preftune.equations.whole_step import aot, aot_unpaired, bco_pair, beta_dpo, beta_dpo_update, beta_dpo_weights
from preftune.tensors import PairLogps


def pairs(
    a: Tensor | list[float], b: Tensor | list[float], reference_gap: Tensor | list[float] | None = None
) -> PairLogps:
    """Pairs of log-ratios a and b; the reference prefers y_w by `reference_gap` nats."""
    a, b = (torch.as_tensor(side, dtype=torch.float64) for side in (a, b))
    R = torch.zeros_like(a) if reference_gap is None else torch.as_tensor(reference_gap, dtype=torch.float64)
    return PairLogps(a + R - 50, b - 50, a, b, torch.ones_like(a), torch.ones_like(a), torch.ones_like(a))


def some_pairs(count: int, seed: int = 0, spread: float = 10.0) -> PairLogps:
    g = torch.Generator().manual_seed(seed)
    return pairs(*(spread * torch.randn(3, count, generator=g, dtype=torch.float64)))


def mapped(step: PairLogps, function: Callable[[Tensor], Tensor]) -> PairLogps:
    columns = (getattr(step, f.name) for f in fields(step))
    return PairLogps(*(None if column is None else function(column) for column in columns))


# --- AOT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_is_the_cheapest_of_all_matchings(name: str) -> None:
    """AOT is an optimal transport: its mean is the least over every way to match the two lists, by brute force."""
    for seed in range(5):
        step = some_pairs(6, seed)
        a, b = step.chosen_log_ratio, step.rejected_log_ratio
        policy = step.chosen - step.rejected
        upper, lower = (policy, policy - (a - b)) if name == "aot" else (a, b)
        costs = [float(softplus(-0.2 * (upper - lower[list(order)])).mean()) for order in permutations(range(6))]
        found = float(LOSSES[name].bind(beta=0.2).values(step).mean())
        assert found == pytest.approx(min(costs), rel=1e-12)
        assert max(costs) > found + 0.1


def test_aot_of_two_half_steps_by_hand() -> None:
    """Chosen (0, 4) and rejected (4, 0): the distributions agree, ln 2; one pair at a time they are 4 nats apart."""
    step = pairs([0.0, 4.0], [4.0, 0.0])
    torch.testing.assert_close(aot_unpaired(step, beta=1.0), torch.full((2,), math.log(2)).double(), atol=1e-7, rtol=0)
    alone = [float(aot_unpaired(pairs([a], [b]), beta=1.0)) for a, b in ((0.0, 4.0), (4.0, 0.0))]
    assert alone == pytest.approx([math.log1p(math.e**4), math.log1p(math.e**-4)])
    gaps = pairs([0.0, 0.0], [0.0, 0.0], [3.0, -1.0])
    moved = pairs([4.0, 0.0], [0.0, 4.0], [-1.0, 3.0])  # G = (3, -1): what the reference has, in another order
    assert float(aot(gaps, beta=1.0).mean()) == float(aot(moved, beta=1.0).mean()) == pytest.approx(math.log(2))
    assert float(dpo(moved, beta=1.0).mean()) == pytest.approx((math.log1p(math.e**4) + math.log1p(math.e**-4)) / 2)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_a_step_of_one_pair_is_dpo(loss: Callable[..., Tensor]) -> None:
    """With one pair there is nothing to sort: a micro-batch of one would silently train DPO, or cDPO."""
    for seed in range(20):
        one = some_pairs(1, seed)
        torch.testing.assert_close(loss(one, beta=0.05), dpo(one, beta=0.05), rtol=1e-12, atol=1e-13)
        smoothed = loss(one, beta=0.05, label_smoothing=0.3)
        torch.testing.assert_close(smoothed, cdpo(one, beta=0.05, label_smoothing=0.3), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_follows_its_rows(name: str) -> None:
    """Rows in another order have the same values in that order: a row's weight stays with its own response."""
    step, order = some_pairs(40), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = mapped(step, lambda t: t[order])
    loss = LOSSES[name].bind(beta=0.1)
    torch.testing.assert_close(loss.values(shuffled), loss.values(step)[order], rtol=1e-12, atol=0)
    for found, expected in zip(loss.weights(shuffled), loss.weights(step), strict=True):
        torch.testing.assert_close(found, expected[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_differentiates_by_log_ratios_alone(name: str) -> None:
    """The whole gradient arrives through the log-ratios, even where they and the log-probs are separate leaves."""
    step = some_pairs(30)
    columns = [getattr(step, f).clone().requires_grad_() for f in ("chosen", "rejected")]
    ratios = [getattr(step, f).clone().requires_grad_() for f in ("chosen_log_ratio", "rejected_log_ratio")]
    leaves = PairLogps(*columns, *ratios, step.chosen_length, step.rejected_length, step.weight)
    loss = LOSSES[name].bind(beta=0.1)
    found = torch.autograd.grad(loss.values(leaves).sum(), [*ratios, *columns], allow_unused=True)
    w_c, w_r = loss.weights(step)
    torch.testing.assert_close((-found[0], found[1]), (w_c, w_r), rtol=1e-12, atol=1e-14)
    assert found[2] is None and found[3] is None


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_distributions_far_apart_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Quantile gaps of up to 1e4 / beta either way: value |z| or 0, weight beta or 0, no NaN."""
    for sign in (-1.0, 1.0):
        ratio = sign * torch.tensor([5e5, 4e5, 1e3, 9e5], dtype=dtype)
        step = PairLogps(ratio - 2e6, -ratio - 2e6, ratio, -ratio, *torch.ones(3, 4, dtype=dtype))
        values, (w_c, w_r) = (LOSSES[name].bind().values(step), LOSSES[name].bind().weights(step))
        far = ratio.abs() > 1e5
        gap = 2 * ratio if name == "aot" else ratio - (-ratio).sort().values[ratio.argsort().argsort()]
        torch.testing.assert_close(values, (-0.01 * gap).clamp(min=0) + torch.log1p(torch.exp(-0.01 * gap.abs())))
        for weight in (w_c, w_r):
            assert torch.isfinite(weight).all()
            torch.testing.assert_close(weight[far], torch.full_like(weight[far], 0.01 if sign < 0 else 0.0))


# --- beta-DPO --------------------------------------------------------------------------------------------------------


def kept(rows: PairLogps, **arguments: float) -> list[int]:
    return beta_dpo(rows, **arguments).nonzero().flatten().tolist()


def test_the_draw_depends_on_the_number_of_the_step_alone() -> None:
    """The same step draws the same pairs, whatever random numbers were used before; another step draws others."""
    step = some_pairs(50)
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        draws.append([kept(step, step=float(number), spread=2.0) for number in range(20)])
        assert torch.equal(torch.get_rng_state(), before)
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[0]}) == 20
    assert {len(draw) for draw in draws[0]} == {40}
    narrow = mapped(step, Tensor.float)
    assert [kept(narrow, step=float(number), spread=2.0) for number in range(20)] == draws[0]


def test_pairs_are_drawn_one_by_one_with_gaussian_odds() -> None:
    """Over many steps each pair is kept as often as drawing two of four without replacement says, within 0.03."""
    D = torch.tensor([1.0, 6.0, 12.0, -4.0]).double()
    odds = torch.exp(-(((0.1 * D - 0.3) / 0.5) ** 2) / 2).tolist()
    expected = [0.0] * 4
    for first, second in permutations(range(4), 2):
        chance = odds[first] / sum(odds) * odds[second] / (sum(odds) - odds[first])
        expected[first] += chance
        expected[second] += chance
    step, found = pairs(D, torch.zeros(4)), torch.zeros(4)
    for number in range(4000):
        found[kept(step, keep=0.5, threshold=0.3, spread=0.5, step=float(number))] += 1
    assert (found / 4000).tolist() == pytest.approx(expected, abs=0.03)
    assert max(expected) - min(expected) > 0.3


def test_outliers_are_the_ones_left_out() -> None:
    """Pairs a thousand spreads off are dropped while others are left, and even if none is there are no NaN."""
    D = torch.tensor([0.1] * 8 + [1e4, -1e4]).double()
    for number in range(50):
        assert kept(pairs(D, torch.zeros(10)), spread=0.5, step=float(number)) == list(range(8))
    far = beta_dpo(pairs(1e4 + D, torch.zeros(10)), spread=1e-3)
    assert int((far != 0).sum()) <= 8 and torch.isfinite(far).all()


def test_mean_over_the_step_is_the_mean_over_the_kept_pairs() -> None:
    """Dropped pairs have value and weight 0, kept ones count T/kept times; at the start the mean is ln 2."""
    step = some_pairs(10)
    values, (w_c, w_r) = beta_dpo(step, alpha=0.0, spread=1.5), beta_dpo_weights(step, alpha=0.0, spread=1.5)
    there = values != 0
    assert int(there.sum()) == 8
    assert float(values.mean()) == pytest.approx(float(dpo(step, beta=0.1)[there].mean()), rel=1e-12)
    assert torch.equal(w_c != 0, there) and torch.equal(w_c, w_r)
    start = beta_dpo(pairs(torch.zeros(10), torch.zeros(10)))
    assert float(start.mean()) == pytest.approx(math.log(2), rel=1e-12)
    one = some_pairs(1)
    margin = 0.1 * float(one.chosen_log_ratio - one.rejected_log_ratio)
    assert float(beta_dpo(one)) == pytest.approx(float(dpo(one, beta=0.1 * (1 + 0.6 * margin))))


def test_beta_of_a_step_follows_its_mean_margin_and_never_falls_below_a_thousandth() -> None:
    """By hand: margins of 2 and a threshold of 1 give beta (1 + 0.6); margins of -20 would give a negative beta."""
    step = pairs(torch.full((5,), 20.0), torch.zeros(5))
    found = beta_dpo(step, keep=1.0, threshold=1.0, spread=1.0)
    torch.testing.assert_close(found, softplus(torch.full((5,), -0.16 * 20).double()), rtol=1e-7, atol=0)
    low = pairs(torch.full((5,), -200.0), torch.zeros(5))
    found, weights = beta_dpo(low, keep=1.0, spread=1.0), beta_dpo_weights(low, keep=1.0, spread=1.0)
    torch.testing.assert_close(found, softplus(torch.full((5,), 0.2).double()), rtol=1e-7, atol=0)
    assert float(weights[0][0]) == pytest.approx(0.001 / (1 + math.e**-0.2), rel=1e-12)


def test_threshold_and_spread_are_running_means_of_reward_margins() -> None:
    """By hand: margins 0.1 (1, 3) have mean 0.2 and spread 0.1; each step moves a tenth of the way."""
    step = pairs([1.0, 3.0], [0.0, 0.0])
    knobs = {"beta": 0.1, "alpha": 0.6, "keep": 0.8}
    first = beta_dpo_update(step, **knobs, threshold=0.0, spread=0.0, step=0.0)
    assert first == pytest.approx({"threshold": 0.02, "spread": 0.01, "step": 1.0})
    second = beta_dpo_update(step, **knobs, **first)
    assert second == pytest.approx({"threshold": 0.038, "spread": 0.019, "step": 2.0})
    assert LOSSES["beta_dpo"].bind().updated(some_pairs(0), second) == second


# --- BCO -------------------------------------------------------------------------------------------------------------


def test_bco_bounds_dpo_from_above_whatever_the_shift() -> None:
    """-log s(u) - log s(v) >= -log s(u + v): the theorem that BCO rests on, for every d; tight where both are large."""
    step = some_pairs(500)
    for d in (-20.0, -1.0, 0.0, 0.5, 30.0):
        assert (bco_pair(step, beta=0.1, reward_sum=3 * d, reward_count=3.0) > dpo(step, beta=0.1)).all()
    sure = pairs([400.0], [-400.0])
    assert float(bco_pair(sure, beta=0.1) - dpo(sure, beta=0.1)) < 1e-15


def test_bco_without_shift_is_the_biased_form_of_nca() -> None:
    """At d = 0 NCA is the mean of this loss over a rejected response that is y_l, and one that is y_w itself."""
    step = some_pairs(200)
    self_rejected = PairLogps(step.chosen, step.chosen, step.chosen_log_ratio, step.chosen_log_ratio,
                              step.chosen_length, step.chosen_length, step.weight)  # fmt: skip
    mean = (bco_pair(step, beta=0.1) + bco_pair(self_rejected, beta=0.1)) / 2
    torch.testing.assert_close(mean, LOSSES["nca"].bind(beta=0.1).values(step), rtol=1e-12, atol=1e-13)
    R_w, R_l = 0.1 * step.chosen_log_ratio, 0.1 * step.rejected_log_ratio
    torch.testing.assert_close(bco_pair(step, beta=0.1), -logsigmoid(R_w) - logsigmoid(-R_l), rtol=1e-12, atol=1e-13)


def test_the_shift_is_the_mean_of_all_rewards_of_both_sides() -> None:
    """By hand: rewards 0.1 (1, 3) and 0.1 (-2, 6), then 0.1 (5) and 0.1 (-1), whatever the split into steps."""
    loss = LOSSES["bco_pair"].bind()
    state = loss.updated(pairs([1.0, 3.0], [-2.0, 6.0]), LOSSES["bco_pair"].state())
    assert state == pytest.approx({"reward_sum": 0.8, "reward_count": 4.0})
    state = loss.updated(pairs([5.0], [-1.0]), state)
    assert state == pytest.approx({"reward_sum": 1.2, "reward_count": 6.0})
    assert loss.updated(some_pairs(0), state) == state
    together = loss.updated(pairs([1.0, 3.0, 5.0], [-2.0, 6.0, -1.0]), LOSSES["bco_pair"].state())
    assert together == pytest.approx(state)
    centred = pairs([2.0], [2.0])  # both rewards at the mean, 0.2
    assert float(loss.values(centred, state)) == pytest.approx(2 * math.log(2), rel=1e-12)
