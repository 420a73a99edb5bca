"""What every judge must satisfy: one `Row` per judge, the same questions for all of them.

`check_judge` asks the judge directly and through `judged`, forwards and swapped, clean and with identities attached,
together and one by one, and compares the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from preftune.judges.contract import IDENTICAL, INCONSISTENT, Comparison, Judge, Outcome, blind, flipped, judged
from preftune.records import Judgement, Message, Response

TEXTS = (
    " very good, but the ending felt truly superb.",
    " awful.",
    ' {"rating": 5}',
    "",
    " good good good good good",
    " simply brilliant.",
    "  VERDICT: 2  ",
)
PROMPTS = (
    "For a thriller, the pacing was",
    (Message(role="user", content="Review the film. The plot was"), Message(role="assistant", content="Sure.")),
)


@dataclass(frozen=True)
class Row:
    """A judge and what may be expected of it."""

    name: str
    make: Callable[[], Judge]
    symmetric: bool = True
    """False for a judge that looks at the order: it is held to the contract through both orders."""
    decides: bool = True
    """False for a judge that can never name a winner."""


def comparisons() -> list[Comparison]:
    """Every ordered pair of different texts after every prompt."""
    return [
        Comparison(prompt=prompt, first=Response(text=a), second=Response(text=b), origin=f"samples.jsonl:{i}")
        for i, prompt in enumerate(PROMPTS)
        for a in TEXTS
        for b in TEXTS
        if a != b
    ]


def check_judge(row: Row) -> None:
    """Raises AssertionError, naming the judge, on the first thing that is not as it must be."""
    questions = comparisons()
    for check in (
        answers_each_question_once_in_order,
        swapping_swaps,
        equal_texts_tie,
        is_blind,
        repeats_itself,
        records_the_order,
        wins_only_from_both_sides,
    ):
        assert check(row, questions), f"{row.name}: {check.__name__} does not hold"


def answers_each_question_once_in_order(row: Row, questions: Sequence[Comparison]) -> bool:
    judge = row.make()
    answers = judge(questions)
    about = [(a.prompt, a.first.text, a.second.text) for a in answers]
    named = {a.judge for a in answers} == {judge.name} and judge([]) == []
    wins = {"first", "second"} & set(outcomes(answers))
    allowed = set(outcomes(answers)) <= set(get_args(Outcome))
    return named and allowed and bool(wins) == row.decides and about == texts(questions)


def swapping_swaps(row: Row, questions: Sequence[Comparison]) -> bool:
    if not row.symmetric:
        return True
    forth, back = row.make()(questions), row.make()([question.swapped() for question in questions])
    return outcomes(forth) == [flipped(outcome) for outcome in outcomes(back)]


def equal_texts_tie(row: Row, questions: Sequence[Comparison]) -> bool:
    same = [replace(question, second=question.first) for question in questions]
    verdicts = judged(row.make(), same, seed=0, orders="both") + judged(row.make(), same, seed=0, orders="random")
    unasked = all(not v.shown and v.judgement.outcome == "tie" and v.judgement.reason == IDENTICAL for v in verdicts)
    directly = set(outcomes(row.make()(same))) <= ({"tie", "skip", "both_bad"})
    return unasked and (directly or not row.symmetric)


def is_blind(row: Row, questions: Sequence[Comparison]) -> bool:
    named = [
        replace(
            question,
            first=replace(question.first, provenance="model=gpt-9 engine=secret", score=99.0, logp=-1.0),
            second=replace(question.second, provenance="model=ours", score=-99.0, logp=-2.0),
            origin="outputs-of-gpt-9.jsonl:1",
        )
        for question in questions
    ]
    for orders in ("random", "both"):
        clean = judged(row.make(), questions, seed=0, orders=orders)
        seen: list[Comparison] = []
        marked = judged(Watched(row.make(), seen), named, seed=0, orders=orders)
        if any(shown != blind(shown) for shown in seen):
            return False
        if outcomes(v.judgement for v in clean) != outcomes(v.judgement for v in marked):
            return False
        kept = {v.judgement.first.provenance for v in marked} | {v.judgement.second.provenance for v in marked}
        if kept != {"model=gpt-9 engine=secret", "model=ours"}:
            return False
    return outcomes(row.make()(questions)) == outcomes(row.make()(named))


def repeats_itself(row: Row, questions: Sequence[Comparison]) -> bool:
    judge = row.make()
    together = outcomes(judge(questions))
    alone = [outcomes(row.make()([question]))[0] for question in questions]
    turned = outcomes(row.make()(list(reversed(questions))))[::-1]
    return together == alone == turned == outcomes(judge(questions))


def records_the_order(row: Row, questions: Sequence[Comparison]) -> bool:
    seen: list[Comparison] = []
    judge = Watched(row.make(), seen)
    verdicts = judged(judge, questions, seed=3, orders="random")
    about = [(v.judgement.prompt, v.judgement.first.text, v.judgement.second.text) for v in verdicts]
    turned = sum(v.judgement.first.text != q.first.text for v, q in zip(verdicts, questions, strict=True))
    anew = judged(row.make(), [question.swapped() for question in questions], seed=3, orders="random")
    same = [v.judgement.outcome for v in verdicts] == [v.judgement.outcome for v in anew]
    return about == texts(seen) and turned == len(questions) // 2 and same and all(len(v.shown) == 1 for v in verdicts)


def wins_only_from_both_sides(row: Row, questions: Sequence[Comparison]) -> bool:
    for verdict, question in zip(judged(row.make(), questions, seed=0, orders="both"), questions, strict=True):
        one, other = verdict.shown
        if (one.first, other.first) != (question.first, question.second) and one.first.score is None:
            return False
        consistent = one.outcome == flipped(other.outcome)
        skipped = "skip" in (one.outcome, other.outcome)
        expected = one.outcome if consistent else "skip" if skipped else "tie"
        if verdict.judgement.outcome != expected:
            return False
        if (verdict.judgement.reason == INCONSISTENT) != (not consistent and not skipped):
            return False
    return True


class Watched:
    """A judge that also writes down what it is shown."""

    def __init__(self, judge: Judge, seen: list[Comparison]) -> None:
        self.name, self._judge, self._seen = judge.name, judge, seen

    def __call__(self, questions: Sequence[Comparison], /) -> list[Judgement]:
        self._seen += questions
        return self._judge(questions)


def outcomes(judgements: object) -> list[str]:
    return [judgement.outcome for judgement in judgements]  # type: ignore[attr-defined]


def texts(questions: Sequence[Comparison]) -> list[tuple[object, str, str]]:
    return [(question.prompt, question.first.text, question.second.text) for question in questions]
