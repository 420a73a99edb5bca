"""Win rate at equal length: what is left of a preference when neither response is longer. No torch.

    logit P(first preferred) = theta + gamma tanh(d / s),    d = length of the first - length of the second,
    win rate at equal length = 1 / (1 + exp(-theta)),        s = standard deviation of d

AlpacaEval 2's length control (2404.04475) without its difficulty of instructions, which exists for its own
prompts only, and with the uncertainty of the whole fit, which its standard error leaves out. Ties are outcomes of one
half. Both terms carry a normal prior of standard deviation PRIOR: nothing where data speak, a bound where they cannot
(separable data). It is antisymmetric: with the models exchanged theta and gamma change sign.

What it cannot do: a model all of whose responses are longer by about the same is compared at a difference never seen;
the interval then is wide. And length may be wanted: this is a second number beside the win rate, not a better one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from preftune.equations.resampling import Floats, resampled
from preftune.equations.stats import Interval, mean_interval, share
from preftune.errors import DataError
from preftune.evaluation.win_rate import Match, between, scores

__all__ = ["LengthControlled", "length_controlled", "length_effect_fit", "length_win_rate"]

PRIOR = 4.0
"""Standard deviation of both terms' prior, in logits: four is a win rate of 98 %."""
POINTS = 0.10


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthControlled:
    """The win rate at equal length beside the one that was observed."""

    one: str
    other: str
    rate: Interval
    """At equal length: percentile interval of the bootstrap over prompts of the whole fit, s included."""
    raw: Interval
    """As observed: `stats.share`, clustered by prompt."""
    length_effect: Interval
    """gamma, in logits: above 0 the longer response is preferred. Bootstrap as `rate`."""
    longer_by: Interval
    """Mean of d in the unit of the lengths."""
    warnings: tuple[str, ...]
    """What a reader must know, one sentence each."""


def length_effect_fit(scores: ArrayLike, longer_by: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """(theta, gamma) [R, 2] of scores in [0, 1] on length differences, both [N], one fit per row of weights [R, N].

    The maximum of the posterior, by Newton's method; s is the weighted standard deviation of each row (0 is read as no
    difference in length at all). Default: one row of ones.
    """
    score_N, longer_N = np.asarray(scores, np.float64), np.asarray(longer_by, np.float64)
    weights_RN = np.ones((1, len(score_N))) if weights is None else np.asarray(weights, np.float64)
    n_R1 = weights_RN.sum(1, keepdims=True)
    mean_R1 = (weights_RN @ longer_N)[:, None] / n_R1
    s_R1 = np.sqrt((weights_RN * (longer_N - mean_R1) ** 2).sum(1, keepdims=True) / n_R1)
    x_RN = np.tanh(np.divide(longer_N, s_R1, out=np.zeros_like(weights_RN), where=s_R1 > 1e-12))
    fit_R2, precision = np.zeros((len(weights_RN), 2)), 1 / PRIOR**2
    for _ in range(50):
        p_RN = _sigmoid(fit_R2[:, :1] + fit_R2[:, 1:] * x_RN)
        pull_RN = weights_RN * (score_N - p_RN)
        curve_RN = weights_RN * p_RN * (1 - p_RN)
        g0, g1 = pull_RN.sum(1) - precision * fit_R2[:, 0], (pull_RN * x_RN).sum(1) - precision * fit_R2[:, 1]
        h00, h01 = curve_RN.sum(1) + precision, (curve_RN * x_RN).sum(1)
        h11 = (curve_RN * x_RN**2).sum(1) + precision
        determinant = h00 * h11 - h01**2
        step_R2 = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / determinant[:, None]
        # A bounded step: Newton's own may leap where the sigmoid is flat.
        size_R1 = np.abs(step_R2).max(1, keepdims=True)
        fit_R2 += step_R2 / np.maximum(1, size_R1)
        if size_R1.max() < 1e-10:
            break
    return fit_R2


def length_win_rate(
    scores: ArrayLike,
    longer_by: ArrayLike,
    level: float = 0.95,
    *,
    clusters: Sequence[object] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Interval, Interval]:
    """(win rate at equal length, length effect) from scores in [0, 1] and length differences, both [N].

    Raises ValueError on no value, lengths that differ, values that are not finite, or scores outside [0, 1].
    """
    score_N, longer_N = np.asarray(scores, np.float64), np.asarray(longer_by, np.float64)
    if not len(score_N) or len(score_N) != len(longer_N) or not np.isfinite([score_N, longer_N]).all():
        raise ValueError("length control needs as many finite length differences as scores, and at least one")
    if score_N.min() < 0 or score_N.max() > 1:
        raise ValueError("scores lie in [0, 1]")
    fit_2 = length_effect_fit(score_N, longer_N)[0]
    drawn_R2 = resampled(
        lambda weights_RN: length_effect_fit(score_N, longer_N, weights_RN),
        len(score_N),
        clusters=clusters,
        resamples=resamples,
        seed=seed,
    )
    (theta_low, gamma_low), (theta_high, gamma_high) = np.quantile(drawn_R2, ((1 - level) / 2, (1 + level) / 2), axis=0)
    rate, low, high = _sigmoid(np.array([fit_2[0], theta_low, theta_high])).tolist()
    effect = Interval(float(fit_2[1]), float(gamma_low), float(gamma_high), len(score_N))
    return Interval(rate, low, high, len(score_N)), effect


def length_controlled(
    found: Iterable[Match], one: str, other: str, level: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> LengthControlled:
    """`one` against `other` at equal length, from all verdicts but skips. Raises DataError where there is none."""
    score_N, prompts, longer_N = scores(between(found, one, other))
    if not len(score_N):
        raise DataError(f"every verdict on {one} against {other} is a skip: nothing to fit")
    rate, effect = length_win_rate(score_N, longer_N, level, clusters=prompts, resamples=resamples, seed=seed)
    raw = share(score_N, level, clusters=prompts)
    longer = mean_interval(longer_N, level, clusters=prompts)
    return LengthControlled(
        one=one,
        other=other,
        rate=rate,
        raw=raw,
        length_effect=effect,
        longer_by=longer,
        warnings=tuple(_warnings(one, rate, raw, score_N, longer_N)),
    )


def _warnings(one: str, rate: Interval, raw: Interval, score_N: Floats, longer_N: Floats) -> Iterable[str]:
    if abs(rate.estimate - raw.estimate) > POINTS:
        longer = "longer" if longer_N.mean() > 0 else "shorter"
        yield (
            f"the win rate of {one} is {100 * raw.estimate:.1f} % as observed and {100 * rate.estimate:.1f} % at equal "
            f"length: its responses are {longer} by {abs(longer_N.mean()):.3g} on average, and length explains much "
            "of the difference"
        )
    if len(score_N) > 1 and longer_N.std() == 0 and longer_N[0] != 0:
        yield (
            f"all responses of {one} differ by the same length ({longer_N[0]:g}): the effect of length cannot be told "
            "from that of the model, and the number at equal length is the observed one"
        )
    if _separable(score_N, longer_N):
        yield (
            "model and length together decide every verdict (the data are separable): without its prior of "
            f"{PRIOR:g} logits the fit would be infinite; read the number as a bound"
        )
    if len(score_N) < 50:
        yield f"{len(score_N)} verdicts are few for a fit of two terms; from about 50 its interval covers as it says"


def _separable(score_N: Floats, longer_N: Floats) -> bool:
    """Whether some threshold of the length difference has all wins on one side and all losses on the other."""
    won, lost = longer_N[score_N > 0], longer_N[score_N < 1]
    if not len(won) or not len(lost):
        return True
    return longer_N.min() < longer_N.max() and bool(lost.max() <= won.min() or won.max() <= lost.min())


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
