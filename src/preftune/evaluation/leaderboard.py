"""Ratings of K models from verdicts between them: Bradley-Terry (1952) by maximum likelihood. No torch.

    P(i preferred to j) = 1 / (1 + exp(theta_j - theta_i));    a tie is half a win of each
    rating = anchor's + (400 / ln 10) (theta_i - theta_anchor), the scale of Elo: 400 points are odds of 10

theta carries a weak normal prior (standard deviation PRIOR logits, 0 in the mean). Ratings are relative, and only
where each model has won and lost against the others by some chain (Ford, 1957): within a strongly connected
component. A model with wins only has no finite likelihood rating; the prior gives it one, its end is reported as
infinite, and a warning says so. Order of rows and of the two models in a row do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preftune.equations.resampling import Floats, resampled
from preftune.equations.stats import Interval
from preftune.errors import DataError
from preftune.evaluation.win_rate import Match

__all__ = ["Leaderboard", "Standing", "bradley_terry_fit", "components", "leaderboard"]

PRIOR = 4.0
POINTS = 400 / math.log(10)
_NEWTON = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One model on the board."""

    model: str
    rating: Interval
    """Points, relative to the anchor, whose rating is given: interval of the bootstrap over prompts. An end is
    infinite where the likelihood knows no bound against the anchor."""
    rank: Interval
    """1 is best; 1 + the number of models rated above it, with the quantiles of that over the resamples."""
    rate: float
    """Share of its verdicts won, ties as half, whoever the opponents were."""
    verdicts: int
    component: int
    """Number of its strongly connected component: ratings compare within one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaderboard:
    """Models by rating, best first, and how well one number per model describes the verdicts."""

    standings: tuple[Standing, ...]
    anchor: str
    verdicts: int
    skips: int
    prompts: int
    connected: bool
    """Whether all models are one component: otherwise `warnings` names the components."""
    deviance: float
    """2 (log-likelihood of a free rate per pair of models - of the ratings); about `degrees` when one number per
    model suffices and verdicts are independent and without ties; less with ties, more with clusters."""
    degrees: int
    """Pairs of models compared - (K - number of groups of models that were compared at all)."""
    cycles: int
    """Triples of models each of which beats the next by majority, in a circle: what no rating can express."""
    triples: int
    """Triples in which every two models were compared and neither pair was even."""
    warnings: tuple[str, ...]


def bradley_terry_fit(wins: ArrayLike, prior: float = PRIOR) -> Floats:
    """theta [..., K] of win counts [..., K, K] (wins[i, j]: i over j, ties half to each), by Newton; they sum to 0.

    `prior` is the standard deviation of theta in logits; math.inf is maximum likelihood, which is finite only for
    strongly connected counts. Raises ValueError where it is asked for and no finite maximum exists.
    """
    wins_KK = np.asarray(wins, np.float64)
    flat = wins_KK.reshape(-1, *wins_KK.shape[-2:])
    models = flat.shape[-1]
    precision = 0.0 if math.isinf(prior) else 1 / prior**2
    if not precision and any(len(components(one)) > 1 for one in flat):
        raise ValueError("without a prior ratings need strongly connected wins: some model never lost or never won")
    games = flat + flat.swapaxes(1, 2)
    theta_RK, eye = np.zeros(flat.shape[:2]), np.eye(models)
    for _ in range(_NEWTON):
        p = 0.5 * (1 + np.tanh((theta_RK[:, :, None] - theta_RK[:, None, :]) / 2))
        pull_RK = (flat - games * p).sum(2) - precision * theta_RK
        curve = games * p * (1 - p)
        # The likelihood has no opinion on a common shift: the last term holds it at 0.
        hessian = eye * (curve.sum(2) + precision)[:, :, None] - curve + 1 / models
        step_RK = np.linalg.solve(hessian, pull_RK[..., None])[..., 0]
        size_R1 = np.abs(step_RK).max(1, keepdims=True)
        theta_RK += step_RK / np.maximum(1, size_R1)
        if size_R1.max() < 1e-10:
            break
    return (theta_RK - theta_RK.mean(1, keepdims=True)).reshape(wins_KK.shape[:-1])


def components(wins: ArrayLike) -> list[list[int]]:
    """Strongly connected components of "i has won (or tied) against j": lists of positions, in order of the first."""
    reach_KK = _reach(np.asarray(wins) > 0)
    both_KK = reach_KK & reach_KK.T
    found: list[list[int]] = []
    for i in range(len(both_KK)):
        if not any(i in one for one in found):
            found.append(np.flatnonzero(both_KK[i]).tolist())
    return found


def leaderboard(
    found: Iterable[Match],
    *,
    anchor: str | None = None,
    anchor_rating: float = 1000.0,
    level: float = 0.95,
    prior: float = PRIOR,
    resamples: int = 1000,
    seed: int = 0,
) -> Leaderboard:
    """Ratings of all models that were compared; `anchor` (default: the first model named) has `anchor_rating`.

    Raises DataError on no verdict between two models, an unknown anchor, or, with `prior=math.inf`, models that are
    not strongly connected.
    """
    every = [match for match in found if match.first != match.second]
    said = [match for match in every if match.outcome != "skip"]
    names = list(dict.fromkeys(name for match in said for name in (match.first, match.second)))
    if not said:
        raise DataError(f"a leaderboard needs verdicts between two models; found {len(every)} judgements, all skips")
    if anchor is not None and anchor not in names:
        raise DataError(f"the anchor {anchor} was compared with nobody; models: {', '.join(names)}")
    wins_of = _wins(said, names)
    wins_KK = wins_of(np.ones((1, len(said))))[0]
    islands = components(wins_KK)
    if math.isinf(prior) and len(islands) > 1:
        raise DataError(f"no finite ratings: {_describe(islands, names)}; compare more, or keep the prior")
    theta_K = bradley_terry_fit(wins_KK, prior)
    drawn_RK = resampled(
        lambda weights_RN: bradley_terry_fit(wins_of(weights_RN), prior if math.isfinite(prior) else 1e3),
        len(said),
        clusters=[match.prompt for match in said],
        resamples=resamples,
        seed=seed,
    )
    fixed = names.index(anchor) if anchor else 0
    rows = _standings(names, wins_KK, theta_K, drawn_RK, fixed, anchor_rating, level)
    cycles, triples = _cycles(wins_KK)
    groups = len(components(wins_KK + wins_KK.T))
    pairs = int(np.triu(wins_KK + wins_KK.T > 0, 1).sum())
    connected = len(islands) == 1
    warning = f"{_describe(islands, names)}: between these groups ratings rest on the prior alone"
    return Leaderboard(
        standings=tuple(sorted(rows, key=lambda row: -row.rating.estimate)),
        anchor=names[fixed],
        verdicts=len(said),
        skips=len(every) - len(said),
        prompts=len({match.prompt for match in said}),
        connected=connected,
        deviance=_deviance(wins_KK, theta_K),
        degrees=pairs - (len(names) - groups),
        cycles=cycles,
        triples=triples,
        warnings=() if connected else (warning,),
    )


def _wins(said: Sequence[Match], names: Sequence[str]) -> Callable[[Floats], Floats]:
    """Weights of verdicts [R, N] -> wins [R, K, K], ties half to each."""
    place, models = {name: i for i, name in enumerate(names)}, len(names)
    table_NKK = np.zeros((len(said), models, models))
    first = [place[match.first] for match in said]
    second = [place[match.second] for match in said]
    score_N = np.array([match.score for match in said])
    table_NKK[range(len(said)), first, second] = score_N
    table_NKK[range(len(said)), second, first] = 1 - score_N
    flat = table_NKK.reshape(len(said), -1)
    return lambda weights_RN: (weights_RN @ flat).reshape(-1, models, models)


def _reach(step_KK: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether j can be reached from i, i itself included."""
    reach_KK = step_KK | np.eye(len(step_KK), dtype=bool)
    for middle in range(len(reach_KK)):
        reach_KK = reach_KK | (reach_KK[:, middle : middle + 1] & reach_KK[middle])
    return reach_KK


def _standings(
    names: Sequence[str],
    wins_KK: Floats,
    theta_K: Floats,
    drawn_RK: Floats,
    fixed: int,
    anchor_rating: float,
    level: float,
) -> list[Standing]:
    reach_KK, islands = _reach(wins_KK > 0), components(wins_KK)
    ends = ((1 - level) / 2, (1 + level) / 2)
    points_K = anchor_rating + POINTS * (theta_K - theta_K[fixed])
    low_K, high_K = np.quantile(anchor_rating + POINTS * (drawn_RK - drawn_RK[:, fixed : fixed + 1]), ends, axis=0)
    # Never lost to the anchor's side by any chain: no upper end; never won against it: no lower one.
    high_K = np.where(reach_KK[fixed], high_K, math.inf)
    low_K = np.where(reach_KK[:, fixed], low_K, -math.inf)
    rank_RK = 1 + (drawn_RK[:, None, :] > drawn_RK[:, :, None] + 1e-9).sum(2)
    best_K, worst_K = (
        np.quantile(rank_RK, ends[0], axis=0, method="lower"),
        np.quantile(rank_RK, ends[1], axis=0, method="higher"),
    )
    games_K = (wins_KK + wins_KK.T).sum(1)
    rows = []
    for k, name in enumerate(names):
        n, rank = round(float(games_K[k])), 1 + int((theta_K > theta_K[k] + 1e-9).sum())
        rows.append(
            Standing(
                model=name,
                rating=Interval(float(points_K[k]), float(low_K[k]), float(high_K[k]), n),
                rank=Interval(rank, float(best_K[k]), float(worst_K[k]), n),
                rate=float(wins_KK[k].sum() / games_K[k]),
                verdicts=n,
                component=next(i for i, one in enumerate(islands) if k in one),
            )
        )
    return rows


def _deviance(wins_KK: Floats, theta_K: Floats) -> float:
    games = wins_KK + wins_KK.T
    share = np.divide(wins_KK, games, out=np.zeros_like(games), where=games > 0)
    log_p = -np.logaddexp(0, theta_K[None, :] - theta_K[:, None])
    log_share = np.log(share, out=np.zeros_like(share), where=share > 0)
    return float(2 * (wins_KK * (log_share - log_p)).sum())


def _cycles(wins_KK: Floats) -> tuple[int, int]:
    beats = wins_KK > wins_KK.T
    decided = beats | beats.T
    every = list(permutations(range(len(beats)), 3))
    circles = sum(bool(beats[i, j] and beats[j, k] and beats[k, i]) for i, j, k in every)
    full = sum(bool(decided[i, j] and decided[j, k] and decided[k, i]) for i, j, k in every)
    return circles // 3, full // 6


def _describe(islands: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    groups = "; ".join("{" + ", ".join(names[i] for i in one) + "}" for one in islands)
    return f"no chain of wins and losses joins {groups}"
