"""The losses of a whole step, derived again from probabilities: every oracle gets the list of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

import torch
from loss_contract import Chances, Limit, Row, log_ratio_reward

Pairs = Sequence[Chances]


# --- the losses, derived again ---------------------------------------------------------------------------------------


def surprise(odds: Decimal, label_smoothing: Decimal = Decimal(0)) -> Decimal:
    """Expected surprise at a comparison with these odds for the chosen one when labels are flipped now and then."""
    right, wrong = odds / (1 + odds), 1 / (1 + odds)
    return -(1 - label_smoothing) * right.ln() - (label_smoothing * wrong.ln() if label_smoothing else 0)


def peers(upper: Sequence[Decimal], lower: Sequence[Decimal]) -> list[Decimal]:
    """For each of `upper` the one of `lower` that beats as many of its own kind; by counting, nothing is sorted."""
    by_wins = {sum(x < y for x in lower): y for y in lower}
    return [by_wins[max(k for k in by_wins if k <= sum(x < y for x in upper))] for y in upper]


def aot(pairs: Pairs, beta: Decimal, label_smoothing: Decimal) -> list[Decimal]:
    """The policy's odds of a pair against the reference's odds that rank alike among the reference's."""
    odds = [q.w / q.l for q in pairs]
    matched = peers(odds, [q.ref_w / q.ref_l for q in pairs])
    return [surprise((x / y) ** beta, label_smoothing) for x, y in zip(odds, matched, strict=True)]


def aot_unpaired(pairs: Pairs, beta: Decimal, label_smoothing: Decimal) -> list[Decimal]:
    """How much likelier the chosen response became, against the rejected one that ranks alike."""
    gain = [q.w / q.ref_w for q in pairs]
    matched = peers(gain, [q.l / q.ref_l for q in pairs])
    return [surprise((x / y) ** beta, label_smoothing) for x, y in zip(gain, matched, strict=True)]


def beta_dpo(
    pairs: Pairs, beta: Decimal, alpha: Decimal, keep: Decimal, threshold: Decimal, spread: Decimal, step: Decimal
) -> list[Decimal]:
    """Pairs are drawn by the exponential clocks of step number `step`, each slowed by the Gaussian odds of its pair."""
    margins = [((q.w * q.ref_l) / (q.l * q.ref_w)).ln() for q in pairs]
    clocks = torch.empty(len(pairs), dtype=torch.float64)
    clocks.exponential_(generator=torch.Generator().manual_seed(int(step)))
    odds = [(-(((beta * D - threshold) / spread) ** 2) / 2).exp() if spread else Decimal(1) for D in margins]
    rings = [Decimal(clock) / odd for clock, odd in zip(clocks.tolist(), odds, strict=True)]
    count = round(keep * len(pairs))
    kept = [t < sorted(rings)[count] if count < len(rings) else True for t in rings]
    mean = sum((D for D, k in zip(margins, kept, strict=True) if k), Decimal(0)) / count
    step_beta = max(beta + beta * alpha * (beta * mean - threshold), Decimal("0.001"))
    scale = Decimal(len(pairs)) / count
    return [scale * surprise((step_beta * D).exp()) if k else Decimal(0) for D, k in zip(margins, kept, strict=True)]


def bco_pair(q: Chances, beta: Decimal, reward_sum: Decimal, reward_count: Decimal) -> Decimal:
    """Two verdicts of one classifier whose odds are the gain in likelihood over the usual gain."""
    usual = (reward_sum / reward_count if reward_count else Decimal(0)).exp()
    return surprise((q.w / q.ref_w) ** beta / usual) + surprise(usual / (q.l / q.ref_l) ** beta)


# --- the rows ---------------------------------------------------------------------------------------------------------

beta_of: Callable[..., float] = lambda beta, **_: beta  # noqa: E731

ROWS: dict[str, Row] = {
    "aot": Row(
        derivation=aot,
        reward=log_ratio_reward,
        other={"beta": 0.037, "label_smoothing": 0.2},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=None,
        shift="response",
        steepness=beta_of,
    ),
    "aot_unpaired": Row(
        derivation=aot_unpaired,
        reward=log_ratio_reward,
        other={"beta": 0.037, "label_smoothing": 0.2},
        at_start=(0.6931471805599453, 0.6931471805599453),
        swap=None,
        shift=None,
        steepness=beta_of,
    ),
    "beta_dpo": Row(
        derivation=beta_dpo,
        reward=log_ratio_reward,
        other={"beta": 0.23, "alpha": 0.2, "keep": 0.5},
        at_start=None,
        swap=None,
        shift="response",
        steepness=beta_of,
        state={"threshold": 0.4, "spread": 1.7, "step": 3.0},
        rests_at_start=True,
        limits=(Limit({"beta": 0.2, "alpha": 0.0, "keep": 1.0}, "dpo", {"beta": 0.2}),),
    ),
    "bco_pair": Row(
        derivation=bco_pair,
        reward=log_ratio_reward,
        other={"beta": 0.37},
        at_start=(1.3862943611198906, 1.3862943611198906),
        swap=lambda D, beta, reward_sum, reward_count: -beta * D,
        shift=None,
        steepness=beta_of,
        state={"reward_sum": 7.0, "reward_count": 5.0},
    ),
}
