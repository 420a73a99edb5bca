"""How often one model's responses are preferred to another's: (wins + ties / 2) / (wins + ties + losses). No torch.

A judgement knows two responses, not two models: `matches` names the model behind each by its provenance. Both bad is a
tie: neither is preferred. A skip is no verdict: it is counted and left out. Verdicts on one prompt, of several samples
or several judges, are not independent: intervals are over prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from preftune.equations.resampling import weighted_mean
from preftune.equations.stats import Interval, bootstrap, mean_interval, paired_bootstrap, share, wilson
from preftune.errors import DataError
from preftune.records import Judgement, Prompt, Response

__all__ = ["Match", "WinRate", "between", "characters", "matches", "scores", "win_rate", "win_rates", "written_by"]

Outcome = Literal["first", "second", "tie", "both_bad", "skip"]
SCORES: dict[Outcome, float] = {"first": 1.0, "second": 0.0, "tie": 0.5, "both_bad": 0.5, "skip": math.nan}
_TURNED: dict[Outcome, Outcome] = {"first": "second", "second": "first"}
NOTHING = Interval(math.nan, math.nan, math.nan, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """One verdict between two models: what ratings and rates are computed from."""

    prompt: Prompt
    judge: str
    first: str
    """The model whose response is called first here; `shown_first` tells whether the judge saw it first."""
    second: str
    outcome: Outcome
    first_length: int
    second_length: int
    shown_first: bool = True

    def turned(self) -> Match:
        """The same verdict with the models in the other order."""
        return Match(
            prompt=self.prompt,
            judge=self.judge,
            first=self.second,
            second=self.first,
            outcome=_TURNED.get(self.outcome, self.outcome),
            first_length=self.second_length,
            second_length=self.first_length,
            shown_first=not self.shown_first,
        )

    @property
    def score(self) -> float:
        """Of the first model: 1, 0, one half for a tie or both bad, NaN for a skip."""
        return SCORES[self.outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """Model `one` against model `other`, as one judge or all of them see it; intervals are 95 % unless asked."""

    one: str
    other: str
    judges: tuple[str, ...]
    prompts: int
    """Different prompts with a verdict: what the intervals are over."""
    wins: int
    ties: int
    losses: int
    both_bad: int
    """Counted as ties in the rate, and not among `ties`."""
    skips: int
    """In no rate."""
    rate: Interval
    """Share of verdicts won, ties as half, with `stats.share`'s interval clustered by prompt. To be quoted."""
    wilson: Interval
    """The same with Wilson's interval, which takes verdicts as independent and ties as coins: too wide with ties,
    too narrow with several verdicts per prompt."""
    bootstrap: Interval
    """The same with the percentile interval of the paired bootstrap over prompts."""
    one_length: Interval
    """Mean length of the responses of `one` in the unit of `matches`, characters by default."""
    other_length: Interval
    when_first: Interval
    """The rate where the response of `one` was shown first; `n` is 0 where it never was."""
    when_second: Interval
    position: Interval
    """What being shown first wins: the mean of `when_first` and 1 - `when_second`, 1/2 for a judge without position
    bias, bootstrap over prompts; NaN unless both orders were shown."""


def characters(response: Response) -> int:
    """The length of a response that every model shares."""
    return len(response.text)


def written_by(response: Response) -> str:
    """The model a response's provenance names: its word `model=NAME`, else all of it."""
    named = [word.removeprefix("model=") for word in response.provenance.split() if word.startswith("model=")]
    return named[0] if named else response.provenance


def matches(
    judgements: Iterable[Judgement],
    *,
    model_of: Callable[[Response], str] = written_by,
    length: Callable[[Response], int] = characters,
) -> list[Match]:
    """Judgements as verdicts between named models, in their order. Raises DataError where no model can be named."""
    found = []
    for judgement in judgements:
        first, second = model_of(judgement.first), model_of(judgement.second)
        if not first or not second:
            raise DataError(
                f"{judgement.origin or 'a judgement'}: a response does not say which model wrote it; its provenance "
                "should hold model=NAME"
            )
        found.append(
            Match(
                prompt=judgement.prompt,
                judge=judgement.judge,
                first=first,
                second=second,
                outcome=judgement.outcome,
                first_length=length(judgement.first),
                second_length=length(judgement.second),
            )
        )
    return found


def between(found: Iterable[Match], one: str, other: str) -> list[Match]:
    """The verdicts on `one` and `other`, turned so that `one` is first. Raises DataError where there is none."""
    every = list(found)
    if one == other:
        raise DataError(f"a win rate needs two models, not {one} twice; give their responses different names")
    chosen = [
        match if match.first == one else match.turned()
        for match in every
        if {match.first, match.second} == {one, other}
    ]
    if not chosen:
        compared = sorted({" against ".join(sorted((match.first, match.second))) for match in every})
        raise DataError(f"nothing compares {one} with {other}; found: {', '.join(compared) or 'no judgement'}")
    return chosen


def scores(found: Sequence[Match]) -> tuple[NDArray[np.float64], list[Prompt], NDArray[np.float64]]:
    """(score of the first model [N], prompt of each, first length minus second [N]) of the verdicts, skips left out."""
    said = [match for match in found if match.outcome != "skip"]
    score_N = np.array([match.score for match in said], dtype=np.float64)
    longer_N = np.array([match.first_length - match.second_length for match in said], dtype=np.float64)
    return score_N, [match.prompt for match in said], longer_N


def win_rate(
    found: Iterable[Match], one: str, other: str, level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> WinRate:
    """All verdicts on `one` and `other`, of whatever judge. Raises DataError where there is none.

    Only skips leave a win rate without value (NaN, n = 0).
    """
    chosen = between(found, one, other)
    outcomes = [match.outcome for match in chosen]
    said = [match for match in chosen if match.outcome != "skip"]
    score_N, prompts, _ = scores(chosen)
    drawn = NOTHING
    if said:
        drawn = paired_bootstrap(score_N, 0 * score_N, level, clusters=prompts, resamples=resamples, seed=seed)
    return WinRate(
        one=one,
        other=other,
        judges=tuple(dict.fromkeys(match.judge for match in chosen)),
        prompts=len(set(prompts)),
        wins=outcomes.count("first"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("second"),
        both_bad=outcomes.count("both_bad"),
        skips=outcomes.count("skip"),
        rate=share(score_N, level, clusters=prompts) if said else NOTHING,
        wilson=wilson(float(score_N.sum()), len(said), level) if said else NOTHING,
        bootstrap=drawn,
        one_length=_lengths([match.first_length for match in said], prompts, level),
        other_length=_lengths([match.second_length for match in said], prompts, level),
        when_first=_share([match for match in said if match.shown_first], level),
        when_second=_share([match for match in said if not match.shown_first], level),
        position=_position(said, level, resamples, seed),
    )


def win_rates(
    found: Iterable[Match], one: str, other: str, level: float = 0.95, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, WinRate]:
    """The same per judge, in the order of their first verdict. Raises DataError where there is none."""
    chosen = between(found, one, other)
    return {
        judge: win_rate(
            (match for match in chosen if match.judge == judge), one, other, level, resamples=resamples, seed=seed
        )
        for judge in dict.fromkeys(match.judge for match in chosen)
    }


def _lengths(lengths: Sequence[int], prompts: Sequence[Prompt], level: float) -> Interval:
    return mean_interval(lengths, level, clusters=prompts) if lengths else NOTHING


def _share(said: Sequence[Match], level: float) -> Interval:
    if not said:
        return NOTHING
    return share([match.score for match in said], level, clusters=[match.prompt for match in said])


def _position(said: Sequence[Match], level: float, resamples: int, seed: int) -> Interval:
    first_N = np.array([match.shown_first for match in said], dtype=bool)
    if first_N.all() or not first_N.any():
        return Interval(math.nan, math.nan, math.nan, len(said))
    shown_first_won_N = np.array([match.score if match.shown_first else 1 - match.score for match in said])
    sides = [weighted_mean(np.stack([shown_first_won_N * side, side], axis=1)) for side in (first_N, ~first_N)]
    return bootstrap(
        lambda weights_RN: (sides[0](weights_RN) + sides[1](weights_RN)) / 2,
        len(said),
        level,
        clusters=[match.prompt for match in said],
        resamples=resamples,
        seed=seed,
    )
