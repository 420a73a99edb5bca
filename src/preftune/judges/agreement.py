"""How far annotators agree, and what sways them. No torch: the labelling page uses this too.

A table is [N items, M annotators]; NaN is a gap (not asked, or skipped). With c_iv the number of ratings v of item i
and m_i the number of its ratings:

    raw      sum_i sum_v c_iv (c_iv - 1) / sum_i m_i (m_i - 1)         share of pairs of ratings that are equal
    kappa    (p_o - p_e) / (1 - p_e), p_e = sum_v p_v q_v               Cohen (1960), two annotators
    kappa    (P - P_e) / (1 - P_e), P = mean_i sum_v c_iv (c_iv - 1) / (m (m - 1)), P_e = sum_v p_v^2
                                                                       Fleiss (1971), m ratings of every item
    alpha    1 - D_o / D_e                                              Krippendorff (2011), any number, with gaps
             o_uv = sum_i (c_iu c_iv - [u = v] c_iu) / (m_i - 1), n_v = sum_u o_uv, n = sum_v n_v
             D_o = sum_uv o_uv d_uv, D_e = sum_uv n_u n_v d_uv / (n - 1)
             d_uv = [u != v] (nominal), (x_u - x_v)^2 with x the value (interval) or its mid-rank (ordinal)

Items with fewer than two ratings say nothing about agreement and are left out. What is not defined is NaN, never 1:
annotators who all always say the same have no alpha. Intervals: Wilson for shares, percentile bootstrap over items for
those above (resamples in which the statistic is undefined are left out). Items of one prompt are not independent:
`agreement` and `flip_rate` take prompts as `clusters`, in both kinds of interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preftune.equations.stats import Interval, bootstrap, share
from preftune.records import Judgement, Prompt

__all__ = [
    "Agreement",
    "AnnotatorRow",
    "agreement",
    "cohen_kappa",
    "fleiss_kappa",
    "flip_rate",
    "krippendorff_alpha",
    "longest_wins",
    "ratings",
    "raw_agreement",
]

Level = Literal["nominal", "ordinal", "interval"]
Floats = NDArray[np.float64]
Clusters = Sequence[object] | None

NOTHING = Interval(math.nan, math.nan, math.nan, 0)
RESAMPLES = 1000
_SIDES = {"first": 1.0, "second": -1.0, "tie": 0.0, "both_bad": 0.0}
BOTH_BAD = 2.0
_SWAPPED = {"first": "second", "second": "first"}


def raw_agreement(
    table: ArrayLike, *, clusters: Clusters = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Share of equal pairs of ratings of one item, pooled over items; NaN where no item has two ratings."""
    counts_NV, _, clusters = _counts(table, clusters)
    m_N = counts_NV.sum(1)
    pairs_N2 = np.stack([(counts_NV * (counts_NV - 1)).sum(1), m_N * (m_N - 1)], axis=1)
    return _bootstrap(pairs_N2, lambda sums: _ratio(sums[..., 0], sums[..., 1]), clusters, resamples, seed)


def cohen_kappa(
    first: ArrayLike, second: ArrayLike, *, clusters: Clusters = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Agreement of two annotators beyond the chance of their own habits; NaN where chance alone explains everything.

    `first`, `second`: [N] ratings of the same items, NaN for gaps. Raises ValueError on unequal lengths.
    """
    table_N2 = np.stack([np.asarray(first, np.float64), np.asarray(second, np.float64)], axis=1)
    rated_N = np.isnan(table_N2).sum(1) == 0
    table_N2, clusters = table_N2[rated_N], _of(clusters, rated_N)
    values, codes = np.unique(table_N2, return_inverse=True)
    codes_N2 = codes.reshape(table_N2.shape)
    one_VV = np.eye(len(values))
    confusion_NVV = one_VV[codes_N2[:, 0], :, None] * one_VV[codes_N2[:, 1], None, :]

    def kappa(sums: Floats) -> Floats:
        shares = sums / sums.sum((-2, -1), keepdims=True)
        observed = np.trace(shares, axis1=-2, axis2=-1)
        return _beyond_chance(observed, (shares.sum(-1) * shares.sum(-2)).sum(-1))

    return _bootstrap(confusion_NVV, kappa, clusters, resamples, seed)


def fleiss_kappa(table: ArrayLike, *, clusters: Clusters = None, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Agreement of m ratings per item beyond the chance of the habits of all together; NaN where all say one value.

    Who rated does not matter, but every item needs equally many ratings: raises ValueError otherwise.
    """
    counts_NV, _, clusters = _counts(table, clusters)
    m_N = counts_NV.sum(1)
    if len(set(m_N.tolist())) > 1:
        least, most = int(m_N.min()), int(m_N.max())
        raise ValueError(f"Fleiss' kappa needs equally many ratings per item, not {least} to {most}; alpha takes gaps")
    equal_N1 = (counts_NV * (counts_NV - 1)).sum(1, keepdims=True)

    def kappa(sums: Floats) -> Floats:
        ratings = sums[..., 1:].sum(-1)
        expected = ((sums[..., 1:] / ratings[..., None]) ** 2).sum(-1)
        return _beyond_chance(sums[..., 0] / (ratings * (m_N[0] - 1)), expected)

    return _bootstrap(np.concatenate([equal_N1, counts_NV], axis=1), kappa, clusters, resamples, seed)


def krippendorff_alpha(
    table: ArrayLike,
    level: Level = "nominal",
    *,
    clusters: Clusters = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """1 - observed / expected disagreement; 1 is perfect, 0 is chance, NaN where all ratings are one value.

    `level` says what a disagreement costs: the same always, by rank distance, or by squared difference.
    Made for few different values: memory grows with their square.
    """
    counts_NV, values_V, clusters = _counts(table, clusters)
    same_VV = np.eye(len(values_V))
    coincidences_NVV = counts_NV[:, :, None] * (counts_NV[:, None, :] - same_VV)
    coincidences_NVV /= (counts_NV.sum(1) - 1)[:, None, None]

    def alpha(sums: Floats) -> Floats:
        n_V = sums.sum(-1)
        n = n_V.sum(-1)
        x_V = n_V.cumsum(-1) - n_V / 2 if level == "ordinal" else np.broadcast_to(values_V, n_V.shape)
        d_VV = 1 - same_VV if level == "nominal" else (x_V[..., :, None] - x_V[..., None, :]) ** 2
        observed = (sums * d_VV).sum((-2, -1))
        expected = (n_V[..., :, None] * n_V[..., None, :] * d_VV).sum((-2, -1)) / np.maximum(n - 1, 1)
        return 1 - _ratio(observed, expected)

    return _bootstrap(coincidences_NVV, alpha, clusters, resamples, seed)


class _Options(TypedDict):
    clusters: Clusters
    resamples: int
    seed: int


@dataclass(frozen=True, slots=True)
class AnnotatorRow:
    """What one annotator did, and what sways it."""

    name: str
    judged: int
    """Comparisons with a verdict, skips left out."""
    decided: int
    """Those with a winner."""
    ties: int
    both_bad: int
    skips: int
    first: Interval
    """P(the response shown first wins), over everything shown that has a winner; 1/2 is no position bias."""
    longer: Interval
    """P(the longer response wins), over verdicts with a winner and unequal lengths in characters."""
    longest_wins: Interval
    """Agreement with the rule "the longest wins" over all verdicts; a tie on one side counts one half."""
    others: Interval
    """Share of equal ratings with the other annotators, over the items they share; bootstrap over items."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The annotators one by one, and together where there are several."""

    annotators: tuple[AnnotatorRow, ...]
    items: int
    """Different questions: a prompt and two texts in any order."""
    shared: int
    """Those with ratings of two annotators or more: the ones that tell something about agreement."""
    raw: Interval
    kappa: Interval
    """NaN unless there are exactly two annotators."""
    alpha: Interval
    """Krippendorff's, nominal: first, second, tie, both bad."""
    alpha_ordinal: Interval
    """Krippendorff's, ordinal: second, no preference, first."""


def agreement(
    judgements: Sequence[Judgement],
    shown: Sequence[Judgement] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Agreement:
    """Everything there is to say about these verdicts, with 95 % intervals.

    `shown`: all that was shown and said where that is more than the verdicts (both orders); it tells about position.
    Equal texts, which tie by definition, are left out. Position and length shares take comparisons as independent;
    several of one prompt are not quite.
    """
    shown = [j for j in (judgements if shown is None else shown) if j.first.text != j.second.text]
    judgements = [j for j in judgements if j.first.text != j.second.text]
    names, nominal_NM, ordinal_NM = ratings(judgements)
    prompts = [prompt for prompt, _, _ in dict.fromkeys(map(_item, judgements))]
    rows = [
        _row(name, judgements, shown, _others(nominal_NM, column, prompts, resamples, seed))
        for column, name in enumerate(names)
    ]
    options: _Options = {"clusters": prompts, "resamples": resamples, "seed": seed}
    two = cohen_kappa(nominal_NM[:, 0], nominal_NM[:, 1], **options) if len(names) == 2 else NOTHING
    return Agreement(
        annotators=tuple(rows),
        items=len(nominal_NM),
        shared=int(((~np.isnan(nominal_NM)).sum(1) > 1).sum()) if names else 0,
        raw=raw_agreement(nominal_NM, **options),
        kappa=two,
        alpha=krippendorff_alpha(nominal_NM, "nominal", **options),
        alpha_ordinal=krippendorff_alpha(ordinal_NM, "ordinal", **options),
    )


def ratings(judgements: Sequence[Judgement]) -> tuple[list[str], Floats, Floats]:
    """(annotators, nominal [N, M], ordinal [N, M]); an item is a prompt with two texts, whichever was shown first.

    Values are 1 and -1 for the two responses, 0 for a tie; both bad is 2 in the nominal table, 0 in the ordinal one;
    a skip is a gap. An annotator's last judgement on an item counts.
    """
    names = list(dict.fromkeys(judgement.judge for judgement in judgements))
    items = {item: row for row, item in enumerate(dict.fromkeys(_item(judgement) for judgement in judgements))}
    nominal_NM = np.full((len(items), len(names)), np.nan)
    ordinal_NM = nominal_NM.copy()
    column = {name: position for position, name in enumerate(names)}
    for judgement in judgements:
        sign = 1.0 if judgement.first.text <= judgement.second.text else -1.0
        value = sign * _SIDES.get(judgement.outcome, math.nan)
        place = items[_item(judgement)], column[judgement.judge]
        ordinal_NM[place] = value
        nominal_NM[place] = BOTH_BAD if judgement.outcome == "both_bad" else value
    return names, nominal_NM, ordinal_NM


def longest_wins(judgement: Judgement) -> float:
    """Agreement of the rule "the longest wins" with a verdict: 1, 0, or 1/2 where one of them sees no winner."""
    longer = len(judgement.first.text) - len(judgement.second.text)
    side = _SIDES[judgement.outcome]
    if side == 0 or longer == 0:
        return 1.0 if side == longer == 0 else 0.5
    return float((longer > 0) == (side > 0))


def flip_rate(shown_twice: Iterable[Sequence[Judgement]]) -> Interval:
    """Share of comparisons shown in both orders whose answer turned with the order, of those answered both times."""
    return _share(
        (one.prompt, float(one.outcome != _SWAPPED.get(other.outcome, other.outcome)))
        for one, other in shown_twice
        if "skip" not in (one.outcome, other.outcome)
    )


def _item(judgement: Judgement) -> tuple[Prompt, str, str]:
    one, other = sorted((judgement.first.text, judgement.second.text))
    return judgement.prompt, one, other


def _row(name: str, judgements: Sequence[Judgement], shown: Sequence[Judgement], others: Interval) -> AnnotatorRow:
    own = [judgement for judgement in judgements if judgement.judge == name]
    outcomes = [judgement.outcome for judgement in own]
    verdicts = [judgement for judgement in own if judgement.outcome != "skip"]
    decided = [judgement for judgement in own if judgement.outcome in ("first", "second")]
    uneven = [judgement for judgement in decided if len(judgement.first.text) != len(judgement.second.text)]
    sides = [judgement for judgement in shown if judgement.judge == name and judgement.outcome in ("first", "second")]
    return AnnotatorRow(
        name=name,
        judged=len(verdicts),
        decided=len(decided),
        ties=outcomes.count("tie"),
        both_bad=outcomes.count("both_bad"),
        skips=outcomes.count("skip"),
        first=_share((judgement.prompt, float(judgement.outcome == "first")) for judgement in sides),
        longer=_share((judgement.prompt, longest_wins(judgement)) for judgement in uneven),
        longest_wins=_share((judgement.prompt, longest_wins(judgement)) for judgement in verdicts),
        others=others,
    )


def _others(table_NM: Floats, column: int, prompts: Sequence[Prompt], resamples: int, seed: int) -> Interval:
    equal_NM = (table_NM == table_NM[:, column : column + 1]).astype(np.float64)
    both_NM = ~np.isnan(table_NM) & ~np.isnan(table_NM[:, column : column + 1])
    both_NM[:, column] = False
    sums_N2 = np.stack([(equal_NM * both_NM).sum(1), both_NM.sum(1)], axis=1)
    rated_N = sums_N2[:, 1] > 0
    clusters = _of(prompts, rated_N)
    return _bootstrap(sums_N2[rated_N], lambda sums: _ratio(sums[..., 0], sums[..., 1]), clusters, resamples, seed)


def _share(successes: Iterable[tuple[Prompt, float]]) -> Interval:
    """Of (prompt, success); prompts with several are clusters."""
    prompts, found = zip(*every, strict=True) if (every := list(successes)) else ((), ())
    return share(found, clusters=prompts) if found else NOTHING


def _counts(table: ArrayLike, clusters: Clusters) -> tuple[Floats, Floats, Clusters]:
    """[N, V] how often each item got each value (items with fewer than two ratings left out), the [V] values, the
    clusters of the items that are left."""
    table_NM = np.asarray(table, np.float64)
    if table_NM.ndim != 2:
        raise ValueError(f"a table is [items, annotators], not of {table_NM.ndim} dimensions")
    rated_N = (~np.isnan(table_NM)).sum(1) > 1
    table_NM = table_NM[rated_N]
    values_V = np.unique(table_NM[~np.isnan(table_NM)])
    return (table_NM[:, :, None] == values_V).sum(1).astype(np.float64), values_V, _of(clusters, rated_N)


def _of(clusters: Clusters, kept_N: NDArray[np.bool_]) -> Clusters:
    return None if clusters is None else [label for label, kept in zip(clusters, kept_N, strict=True) if kept]


def _beyond_chance(observed: Floats, expected: Floats) -> Floats:
    """(observed - expected) / (1 - expected), NaN where chance alone explains everything."""
    return _ratio(observed - expected, np.where(expected > 1 - 1e-12, 0.0, 1 - expected))


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below != 0)


def _bootstrap(
    per_item: Floats, statistic: Callable[[Floats], Floats], clusters: Clusters, resamples: int, seed: int
) -> Interval:
    """`statistic` of the sum over items, with its percentile interval over resampled items or clusters of them."""
    n = len(per_item)
    if n == 0:
        return NOTHING
    if resamples == 0:
        return Interval(float(statistic(per_item.sum(0))), math.nan, math.nan, n)

    flat = per_item.reshape(n, -1)

    def weighted(weights_RN: Floats) -> Floats:
        return statistic((weights_RN @ flat).reshape(-1, *per_item.shape[1:]))

    return bootstrap(weighted, n, clusters=clusters, resamples=resamples, seed=seed)
