"""What every loss of labelled responses must satisfy: one `Row` per loss, written in probabilities.

As `loss_contract` for pairs: the oracles are exact arithmetic (`decimal`, 60 digits) on probabilities, so they share
neither formula nor rounding with `preftune.equations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext

import torch
from torch import Tensor

from preftune.tensors import LabelledLogps

Knobs = Mapping[str, float]


@dataclass(frozen=True)
class Labelled:
    """U labelled responses and M mismatched ones as leaves: log-probabilities of policy and reference."""

    policy: Tensor
    reference: Tensor
    desirable: Tensor
    stray: Tensor
    """[M] the policy's log-probability of mismatched responses."""
    stray_reference: Tensor

    def logps(self) -> LabelledLogps:
        """Weight, length and the policy's own log-probability are NaN: these losses read log-ratios only."""
        nothing = torch.full_like(self.policy, torch.nan).detach()
        ratio = self.policy - self.reference
        return LabelledLogps(nothing, ratio, nothing, self.desirable, nothing, self.stray - self.stray_reference)

    def leaves(self, dtype: torch.dtype = torch.float64) -> Labelled:
        """The same responses in `dtype`, the policy's log-probabilities ready to be differentiated by."""
        cast = (getattr(self, f.name).detach() for f in fields(self))
        copy = Labelled(*(t.to(dtype) if t.is_floating_point() else t for t in cast))
        return replace(copy, policy=copy.policy.requires_grad_(), stray=copy.stray.requires_grad_())

    def map(self, function: Callable[[Tensor], Tensor]) -> Labelled:
        """The labelled responses only; the mismatched ones are another list."""
        return replace(self, **{name: function(getattr(self, name)) for name in ("policy", "reference", "desirable")})

    def __len__(self) -> int:
        return len(self.policy)


def random_labelled(count: int, seed: int = 0, mismatched: int = 7) -> Labelled:
    """Log-ratios of both signs with a spread of 15 nats; the mismatched ones are 3 nats up on average."""
    g = torch.Generator().manual_seed(seed)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    reference, stray_reference = -60 + 5 * normal(count), -60 + 5 * normal(mismatched)
    desirable = torch.rand(count, generator=g) < 0.4
    stray = stray_reference + 3 + 4 * normal(mismatched)
    return Labelled(reference + 15 * normal(count), reference, desirable, stray, stray_reference)


def extreme_labelled(scale: float) -> Labelled:
    """Log-ratios of 0 and of +-1e-4 to +-1e4 over `scale`, desirable and not; two mismatched responses, 8 nats up."""
    ratio = torch.tensor([sign * 10.0**k for k in range(-4, 5) for sign in (-1, 1)] + [0.0]).double() / scale
    ratio = torch.cat([ratio, ratio]).float().double()
    reference = -2 * ratio.abs()
    desirable = torch.arange(len(ratio)) < len(ratio) // 2
    stray_reference = torch.tensor([-32.0, -64.0]).double()
    return Labelled(reference + ratio, reference, desirable, stray_reference + 8, stray_reference)


@dataclass(frozen=True)
class Verdict:
    """One labelled response: how much likelier the policy makes it than the reference, and its label."""

    gain: Decimal
    desirable: bool


Oracle = Callable[..., Decimal]
"""(Verdict, gains of the mismatched responses, *, knobs, state) -> the value of the loss."""


def exact(oracle: Oracle, rows: Labelled, knobs: Knobs) -> Tensor:
    """The oracle's value of every response, [U] float64."""
    exact_knobs = {name: Decimal(value) for name, value in knobs.items()}
    with localcontext(prec=60, Emin=MIN_EMIN, Emax=MAX_EMAX):
        gains, strays = (
            [Decimal(p).exp() / Decimal(q).exp() for p, q in zip(policy.tolist(), reference.tolist(), strict=True)]
            for policy, reference in ((rows.policy, rows.reference), (rows.stray, rows.stray_reference))
        )
        labels = rows.desirable.tolist()
        found = [oracle(Verdict(g, d), strays, **exact_knobs) for g, d in zip(gains, labels, strict=True)]
        return torch.tensor([float(value) for value in found], dtype=torch.float64)


@dataclass(frozen=True)
class Row:
    derivation: Oracle
    """Value of the loss from probabilities."""
    other: Knobs
    """A second value of every knob."""
    at_start: tuple[float | None, float | None]
    """The value at policy == reference, worked out by hand, for default knobs and for `other`; None: data decides."""
    centre: Callable[..., Tensor]
    """(mismatched log-ratios, *, knobs, state) -> the log-ratio about which the two labels are mirror images."""
    pull_far_off: float
    """The gradient weight over beta of a response that is ranked infinitely badly, at default knobs."""
    state: Knobs = field(default_factory=dict)
    """A second value of every number of the loss's state."""


# --- the losses, derived again ---------------------------------------------------------------------------------------


def kto(row: Verdict, strays: Sequence[Decimal], beta: Decimal, desirable: Decimal, undesirable: Decimal) -> Decimal:
    """The chance that the label loses a contest of gains against the usual gain, the strays' geometric mean or 1."""
    product = Decimal(1)
    for gain in strays:
        product *= gain
    usual = max(Decimal(1), product ** (1 / Decimal(len(strays)))) ** beta
    gain = row.gain**beta
    return desirable * usual / (gain + usual) if row.desirable else undesirable * gain / (gain + usual)


def bco(row: Verdict, strays: Sequence[Decimal], beta: Decimal, reward_sum: Decimal, reward_count: Decimal) -> Decimal:
    """Surprise at the label of a classifier whose odds of "desirable" are the gain over the usual gain."""
    usual = (reward_sum / reward_count if reward_count else Decimal(0)).exp()
    gain = row.gain**beta
    return ((gain + usual) / (gain if row.desirable else usual)).ln()


ROWS: dict[str, Row] = {
    "kto": Row(
        derivation=kto,
        other={"beta": 0.37, "desirable": 1.3, "undesirable": 0.7},
        at_start=(0.5, None),
        centre=lambda strays, beta, desirable, undesirable: strays.mean().clamp(min=0),
        pull_far_off=0.0,
    ),
    "bco": Row(
        derivation=bco,
        other={"beta": 0.37},
        at_start=(0.6931471805599453, 0.6931471805599453),
        centre=lambda strays, beta, reward_sum, reward_count: torch.tensor(
            reward_sum / max(reward_count, 1) / beta, dtype=torch.float64
        ),
        pull_far_off=1.0,
        state={"reward_sum": 7.0, "reward_count": 5.0},
    ),
}
