"""Claims about every loss of labelled responses; the rows of `labelled_contract` say what each of them should be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from labelled_contract import ROWS, Labelled, exact, extreme_labelled, random_labelled
from torch import Tensor

from preftune.equations.losses import LOSSES, BoundLoss
from preftune.tensors import LabelledLogps, ResponseLogps

UNPAIRED = {name: loss for name, loss in LOSSES.items() if loss.reads is LabelledLogps}
EVERY_LOSS = pytest.mark.parametrize("name", UNPAIRED)
SWAPPED = {"desirable": "undesirable", "undesirable": "desirable"}


@dataclass(frozen=True)
class Setting:
    """A loss with its knobs and its state."""

    loss: BoundLoss
    state: Mapping[str, float]

    @property
    def arguments(self) -> dict[str, float]:
        return {**self.loss.knobs, **self.state}

    def values(self, rows: Labelled) -> Tensor:
        return self.loss.values(rows.logps(), self.state)

    def weights(self, rows: Labelled) -> Tensor:
        found = self.loss.weights(rows.logps(), self.state)
        assert isinstance(found, Tensor) and not found.requires_grad
        return found

    def by_autograd(self, rows: Labelled) -> Tensor:
        """-dL/d log pi [U]."""
        (gradient,) = torch.autograd.grad(self.values(rows).sum(), rows.policy)
        return -gradient


def default(name: str) -> Setting:
    return Setting(LOSSES[name].bind(), LOSSES[name].state())


def settings(name: str) -> Iterator[Setting]:
    """Default knobs, every knob changed alone, all changed; the last two again in another state."""
    other = ROWS[name].other
    changed = ({}, *({knob: value} for knob, value in other.items()), other)
    yield from (Setting(LOSSES[name].bind(**knobs), LOSSES[name].state()) for knobs in changed)
    if ROWS[name].state:
        yield from (Setting(LOSSES[name].bind(**knobs), ROWS[name].state) for knobs in changed[-2:])


def oracle(name: str, rows: Labelled, setting: Setting) -> Tensor:
    return exact(ROWS[name].derivation, rows, setting.arguments)


def fresh(rows: Labelled) -> Labelled:
    return replace(rows, policy=rows.reference, stray=rows.stray_reference)


def test_every_unpaired_loss_is_under_contract() -> None:
    """Every loss of labelled responses has a row here, every knob a second value, and one name throughout."""
    assert set(ROWS) == set(UNPAIRED)
    for name, loss in UNPAIRED.items():
        assert loss.name == name == loss.function.__name__
        assert set(ROWS[name].other) == set(loss.knobs())
        assert set(ROWS[name].state) == set(loss.state())
        assert inspect.signature(loss.weights).parameters == inspect.signature(loss.function).parameters


@EVERY_LOSS
def test_value_of_a_response_at_policy_equal_to_reference_is_the_constant(name: str) -> None:
    """Where policy and reference agree a loss has its hand-computed constant, or openly none."""
    rows = fresh(random_labelled(50))
    bound = (LOSSES[name].bind(), LOSSES[name].bind(**ROWS[name].other))
    for loss, constant in zip(bound, ROWS[name].at_start, strict=True):
        assert loss.at_start() == (None if constant is None else pytest.approx(constant, rel=1e-14))
        values = Setting(loss, LOSSES[name].state()).values(rows)
        if constant is None:
            assert values.std() > 1e-2
        else:
            torch.testing.assert_close(values, torch.full((50,), constant).double(), rtol=1e-7, atol=1e-12)


@EVERY_LOSS
def test_value_of_a_response_equals_the_derivation_from_probabilities(name: str) -> None:
    """The loss is what exact arithmetic on probabilities gives, at every setting of its knobs and its state."""
    rows = random_labelled(150)
    for setting in settings(name):
        torch.testing.assert_close(setting.values(rows), oracle(name, rows, setting), rtol=1e-11, atol=1e-11)


@EVERY_LOSS
def test_autograd_equals_the_analytic_weights_of_a_response(name: str) -> None:
    """-dL/d log pi is the gradient weight, up for every desirable response, down for the others; none of it to z0."""
    rows = random_labelled(2500, seed=1).leaves()
    for setting in settings(name):
        found = setting.weights(rows)
        torch.testing.assert_close(found, setting.by_autograd(rows), rtol=1e-10, atol=1e-13)
        assert torch.equal(found > 0, rows.desirable) and torch.equal(found < 0, ~rows.desirable)
        (to_strays,) = torch.autograd.grad(setting.values(rows).sum(), rows.stray, allow_unused=True)
        assert to_strays is None or not to_strays.any()


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_responses_stay_finite_and_right(name: str, dtype: torch.dtype) -> None:
    """Up to rewards of 1e4 value, gradient and weights are finite, and the value is the exact one."""
    relative = 1e-5 if dtype == torch.float32 else 1e-11
    for setting in settings(name):
        rows = extreme_labelled(setting.loss.knobs["beta"]).leaves(dtype)
        values, weights, gradient = setting.values(rows), setting.weights(rows), setting.by_autograd(rows)
        assert values.dtype == weights.dtype == gradient.dtype == dtype
        assert torch.isfinite(weights).all() and torch.isfinite(gradient).all()
        torch.testing.assert_close(weights, gradient, rtol=relative, atol=relative)
        torch.testing.assert_close(values.double(), oracle(name, rows, setting), rtol=relative, atol=relative)


@EVERY_LOSS
def test_a_response_ranked_badly_wrong_is_pulled_as_declared(name: str) -> None:
    """The pull of a false or hopeless label vanishes or stays beta: what sets KTO and BCO apart."""
    rows, setting = extreme_labelled(default(name).loss.knobs["beta"]), default(name)
    worst = torch.where(rows.desirable, 1.0, -1.0) * (rows.policy - rows.reference) < -900
    assert int(worst.sum()) > 4
    pull = setting.weights(rows)[worst].abs() / setting.loss.knobs["beta"]
    torch.testing.assert_close(pull, torch.full_like(pull, ROWS[name].pull_far_off), rtol=0, atol=1e-12)


@EVERY_LOSS
def test_responses_that_bfloat16_can_hold_cost_rounding_only(name: str) -> None:
    """On inputs of bfloat16, float32 arithmetic follows float64 to 1e-4 of the loss's scale."""
    rows = random_labelled(200, seed=14)
    coarse = Labelled(*(t.bfloat16().double() if t.is_floating_point() else t for t in vars(rows).values()))
    for setting in settings(name):
        wide, narrow = setting.values(coarse), setting.values(coarse.leaves(torch.float32)).detach().double()
        assert float((narrow - wide).abs().max()) < 1e-4 * float(1 + wide.abs().max())


@EVERY_LOSS
def test_labelled_responses_never_mix(name: str) -> None:
    """Reordering responses reorders their losses; disturbing one changes that one only; no rows, no values."""
    count = 48  # whole vectors: the last rows of another count go through scalar code, perhaps one bit apart
    rows, setting = random_labelled(count, seed=7), default(name)
    values = setting.values(rows)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    assert torch.equal(setting.values(rows.map(lambda t: t[order])), values[order])
    disturbed = replace(rows, policy=rows.policy.clone())
    disturbed.policy[17] -= 40.0
    assert (setting.values(disturbed) != values).nonzero().flatten().tolist() == [17]
    assert values.shape == (count,) and setting.weights(rows).shape == (count,)
    assert setting.values(rows.map(lambda t: t[:0])).shape == setting.weights(rows.map(lambda t: t[:0])).shape == (0,)


@EVERY_LOSS
def test_mismatched_responses_are_read_exactly_when_declared(name: str) -> None:
    """Every response of a coupled loss depends on every mismatched one; the others never look at them."""
    rows, setting, loss = random_labelled(48, seed=5), default(name), LOSSES[name]
    values = setting.values(rows)
    for stray in range(len(rows.stray)):
        moved = rows.stray.clone()
        moved[stray] += 2.0
        changed = setting.values(replace(rows, stray=moved)) != values
        assert bool(changed.all()) if loss.coupled else not bool(changed.any())
    blind = setting.values(replace(rows, stray=rows.stray * torch.nan))
    assert bool(torch.isfinite(blind).all()) == ("mismatched" not in loss.needs)
    assert loss.coupled == ("mismatched" in loss.needs)
    assert loss.needs_reference and not (setting.values(replace(rows, reference=rows.reference - 3)) == values).any()


@EVERY_LOSS
def test_half_a_step_of_labelled_responses_is_another_loss_exactly_when_declared(name: str) -> None:
    """A step evaluated as two halves, each with its mismatched responses, gives other values where coupled."""
    rows = random_labelled(96, seed=16, mismatched=8)
    for setting in settings(name):
        halves = []
        for part, strays in ((slice(48), slice(4)), (slice(48, None), slice(4, None))):
            half = rows.map(lambda t, part=part: t[part])
            alone = replace(half, stray=rows.stray[strays], stray_reference=rows.stray_reference[strays])
            halves.append(setting.values(alone))
        same = torch.allclose(torch.cat(halves), setting.values(rows), rtol=1e-12, atol=1e-13)
        assert same == (not LOSSES[name].coupled)


@EVERY_LOSS
def test_every_knob_and_number_changes_value_and_gradient_of_labelled_responses(name: str) -> None:
    """No knob is silent, and nothing is remembered that is not used."""
    rows, state, later = random_labelled(50, seed=9), LOSSES[name].state(), ROWS[name].state
    for knob, value in ROWS[name].other.items():
        changed = Setting(LOSSES[name].bind(**{knob: value}), state)
        assert not torch.allclose(changed.values(rows), default(name).values(rows))
        assert not torch.allclose(changed.weights(rows), default(name).weights(rows))
    for number in later:
        forgetful = Setting(LOSSES[name].bind(), {**later, number: state[number]})
        assert not torch.allclose(forgetful.values(rows), Setting(LOSSES[name].bind(), later).values(rows))


@EVERY_LOSS
def test_desirable_and_undesirable_are_mirror_images(name: str) -> None:
    """The other label at the log-ratio mirrored about the loss's centre costs the same, class weights exchanged."""
    rows = random_labelled(300, seed=2)
    for setting in settings(name):
        centre = ROWS[name].centre(rows.stray - rows.stray_reference, **setting.arguments)
        ratio = 2 * centre - (rows.policy - rows.reference)
        mirrored = replace(rows, policy=rows.reference + ratio, desirable=~rows.desirable)
        knobs = {SWAPPED.get(knob, knob): value for knob, value in setting.loss.knobs.items()}
        there = Setting(LOSSES[name].bind(**knobs), setting.state)
        torch.testing.assert_close(there.values(mirrored), setting.values(rows), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(there.weights(mirrored), -setting.weights(rows), rtol=1e-9, atol=1e-12)


@EVERY_LOSS
def test_state_of_a_step_is_the_state_of_its_parts_in_turn(name: str) -> None:
    """What is remembered counts responses: a step in two halves leaves the same numbers; nothing else is remembered."""
    rows, loss = random_labelled(40, seed=3), LOSSES[name].bind()
    start = ROWS[name].state
    whole = loss.updated(rows.logps(), start)
    parts = start
    for half in (slice(0, 13), slice(13, 13), slice(13, None)):
        parts = loss.updated(rows.map(lambda t, half=half: t[half]).logps(), parts)
    assert parts == pytest.approx(whole, rel=1e-12)
    assert (whole != start) == bool(start)
    assert set(whole) == set(LOSSES[name].state()) and all(type(number) is float for number in whole.values())


@EVERY_LOSS
def test_reward_of_a_labelled_response_is_beta_times_its_log_ratio(name: str) -> None:
    """The reward is reported as DPO's, detached, whatever shift the loss compares it with."""
    rows = random_labelled(60, seed=10).leaves()
    responses = ResponseLogps(rows.policy, rows.policy - rows.reference, torch.ones_like(rows.policy))
    for setting in settings(name):
        reward = setting.loss.reward(responses)
        assert not reward.requires_grad
        torch.testing.assert_close(reward, setting.loss.knobs["beta"] * (rows.policy - rows.reference).detach())
