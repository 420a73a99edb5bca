"""The listwise losses, derived again from probabilities of one ranking at a time."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise, permutations, product
from math import log

import torch
from listwise_contract import PairLimit, Ranking, Row, World
from torch import Tensor

# --- the losses, derived again ---------------------------------------------------------------------------------------


def sequential_draws(strength: list[Decimal], order: tuple[int, ...]) -> Decimal:
    """The chance that drawing without replacement, in proportion to strength, gives this order."""
    chance, left = Decimal(1), sum(strength)
    for i in order:
        chance *= strength[i] / left
        left = sum(strength[j] for j in order[order.index(i) + 1 :])
    return chance


def plackett_luce(q: Ranking, beta: Decimal) -> Decimal:
    """Surprise at the ranking: every order that it allows is drawn, one by one."""
    strength = [r**beta for r in q.ratios]
    orders = permutations(range(len(strength)))
    allowed = [o for o in orders if all(q.rank[i] <= q.rank[j] for i, j in pairwise(o))]
    return -sum((sequential_draws(strength, o) for o in allowed), Decimal(0)).ln()


def present_orders(q: Ranking) -> Iterator[tuple[int, ...]]:
    """All orders by falling likelihood ratio; ratios that differ in the 40th digit only are equal."""
    ratios = q.ratios
    above = [r * (1 + Decimal("1e-40")) for r in ratios]
    for order in permutations(range(len(ratios))):
        if all(ratios[j] <= above[i] for i, j in pairwise(order)):
            yield order


def lipo(q: Ranking, beta: Decimal) -> Decimal:
    """For each pair that the scores tell apart: surprise at it, times what swapping the two changes in the DCG."""
    orders, strength = list(present_orders(q)), [r**beta for r in q.ratios]
    gain = [Decimal(2) ** psi - 1 for psi in q.score]
    discount = [Decimal(1 + place).ln() for place in range(1, 1 + len(gain))]

    def dcg(order: tuple[int, ...]) -> Decimal:
        return sum((gain[i] / d for i, d in zip(order, discount, strict=True)), Decimal(0))

    loss = Decimal(0)
    for i, j in product(range(len(gain)), repeat=2):
        if q.score[i] > q.score[j]:
            other = {i: j, j: i}
            changes = [abs(dcg(o) - dcg(tuple(other.get(k, k) for k in o))) for o in orders]
            w, l = strength[i], strength[j]
            loss += sum(changes) / len(changes) * -(w / (w + l)).ln()
    return loss


def shares(parts: list[Decimal]) -> list[Decimal]:
    return [part / sum(parts) for part in parts]


def exo_list(q: Ranking, beta: Decimal, beta_r: Decimal) -> Decimal:
    """Nats lost by coding what the policy draws with the scores' distribution."""
    drawn, wanted = shares([r**beta for r in q.ratios]), shares([(psi / beta_r).exp() for psi in q.score])
    return sum((p * (p / w).ln() for p, w in zip(drawn, wanted, strict=True)), Decimal(0))


def infonca(q: Ranking, beta: Decimal, alpha: Decimal) -> Decimal:
    """Mean surprise of the policy at a response drawn as the scores say."""
    drawn, wanted = shares([r**beta for r in q.ratios]), shares([(psi / alpha).exp() for psi in q.score])
    return sum((w * -p.ln() for p, w in zip(drawn, wanted, strict=True)), Decimal(0))


def nca_list(q: Ranking, beta: Decimal, alpha: Decimal) -> Decimal:
    """Surprise of a classifier with odds ratio^beta: at one response drawn by scores, and at one drawn blindly."""
    odds, wanted = [r**beta for r in q.ratios], shares([(psi / alpha).exp() for psi in q.score])
    own = sum((w * -(o / (1 + o)).ln() for o, w in zip(odds, wanted, strict=True)), Decimal(0))
    return own + sum((1 + o).ln() for o in odds) / len(odds)


# --- closed-form optima over all responses, candidates drawn from the reference ---------------------------------------


def kl_optimum(world: World, beta: float) -> Tensor:
    """pi_ref exp(r / beta) / Z."""
    return torch.softmax(world.reference.log() + world.reward / beta, 0)


def tempered_optimum(world: World, beta: float, alpha: float = 1.0, beta_r: float = 1.0) -> Tensor:
    """pi_ref exp(r / (temperature beta)) / Z."""
    return torch.softmax(world.reference.log() + world.reward / (alpha * beta_r * beta), 0)


def nca_optimum(world: World, beta: float, alpha: float) -> Tensor:
    """At beta = 1, of three candidates: the law of one drawn from them as the scores say; it sums to one by itself."""
    assert beta == 1
    size = len(world.reference)
    policy = torch.zeros(size, dtype=torch.float64)
    for three in product(range(size), repeat=3):
        at = torch.tensor(three)
        wanted = torch.softmax(world.reward[at] / alpha, 0)
        policy = policy.index_add(0, at, world.reference[at].prod() * wanted)
    return policy


# --- the rows ---------------------------------------------------------------------------------------------------------

SWAP_OF_TWO = 1 / log(2) - 1 / log(3)
"""What the first place is worth above the second."""

ROWS: dict[str, Row] = {
    "plackett_luce": Row(
        derivation=plackett_luce,
        other={"beta": 0.37},
        at_start=None,
        shift=True,
        limits=(PairLimit({"beta": 0.2}, "dpo", {"beta": 0.2}),),
        optimum=kl_optimum,
        optimum_knobs={"beta": 0.6},
    ),
    "lipo": Row(
        derivation=lipo,
        other={"beta": 0.37},
        at_start=None,
        shift=True,
        limits=(
            PairLimit({"beta": 0.2}, "dpo", {"beta": 0.2}, factor=SWAP_OF_TWO),
            PairLimit({"beta": 0.2}, "dpo", {"beta": 0.2}, scores=(3.0, 1.0), factor=6 * SWAP_OF_TWO),
        ),
    ),
    "exo_list": Row(
        derivation=exo_list,
        other={"beta": 0.37, "beta_r": 0.9},
        at_start=None,
        shift=True,
        limits=(
            PairLimit(
                {"beta": 0.2, "beta_r": 0.5},
                "exo",
                {"beta": 0.2, "label_smoothing": 0.1},
                scores=(0.5 * log(9), 0.0),  # at the temperature beta_r they say nine to one
            ),
        ),
        optimum=tempered_optimum,
        optimum_knobs={"beta": 0.5, "beta_r": 1.5},
    ),
    "infonca": Row(
        derivation=infonca,
        other={"beta": 0.37, "alpha": 0.4},
        at_start=None,
        shift=True,
        limits=(PairLimit({"beta": 0.2, "alpha": 1e-3}, "dpo", {"beta": 0.2}),),
        optimum=tempered_optimum,
        optimum_knobs={"beta": 0.5, "alpha": 1.5},
    ),
    "nca_list": Row(
        derivation=nca_list,
        other={"beta": 0.37, "alpha": 0.4},
        at_start=1.3862943611198906,
        shift=False,
        limits=(PairLimit({"beta": 0.2, "alpha": 1e-3}, "nca", {"beta": 0.2}),),
        optimum=nca_optimum,
        optimum_knobs={"beta": 1.0, "alpha": 0.7},
    ),
}
