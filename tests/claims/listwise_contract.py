"""What every listwise loss must satisfy: one `Row` per loss, written in probabilities, not in log-probabilities.

As `loss_contract` for pairs: the oracles are exact arithmetic (`decimal`, 60 digits) on one ranking at a time, without
padding, so they share neither formula nor rounding nor masks with `preftune.equations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from preftune.tensors import ListLogps

Knobs = Mapping[str, float]


@dataclass(frozen=True)
class Lists:
    """G rankings as leaves [G, K]: log-probabilities of policy and reference, ranks and scores; rank 0 is absent.

    What is absent is NaN throughout: a loss that touches it shows.
    """

    policy: Tensor
    reference: Tensor
    rank: Tensor
    score: Tensor

    def logps(self) -> ListLogps:
        """Weights and lengths are NaN: these losses neither reduce nor normalise."""
        nothing = torch.full_like(self.policy, torch.nan)
        return ListLogps(
            self.policy, self.policy - self.reference, nothing.detach(), self.rank, self.score, nothing[:, :0].sum(1)
        )

    @property
    def present(self) -> Tensor:
        return self.rank > 0

    def leaves(self, dtype: torch.dtype = torch.float64) -> Lists:
        """The same rankings in `dtype`, the policy's log-probabilities ready to be differentiated by."""
        policy, reference, score = (t.detach().to(dtype) for t in (self.policy, self.reference, self.score))
        return Lists(policy.requires_grad_(), reference, self.rank, score)

    def map(self, function: Callable[[Tensor], Tensor]) -> Lists:
        return Lists(*(function(getattr(self, f.name)) for f in fields(self)))

    def alone(self, ranking: int) -> Lists:
        """One ranking, cut to its own length."""
        there = self.present[ranking]
        return self.map(lambda t: t[ranking, there][None])

    def moved(self, by: Tensor) -> Lists:
        """The policy's log-probabilities, and so the log-ratios, moved."""
        return replace(self, policy=self.policy + by)

    def __len__(self) -> int:
        return len(self.policy)


def random_lists(count: int, seed: int = 0, *, widest: int = 5, spread: float = 15.0) -> Lists:
    """2 to `widest` responses, ties in ranks and scores; one list in eight is fresh, one has equal log-ratios."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    there = torch.arange(widest) < torch.randint(2, widest + 1, (count, 1), generator=g)
    reference = -80 * uniform(count, widest) - 10
    ratio = spread * torch.randn(count, widest, generator=g, dtype=torch.float64)
    ratio[::8] = 0
    ratio[1::8, 1:3] = ratio[1::8, :1]
    policy = torch.where(ratio == ratio[:, :1], reference[:, :1], reference) + ratio  # so that equal ratios stay equal
    reference = torch.where(ratio == ratio[:, :1], reference[:, :1], reference)
    score = torch.where(uniform(count, widest) < 0.3, 1.0, 3 * uniform(count, widest))
    rank = dense(torch.randint(1, widest + 1, (count, widest), generator=g), there)
    values = (t.masked_fill(~there, torch.nan) for t in (policy, reference, score))
    policy, reference, score = values
    return Lists(policy, reference, rank, score)


def dense(rank: Tensor, there: Tensor) -> Tensor:
    """Ranks without gaps, 1 is best; 0 where nothing is there."""
    lower = (rank[:, None, :] < rank[:, :, None]) & there[:, None, :]
    first = ~((rank[:, None, :] == rank[:, :, None]) & there[:, None, :]).tril(-1).any(-1)
    return ((lower & first[:, None, :]).sum(-1) + 1).masked_fill(~there, 0)


SHAPES = ([1, 0], [1, -1, 0], [0, 1, 1, -1], [1, 0, -1, 1, -1], [-1, 1, 1, 1, 0])
"""Log-ratios of the extreme lists in units of their gap: every two of them are far apart or equal."""


def extreme_lists(scale: float) -> Lists:
    """Gaps of 1e-4 to 1e4 over `scale`, exact in float32 in every subtraction, under three rankings each."""
    g = torch.Generator().manual_seed(0)
    rows, there = [], []
    for shape in SHAPES:
        for k in range(-4, 5):
            for _ in range(3):
                rows.append([10.0**k * x for x in shape] + [0.0] * (5 - len(shape)))
                there.append([True] * len(shape) + [False] * (5 - len(shape)))
    ratio = (torch.tensor(rows, dtype=torch.float64) / scale).float().double()
    reference = torch.where(ratio > 0, -2 * ratio, ratio)
    present = torch.tensor(there)
    rank = dense(torch.randint(1, 6, ratio.shape, generator=g), present)
    score = torch.randint(0, 49, ratio.shape, generator=g).double() / 16
    policy, reference, score = (t.masked_fill(~present, torch.nan) for t in (ratio + reference, reference, score))
    return Lists(policy, reference, rank, score)


@dataclass(frozen=True)
class Ranking:
    """One ranking as probabilities, nothing absent."""

    policy: tuple[Decimal, ...]
    reference: tuple[Decimal, ...]
    rank: tuple[int, ...]
    score: tuple[Decimal, ...]

    @property
    def ratios(self) -> list[Decimal]:
        return [p / q for p, q in zip(self.policy, self.reference, strict=True)]


Oracle = Callable[..., Decimal]
"""(Ranking, *, knobs) -> the value of the loss."""


def exact(oracle: Oracle, lists: Lists, knobs: Knobs) -> Tensor:
    """The oracle's value of every ranking, [G] float64."""
    exact_knobs = {name: Decimal(value) for name, value in knobs.items()}
    with localcontext(prec=60):
        values = []
        for g in range(len(lists)):
            policy, reference, rank, score = (getattr(lists.alone(g), f.name)[0].tolist() for f in fields(lists))
            probabilities = (tuple(Decimal(x).exp() for x in side) for side in (policy, reference))
            values.append(oracle(Ranking(*probabilities, tuple(rank), tuple(map(Decimal, score))), **exact_knobs))
        return torch.tensor([float(value) for value in values], dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """One prompt, V possible responses: the reference that draws the candidates, and what they are worth."""

    reference: Tensor
    """[V] probabilities."""
    reward: Tensor
    """[V] nats; a scoring source's scores are these."""


@dataclass(frozen=True)
class PairLimit:
    """On two responses with `scores`, better one first, the loss is `factor` times `equals`."""

    knobs: Knobs
    equals: str
    equals_knobs: Knobs
    scores: tuple[float, float] = (1.0, 0.0)
    factor: float = 1.0


@dataclass(frozen=True)
class Row:
    derivation: Oracle
    other: Knobs
    """A second value of every knob."""
    at_start: float | None
    """The value at policy == reference, worked out by hand, whatever the knobs; None: the data decides."""
    shift: bool
    """The loss ignores a constant added to all log-ratios of a ranking, which is log Z."""
    limits: tuple[PairLimit, ...]
    optimum: Callable[..., Tensor] | None = None
    optimum_knobs: Knobs = field(default_factory=dict)
