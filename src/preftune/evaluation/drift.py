"""What went wrong, in plain words: known ways in which a policy drifts, each with its numbers. No torch.

    displacement           chosen responses became less likely than the move away from the reference forces
    length                 the gain goes along with longer (or shorter) responses
    over_optimisation      on one path a policy further from the reference has less reward than one closer to it
    collapse               different prompts get the same answer, more than from the reference
    saturation             most pairs are decided so far that they teach nothing any more
    accuracy_not_quality   pairs are ranked better, responses are not better

A finding is "seen" or "not seen" when an interval says so, else "cannot be told from n prompts". Nothing here is a
verdict about a model: the numbers are, and they stand beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from preftune.equations.resampling import Floats
from preftune.equations.stats import Interval, bootstrap, mean_interval, paired_difference, share

__all__ = [
    "DECIDED", "Finding", "Point", "accuracy_not_quality", "collapse", "displacement", "gap", "length", "no_path",
    "over_optimisation", "saturation",
]  # fmt: skip

SEEN, NOT_SEEN = "seen", "not seen"
DECIDED = math.log(99)
"""|z| from which a pair's gradient weight, or that of its opposite, is below 1 %; nats."""
ONE_FOR_ALL = 0.05
"""Answers that serve several prompts, beyond the reference's share of them, from which a policy has collapsed."""
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One way to drift, looked for in one model."""

    name: str
    model: str
    verdict: str
    """`seen`, `not seen`, or `cannot be told from 40 prompts` (or from these models)."""
    sentence: str
    """What that rests on, with numbers and intervals."""
    numbers: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Point:
    """One policy on the way away from the reference."""

    model: str
    kl: Interval
    """KL(pi || reference), nats."""
    rewards: Mapping[int, float]
    """Prompt -> mean reward of its responses."""


def gap(first: Interval, second: Interval) -> Interval:
    """first - second of two independent estimates, from their intervals (MOVER; Zou and Donner, 2008)."""
    low = math.hypot(first.estimate - first.low, second.high - second.estimate)
    high = math.hypot(first.high - first.estimate, second.estimate - second.low)
    difference = first.estimate - second.estimate
    return Interval(difference, difference - low, difference + high, min(first.n, second.n))


def displacement(model: str, chosen: Interval, forced: Interval, prompts: int) -> Finding:
    """Did the chosen responses' log-ratio fall by more than `forced`? Both nats per response, independent estimates.

    For responses of the reference E log(pi / ref) = -KL(ref || pi): a fall by that much is arithmetic, not a fault.
    Where more is known, `forced` is E_w[r] / beta - log Z (`theory.convergence.forced_log_ratios`).
    """
    excess = gap(chosen, forced)
    verdict = SEEN if excess.high < 0 else NOT_SEEN if excess.low >= 0 or chosen.low >= 0 else _unknown(prompts)
    sentence = (
        f"chosen responses changed by {chosen} nats; for responses that the reference wrote its distance forces "
        f"{forced} on average: {excess} beyond that"
    )
    numbers = {"chosen_log_ratio": chosen, "forced": forced, "excess": excess}
    return Finding(name="displacement", model=model, verdict=verdict, sentence=sentence, numbers=numbers)


def length(
    model: str,
    gains: ArrayLike,
    longer_by: ArrayLike,
    *,
    clusters: Sequence[object],
    unit: str = "characters",
    resamples: int = RESAMPLES,
) -> Finding:
    """How much of the gain over the reference goes along with length? gain = at_equal_length + slope longer_by.

    `gains`, `longer_by` [N]: of the i-th response less the reference's i-th response to the same prompt. Least squares;
    all intervals resample prompts through the whole fit. Raises ValueError on columns of different lengths.
    """
    fit_N2 = np.stack([np.asarray(longer_by, np.float64), np.asarray(gains, np.float64)], axis=1)

    def parts(weights_RN: Floats) -> tuple[Floats, Floats, Floats]:
        """(slope, mean of longer_by, mean of gains) of every row of weights; NaN slope where no length differs."""
        total_R = weights_RN.sum(1)
        x_R, y_R = (weights_RN @ fit_N2 / total_R[:, None]).T
        xx_R = weights_RN @ fit_N2[:, 0] ** 2 / total_R - x_R**2
        xy_R = weights_RN @ fit_N2.prod(1) / total_R - x_R * y_R
        floor = 1e-12 * max(1.0, float((fit_N2[:, 0] ** 2).max()))
        return np.divide(xy_R, xx_R, out=np.full(len(x_R), np.nan), where=xx_R > floor), x_R, y_R

    def of(statistic: int) -> Interval:
        def value(weights_RN: Floats) -> Floats:
            slope_R, x_R, y_R = parts(weights_RN)
            return (slope_R, slope_R * x_R, y_R - slope_R * x_R)[statistic]

        return bootstrap(value, len(fit_N2), clusters=clusters, resamples=resamples)

    slope, explained, equal = (of(i) for i in range(3))
    longer, gain = (mean_interval(column, clusters=clusters) for column in fit_N2.T)
    numbers = {"longer_by": longer, "gain": gain, "slope": slope, "explained": explained, "at_equal_length": equal}
    if math.isnan(explained.estimate):
        same = f"every response differs from the reference's by {longer.estimate:g} {unit}: no slope can be fitted"
        verdict = NOT_SEEN if longer.estimate == 0 else _unknown(len(set(clusters)))
        return Finding(name="length", model=model, verdict=verdict, sentence=same, numbers=numbers)
    if explained.low > 0:
        verdict = SEEN
    else:
        minor = explained.high < equal.low  # even at the upper end it is the smaller part of the gain
        verdict = NOT_SEEN if explained.high <= 0 or minor else _unknown(len(set(clusters)))
    sentence = (
        f"responses are {_by(longer, 'longer', 'shorter')} than the reference's, in {unit}, and score "
        f"{_by(gain, 'higher', 'lower')}. Of two responses the one that is longer by 1 scores "
        f"{_by(slope, 'higher', 'lower')}, so their length alone makes them score "
        f"{_by(explained, 'higher', 'lower')}, and at equal length they would score {_by(equal, 'higher', 'lower')} "
        "(brackets: 95 % intervals over prompts)"
    )
    if verdict == SEEN:
        sentence += "; whether longer is better in this task is for you to say"
    return Finding(name="length", model=model, verdict=verdict, sentence=sentence, numbers=numbers)


def _by(difference: Interval, more: str, less: str) -> str:
    """`12 [9, 15] longer`; of a negative difference its size and the other word."""
    if difference.estimate >= 0:
        return f"{difference} {more}"
    return f"{Interval(-difference.estimate, -difference.high, -difference.low, difference.n)} {less}"


def over_optimisation(points: Sequence[Point], path: str, level: float = 0.95) -> Finding:
    """Does reward fall again as KL grows? The policy of most reward against every one further away, paired by prompt.

    The points are one path, as `paths.paths` finds them; `path` says in words which.

    The peak is chosen by looking, so intervals have the level 1 - (1 - level) / number of pairs of policies: they hold
    for all pairs at once (Bonferroni). The reference belongs to the points, with KL 0, where the path begins at it.
    Raises ValueError on no point.
    """
    way = sorted(points, key=lambda point: point.kl.estimate)
    shared = sorted(set.intersection(*(set(point.rewards) for point in way)))
    peak = max(way, key=lambda point: float(np.mean([point.rewards[x] for x in shared])) if shared else 0.0)
    beyond = way[way.index(peak) + 1 :]
    pairs = len(list(combinations(way, 2)))
    falls = {
        point.model: paired_difference(
            [point.rewards[x] for x in shared], [peak.rewards[x] for x in shared], 1 - (1 - level) / pairs
        )
        for point in beyond
        if shared
    }
    fallen = [name for name, fall in falls.items() if fall.high < 0]
    told = len(way) > 2 and len(shared) > 1
    verdict = SEEN if fallen else NOT_SEEN if told and not beyond else _unknown(len(shared))
    listed = ", ".join(f"{name} {fall}" for name, fall in falls.items()) or "none is further away"
    sentence = f"{path}: most reward at KL {peak.kl} nats ({peak.model}); of those further away, reward less that of "
    sentence += f"{peak.model}: {listed}"
    if len(way) < 3:
        sentence = "two points show no peak: give more checkpoints or strengths; " + sentence
    numbers = {"peak_kl": peak.kl, **{f"fall_{name}": fall for name, fall in falls.items()}}
    named = ", ".join(fallen) or peak.model
    return Finding(name="over_optimisation", model=named, verdict=verdict, sentence=sentence, numbers=numbers)


def no_path(points: Sequence[Point]) -> Finding:
    """What can be said of over-optimisation by models that are no path with any other: nothing."""
    named = ", ".join(point.model for point in points)
    sentence = (
        f"nothing shows that {named} lies on a path with another model: that takes runs of one method from the same "
        "weights on the same data, of which only strength or length differ (beta, kl_coef, epochs, max_steps, ...); "
        "a difference between others is no fall of reward"
    )
    numbers = {f"kl_{point.model}": point.kl for point in points}
    verdict = "cannot be told from these models"
    return Finding(name="over_optimisation", model=named, verdict=verdict, sentence=sentence, numbers=numbers)


def collapse(model: str, elsewhere: ArrayLike, reference_elsewhere: ArrayLike) -> Finding:
    """Do different prompts get one answer? `elsewhere` [P]: share of a prompt's answers that others got word for word.

    Less the reference's on the same prompts: how often an answer comes again depends on how many are asked, and is
    natural where answers are short. The intervals are of shares, so that never seen is not never.
    """
    ours = share(elsewhere)
    more = gap(ours, share(reference_elsewhere))
    verdict = SEEN if more.low > ONE_FOR_ALL else NOT_SEEN if more.high <= ONE_FOR_ALL else _unknown(ours.n)
    sentence = f"{ours} of the answers are given to another prompt too, word for word: {more} more than the reference's"
    numbers = {"said_elsewhere": ours, "difference": more}
    return Finding(name="collapse", model=model, verdict=verdict, sentence=sentence, numbers=numbers)


def saturation(model: str, margins: ArrayLike, *, clusters: Sequence[object]) -> Finding:
    """Is more than half of the pairs decided beyond `DECIDED`? `margins` [T] beta (log-ratio gap), nats."""
    margin_T = np.asarray(margins, np.float64)
    decided = share((np.abs(margin_T) > DECIDED).astype(np.float64), clusters=clusters)
    verdict = SEEN if decided.low > 0.5 else NOT_SEEN if decided.high < 0.5 else _unknown(len(set(clusters)))
    sentence = f"{decided} of pairs have a margin beyond {DECIDED:.1f} nats: the loss hardly feels them either way"
    return Finding(name="saturation", model=model, verdict=verdict, sentence=sentence, numbers={"decided": decided})


def accuracy_not_quality(model: str, accuracy: Interval, quality: Interval, *, even: float, prompts: int) -> Finding:
    """Are pairs ranked by the implicit reward while responses are no better than the reference's?

    `accuracy`: share of held-out pairs with a positive log-ratio gap, 1/2 for the reference itself. `quality`: a win
    rate or a reward difference, with the value `even` where nothing is gained.
    """
    ranks, gains = accuracy.low > 0.5, quality.low > even
    if ranks and quality.high <= even:
        verdict = SEEN
    else:
        verdict = NOT_SEEN if gains or accuracy.high <= 0.5 else _unknown(prompts)
    sentence = f"ranks {accuracy} of the pairs as they are labelled; quality is {quality}, even at {even:g}"
    numbers = {"accuracy": accuracy, "quality": quality}
    return Finding(name="accuracy_not_quality", model=model, verdict=verdict, sentence=sentence, numbers=numbers)


def _unknown(prompts: int) -> str:
    return f"cannot be told from {prompts} prompts"
