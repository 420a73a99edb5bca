"""What every pairwise loss must satisfy: one `Row` per loss, written in probabilities, not in log-probabilities.

The oracles are exact arithmetic (`decimal`, 60 digits): they raise the four probabilities to powers and take
quotients, so they share neither formula nor rounding with `preftune.equations`, and e^-10000 is an ordinary number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Literal

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

    def pairs(self) -> PairLogps:
        """The weight is NaN: a loss that reads it is a loss that reduces, which is the caller's business."""
        return PairLogps(
            self.pi_w,
            self.pi_l,
            self.pi_w - self.ref_w,
            self.pi_l - self.ref_l,
            self.n_w,
            self.n_l,
            torch.full_like(self.pi_w, torch.nan),
        )

    def swapped(self) -> Points:
        return Points(self.pi_l, self.pi_w, self.ref_l, self.ref_w, self.n_l, self.n_w)

    def leaves(self, dtype: torch.dtype = torch.float64) -> Points:
        pi_w, pi_l = (t.detach().to(dtype).requires_grad_() for t in (self.pi_w, self.pi_l))
        return Points(pi_w, pi_l, *(t.to(dtype) for t in (self.ref_w, self.ref_l, self.n_w, self.n_l)))


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
    return Points(pi_w, pi_l, ref_w, ref_l, n_w, n_l)


def extreme_points(scale: float) -> Points:
    """Gaps D of 0 and of +-1e-4 to +-1e4 over `scale`, one token a side; subtracting them is exact in float32 too."""
    gap = torch.tensor([sign * 10.0**k for k in range(-4, 5) for sign in (-1, 1)] + [0.0]).double() / scale
    ref = -2 * gap.abs() - (gap == 0).double()
    return Points(ref + gap / 2, ref - gap / 2, ref, ref, torch.ones_like(gap), torch.ones_like(gap))


@dataclass(frozen=True)
class Chances:
    """One pair as probabilities: policy and reference, chosen (w) and rejected (l), and the token counts."""

    w: Decimal
    l: Decimal
    ref_w: Decimal
    ref_l: Decimal
    n_w: int
    n_l: int


Oracle = Callable[..., Decimal]


def exact(oracle: Oracle, points: Points, knobs: Knobs) -> Tensor:
    """The oracle's value at every point, [T] float64."""
    exact_knobs = {name: Decimal(value) for name, value in knobs.items()}
    columns = [t.tolist() for t in (points.pi_w, points.pi_l, points.ref_w, points.ref_l, points.n_w, points.n_l)]
    values = []
    with localcontext(prec=60):
        for *logs, n_w, n_l in zip(*columns, strict=True):
            chances = Chances(*(Decimal(x).exp() for x in logs), int(n_w), int(n_l))
            values.append(float(oracle(chances, **exact_knobs)))
    return torch.tensor(values, dtype=torch.float64)


# --- the losses, derived again ---------------------------------------------------------------------------------------


def wins(q: Chances, beta: Decimal) -> tuple[Decimal, Decimal]:
    """Bradley-Terry on strengths (pi / pi_ref)^beta: the chances that w beats l and that l beats w."""
    w, l = (q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta
    return w / (w + l), l / (w + l)


def dpo(q: Chances, beta: Decimal) -> Decimal:
    """Surprise at the label."""
    return -wins(q, beta)[0].ln()


def cdpo(q: Chances, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """Expected surprise when a fair labeller errs now and then."""
    right, wrong = wins(q, beta)
    return -((1 - label_smoothing) * right.ln() + label_smoothing * wrong.ln())


def robust(q: Chances, beta: Decimal, label_smoothing: Decimal) -> Decimal:
    """The loss of the observed label that solves "mean over flips = clean loss" for both labels at once (Cramer)."""
    right, wrong = wins(q, beta)
    keep, flip = 1 - label_smoothing, label_smoothing
    return (keep * -right.ln() - flip * -wrong.ln()) / (keep * keep - flip * flip)


def _regression(h: Decimal, tau: Decimal) -> Decimal:
    """Regress h on I/tau, I the fair coin of which response is called first; its noise, 1/(4 tau^2), taken off."""
    half = Decimal("0.5")
    return half * (h - 1 / tau) ** 2 + half * h**2 - 1 / (2 * tau) ** 2


def ipo(q: Chances, tau: Decimal) -> Decimal:
    return _regression(((q.w * q.ref_l) / (q.l * q.ref_w)).ln(), tau)


def ipo_average(q: Chances, tau: Decimal) -> Decimal:
    """Geometric means over tokens in place of the products."""
    w, l = (q.w / q.ref_w) ** (1 / Decimal(q.n_w)), (q.l / q.ref_l) ** (1 / Decimal(q.n_l))
    return _regression((w / l).ln(), tau)


def hinge(q: Chances, beta: Decimal) -> Decimal:
    """No loss once w's strength is e times l's."""
    right, wrong = wins(q, beta)
    e = Decimal(1).exp()
    return Decimal(0) if right >= e * wrong else (e * wrong / right).ln()


def simpo(q: Chances, beta: Decimal, gamma: Decimal) -> Decimal:
    """Surprise at the label when l is given a head start of e^gamma and strengths are mean token probabilities."""
    w, l = q.w ** (beta / q.n_w), q.l ** (beta / q.n_l) * gamma.exp()
    return -(w / (w + l)).ln()


# --- closed-form optima over all responses ---------------------------------------------------------------------------


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


def kl_optimum(world: World, beta: float, **_: float) -> Tensor:
    """pi_ref exp(r / beta) / Z."""
    weights = world.reference * torch.exp(world.reward / beta)
    return weights / weights.sum()


def calibrated_optimum(world: World, beta: float, label_smoothing: float) -> Tensor:
    """V = 2 and a certain winner: the odds over the reference are those of a right label, to the power 1/beta."""
    odds = torch.tensor([((1 - label_smoothing) / label_smoothing) ** (1 / beta), 1.0], dtype=torch.float64)
    return world.reference * odds / (world.reference * odds).sum()


def ipo_optimum(world: World, tau: float) -> Tensor:
    """pi_ref exp(P(y beats pi_ref) / tau) / Z (arXiv 2310.12036 Section 5): any preferences, transitive or not."""
    weights = world.reference * torch.exp(world.beats @ world.reference / tau)
    return weights / weights.sum()


def ipo_average_optimum(world: World, tau: float) -> Tensor:
    """pi_ref exp(n (P(y beats pi_ref) / tau + c)), c by normalisation: the same advantage pays per token."""
    return _normalised(world.reference.log(), world.length, world.beats @ world.reference / tau)


def simpo_optimum(world: World, beta: float, gamma: float) -> Tensor:
    """exp(n (r / beta + c)) at gamma = 0: no trace of the reference, and long responses gain or lose by length."""
    assert gamma == 0
    return _normalised(torch.zeros_like(world.reward), world.length, world.reward / beta)


def _normalised(base: Tensor, length: Tensor, per_token: Tensor) -> Tensor:
    """exp(base + length (per_token + c)) with the c, found by bisection, that makes it sum to one."""
    low, high = -100.0, 100.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if torch.logsumexp(base + length * (per_token + c), 0) < 0 else (low, c)
    return torch.exp(base + length * (per_token + low))


# --- the rows --------------------------------------------------------------------------------------------------------


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
    """The value at policy == reference, worked out by hand, for default knobs and for `other`."""
    swap: Callable[..., Tensor]
    """L(w, l) - L(l, w) as a function of the margin that the loss looks at."""
    shift: Literal["response", "token"]
    """The loss ignores a constant added to both log-ratios (that is log Z), or to every token's."""
    steepness: Callable[..., float]
    """d margin / d D at one token per response: how far a log-ratio gap carries the loss."""
    limits: tuple[Limit, ...] = ()
    optimum: Callable[..., Tensor] | None = None
    optimum_world: Literal["bradley_terry", "intransitive", "certain"] = "bradley_terry"
    optimum_knobs: Knobs = field(default_factory=dict)
    optimum_flips: float = 0.0
    """The share of labels flipped before the loss sees them."""


def _beta(beta: float, **_: float) -> float:
    return beta


ROWS: dict[str, Row] = {
    "dpo": Row(
        derivation=dpo,
        reward=lambda q, beta: beta * (q.w / q.ref_w).ln(),
        other={"beta": 0.37},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=lambda D, beta: -beta * D,
        shift="response",
        steepness=_beta,
        optimum=kl_optimum,
        optimum_knobs={"beta": 0.3},
    ),
    "cdpo": Row(
        derivation=cdpo,
        reward=lambda q, beta: beta * (q.w / q.ref_w).ln(),
        other={"beta": 0.37, "label_smoothing": 0.3},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=lambda D, beta, label_smoothing: -(1 - 2 * label_smoothing) * beta * D,
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "label_smoothing": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=calibrated_optimum,
        optimum_world="certain",
        optimum_knobs={"beta": 0.8, "label_smoothing": 0.2},
    ),
    "robust": Row(
        derivation=robust,
        reward=lambda q, beta: beta * (q.w / q.ref_w).ln(),
        other={"beta": 0.37, "label_smoothing": 0.3},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=lambda D, beta, label_smoothing: -beta * D / (1 - 2 * label_smoothing),
        shift="response",
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "label_smoothing": 0.0}, "dpo", {"beta": 0.2}),),
        optimum=kl_optimum,
        optimum_knobs={"beta": 0.5, "label_smoothing": 0.2},
        optimum_flips=0.2,
    ),
    "ipo": Row(
        derivation=ipo,
        reward=lambda q, tau: tau * (q.w / q.ref_w).ln(),
        other={"tau": 0.5},
        at_start=(25.0, 1.0),
        swap=lambda D, tau: -2 * D / tau,
        shift="response",
        steepness=lambda tau: 1.0,
        optimum=ipo_optimum,
        optimum_world="intransitive",
        optimum_knobs={"tau": 0.2},
    ),
    "ipo_average": Row(
        derivation=ipo_average,
        reward=lambda q, tau: tau * (q.w / q.ref_w).ln() / q.n_w,
        other={"tau": 0.25},
        at_start=(0.25, 4.0),
        swap=lambda D_token, tau: -2 * D_token / tau,
        shift="token",
        steepness=lambda tau: 1.0,
        limits=(Limit({"tau": 0.3}, "ipo", {"tau": 0.3}, length=1),),
        optimum=ipo_average_optimum,
        optimum_world="intransitive",
        optimum_knobs={"tau": 0.6},
    ),
    "hinge": Row(
        derivation=hinge,
        reward=lambda q, beta: beta * (q.w / q.ref_w).ln(),
        other={"beta": 0.2},
        at_start=(1.0, 1.0),
        swap=lambda D, beta: torch.where((beta * D).abs() < 1, -2 * beta * D, -torch.sign(D) * (1 + (beta * D).abs())),
        shift="response",
        steepness=_beta,
    ),
    "simpo": Row(
        derivation=simpo,
        reward=lambda q, beta: beta * q.w.ln() / q.n_w,
        other={"beta": 5.0, "gamma": 0.4},
        at_start=None,
        swap=lambda p_gap, beta, gamma: torch.log(
            (1 + torch.exp(gamma - beta * p_gap)) / (1 + torch.exp(gamma + beta * p_gap))
        ),
        shift="token",
        steepness=_beta,
        limits=(Limit({"beta": 2.0, "gamma": 0.0}, "dpo", {"beta": 2.0 / 7}, length=7, reference=False),),
        optimum=simpo_optimum,
        optimum_knobs={"beta": 2.0, "gamma": 0.0},
    ),
}
