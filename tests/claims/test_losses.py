"""Claims about every pairwise loss; the rows of `loss_rows` say what each of them should be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from loss_contract import Limit, Points, Row, World, exact, extreme_points, random_points
from loss_rows import ROWS
from torch import Tensor

from preftune.equations.losses import LOSSES, BoundLoss
from preftune.tensors import PairIndex, PairLogps, ResponseLogps

PAIRWISE = {name: loss for name, loss in LOSSES.items() if loss.reads is PairLogps}
EVERY_LOSS = pytest.mark.parametrize("name", PAIRWISE)


@dataclass(frozen=True)
class Setting:
    """A loss with its knobs and its state."""

    loss: BoundLoss
    state: Mapping[str, float]

    @property
    def arguments(self) -> dict[str, float]:
        return {**self.loss.knobs, **self.state}

    def values(self, points: Points) -> Tensor:
        return self.loss.values(points.pairs(), self.state)

    def weights(self, points: Points) -> tuple[Tensor, Tensor]:
        w_c, w_r = self.loss.weights(points.pairs(), self.state)
        return w_c, w_r


def default(name: str) -> Setting:
    return Setting(LOSSES[name].bind(), LOSSES[name].state())


def settings(name: str) -> Iterator[Setting]:
    """Default knobs, every knob changed alone, all changed; the last two again in another state."""
    other = ROWS[name].other
    changed = ({}, *({knob: value} for knob, value in other.items()), other)
    yield from (Setting(LOSSES[name].bind(**knobs), LOSSES[name].state()) for knobs in changed)
    if ROWS[name].state:
        yield from (Setting(LOSSES[name].bind(**knobs), ROWS[name].state) for knobs in changed[-2:])


def oracle(name: str, points: Points, setting: Setting) -> Tensor:
    return exact(ROWS[name].derivation, points, setting.arguments, coupled=LOSSES[name].coupled)


def gradients(setting: Setting, points: Points) -> tuple[Tensor, Tensor]:
    """(-dL/d log pi(y_w), +dL/d log pi(y_l)) by autograd; zero where the loss does not read one of them."""
    leaves = points.pi_w, points.pi_l
    found = torch.autograd.grad(setting.values(points).sum(), leaves, allow_unused=True)
    d_w, d_l = (torch.zeros_like(leaf) if d is None else d for d, leaf in zip(found, leaves, strict=True))
    return -d_w, d_l


def fresh(points: Points) -> Points:
    """The same pairs where the policy is the reference: no divergence either."""
    zero = torch.zeros_like(points.kl_w)
    return replace(points, pi_w=points.ref_w, pi_l=points.ref_l, kl_w=zero, kl_l=zero)


def margin(row: Row, points: Points, needs_reference: bool) -> Tensor:
    """The quantity whose sign a loss tells apart, without its scale."""
    w, l = (points.pi_w - points.ref_w, points.pi_l - points.ref_l) if needs_reference else (points.pi_w, points.pi_l)
    return w / points.n_w - l / points.n_l if row.shift == "token" else w - l


def test_every_loss_is_under_contract() -> None:
    """Every loss of the table has a row here, every knob a second value, and one name throughout."""
    assert set(ROWS) == set(PAIRWISE)
    for name, loss in PAIRWISE.items():
        assert loss.name == name == loss.function.__name__
        assert set(ROWS[name].other) == set(loss.knobs())
        assert set(ROWS[name].state) == set(loss.state())
        assert inspect.signature(loss.weights).parameters == inspect.signature(loss.function).parameters


@EVERY_LOSS
def test_value_at_policy_equal_to_reference_is_the_constant(name: str) -> None:
    """Where policy and reference agree a loss has its hand-computed constant, or openly none."""
    points = fresh(random_points(50))
    if ROWS[name].at_start is None:
        assert LOSSES[name].bind().at_start() is None
        assert default(name).values(points).std() > 1e-3
        return
    bound = (LOSSES[name].bind(), LOSSES[name].bind(**ROWS[name].other))
    for loss, constant in zip(bound, ROWS[name].at_start, strict=True):
        assert loss.at_start() == pytest.approx(constant, rel=1e-14)
        values = Setting(loss, LOSSES[name].state()).values(points)
        torch.testing.assert_close(values, torch.full((50,), constant).double(), rtol=1e-7, atol=1e-12)


@EVERY_LOSS
def test_value_equals_the_derivation_from_probabilities(name: str) -> None:
    """The loss is what exact arithmetic on the four probabilities gives, at every setting of its knobs."""
    points = random_points(150)
    for setting in settings(name):
        torch.testing.assert_close(setting.values(points), oracle(name, points, setting), rtol=1e-11, atol=1e-11)


@EVERY_LOSS
def test_autograd_equals_the_analytic_weights(name: str) -> None:
    """-dL/d log pi(y_w) and +dL/d log pi(y_l) are the gradient weights, at 2,500 points and every setting."""
    points = random_points(2500, seed=1).leaves()
    for setting in settings(name):
        weights = setting.weights(points)
        assert not any(w.requires_grad for w in weights)
        torch.testing.assert_close(weights, gradients(setting, points), rtol=1e-10, atol=1e-13)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_margins_stay_finite_and_right(name: str, dtype: torch.dtype) -> None:
    """Up to margins of 1e4 value, gradient and weights are finite, and the value is the exact one."""
    relative = 1e-5 if dtype == torch.float32 else 1e-11
    for setting in settings(name):
        points = extreme_points(ROWS[name].steepness(**setting.loss.knobs)).leaves(dtype)
        values, weights = setting.values(points), setting.weights(points)
        assert values.dtype == weights[0].dtype == weights[1].dtype == dtype
        for got, by_autograd in zip(weights, gradients(setting, points), strict=True):
            assert torch.isfinite(got).all() and torch.isfinite(by_autograd).all()
            torch.testing.assert_close(got, by_autograd, rtol=relative, atol=relative)
        torch.testing.assert_close(values.double(), oracle(name, points, setting), rtol=relative, atol=relative)


@EVERY_LOSS
def test_bfloat16_inputs_cost_rounding_only(name: str) -> None:
    """On inputs that bfloat16 can hold, float32 arithmetic follows float64 to 1e-4 of the loss's scale."""
    points = random_points(200, seed=14).map(lambda t: t.bfloat16().double())
    for setting in settings(name):
        wide = setting.values(points)
        narrow = setting.values(points.map(Tensor.float)).double()
        assert float((narrow - wide).abs().max()) < 1e-4 * float(1 + wide.abs().max())


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.swap])
def test_swapping_chosen_and_rejected_reverses_the_margin(name: str) -> None:
    """L(w, l) - L(l, w) is the closed form in the margin that the loss reads."""
    points, row = random_points(300, seed=2).leaves(), ROWS[name]
    assert row.swap
    for setting in settings(name):
        difference = setting.values(points) - setting.values(points.swapped())
        expected = row.swap(margin(row, points, LOSSES[name].needs_reference), **setting.arguments)
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
def test_a_constant_that_is_the_same_for_both_responses_cancels_when_declared(name: str) -> None:
    """A constant added to both sides, log Z, leaves the loss as it was; a loss that anchors each side says so."""
    points, row = random_points(300, seed=4), ROWS[name]
    c = torch.linspace(-30, 30, 300, dtype=torch.float64)
    by_w, by_l = (points.n_w, points.n_l) if row.shift == "token" else (1.0, 1.0)
    moved = replace(points, pi_w=points.pi_w + c * by_w, pi_l=points.pi_l + c * by_l)
    one_sided = replace(points, pi_w=points.pi_w + c * by_w)
    for setting in settings(name):
        values = setting.values(points)
        same = torch.allclose(setting.values(moved), values, rtol=1e-9, atol=1e-9)
        assert same == (row.shift is not None)
        assert not torch.allclose(setting.values(one_sided), values, rtol=1e-9, atol=1e-9)


@EVERY_LOSS
def test_reference_is_read_exactly_when_declared(name: str) -> None:
    """A loss that needs no reference never looks at a log-ratio; one that needs it changes with it."""
    points, setting = random_points(20, seed=5), default(name)
    if LOSSES[name].needs_reference:
        values = setting.values(points)
        assert not torch.equal(setting.values(replace(points, ref_l=points.ref_l - 3)), values)
        assert not torch.equal(setting.values(replace(points, ref_w=points.ref_w - 3)), values)
    else:
        blind = replace(points, ref_w=points.ref_w * torch.nan, ref_l=points.ref_l * torch.nan)
        assert torch.isfinite(setting.values(blind)).all()
        assert all(torch.isfinite(w).all() for w in setting.weights(blind))


@EVERY_LOSS
def test_extras_are_read_exactly_when_declared(name: str) -> None:
    """Scores, single tokens, divergences and alignments: a loss reads those it declares to need, and no other."""
    points, setting = random_points(20, seed=15), default(name)
    columns = {"scores": ["score_gap"], "tokens": ["shared_w", "shared_l"], "divergence": ["kl_w", "kl_l"],
               "alignment": ["align_w", "align_l"]}  # fmt: skip
    for need, names in columns.items():
        nothing = replace(points, **{column: getattr(points, column) * torch.nan for column in names})
        reads = not torch.isfinite(setting.values(nothing)).all()
        assert reads == (need in LOSSES[name].needs), need


@EVERY_LOSS
def test_at_the_start_the_gradient_pulls_as_declared(name: str) -> None:
    """With a fresh policy chosen is pulled up and rejected pushed down, unless the loss openly does otherwise."""
    points = fresh(random_points(200, seed=6)).leaves()
    for setting in settings(name):
        for found, sign in zip(gradients(setting, points), ROWS[name].pull_at_start, strict=True):
            signs = set(found.sign().tolist())
            assert signs == {float(sign)} or (ROWS[name].rests_at_start and signs == {0.0, float(sign)})


@EVERY_LOSS
def test_pairs_mix_exactly_when_declared(name: str) -> None:
    """Reordering pairs reorders their losses; disturbing one changes that one only, unless the loss is coupled."""
    count = 48  # whole vectors: the last rows of another count go through scalar code, perhaps one bit apart
    points, setting, pair = random_points(count, seed=7), default(name), 17
    values = setting.values(points)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(setting.values(points.map(lambda t: t[order])), values[order]) or LOSSES[name].coupled

    disturbed = replace(points, pi_w=points.pi_w.clone())
    disturbed.pi_w[pair] -= 400.0
    changed = (setting.values(disturbed) != values).nonzero().flatten().tolist()
    assert changed == [pair] or (LOSSES[name].coupled and len(changed) > 1)
    assert values.shape == (count,)
    assert setting.values(points.map(lambda t: t[:0])).shape == (0,)


@EVERY_LOSS
def test_half_a_step_at_a_time_is_another_loss_exactly_when_declared(name: str) -> None:
    """A step evaluated as two halves gives the values of the whole step exactly if the loss is not coupled."""
    points = random_points(96, seed=16)
    for setting in settings(name):
        halves = [setting.values(points.map(lambda t, part=part: t[part])) for part in (slice(48), slice(48, None))]
        same = torch.allclose(torch.cat(halves), setting.values(points), rtol=1e-12, atol=1e-13)
        assert same == (not LOSSES[name].coupled)


@EVERY_LOSS
def test_a_response_in_three_pairs_gets_the_sum_of_three_gradients(name: str) -> None:
    """Over index pairs the gradient of a response is the signed sum of its pairs' weights, each counted once."""
    g = torch.Generator().manual_seed(8)
    policy = (-60 + 5 * torch.randn(4, generator=g, dtype=torch.float64)).requires_grad_()
    reference = -60 + 5 * torch.randn(4, generator=g, dtype=torch.float64)
    gap = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 1.0])
    index = PairIndex(torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 2, 3, 2, 3, 3]), torch.ones(6), gap)
    length = torch.tensor([5, 9, 20, 31])
    loss = LOSSES[name].bind()

    def pairs() -> PairLogps:
        tokens = policy.div(length).repeat_interleave(length)
        reference_tokens = reference.div(length).repeat_interleave(length)
        spread = torch.linspace(0.1, 1, len(tokens), dtype=torch.float64)
        return ResponseLogps.from_tokens(
            tokens, length, reference_tokens, divergence_C=spread, alignment_C=-spread, keep_tokens=True
        ).pairs(index)

    (together,) = torch.autograd.grad(loss.values(pairs()).sum(), policy)
    alone = sum(torch.autograd.grad(loss.values(pairs())[t], policy)[0] for t in range(6))
    w_c, w_r = loss.weights(pairs())
    analytic = torch.zeros(4).double().index_add(0, index.chosen, -w_c).index_add(0, index.rejected, w_r)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)
    assert ROWS[name].by_token or torch.allclose(together, analytic, rtol=1e-12, atol=1e-14)


@EVERY_LOSS
def test_every_knob_changes_value_and_gradient(name: str) -> None:
    """No knob is silent."""
    points, state = random_points(50, seed=9), LOSSES[name].state()
    for knob, value in ROWS[name].other.items():
        changed = Setting(LOSSES[name].bind(**{knob: value}), state)
        assert not torch.allclose(changed.values(points), default(name).values(points))
        now, before = torch.stack(changed.weights(points)), torch.stack(default(name).weights(points))
        assert not torch.allclose(now, before)
    later = ROWS[name].state
    for number in later:
        forgetful = Setting(LOSSES[name].bind(), {**later, number: state[number]})
        assert not torch.allclose(forgetful.values(points), Setting(LOSSES[name].bind(), later).values(points))


@EVERY_LOSS
def test_rewards_are_the_scaled_log_probabilities_and_carry_no_gradient(name: str) -> None:
    """Both rewards equal the derivation from probabilities, at every setting, and are detached."""
    points = random_points(60, seed=10).leaves()
    for setting in settings(name):
        used = {k: v for k, v in setting.loss.knobs.items() if k in inspect.signature(ROWS[name].reward).parameters}
        r_w, r_l = setting.loss.rewards(points.pairs())
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
    if kind == "uniform":
        reference = torch.full_like(reference, 1 / size)
    reward = torch.randn(size, generator=g, dtype=torch.float64)
    if kind == "intransitive":
        strength = torch.randn(size, size, generator=g, dtype=torch.float64)
        odds = strength - strength.T
    else:
        odds = reward[:, None] - reward[None, :]
    return World(reference, reward, torch.sigmoid(odds), torch.tensor([1.0, 2.0, 3.0, 2.0, 5.0, 4.0]).double())


def population_minimiser(loss: BoundLoss, world: World, flips: float) -> Tensor:
    """The tabular policy that minimises the expected loss over pairs drawn from the reference: [V].

    The source's scores, for losses that read them, are the rewards.
    """
    size = len(world.reference)
    first, second = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
    beats = (1 - flips) * world.beats + flips * world.beats.T
    chance = world.reference[first] * world.reference[second] * beats[first, second] * (first != second)
    index = PairIndex(first, second, chance, world.reward[first] - world.reward[second])
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
