"""What theory says about convergence: distances that fit together, forced displacement, coverage, the noise floor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from preftune.equations.kl import kl_divergence, total_variation
from preftune.equations.optimum import optimal_policy
from preftune.theory.convergence import (
    coverage,
    distance,
    forced_log_ratios,
    mean_log_ratios,
    never_drawn,
    sampling_floor,
)

BETAS = (0.1, 0.3, 1.0, 3.0)


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REF = torch.log_softmax(draw((3, 7), 0), -1)
UTILITY = draw((3, 7), 1)
POLICY = torch.log_softmax(draw((3, 7), 2), -1)
BEATS = torch.sigmoid(UTILITY[..., :, None] - UTILITY[..., None, :])


@pytest.mark.parametrize("beta", BETAS)
def test_the_objective_gap_is_beta_times_the_divergence(beta: float) -> None:
    """beta log Z - J(pi), from reward and KL, is beta KL(pi || pi*); Pinsker holds; the parts are their definitions."""
    found = distance(POLICY, REF, UTILITY, beta)
    torch.testing.assert_close(found.objective_gap, beta * found.kl, rtol=1e-10, atol=1e-12)
    assert (found.total_variation <= (found.kl / 2).sqrt()).all()
    best = REF.exp() * (UTILITY / beta).exp()
    best = best / best.sum(-1, keepdim=True)
    pi = POLICY.exp()
    torch.testing.assert_close(found.total_variation, (pi - best).clamp(min=0).sum(-1))
    torch.testing.assert_close(found.kl, kl_div(best.log(), pi, reduction="none").sum(-1))
    torch.testing.assert_close(found.reverse_kl, kl_div(pi.log(), best, reduction="none").sum(-1))
    torch.testing.assert_close(found.kl_to_reference, kl_div(REF, pi, reduction="none").sum(-1))
    torch.testing.assert_close(found.reward_gap, ((best - pi) * UTILITY).sum(-1))


@pytest.mark.parametrize("beta", BETAS)
def test_at_the_optimum_nothing_is_left(beta: float) -> None:
    """Every distance from pi* is 0 at pi* itself, and the KL to the reference is the optimum's."""
    best = optimal_policy(REF, UTILITY, beta)
    found = distance(best, REF, UTILITY, beta)
    for number in (found.total_variation, found.kl, found.reverse_kl, found.reward_gap, found.objective_gap):
        torch.testing.assert_close(number, torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.kl_to_reference, kl_divergence(best, REF))


def log_ratios_by_hand(policy: Tensor, x: int, beats: Tensor) -> tuple[float, float]:
    """E_w and E_l of the log-ratio for prompt x, pair by pair in plain Python."""
    chosen = rejected = total = 0.0
    for i in range(7):
        for j in range(7):
            if i == j:
                continue
            chance = math.exp(REF[x, i] + REF[x, j]) * float(beats[x, i, j])
            chosen += chance * float(policy[x, i] - REF[x, i])
            rejected += chance * float(policy[x, j] - REF[x, j])
            total += chance
    return chosen / total, rejected / total


@pytest.mark.parametrize("deterministic", [False, True], ids=["bradley-terry", "deterministic"])
@pytest.mark.parametrize("beta", BETAS)
def test_displacement_is_forced_by_the_optimum(beta: float, deterministic: bool) -> None:
    """E_w[u] / beta - log Z is the mean chosen log-ratio that pi* has, whoever labels; likewise the rejected one."""
    beats = torch.heaviside(UTILITY[..., :, None] - UTILITY[..., None, :], torch.tensor(0.5).double())
    beats = beats if deterministic else BEATS
    best = optimal_policy(REF, UTILITY, beta)
    forced, measured = forced_log_ratios(REF, UTILITY, beta, beats), mean_log_ratios(best, REF, beats)
    torch.testing.assert_close(measured.chosen, forced.chosen, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(measured.rejected, forced.rejected, rtol=1e-10, atol=1e-12)
    for x in range(3):
        by_hand = log_ratios_by_hand(best, x, beats)
        assert (float(forced.chosen[x]), float(forced.rejected[x])) == pytest.approx(by_hand, abs=1e-12)


def test_small_beta_pulls_the_chosen_responses_down() -> None:
    """At beta = 0.1 even the chosen responses fall, at beta = 3 they rise: log Z follows the best response."""
    assert (forced_log_ratios(REF, UTILITY, 0.1, BEATS).chosen < -1).all()
    assert (forced_log_ratios(REF, UTILITY, 3.0, BEATS).chosen > 0).all()


def test_both_sides_together_fall_by_a_divergence() -> None:
    """Over pairs drawn from the reference chosen and rejected average to minus KL(ref || pi), equal draws put back."""
    sides = mean_log_ratios(POLICY, REF, BEATS)
    share = 1 - REF.exp().square().sum(-1)  # of draws that are a pair
    equal = (REF.exp().square() * (POLICY - REF)).sum(-1)
    both = share * (sides.chosen + sides.rejected) / 2 + equal
    torch.testing.assert_close(both, -kl_divergence(REF, POLICY))


def test_coverage_is_the_largest_and_the_typical_weight() -> None:
    """The reference covers itself wholly; a policy on one response needs 1 / ref(y) draws; -inf is no weight."""
    own = coverage(REF, REF)
    torch.testing.assert_close(torch.stack([own.worst, own.effective]), torch.ones(2, 3).double())
    point = torch.full((7,), -math.inf).double()
    point[4] = 0.0
    alone = coverage(point, REF)
    torch.testing.assert_close(alone.worst, 1 / REF[:, 4].exp())
    torch.testing.assert_close(alone.effective, REF[:, 4].exp())
    weights = (POLICY - REF).exp()
    torch.testing.assert_close(coverage(POLICY, REF).effective, 1 / (REF.exp() * weights.square()).sum(-1))
    assert (coverage(optimal_policy(REF, UTILITY, 0.1), REF).worst > coverage(POLICY, POLICY).worst).all()


def test_what_is_never_drawn_is_what_sampling_misses() -> None:
    """The expected missing mass is that of 4,000 samples of 12 draws each, within four standard errors."""
    missed = []
    for x in range(3):
        g = torch.Generator().manual_seed(x)
        drawn = torch.multinomial(REF[x].exp().expand(4000, 7), 12, replacement=True, generator=g)
        seen = torch.zeros(4000, 7).scatter_(1, drawn, 1.0).bool()
        missed.append(torch.where(seen, 0.0, POLICY[x].exp()).sum(-1))
    found = torch.stack(missed)
    error = found.std(-1) / math.sqrt(4000)
    assert ((found.mean(-1) - never_drawn(POLICY, REF, 12)).abs() < 4 * error).all()
    torch.testing.assert_close(never_drawn(POLICY, REF, 0), torch.ones(3).double())


def fitted(ref: Tensor, utility: Tensor, beta: float, pairs: int, samples: int) -> Tensor:
    """[samples, M] tables fitted by Newton's method to `pairs` sampled comparisons each: an independent minimiser."""
    size = len(ref)
    chance = (ref[:, None] + ref[None]).exp() * torch.sigmoid(utility[:, None] - utility[None])  # i chosen over j
    cells = torch.cat([2 * (chance * (1 - torch.eye(size))).flatten(), ref.exp().square().sum()[None]])
    drawn = np.random.default_rng(5).multinomial(pairs, (cells / cells.sum()).numpy(), size=samples)
    count = torch.from_numpy(drawn[:, :-1]).double().view(samples, size, size)
    h = torch.zeros(samples, size).double()
    for _ in range(30):
        p = torch.sigmoid(beta * (h[:, None, :] - h[:, :, None]))  # [i, j]: how wrong the fit is about i over j
        pull = beta * (count * p - (count * p).mT).sum(-1)
        both = beta**2 * (count + count.mT) * p * (1 - p)
        curvature = torch.diag_embed(both.sum(-1)) - both + 1.0 / size
        h = h + torch.linalg.solve(curvature, pull)
    return torch.log_softmax(ref + h, -1)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_floor_is_where_fitted_tables_end(beta: float) -> None:
    """The mean TV and KL of 4,000 tables, each fitted to 100,000 sampled pairs, are the floor's to 4 %."""
    ref, utility = REF[0], UTILITY[0]
    tables, best = fitted(ref, utility, beta, 100_000, 4000), optimal_policy(ref, utility, beta)
    floor = sampling_floor(ref, utility, beta, 100_000)
    assert float(total_variation(tables, best).mean()) == pytest.approx(float(floor.total_variation), rel=0.04)
    assert float(kl_divergence(tables, best).mean()) == pytest.approx(float(floor.kl), rel=0.04)


def test_four_times_the_pairs_halve_the_distance() -> None:
    """The floor's KL falls as 1 / pairs, its TV as 1 / sqrt(pairs); prompts are computed together as alone."""
    few, many = (sampling_floor(REF, UTILITY, 1.0, pairs) for pairs in (100, 400))
    torch.testing.assert_close(few.kl, 4 * many.kl)
    torch.testing.assert_close(few.total_variation, 2 * many.total_variation)
    torch.testing.assert_close(sampling_floor(REF[1], UTILITY[1], 1.0, 100).kl, few.kl[1])


def test_a_number_out_of_range_is_refused() -> None:
    """A beta of 0 has no optimum, no pairs have no fit."""
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        distance(POLICY, REF, UTILITY, 0.0)
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        forced_log_ratios(REF, UTILITY, -1.0, BEATS)
    with pytest.raises(ValueError, match="pairs must be at least 1, not 0"):
        sampling_floor(REF, UTILITY, 1.0, 0)
