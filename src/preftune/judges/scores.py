"""A judge from a score: the larger score wins, equal scores tie, a score that is no number decides nothing.

The score may be a rule's, an embedded world's reward or a reward model's. It sees one prompt and one response at a
time, so such a judge has no order and no position bias. Scorers that need a model are passed in by the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from preftune.errors import RunError
from preftune.judges.contract import Comparison, Outcome
from preftune.records import Judgement, Prompt, Response

__all__ = ["ScoreJudge", "Scorer", "score_all", "scorer"]

Scorer = Callable[[Sequence[tuple[Prompt, Response]]], list[float]]
"""(prompt, response) -> score, any unit, larger is better; NaN where there is none."""


@dataclass(frozen=True)
class ScoreJudge:
    """Larger score wins, equal scores tie; with a NaN on either side the comparison is skipped."""

    name: str
    score: Scorer

    def __call__(self, comparisons: Sequence[Comparison], /) -> list[Judgement]:
        return [
            Judgement(
                prompt=comparison.prompt,
                first=replace(comparison.first, score=first if math.isfinite(first) else None),
                second=replace(comparison.second, score=second if math.isfinite(second) else None),
                outcome=_outcome(first, second),
                judge=self.name,
                reason=f"no score: {first:g} and {second:g}" if math.isnan(first) or math.isnan(second) else "",
            )
            for comparison, first, second in score_all(self.name, self.score, comparisons)
        ]


def score_all(name: str, score: Scorer, comparisons: Sequence[Comparison]) -> list[tuple[Comparison, float, float]]:
    """(comparison, score of first, score of second); every response of a prompt is scored once.

    Raises RunError when the scorer returns another number of scores than it was asked for.
    """
    sides = [(c.prompt, side) for c in comparisons for side in (c.first, c.second)]
    places = {question: i for i, question in enumerate(dict.fromkeys(sides))}
    scores = score(list(places)) if places else []
    if len(scores) != len(places):
        raise RunError(f"judge {name}: {len(scores)} scores for {len(places)} responses; one each is needed")
    values = [float(scores[places[side]]) for side in sides]
    return list(zip(comparisons, values[::2], values[1::2], strict=True))


def scorer(function: Callable[[Prompt, str], float]) -> Scorer:
    """A scorer of many from the score of one (prompt, text)."""
    return lambda asked: [function(prompt, response.text) for prompt, response in asked]


def _outcome(first: float, second: float) -> Outcome:
    if math.isnan(first) or math.isnan(second):
        return "skip"
    return "first" if first > second else "second" if second > first else "tie"
