"""The losses without a reference, derived again from probabilities (SimPO's row stands with the first ones)."""

from __future__ import annotations

from decimal import Decimal

import torch
from loss_contract import Chances, Limit, Row, World
from rows_divergences import capped, surprise, totalling_one
from torch import Tensor

# --- the losses, derived again ---------------------------------------------------------------------------------------


def per_token(q: Chances) -> tuple[Decimal, Decimal]:
    """Geometric mean probabilities of a token of w and of l."""
    return q.w ** (1 / Decimal(q.n_w)), q.l ** (1 / Decimal(q.n_l))


def bent(mean: Decimal, beta: Decimal, alpha: Decimal) -> Decimal:
    return beta / alpha * (1 - capped(mean**-alpha))


def alphapo(q: Chances, beta: Decimal, gamma: Decimal, alpha: Decimal) -> Decimal:
    """Surprise at the label when l is given a head start of gamma in bent rewards."""
    w, l = per_token(q)
    return surprise(bent(w, beta, alpha) - bent(l, beta, alpha) - gamma)


def nll(q: Chances) -> Decimal:
    """Surprise at a token of w, on average."""
    return -per_token(q)[0].ln()


def cpo(q: Chances, beta: Decimal, nll_weight: Decimal) -> Decimal:
    """Bradley-Terry on strengths pi^beta, and the surprise at w."""
    w, l = q.w**beta, q.l**beta
    return (1 + l / w).ln() + nll_weight * nll(q)


def slic_hf(q: Chances, delta: Decimal, nll_weight: Decimal) -> Decimal:
    """No ranking loss once w is e^delta times as likely as l."""
    enough = q.w >= delta.exp() * q.l
    return (Decimal(0) if enough else (delta.exp() * q.l / q.w).ln()) - nll_weight * q.w.ln()


def odds(mean: Decimal) -> Decimal:
    """P / (1 - P), P at most e^-1e-7."""
    mean = min(mean, Decimal("-1e-7").exp())
    return mean / (1 - mean)


def orpo(q: Chances, odds_weight: Decimal) -> Decimal:
    """Surprise at w, and at the label under Bradley-Terry on odds."""
    w, l = (odds(mean) for mean in per_token(q))
    return nll(q) - odds_weight * (w / (w + l)).ln()


def unlikelihood(q: Chances, alpha: Decimal) -> Decimal:
    """log of pi(l)^alpha over pi(w)."""
    return (q.l**alpha / q.w).ln()


# --- closed-form optima over all responses ---------------------------------------------------------------------------


def alphapo_optimum(world: World, beta: float, gamma: float, alpha: float) -> Tensor:
    """(1 - alpha (r / beta + c))^(-n / alpha) at gamma = 0: SimPO's exponential, bent."""
    assert gamma == 0
    return totalling_one(lambda c: (1 - alpha * (world.reward / beta + c)).clamp(min=0) ** (-world.length / alpha))


def cpo_optimum(world: World, beta: float, nll_weight: float) -> Tensor:
    """exp(r / beta) / Z without the likelihood term: nothing of the reference."""
    assert nll_weight == 0
    return torch.softmax(world.reward / beta, 0)


def chosen_share(world: World) -> Tensor:
    """How often each response is the chosen one of a pair of two different ones."""
    wins = world.beats - torch.diag(world.beats.diag())
    share = world.reference * (wins @ world.reference)
    return share / share.sum()


def nll_optimum(world: World) -> Tensor:
    """A mean per token counts a response of n tokens 1/n times."""
    share = chosen_share(world) / world.length
    return share / share.sum()


# --- the rows ---------------------------------------------------------------------------------------------------------


def _beta(beta: float, **_: float) -> float:
    return beta


def _one(**_: float) -> float:
    return 1.0


ROWS: dict[str, Row] = {
    "alphapo": Row(
        derivation=alphapo,
        reward=lambda q, beta, alpha: bent(per_token(q)[0], beta, alpha),
        other={"beta": 5.0, "gamma": 0.9, "alpha": -0.4},
        at_start=None,
        swap=None,
        shift=None,
        steepness=_beta,
        rests_at_start=True,
        limits=(
            Limit({"beta": 3.0, "gamma": 0.7, "alpha": 0.0}, "simpo", {"beta": 3.0, "gamma": 0.7}),
            Limit({"beta": 2.0, "gamma": 0.0, "alpha": 0.7}, "fdpo_alpha", {"beta": 2.0, "alpha": 0.7}, 1, False),
        ),
        optimum=alphapo_optimum,
        optimum_knobs={"beta": 2.0, "gamma": 0.0, "alpha": 0.25},
    ),
    "nll": Row(
        derivation=nll,
        reward=lambda q: per_token(q)[0].ln(),
        other={},
        at_start=None,
        swap=None,
        shift=None,
        steepness=_one,
        pull_at_start=(1, 0),
        optimum=nll_optimum,
    ),
    "cpo": Row(
        derivation=cpo,
        reward=lambda q, beta: beta * q.w.ln(),
        other={"beta": 0.37, "nll_weight": 0.3},
        at_start=None,
        swap=None,
        shift=None,
        steepness=_beta,
        limits=(Limit({"beta": 0.2, "nll_weight": 0.0}, "dpo", {"beta": 0.2}, reference=False),),
        optimum=cpo_optimum,
        optimum_knobs={"beta": 0.5, "nll_weight": 0.0},
    ),
    "slic_hf": Row(
        derivation=slic_hf,
        reward=lambda q: q.w.ln(),
        other={"delta": 9.0, "nll_weight": 0.2},
        at_start=None,
        swap=None,
        shift=None,
        steepness=_one,
        rests_at_start=True,
        limits=(Limit({"delta": 1.0, "nll_weight": 0.0}, "hinge", {"beta": 1.0}, reference=False),),
    ),
    "orpo": Row(
        derivation=orpo,
        reward=lambda q: odds(per_token(q)[0]).ln(),
        other={"odds_weight": 0.6},
        at_start=None,
        swap=None,
        shift=None,
        steepness=_one,
        limits=(Limit({"odds_weight": 0.0}, "nll", {}),),
    ),
    "unlikelihood": Row(
        derivation=unlikelihood,
        reward=lambda q: q.w.ln(),
        other={"alpha": 0.2},
        at_start=None,
        swap=None,
        shift=None,
        steepness=_one,
        limits=(Limit({"alpha": 0.0}, "nll", {}, length=1),),
        optimum=lambda world, alpha: chosen_share(world),
        optimum_knobs={"alpha": 0.0},
    ),
}
