"""What is special about each reshaped loss, and where well-known implementations of it differ."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from preftune.equations.losses import LOSSES
from preftune.equations.pairwise import cdpo, dpo, dpo_weights
from preftune.equations.shaped import (
    discopop,
    discopop_weights,
    dpop,
    dpop_weights,
    exo,
    exo_weights,
    margin_dpo,
    odpo,
    odpo_weights,
    rdpo,
    rdpo_weights,
    xpo,
    xpo_weights,
)
from preftune.errors import ConfigError, DataError
from preftune.tensors import PairIndex, PairLogps, ResponseLogps


def pairs(a: Tensor, b: Tensor, *, n_w: float = 5.0, n_l: float = 5.0, gap: Tensor | None = None) -> PairLogps:
    """Pairs with these log-ratios, of responses whose reference log-prob is -60."""
    one = torch.ones_like(a)
    return PairLogps(a - 60, b - 60, a, b, n_w * one, n_l * one, one, gap)


def of_gap(gap: Tensor) -> PairLogps:
    """Pairs whose log-ratio gap D is this, half of it on each side."""
    return pairs(gap / 2, -gap / 2)


def spread(low: float, high: float, count: int = 401) -> Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


# --- EXO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [1e-3, 0.1, 0.4])
def test_exo_is_the_kl_from_the_model_to_the_smoothed_label_and_cdpo_the_kl_back(e: float) -> None:
    """EXO = KL(model || label); conservative DPO = KL(label || model) + the label's entropy."""
    D = spread(-60, 60)
    model = Bernoulli(logits=0.1 * D)
    label = Bernoulli(probs=torch.full_like(D, 1 - e))
    torch.testing.assert_close(exo(of_gap(D), label_smoothing=e), kl_divergence(model, label), rtol=1e-9, atol=1e-12)
    back = kl_divergence(label, model) + label.entropy()
    torch.testing.assert_close(cdpo(of_gap(D), label_smoothing=e), back, rtol=1e-9, atol=1e-12)


def test_exo_gives_up_pairs_that_are_very_wrong() -> None:
    """Its pull is largest at a moderate error and falls to nothing beyond, where DPO's keeps growing to beta."""
    z = spread(-40, 0)
    pull, _ = exo_weights(of_gap(z / 0.1), beta=0.1)
    hardest = int(pull.argmax())
    assert 0 < hardest < 400 and -4 < float(z[hardest]) < 0
    assert float(pull[0]) < 1e-14 < 0.0999 < float(dpo_weights(of_gap(z / 0.1), beta=0.1)[0][0])
    assert (pull[:hardest].diff() > 0).all()


@pytest.mark.parametrize("e", [1e-3, 0.2])
def test_exo_settles_where_the_model_is_as_sure_as_the_label(e: float) -> None:
    """Loss and pull are 0 at z = logit(1 - e); beyond it the pair is pulled back."""
    z = math.log((1 - e) / e) + torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)
    pull, _ = exo_weights(of_gap(z / 0.1), beta=0.1, label_smoothing=e)
    assert float(pull[0]) > 1e-6 and abs(float(pull[1])) < 1e-15 and float(pull[2]) < -1e-6
    assert abs(float(exo(of_gap(z / 0.1), label_smoothing=e)[1])) < 1e-14


def test_exo_without_smoothing_is_refused_rather_than_smoothed_in_silence() -> None:
    """e = 0 makes the KL infinite: refused by name, neither replaced by 1e-3 nor accepted."""
    message = "loss exo: label_smoothing must be a number in (0, 0.5), not 0"
    for e in (0, 0.0):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
            LOSSES["exo"].bind(label_smoothing=e)


def test_exo_reads_both_logarithms_from_one_e() -> None:
    """log e = -10 with log(1 - e) = 0, as in the authors' code, is no KL: it falls below zero. Ours cannot."""
    z = spread(0, 40)
    q = torch.sigmoid(z)
    released = q * q.log() + (1 - q) * ((1 - q).log() + 10)
    assert float(released[:300].min()) < -1e-6
    ours = exo(of_gap(z / 0.1), label_smoothing=math.exp(-10.0))
    assert float(ours.min()) >= 0
    torch.testing.assert_close(
        (ours - released)[:300], (-math.log1p(-math.exp(-10.0)) * q)[:300], rtol=1e-6, atol=1e-12
    )


# --- DiscoPOP --------------------------------------------------------------------------------------------------------


def test_discopop_has_a_minimum_and_a_maximum_between_wrong_and_right() -> None:
    """The loss falls, rises from z = -0.1186 to z = +0.0720 and falls again: at beta = 0.05, gaps of -2.37 and 1.44."""
    z = spread(-1, 1, 200_001)
    values = discopop(of_gap(z / 0.05))
    rising = (values.diff() > 0).nonzero().flatten()
    assert float(z[rising[0]]) == pytest.approx(-0.1186, abs=5e-5)
    assert float(z[rising[-1] + 1]) == pytest.approx(0.0720, abs=5e-5)
    assert len(rising) == int(rising[-1] - rising[0]) + 1
    for stationary in (float(z[rising[0]]), float(z[rising[-1] + 1])):
        pull, _ = discopop_weights(of_gap(torch.tensor([stationary / 0.05], dtype=torch.float64)))
        assert abs(float(pull)) < 1e-4 * 0.05 * 20


@pytest.mark.parametrize(("start", "end"), [(0.0, -0.1186), (0.071, -0.1186), (-0.5, -0.1186), (0.073, 1.0)])
def test_discopop_leaves_a_fresh_pair_on_the_wrong_side(start: float, end: float) -> None:
    """Descent on one pair from z = 0 settles at z = -0.1186; only from beyond +0.0720 does it go on to the right."""
    z = torch.tensor([start], dtype=torch.float64)
    for _ in range(3000):
        pull, _ = discopop_weights(of_gap(z / 0.05))
        z = (z + 0.2 * pull).clamp(max=1.0)
    assert float(z) == pytest.approx(end, abs=1e-4)


def test_discopop_reads_the_gap_only_through_z() -> None:
    """Twice the gap at half the beta is the same loss; the first release, which modulates by s(D), breaks that."""
    D = spread(-4, 4)
    ours = discopop(of_gap(D), beta=0.1), discopop(of_gap(2 * D), beta=0.05)
    torch.testing.assert_close(*ours, rtol=1e-12, atol=1e-12)

    def first_release(D: Tensor, beta: float) -> Tensor:
        z, m = beta * D, torch.sigmoid(D)
        return torch.log1p(torch.exp(-z)) * (1 - m) + torch.exp(-z) * m

    torch.testing.assert_close(first_release(D, 0.05), discopop(of_gap(D), beta=0.05), rtol=1e-12, atol=1e-12)
    assert float((first_release(D, 0.1) - ours[0]).abs().max()) > 0.05


# --- R-DPO -----------------------------------------------------------------------------------------------------------


def test_rdpo_pulls_pairs_whose_winner_is_longer_less() -> None:
    """At the same log-ratios: less than DPO for a longer winner, as much for equal lengths, more for a shorter one."""
    a, b = spread(-20, 20, 41), spread(15, -10, 41)
    plain, _ = dpo_weights(pairs(a, b), beta=0.1)
    longer, even, shorter = (
        rdpo_weights(pairs(a, b, n_w=n_w, n_l=n_l), beta=0.1, alpha=0.05)[0]
        for n_w, n_l in ((90, 30), (30, 30), (30, 90))
    )
    assert (longer < plain).all() and (plain < shorter).all()
    torch.testing.assert_close(even, plain, rtol=1e-14, atol=0)


def test_rdpo_charges_length_to_the_labeller_not_to_the_policy() -> None:
    """A winner that is 60 tokens longer needs 60 alpha / beta nats of gap less; the opposite sign would need more."""
    D = spread(-50, 50)
    here = rdpo(pairs(D / 2, -D / 2, n_w=90, n_l=30), beta=0.1, alpha=0.05)
    torch.testing.assert_close(here, dpo(of_gap(D + 60 * 0.05 / 0.1), beta=0.1), rtol=1e-12, atol=1e-14)
    assert float((here - dpo(of_gap(D - 60 * 0.05 / 0.1), beta=0.1)).abs().min()) > 0.1


# --- ODPO and margins ------------------------------------------------------------------------------------------------


def test_odpo_offsets_by_the_log_of_the_gap_below_one_too() -> None:
    """A gap of 1 is DPO, e asks for one nat of z more, 1/e for one nat less: no floor at zero."""
    D = spread(-50, 50)
    for gap, offset in ((1.0, 0.0), (math.e, 1.0), (1 / math.e, -1.0)):
        here = odpo(pairs(D / 2, -D / 2, gap=torch.full_like(D, gap)), beta=0.1)
        torch.testing.assert_close(here, dpo(of_gap(D - offset / 0.1), beta=0.1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, -2.0])
def test_odpo_learns_nothing_from_ties_and_contradictions(gap: float) -> None:
    """Loss, weights and gradient are exactly 0, where log(gap) would give -inf or NaN; at alpha = 0 they are DPO's."""
    a = spread(-30, 30, 7).requires_grad_()
    tied = pairs(a, -a, gap=torch.full((7,), gap, dtype=torch.float64))
    assert torch.equal(odpo(tied), torch.zeros(7).double())
    assert torch.equal(odpo_weights(tied)[0], torch.zeros(7).double())
    (grad,) = torch.autograd.grad(odpo(tied).sum(), a)
    assert torch.equal(grad, torch.zeros(7).double())
    assert torch.equal(odpo(tied, alpha=0.0), dpo(tied))
    assert torch.equal(odpo_weights(tied, alpha=0.0)[0], dpo_weights(tied)[0])


def test_odpo_reaches_a_tie_without_a_jump() -> None:
    """Log scores of 1e-2, 1e-4, ... apart: the loss falls to the tie's 0 like the gap itself."""
    gap = torch.tensor([10.0**-k for k in range(2, 20, 2)], dtype=torch.float64)
    zero = torch.zeros_like(gap)
    values = odpo(pairs(zero, zero, gap=gap))
    torch.testing.assert_close(values, torch.log1p(gap), rtol=1e-10, atol=0)


def test_margin_is_asked_in_nats_of_reward() -> None:
    """alpha times the gap is subtracted from z: none for ties, negative where contradicted."""
    D = spread(-50, 50)
    for gap in (0.0, 1.0, 3.0, -1.0):
        here = margin_dpo(pairs(D / 2, -D / 2, gap=torch.full_like(D, gap)), beta=0.1, alpha=0.5)
        torch.testing.assert_close(here, dpo(of_gap(D - 0.5 * gap / 0.1), beta=0.1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["odpo", "margin_dpo"])
def test_pairs_without_scores_are_not_taken_for_ties(name: str) -> None:
    """No scores at all is refused with what to do; one missing score makes that row, and only that row, NaN."""
    D = spread(-1, 1, 3)
    with pytest.raises(DataError, match="give data with scores, or choose a loss that needs none"):
        LOSSES[name].bind().values(of_gap(D))
    gap = torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64)
    assert LOSSES[name].bind().values(pairs(D, -D, gap=gap)).isnan().tolist() == [False, True, False]


# --- DPOP ------------------------------------------------------------------------------------------------------------


def test_dpop_is_dpo_while_chosen_is_not_below_its_reference() -> None:
    """Where a >= 0 value and weights are DPO's exactly, whatever the penalty; where a < 0 the loss is larger."""
    a = torch.cat([torch.zeros(1).double(), spread(0.1, 30, 60)])
    above, below = pairs(a, spread(-30, 30, 61)), pairs(-a[1:], spread(-30, 30, 60))
    for penalty in (0.1, 50.0):
        assert torch.equal(dpop(above, beta=0.3, penalty=penalty), dpo(above, beta=0.3))
        torch.testing.assert_close(dpop_weights(above, beta=0.3, penalty=penalty), dpo_weights(above, beta=0.3))
        assert (dpop(below, beta=0.3, penalty=penalty) > dpo(below, beta=0.3)).all()


def test_dpop_pulls_a_fallen_chosen_response_51_times_as_hard() -> None:
    """w_c / w_r = 1 + penalty where a < 0; a rejected response below its reference is nobody's loss."""
    fallen = pairs(torch.tensor([-0.1], dtype=torch.float64), torch.tensor([-20.0], dtype=torch.float64))
    w_c, w_r = dpop_weights(fallen)
    assert float(w_c / w_r) == pytest.approx(51)
    assert float(dpop(fallen)) == pytest.approx(math.log1p(math.exp(-0.3 * (19.9 - 50 * 0.1))), rel=1e-12)


# --- XPO -------------------------------------------------------------------------------------------------------------


def test_xpo_s_optimism_is_minus_alpha_times_the_kl_from_the_reference() -> None:
    """Over pairs of the reference's own samples the term's mean is -alpha KL(pi_ref || pi), by enumeration."""
    g = torch.Generator().manual_seed(0)
    reference, policy = torch.randn(2, 6, generator=g, dtype=torch.float64).log_softmax(-1)
    index = PairIndex(*torch.cartesian_prod(torch.arange(6), torch.arange(6)).T, torch.ones(36))
    drawn = ResponseLogps(policy, policy - reference, torch.ones(6).double()).pairs(index)
    chance = torch.outer(reference.exp(), reference.exp()).flatten()
    term = (chance * (xpo(drawn, beta=0.1, alpha=0.3) - dpo(drawn, beta=0.1))).sum()
    kl = (reference.exp() * (reference - policy)).sum()
    assert float(kl) > 0.1
    assert float(term) == pytest.approx(-0.3 * float(kl), rel=1e-12)


def test_xpo_pulls_both_samples_down_as_the_papers_log_prob_would() -> None:
    """Measuring log pi from the reference changes no gradient: w_c falls and w_r rises by alpha/2 each."""
    a, b = spread(-20, 20, 9), spread(10, -30, 9)
    w_c, w_r = xpo_weights(pairs(a, b), alpha=0.05)
    plain, _ = dpo_weights(pairs(a, b))
    pi_w, pi_l = (a - 60).requires_grad_(), (b - 60).requires_grad_()
    paper = torch.nn.functional.softplus(-0.1 * ((pi_w + 60) - (pi_l + 60))) + 0.05 * (pi_w + pi_l) / 2
    d_w, d_l = torch.autograd.grad(paper.sum(), (pi_w, pi_l))
    torch.testing.assert_close((w_c, w_r), (-d_w, d_l), rtol=1e-10, atol=1e-14)
    assert (w_c < plain).all() and (plain < w_r).all()
