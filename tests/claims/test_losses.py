"""Claims about every pairwise loss; the rows of `loss_contract` say what each of them should be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from loss_contract import ROWS, Limit, Points, Row, World, exact, extreme_points, random_points
from torch import Tensor

from preftune.equations.losses import LOSSES, BoundLoss
from preftune.tensors import PairIndex, ResponseLogps

EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


def settings(name: str) -> Iterator[BoundLoss]:
    """Default knobs, every knob changed alone, all changed."""
    other = ROWS[name].other
    for knobs in ({}, *({knob: value} for knob, value in other.items()), other):
        yield LOSSES[name].bind(**knobs)


def gradients(loss: BoundLoss, points: Points) -> tuple[Tensor, Tensor]:
    """(-dL/d log pi(y_w), +dL/d log pi(y_l)) by autograd."""
    d_w, d_l = torch.autograd.grad(loss.values(points.pairs()).sum(), (points.pi_w, points.pi_l))
    return -d_w, d_l


def margin(row: Row, points: Points, needs_reference: bool) -> Tensor:
    """The quantity whose sign a loss tells apart, without its scale."""
    w, l = (points.pi_w - points.ref_w, points.pi_l - points.ref_l) if needs_reference else (points.pi_w, points.pi_l)
    return w / points.n_w - l / points.n_l if row.shift == "token" else w - l


def test_every_loss_is_under_contract() -> None:
    """Every loss of the table has a row here, every knob a second value, and one name throughout."""
    assert set(ROWS) == set(LOSSES)
    for name, loss in LOSSES.items():
        assert loss.name == name == loss.function.__name__
        assert set(ROWS[name].other) == set(loss.knobs())
        assert inspect.signature(loss.weights).parameters == inspect.signature(loss.function).parameters


@EVERY_LOSS
def test_value_at_policy_equal_to_reference_is_the_constant(name: str) -> None:
    """Where policy and reference agree a loss has its hand-computed constant, or openly none."""
    points = random_points(50)
    points = replace(points, pi_w=points.ref_w, pi_l=points.ref_l)
    if ROWS[name].at_start is None:
        assert LOSSES[name].bind().at_start() is None
        assert LOSSES[name].bind().values(points.pairs()).std() > 0.1
        return
    bound = (LOSSES[name].bind(), LOSSES[name].bind(**ROWS[name].other))
    for loss, constant in zip(bound, ROWS[name].at_start, strict=True):
        assert loss.at_start() == pytest.approx(constant, rel=1e-14)
        torch.testing.assert_close(
            loss.values(points.pairs()), torch.full((50,), constant).double(), rtol=1e-7, atol=1e-12
        )


@EVERY_LOSS
def test_value_equals_the_derivation_from_probabilities(name: str) -> None:
    """The loss is what exact arithmetic on the four probabilities gives, at every setting of its knobs."""
    points = random_points(150)
    for loss in settings(name):
        expected = exact(ROWS[name].derivation, points, loss.knobs)
        torch.testing.assert_close(loss.values(points.pairs()), expected, rtol=1e-11, atol=1e-11)


@EVERY_LOSS
def test_autograd_equals_the_analytic_weights(name: str) -> None:
    """-dL/d log pi(y_w) and +dL/d log pi(y_l) are the gradient weights, at 2,500 points and every setting."""
    points = random_points(2500, seed=1).leaves()
    for loss in settings(name):
        weights = loss.weights(points.pairs())
        assert not any(w.requires_grad for w in weights)
        torch.testing.assert_close(weights, gradients(loss, points), rtol=1e-10, atol=1e-13)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_margins_stay_finite_and_right(name: str, dtype: torch.dtype) -> None:
    """Up to margins of 1e4 value, gradient and weights are finite, and the value is the exact one."""
    relative = 1e-5 if dtype == torch.float32 else 1e-11
    for loss in settings(name):
        points = extreme_points(ROWS[name].steepness(**loss.knobs)).leaves(dtype)
        values, weights = loss.values(points.pairs()), loss.weights(points.pairs())
        assert values.dtype == weights[0].dtype == weights[1].dtype == dtype
        for got, by_autograd in zip(weights, gradients(loss, points), strict=True):
            assert torch.isfinite(got).all() and torch.isfinite(by_autograd).all()
            torch.testing.assert_close(got, by_autograd, rtol=relative, atol=relative)
        expected = exact(ROWS[name].derivation, points, loss.knobs)
        torch.testing.assert_close(values.double(), expected, rtol=relative, atol=relative)


@EVERY_LOSS
def test_swapping_chosen_and_rejected_reverses_the_margin(name: str) -> None:
    """L(w, l) - L(l, w) is the closed form in the margin that the loss reads."""
    points, row = random_points(300, seed=2).leaves(), ROWS[name]
    for loss in settings(name):
        difference = loss.values(points.pairs()) - loss.values(points.swapped().pairs())
        expected = row.swap(margin(row, points, LOSSES[name].needs_reference), **loss.knobs)
        torch.testing.assert_close(difference, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "limit"),
    [pytest.param(name, limit, id=f"{name}-{limit.equals}") for name, row in ROWS.items() for limit in row.limits],
)
def test_limits_are_the_losses_they_should_be(name: str, limit: Limit) -> None:
    """Where a loss contains another as a special case, value and weights of both agree there."""
    points = random_points(300, seed=3, length=limit.length)
    if not limit.reference:
        points = replace(points, ref_w=torch.zeros_like(points.ref_w), ref_l=torch.zeros_like(points.ref_l))
    here, there = LOSSES[name].bind(**limit.knobs), LOSSES[limit.equals].bind(**limit.equals_knobs)
    torch.testing.assert_close(here.values(points.pairs()), there.values(points.pairs()), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(here.weights(points.pairs()), there.weights(points.pairs()), rtol=1e-11, atol=1e-12)


@EVERY_LOSS
def test_a_constant_that_is_the_same_for_both_responses_cancels(name: str) -> None:
    """The partition function never matters: a constant added to both sides leaves the loss as it was."""
    points, row = random_points(300, seed=4), ROWS[name]
    c = torch.linspace(-30, 30, 300, dtype=torch.float64)
    by_w, by_l = (points.n_w, points.n_l) if row.shift == "token" else (1.0, 1.0)
    moved = replace(points, pi_w=points.pi_w + c * by_w, pi_l=points.pi_l + c * by_l)
    one_sided = replace(points, pi_w=points.pi_w + c * by_w)
    for loss in settings(name):
        values = loss.values(points.pairs())
        torch.testing.assert_close(loss.values(moved.pairs()), values, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(loss.values(one_sided.pairs()), values, rtol=1e-9, atol=1e-9)


@EVERY_LOSS
def test_reference_is_read_exactly_when_declared(name: str) -> None:
    """A loss that needs no reference never looks at a log-ratio; one that needs it changes with it."""
    points, loss = random_points(20, seed=5), LOSSES[name].bind()
    if LOSSES[name].needs_reference:
        values = loss.values(points.pairs())
        assert not torch.equal(loss.values(replace(points, ref_l=points.ref_l - 3).pairs()), values)
        assert not torch.equal(loss.values(replace(points, ref_w=points.ref_w - 3).pairs()), values)
    else:
        blind = replace(points, ref_w=points.ref_w * torch.nan, ref_l=points.ref_l * torch.nan)
        assert torch.isfinite(loss.values(blind.pairs())).all()
        assert all(torch.isfinite(w).all() for w in loss.weights(blind.pairs()))


@EVERY_LOSS
def test_at_the_start_chosen_is_pulled_up_and_rejected_pushed_down(name: str) -> None:
    """With a fresh policy both gradient weights of every pair are positive."""
    points = random_points(200, seed=6)
    fresh = replace(points, pi_w=points.ref_w, pi_l=points.ref_l).leaves()
    for loss in settings(name):
        assert all((g > 0).all() for g in gradients(loss, fresh))


@EVERY_LOSS
def test_pairs_do_not_mix(name: str) -> None:
    """Reordering pairs reorders their losses; disturbing one changes that one only; a batch may have none."""
    points, loss, pair = random_points(40, seed=7), LOSSES[name].bind(), 17
    values = loss.values(points.pairs())
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    fields = ("pi_w", "pi_l", "ref_w", "ref_l", "n_w", "n_l")
    shuffled = Points(*(getattr(points, f)[order] for f in fields))
    assert torch.equal(loss.values(shuffled.pairs()), values[order])

    disturbed = replace(points, pi_w=points.pi_w.clone())
    disturbed.pi_w[pair] -= 400.0
    changed = loss.values(disturbed.pairs()) != values
    assert changed.nonzero().flatten().tolist() == [pair]
    assert values.shape == (40,)
    assert loss.values(Points(*(getattr(points, f)[:0] for f in fields)).pairs()).shape == (0,)


@EVERY_LOSS
def test_a_response_in_three_pairs_gets_the_sum_of_three_gradients(name: str) -> None:
    """Over index pairs the gradient of a response is the signed sum of its pairs' weights, each counted once."""
    g = torch.Generator().manual_seed(8)
    policy = (-60 + 5 * torch.randn(4, generator=g, dtype=torch.float64)).requires_grad_()
    reference = -60 + 5 * torch.randn(4, generator=g, dtype=torch.float64)
    index = PairIndex(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 2, 3, 2, 3, 3]), torch.ones(6))
    length = torch.tensor([5.0, 9.0, 20.0, 31.0], dtype=torch.float64)
    loss = LOSSES[name].bind()

    def values(chosen: Tensor) -> Tensor:
        pairs = ResponseLogps(policy, policy - reference, length).pairs(index)
        return loss.values(pairs)[chosen]

    (together,) = torch.autograd.grad(values(torch.arange(6)).sum(), policy)
    alone = sum(torch.autograd.grad(values(torch.tensor([t])).sum(), policy)[0] for t in range(6))
    w_c, w_r = loss.weights(ResponseLogps(policy, policy - reference, length).pairs(index))
    analytic = torch.zeros(4).double().index_add(0, index.chosen, -w_c).index_add(0, index.rejected, w_r)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(together, analytic, rtol=1e-12, atol=1e-14)


@EVERY_LOSS
def test_every_knob_changes_value_and_gradient(name: str) -> None:
    """No knob is silent."""
    pairs, default = random_points(50, seed=9).pairs(), LOSSES[name].bind()
    for knob, value in ROWS[name].other.items():
        changed = LOSSES[name].bind(**{knob: value})
        assert not torch.allclose(changed.values(pairs), default.values(pairs))
        assert not torch.allclose(changed.weights(pairs)[0], default.weights(pairs)[0])


@EVERY_LOSS
def test_rewards_are_the_scaled_log_probabilities_and_carry_no_gradient(name: str) -> None:
    """Both rewards equal the derivation from probabilities, at every setting, and are detached."""
    points = random_points(60, seed=10).leaves()
    for loss in settings(name):
        used = {k: v for k, v in loss.knobs.items() if k in inspect.signature(ROWS[name].reward).parameters}
        r_w, r_l = loss.rewards(points.pairs())
        assert not r_w.requires_grad and not r_l.requires_grad
        torch.testing.assert_close(r_w, exact(ROWS[name].reward, points, used), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(r_l, exact(ROWS[name].reward, points.swapped(), used), rtol=1e-11, atol=1e-12)


def test_robust_is_unbiased_under_label_flips() -> None:
    """Averaged over labels that are flipped at rate e, robust DPO is DPO on clean labels, gradient included."""
    points = random_points(500, seed=11).leaves()
    for e in (0.05, 0.2, 0.45):
        loss, clean = LOSSES["robust"].bind(label_smoothing=e), LOSSES["dpo"].bind()
        mean = (1 - e) * loss.values(points.pairs()) + e * loss.values(points.swapped().pairs())
        torch.testing.assert_close(mean, clean.values(points.pairs()), rtol=1e-10, atol=1e-10)
        (got,) = torch.autograd.grad(mean.sum(), points.pi_w)
        torch.testing.assert_close(-got, clean.weights(points.pairs())[0], rtol=1e-10, atol=1e-12)


def test_cdpo_is_dpo_on_smoothed_labels() -> None:
    """Conservative DPO is DPO's mean over labels flipped at rate e."""
    points = random_points(500, seed=12)
    loss, plain = LOSSES["cdpo"].bind(label_smoothing=0.2), LOSSES["dpo"].bind()
    mean = 0.8 * plain.values(points.pairs()) + 0.2 * plain.values(points.swapped().pairs())
    torch.testing.assert_close(loss.values(points.pairs()), mean, rtol=1e-12, atol=1e-12)


# --- what the losses are minimised by --------------------------------------------------------------------------------


def world(kind: str) -> World:
    g = torch.Generator().manual_seed(13)
    if kind == "certain":
        reference, reward = torch.tensor([0.3, 0.7]).double(), torch.zeros(2).double()
        return World(reference, reward, torch.tensor([[0.5, 1.0], [0.0, 0.5]]).double(), torch.ones(2).double())
    size = 6
    reference = torch.softmax(torch.randn(size, generator=g, dtype=torch.float64), 0)
    reward = torch.randn(size, generator=g, dtype=torch.float64)
    strength = reward if kind == "bradley_terry" else torch.randn(size, size, generator=g, dtype=torch.float64)
    odds = strength[:, None] - strength[None, :] if kind == "bradley_terry" else strength - strength.T
    return World(reference, reward, torch.sigmoid(odds), torch.tensor([1.0, 2.0, 3.0, 2.0, 5.0, 4.0]).double())


def population_minimiser(loss: BoundLoss, world: World, flips: float) -> Tensor:
    """The tabular policy that minimises the expected loss over pairs drawn from the reference: [V]."""
    size = len(world.reference)
    first, second = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
    beats = (1 - flips) * world.beats + flips * world.beats.T
    chance = world.reference[first] * world.reference[second] * beats[first, second] * (first != second)
    index = PairIndex(first, second, chance)
    theta = world.reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logp = torch.log_softmax(theta, 0)
        pairs = ResponseLogps(logp, logp - world.reference.log(), world.length).pairs(index)
        risk = (loss.values(pairs) * chance).sum()
        risk.backward()
        return risk

    optimizer.step(closure)
    return torch.softmax(theta.detach(), 0)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.optimum])
def test_population_minimiser_is_the_closed_form_optimum(name: str) -> None:
    """With enough pairs from the reference the best policy is the known one, to 1e-6 in total variation."""
    row = ROWS[name]
    here = world(row.optimum_world)
    found = population_minimiser(LOSSES[name].bind(**row.optimum_knobs), here, row.optimum_flips)
    known = row.optimum(here, **row.optimum_knobs)
    assert float((known - here.reference).abs().sum()) / 2 > 0.05, (
        "the optimum must differ from where the search starts"
    )
    assert float((found - known).abs().sum()) / 2 < 1e-6


def test_ipo_stays_finite_where_labels_are_certain() -> None:
    """Two equally likely responses, one always chosen: IPO settles at s(1/(2 tau)), where DPO would go on for ever."""
    two = replace(world("certain"), reference=torch.tensor([0.5, 0.5]).double())
    for tau in (0.2, 0.5, 1.0):
        found = population_minimiser(LOSSES["ipo"].bind(tau=tau), two, flips=0.0)
        assert float(found[0]) == pytest.approx(1 / (1 + 2.718281828459045 ** (-1 / (2 * tau))), abs=1e-9)
