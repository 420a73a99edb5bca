"""Blind comparisons in, judgements out: what every judge is, and how it is asked.

A judge sees a prompt and two texts: no model, no sampler, no file, no earlier score. It never sees which of the two
the caller named first either: `judged` shows them in an order drawn from their content, or in both orders. Nothing
here invents a winner: equal texts tie unasked, verdicts that turn with the order tie, an answer that cannot be had is a
skip with its reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from preftune.errors import RunError
from preftune.records import Judgement, Prompt, Response

__all__ = [
    "IDENTICAL",
    "INCONSISTENT",
    "Comparison",
    "Judge",
    "Orders",
    "Outcome",
    "Verdict",
    "blind",
    "chance",
    "flipped",
    "judged",
]

Outcome = Literal["first", "second", "tie", "both_bad", "skip"]
Orders = Literal["random", "both"]

IDENTICAL, INCONSISTENT = "identical", "inconsistent"
"""`reason` of a tie of equal texts, and of a tie because the verdict turned with the order."""

_FLIPPED: dict[Outcome, Outcome] = {"first": "second", "second": "first"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two responses to one prompt, to be compared."""

    prompt: Prompt
    first: Response
    second: Response
    origin: str = ""
    """Where the row stands; a judge is not told."""

    def swapped(self) -> Comparison:
        """The same question, the other way round."""
        return replace(self, first=self.second, second=self.first)


class Judge(Protocol):
    """One `Judgement` per comparison, in their order, of the two responses as they were shown.

    It may write its own score into the responses of a judgement (any unit, larger is better) and a reason.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, comparisons: Sequence[Comparison], /) -> list[Judgement]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one comparison."""

    judgement: Judgement
    """Asked once: in the order shown, so that order is recorded. Asked both ways: in the order of the comparison."""
    shown: tuple[Judgement, ...]
    """Everything the judge was asked about it and said, as shown: none (equal texts), one, or both orders."""


def blind(comparison: Comparison) -> Comparison:
    """What a judge may see: the prompt, the two texts, and whether they are finished."""
    first, second = (Response(text=r.text, finished=r.finished) for r in (comparison.first, comparison.second))
    return Comparison(prompt=comparison.prompt, first=first, second=second)


def chance(*content: object) -> float:
    """A number in [0, 1), the same wherever and whenever the same content is drawn for."""
    return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:7]) / 2**56


def flipped(outcome: Outcome) -> Outcome:
    """The outcome of the same judgement when first and second change places."""
    return _FLIPPED.get(outcome, outcome)


def judged(judge: Judge, comparisons: Sequence[Comparison], *, seed: int, orders: Orders) -> list[Verdict]:
    """One verdict per comparison, in their order; the judge is asked blind and at most twice about each.

    `orders="random"` shows either response first, by a coin that depends on seed, prompt and texts alone.
    `orders="both"` asks both ways; a win counts when both say so, an answer that changes is a tie (`INCONSISTENT`),
    and a skip of either is a skip. Equal texts tie without being shown. Raises RunError when the judge answers
    something else than it was asked.
    """
    asked: list[Comparison] = []
    places: list[slice] = []
    for comparison in comparisons:
        start = len(asked)
        if comparison.first.text != comparison.second.text:
            turned = _turned(comparison, seed)
            asked += [turned] if orders == "random" else [comparison, comparison.swapped()]
        places.append(slice(start, len(asked)))
    answers = judge([blind(comparison) for comparison in asked]) if asked else []
    _check(judge, asked, answers)
    shown = [_restored(question, answer) for question, answer in zip(asked, answers, strict=True)]
    return [
        _verdict(judge.name, comparison, tuple(shown[place]))
        for comparison, place in zip(comparisons, places, strict=True)
    ]


def _turned(comparison: Comparison, seed: int) -> Comparison:
    texts = sorted((comparison.first.text, comparison.second.text))
    shown_first = texts[int(chance("order", seed, comparison.prompt, *texts) < 0.5)]
    return comparison if comparison.first.text == shown_first else comparison.swapped()


def _check(judge: Judge, asked: Sequence[Comparison], answers: Sequence[Judgement]) -> None:
    if len(answers) != len(asked):
        raise RunError(
            f"judge {judge.name} gave {len(answers)} judgements on {len(asked)} comparisons; one each is needed"
        )
    for i, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        texts = (answer.prompt, answer.first.text, answer.second.text)
        if texts != (question.prompt, question.first.text, question.second.text):
            raise RunError(f"judge {judge.name}: judgement {i} is not about comparison {i} as it was shown")


def _restored(question: Comparison, answer: Judgement) -> Judgement:
    """The judgement with the responses as they were before blinding; a score is the judge's own or none."""
    return replace(
        answer,
        first=replace(question.first, score=answer.first.score),
        second=replace(question.second, score=answer.second.score),
        origin=question.origin,
    )


def _verdict(name: str, comparison: Comparison, shown: tuple[Judgement, ...]) -> Verdict:
    if not shown:
        tie = Judgement(
            prompt=comparison.prompt,
            first=replace(comparison.first, score=None),
            second=replace(comparison.second, score=None),
            outcome="tie",
            judge=name,
            origin=comparison.origin,
            reason=IDENTICAL,
        )
        return Verdict(tie, ())
    if len(shown) == 1:
        return Verdict(shown[0], shown)
    one, other = shown
    if one.outcome == flipped(other.outcome):
        return Verdict(one, shown)
    skipped = next((answer for answer in shown if answer.outcome == "skip"), None)
    if skipped is not None:
        return Verdict(replace(one, outcome="skip", reason=skipped.reason), shown)
    return Verdict(replace(one, outcome="tie", reason=INCONSISTENT), shown)
