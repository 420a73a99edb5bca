"""Annotators whose mistakes are known: a score, and chance of a stated kind.

    deterministic    the larger score wins, equal scores tie
    noisy            as deterministic, but a winner is turned over with probability `flip`
    bradley_terry    P(a preferred to b) = sigmoid(scale (s_a - s_b)); never ties but on equal texts
    length_biased    P(a preferred to b) = sigmoid(scale (s_a - s_b) + bias (n_a - n_b) / (n_a + n_b)), n characters

Every draw is a function of annotator, seed, prompt and the two texts: the same question has the same answer in any
order, in any batch, on any day, and a swapped question the swapped answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from preftune.errors import ConfigError
from preftune.judges.contract import Comparison, Outcome, chance, flipped
from preftune.judges.scores import Scorer, score_all
from preftune.records import Judgement

__all__ = ["ANNOTATORS", "Annotator", "annotator"]


@dataclass(frozen=True)
class Annotator:
    """A judge that prefers one of two texts with a known probability, and keeps the scores to itself."""

    name: str
    score: Scorer
    seed: int
    probability: Callable[[float, float, int, int], float | None]
    """(score of a, of b, characters of a, of b) -> P(a preferred), None for a tie."""

    def __call__(self, comparisons: Sequence[Comparison], /) -> list[Judgement]:
        return [self._judgement(*scored) for scored in score_all(self.name, self.score, comparisons)]

    def _judgement(self, asked: Comparison, first: float, second: float) -> Judgement:
        has_scores = math.isfinite(first) and math.isfinite(second)
        return Judgement(
            prompt=asked.prompt,
            first=asked.first,
            second=asked.second,
            outcome=self._outcome(asked, first, second) if has_scores else "skip",
            judge=self.name,
            reason="" if has_scores else f"no score: {first:g} and {second:g}",
        )

    def _outcome(self, asked: Comparison, first: float, second: float) -> Outcome:
        a, b = asked.first.text, asked.second.text
        if a == b:
            return "tie"
        if a > b:  # one draw for the question, whichever way it is asked
            return flipped(self._outcome(asked.swapped(), second, first))
        preferred = self.probability(first, second, len(a), len(b))
        if preferred is None:
            return "tie"
        return "first" if chance(self.name, self.seed, asked.prompt, a, b) < preferred else "second"


def annotator(kind: str, knobs: Mapping[str, float], score: Scorer, *, name: str, seed: int) -> Annotator:
    """The annotator of a kind in `ANNOTATORS` with its knobs. Raises ConfigError on an unknown kind, knob or value."""
    if kind not in ANNOTATORS:
        raise ConfigError(f"simulated:{kind} is unknown; allowed: {', '.join(ANNOTATORS)}")
    make, known = ANNOTATORS[kind]
    for knob, value in knobs.items():
        if knob not in known:
            raise ConfigError(f"simulated:{kind} has no knob {knob}; it has: {', '.join(known) or 'none'}")
        low, high = _RANGES[knob]
        if not low <= value <= high:
            raise ConfigError(f"simulated:{kind}: {knob} must be in [{low:g}, {high:g}], not {value:g}")
    return Annotator(name, score, seed, make(**{**known, **knobs}))


_Probability = Callable[[float, float, int, int], float | None]
_RANGES = {"flip": (0.0, 1.0), "scale": (0.0, 1e6), "bias": (-1e6, 1e6)}


def _noisy(flip: float = 0.0) -> _Probability:
    return lambda s_a, s_b, n_a, n_b: None if s_a == s_b else 1 - flip if s_a > s_b else flip


def _bradley_terry(scale: float, bias: float = 0.0) -> _Probability:
    def probability(s_a: float, s_b: float, n_a: int, n_b: int) -> float:
        longer = (n_a - n_b) / max(1, n_a + n_b)
        return (1 + math.tanh((scale * (s_a - s_b) + bias * longer) / 2)) / 2  # the sigmoid, without overflow

    return probability


ANNOTATORS: Mapping[str, tuple[Callable[..., _Probability], Mapping[str, float]]] = {
    "deterministic": (_noisy, {}),
    "noisy": (_noisy, {"flip": 0.1}),
    "bradley_terry": (_bradley_terry, {"scale": 20.0}),
    "length_biased": (_bradley_terry, {"scale": 20.0, "bias": 5.0}),
}
"""Kind -> (how it decides, its knobs with their defaults)."""
