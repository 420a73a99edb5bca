"""What the contract suite cannot say of KTO and BCO: the reference point, where they settle, pairs as two rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.equations.losses import LOSSES
from preftune.equations.unpaired import bco, kto, kto_weights
from preftune.tensors import LabelledLogps, PairIndex, ResponseLogps, TokenGroup


def labelled(ratio: Tensor, desirable: Tensor, mismatched: Tensor) -> LabelledLogps:
    nothing = torch.full_like(ratio, torch.nan)
    return LabelledLogps(nothing, ratio, nothing, desirable, nothing, mismatched)


def expected_z0(size: int, mean: float = -0.5, spread: float = 4.0) -> float:
    """E max(0, mean of `size` normal log-ratios), in closed form: sigma phi(t) + mean Phi(t), t = mean / sigma."""
    sigma = spread / math.sqrt(size)
    t = mean / sigma
    return sigma * math.exp(-t * t / 2) / math.sqrt(2 * math.pi) + mean * math.erfc(-t / math.sqrt(2)) / 2


def test_z0_is_biased_upwards_the_more_the_smaller_the_batch() -> None:
    """A KL estimate of -0.5 becomes .89 at 2 responses and .04 at 64: why z0 is taken over the whole step."""
    sizes = (2, 4, 8, 16, 32, 64)
    assert [expected_z0(m) for m in sizes] == pytest.approx([0.89, 0.57, 0.35, 0.20, 0.10, 0.04], abs=0.01)
    g = torch.Generator().manual_seed(0)
    one = torch.ones(1, dtype=torch.float64)
    for m in sizes:
        strays = -0.5 + 4 * torch.randn(20000, m, generator=g, dtype=torch.float64)
        value = torch.vmap(lambda stray: kto(labelled(0 * one, one.bool(), stray), beta=0.1))(strays)
        z0 = torch.logit(value) / 0.1  # of a desirable response with log-ratio 0 the value is s(0.1 z0)
        assert float(z0.min()) > -1e-12 and float(z0.mean()) == pytest.approx(expected_z0(m), abs=0.03)


def test_z0_is_a_mean_of_all_mismatched_responses_clamped_once() -> None:
    """By hand: (-4, 0, 10) gives 2, zeros count; (-4, 1) gives 0; clamping each one would give more."""
    here = torch.zeros(1, dtype=torch.float64)
    for strays, z0 in (([-4.0, 0.0, 10.0], 2.0), ([-4.0, 1.0], 0.0), ([3.0], 3.0)):
        for desirable, sign in ((True, 1), (False, -1)):
            row = labelled(here, torch.tensor([desirable]), torch.tensor(strays, dtype=torch.float64))
            assert float(kto(row, beta=0.5)) == pytest.approx(1 / (1 + math.exp(-sign * 0.5 * z0)), rel=1e-12)


def test_kto_without_a_mismatched_response_is_refused() -> None:
    """No reference point, no loss: a z0 of 0 by default would be another loss. An empty step is empty."""
    some = labelled(torch.zeros(3), torch.tensor([True, False, True]), torch.zeros(0))
    for function in (kto, kto_weights):
        with pytest.raises(ValueError, match=r"^KTO got 3 responses but no mismatched one to estimate z0 from; give"):
            function(some)
        assert function(labelled(torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.zeros(0))).shape == (0,)


def test_mean_pull_of_kto_depends_on_the_label_odds_only() -> None:
    """Expected weight = beta s(u) s(-u) [w_D p - w_U (1 - p)]: one sign at every policy, so nothing but z0 stops it."""
    r = torch.linspace(-60, 60, 41, dtype=torch.float64)
    strays = torch.tensor([2.0]).double()
    for p, w_D, w_U in ((0.6, 1.0, 1.0), (0.45, 1.0, 1.0), (0.45, 1.3, 1.0), (0.5, 1.0, 1.0)):
        knobs = {"beta": 0.1, "desirable": w_D, "undesirable": w_U}
        up, down = (kto_weights(labelled(r, torch.full((41,), label), strays), **knobs) for label in (True, False))
        u = 0.1 * (r - 2)
        slope = torch.exp(-u) / (1 + torch.exp(-u)) ** 2
        expected = 0.1 * slope * (w_D * p - w_U * (1 - p))
        torch.testing.assert_close(p * up + (1 - p) * down, expected, rtol=1e-11, atol=1e-15)
        assert {float(s) for s in expected.sign()} == {float(np.sign(round(w_D * p - w_U * (1 - p), 12)))}


def test_weight_vanishes_where_badly_wrong_and_is_largest_at_z0() -> None:
    """KTO gives up on a hopeless response; BCO pulls it with all of beta."""
    r = torch.tensor([-400.0, 2.0, 400.0]).double()
    row = labelled(r, torch.ones(3, dtype=torch.bool), torch.tensor([2.0]).double())
    w = kto_weights(row, beta=0.1)
    assert float(w[1]) == pytest.approx(0.1 / 4, rel=1e-12) and 0 < float(w[0]) < 1e-17 and 0 < float(w[2]) < 1e-17
    pulls = LOSSES["bco"].bind(beta=0.1).weights(row)
    assert float(pulls[0]) == pytest.approx(0.1, rel=1e-12) and float(pulls[2]) < 1e-17


def test_bco_settles_at_the_policy_of_the_log_odds() -> None:
    """With d = -beta log Z its population minimiser is pi_ref odds^(1/beta) / Z: a reward of log-odds, to 1e-6."""
    g = torch.Generator().manual_seed(3)
    reference = torch.softmax(torch.randn(6, generator=g, dtype=torch.float64), 0)
    odds, beta = torch.exp(torch.randn(6, generator=g, dtype=torch.float64)), 0.5
    p = odds / (1 + odds)
    target = reference * odds ** (1 / beta)
    d = -beta * float(target.sum().log())
    theta = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        ratio = torch.log_softmax(theta, 0) - reference.log()
        risk = torch.zeros((), dtype=torch.float64)
        for chance, label in ((p, True), (1 - p, False)):
            rows = labelled(ratio, torch.full((6,), label), torch.zeros(0))
            risk = risk + (reference * chance * bco(rows, beta=beta, reward_sum=d, reward_count=1.0)).sum()
        risk.backward()
        return risk

    optimizer.step(closure)
    found, known = torch.softmax(theta.detach(), 0), target / target.sum()
    assert float((known - reference).abs().sum()) / 2 > 0.05
    assert float((found - known).abs().sum()) / 2 < 1e-6


def test_a_pair_serves_as_a_desirable_and_an_undesirable_response() -> None:
    """Over groups of pairs BCO sums to BCO on pairs, and KTO at z0 = 0 to APO-zero; both from the same responses."""
    ids = np.array([1], dtype=np.int32)
    groups = [TokenGroup(ids, (ids,) * 4, pairs=((2, 0),), mismatched=1), TokenGroup(ids, (ids,) * 2, pairs=((0, 1),))]
    policy = torch.tensor([-3.0, -9.0, -5.0, -70.0, -2.0, -8.0]).double()
    ratio = torch.tensor([4.0, 90.0, -7.0, -3.0, 12.0, 1.0]).double()  # the mismatched one fell: z0 = 0
    responses = ResponseLogps(policy, ratio, torch.ones(6).double())
    rows, pairs = responses.labelled(groups), responses.pairs(PairIndex.of(groups))
    assert rows.desirable.tolist() == [True, False, True, False] and rows.mismatched_log_ratio.tolist() == [-3.0]
    state = {"reward_sum": 1.5, "reward_count": 5.0}
    on_pairs = LOSSES["bco_pair"].bind().values(pairs, state)
    singly = LOSSES["bco"].bind().values(rows, state).reshape(2, 2).sum(1)
    torch.testing.assert_close(singly, on_pairs, rtol=1e-12, atol=1e-14)
    apo = LOSSES["apo_zero"].bind(beta=0.1).values(pairs)
    torch.testing.assert_close(kto(rows, beta=0.1).reshape(2, 2).sum(1), apo, rtol=1e-12, atol=1e-14)
    assert LOSSES["bco"].bind().updated(rows, state) == pytest.approx(LOSSES["bco_pair"].bind().updated(pairs, state))
