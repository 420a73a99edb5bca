"""What every pairwise loss must satisfy: one `Row` per loss, written in probabilities, not in log-probabilities.

The oracles are exact arithmetic (`decimal`, 60 digits): they raise the four probabilities to powers and take
quotients, so they share neither formula nor rounding with `preftune.equations`, and e^-10000 is an ordinary number.
The rows of each family of losses stand in a module of their own; `loss_rows` is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.tensors import PairLogps

Knobs = Mapping[str, float]


@dataclass(frozen=True)
class Points:
    """T pairs as leaves: log-probabilities of the policy (to differentiate) and of the reference, and lengths."""

    pi_w: Tensor
    pi_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    n_w: Tensor
    n_l: Tensor
    score_gap: Tensor
    """The source's score of w minus that of l."""
    shared_w: Tensor
    shared_l: Tensor
    """Share of each log-ratio that falls on the first min(n_w, n_l) tokens: 1 for the shorter response."""
    kl_w: Tensor
    kl_l: Tensor
    """Sums over tokens of KL(pi_ref || pi), >= 0."""
    align_w: Tensor
    align_l: Tensor
    """WPO's mean alignment, nats."""

    def pairs(self) -> PairLogps:
        """The weight is NaN: a loss that reads it is a loss that reduces, which is the caller's business."""
        a, b = self.pi_w - self.ref_w, self.pi_l - self.ref_l
        return PairLogps(
            self.pi_w, self.pi_l, a, b, self.n_w, self.n_l, torch.full_like(self.pi_w, torch.nan),
            self.score_gap, self.shared_w * a.detach(), self.shared_l * b.detach(),
            self.kl_w, self.kl_l, self.align_w, self.align_l,
        )  # fmt: skip

    def swapped(self) -> Points:
        return Points(
            self.pi_l, self.pi_w, self.ref_l, self.ref_w, self.n_l, self.n_w, -self.score_gap,
            self.shared_l, self.shared_w, self.kl_l, self.kl_w, self.align_l, self.align_w,
        )  # fmt: skip

    def leaves(self, dtype: torch.dtype = torch.float64) -> Points:
        """The same points in `dtype`, the policy's log-probabilities ready to be differentiated by."""
        cast = self.map(lambda t: t.detach().to(dtype))
        return replace(cast, pi_w=cast.pi_w.requires_grad_(), pi_l=cast.pi_l.requires_grad_())

    def map(self, function: Callable[[Tensor], Tensor]) -> Points:
        return Points(*(function(getattr(self, f.name)) for f in fields(self)))

    def __len__(self) -> int:
        return len(self.pi_w)


def random_points(count: int, seed: int = 0, *, length: int | None = None) -> Points:
    """Responses of 1 to 40 tokens, log-ratios of both signs with a spread of 15 nats, float64."""
    g = torch.Generator().manual_seed(seed)

    def one_side() -> tuple[Tensor, Tensor, Tensor]:
        n = torch.randint(1, 41, (count,), generator=g).double()
        if length is not None:
            n = torch.full_like(n, length)
        ref = -n * (0.5 + 2 * torch.rand(count, generator=g, dtype=torch.float64)) - 50
        return ref + 15 * torch.randn(count, generator=g, dtype=torch.float64), ref, n

    (pi_w, ref_w, n_w), (pi_l, ref_l, n_l) = one_side(), one_side()
    return _complete(pi_w, pi_l, ref_w, ref_l, n_w, n_l, g)


def _complete(
    pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, n_w: Tensor, n_l: Tensor, g: torch.Generator
) -> Points:
    """Draws what only some losses read: scores, shares on shared tokens, divergences, alignments."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(pi_w), generator=g, dtype=torch.float64)

    shared_w, shared_l = (torch.where(n <= other, 1.0, uniform(0.2, 0.9)) for n, other in ((n_w, n_l), (n_l, n_w)))
    kl_w, kl_l, align_w, align_l = uniform(0, 8), uniform(0, 8), uniform(-3, 1), uniform(-3, 1)
    return Points(pi_w, pi_l, ref_w, ref_l, n_w, n_l, uniform(0.1, 4), shared_w, shared_l, kl_w, kl_l, align_w, align_l)


def extreme_points(scale: float) -> Points:
    """Gaps D of 0 and of +-1e-4 to +-1e4 over `scale`, one token a side; subtracting them is exact in float32 too."""
    gap = torch.tensor([sign * 10.0**k for k in range(-4, 5) for sign in (-1, 1)] + [0.0]).double() / scale
    ref = -2 * gap.abs() - (gap == 0).double()
    one = torch.ones_like(gap)
    return _complete(ref + gap / 2, ref - gap / 2, ref, ref, one, one, torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Chances:
    """One pair as probabilities: policy and reference, chosen (w) and rejected (l), token counts, and the extras."""

    w: Decimal
    l: Decimal
    ref_w: Decimal
    ref_l: Decimal
    n_w: int
    n_l: int
    score_gap: Decimal
    shared_w: Decimal
    """Share of the log-ratio, not a probability; the same for the fields below: see `Points`."""
    shared_l: Decimal
    kl_w: Decimal
    kl_l: Decimal
    align_w: Decimal
    align_l: Decimal


Oracle = Callable[..., Any]
"""(Chances, *, knobs, state) -> Decimal; of a coupled loss (list of Chances, *, knobs, state) -> list of Decimals."""


def exact(oracle: Oracle, points: Points, knobs: Knobs, *, coupled: bool = False) -> Tensor:
    """The oracle's value at every point, [T] float64."""
    exact_knobs = {name: Decimal(value) for name, value in knobs.items()}
    columns = [getattr(points, f.name).tolist() for f in fields(points)]
    with localcontext(prec=60, Emin=MIN_EMIN, Emax=MAX_EMAX):
        chances = [
            Chances(*(Decimal(x).exp() for x in row[:4]), int(row[4]), int(row[5]), *map(Decimal, row[6:]))
            for row in zip(*columns, strict=True)
        ]
        values = oracle(chances, **exact_knobs) if coupled else [oracle(q, **exact_knobs) for q in chances]
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """One prompt, V possible responses: the reference that writes the pairs, and who beats whom."""

    reference: Tensor
    """[V] probabilities."""
    reward: Tensor
    """[V] nats."""
    beats: Tensor
    """[V, V] P(row beats column), P + P' = 1."""
    length: Tensor
    """[V] tokens."""


@dataclass(frozen=True)
class Limit:
    """With `knobs` the loss is `equals` with `equals_knobs`, on responses of one `length`, or with pi_ref = 1."""

    knobs: Knobs
    equals: str
    equals_knobs: Knobs
    length: int | None = None
    reference: bool = True


@dataclass(frozen=True)
class Row:
    derivation: Oracle
    """Value of the loss from probabilities."""
    reward: Oracle
    """Reward of the chosen response from probabilities, for the knobs the reward depends on."""
    other: Knobs
    """A second value of every knob."""
    at_start: tuple[float, float] | None
    """The value at policy == reference, worked out by hand, for default knobs and for `other`; None: data decides."""
    swap: Callable[..., Tensor] | None
    """L(w, l) - L(l, w) as a function of the margin that the loss looks at; None: no closed form in that margin."""
    shift: Literal["response", "token"] | None
    """The loss ignores a constant added to both log-ratios (that is log Z), or to every token's; None: it does not."""
    steepness: Callable[..., float]
    """d margin / d D at one token per response: how far a log-ratio gap carries the loss."""
    state: Knobs = field(default_factory=dict)
    """A second value of every number of the loss's state."""
    by_token: bool = False
    """The tokens of a response have different gradient weights: `weights` is that of its last one."""
    pull_at_start: tuple[int, int] = (1, 1)
    """Signs of the two gradient weights of a fresh policy: chosen up and rejected down unless the loss says else."""
    rests_at_start: bool = False
    """A pair that a fresh policy already orders well enough is let go: some of those weights are 0."""
    limits: tuple[Limit, ...] = ()
    optimum: Callable[..., Tensor] | None = None
    optimum_world: Literal["bradley_terry", "intransitive", "certain", "uniform"] = "bradley_terry"
    optimum_knobs: Knobs = field(default_factory=dict)
    optimum_flips: float = 0.0
    """The share of labels flipped before the loss sees them."""


def log_ratio_reward(q: Chances, beta: Decimal) -> Decimal:
    """The reward of most losses with a reference."""
    return beta * (q.w / q.ref_w).ln()
