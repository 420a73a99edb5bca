"""Samples -> the comparisons a judge is asked, and verdicts -> rows to train on; everything is counted on the way."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from preftune.data.ranking import pair_positions, ranks_from_pairs
from preftune.data.sources import open_source
from preftune.errors import DataError
from preftune.judges.contract import IDENTICAL, INCONSISTENT, Comparison, Verdict
from preftune.judges.llm import FAILED, UNPARSABLE
from preftune.records import Judgement, Message, Prompt, RankedResponses, Refusal, Response, SampledResponses, from_json

__all__ = [
    "Question",
    "category",
    "is_samples",
    "pair_rows",
    "questions",
    "ranking_rows",
    "read_rankings",
    "read_samples",
    "scored_rows",
    "tally",
]

STATED = "the data's own labels"
"""The annotator of a preference file that names none."""


@dataclass(frozen=True)
class Question:
    """One prompt with what is compared: every two responses that could be trained on."""

    prompt: Prompt
    responses: tuple[Response, ...]
    """Finished and not empty."""
    comparisons: tuple[Comparison, ...]
    left_out: Counter[str]
    """Comparisons that are not asked, by reason: `empty`, `unfinished`."""
    stated: tuple[Judgement, ...]
    """What the data itself says about them, of preference data."""


def read_samples(name: str) -> tuple[list[SampledResponses | RankedResponses], str]:
    """(rows, SHA-256) of a file of `preftune sample`, or of preference data in any layout. Raises DataError."""
    path = Path(name)
    if path.is_file() and is_samples(path):
        content = path.read_bytes()
        return list(_sampled(content, name)), hashlib.sha256(content).hexdigest()
    rows, refusals, digest = read_rankings(name)
    if refusals:
        more = f" (and {len(refusals) - 1} more)" * (len(refusals) > 1)
        raise DataError(f"{refusals[0]}{more}; nothing was labelled, mend the row or take it out")
    return [*rows], digest


def read_rankings(name: str) -> tuple[list[RankedResponses], list[Refusal], str]:
    """(rows, refused rows, SHA-256) of preference data. Raises DataError on data without anything to compare."""
    source = open_source(name, kind="preferences")
    rows: list[RankedResponses] = []
    refusals: list[Refusal] = []
    for item in source:
        if isinstance(item, Refusal):
            refusals.append(item)
        elif isinstance(item, RankedResponses):
            rows.append(item)
        else:
            raise DataError(f"{item.origin}: holds one response, there is nothing to compare it with")
    return rows, refusals, source.sha256


def is_samples(path: Path) -> bool:
    """Whether a file is one of `preftune sample`, by its first line."""
    with path.open("rb") as file:
        return re.match(rb'\s*\{\s*"type":\s*"SampledResponses"', file.read(200)) is not None


def _sampled(content: bytes, name: str) -> Iterator[SampledResponses]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = from_json(line.decode())
            if not isinstance(row, SampledResponses):
                raise ValueError(f"a {type(row).__name__} stands between samples")
        except (ValueError, TypeError, AttributeError) as problem:
            raise DataError(
                f"{name}:{number}: no line of samples ({problem}); run preftune sample to its end"
            ) from None
        yield row


def questions(rows: Sequence[SampledResponses | RankedResponses], name: str) -> list[Question]:
    """What is asked about each row: K (K - 1) / 2 comparisons, less those with an answer nobody could train on."""
    found = []
    for number, row in enumerate(rows, start=1):
        origin = row.origin if isinstance(row, RankedResponses) else f"{name}:{number}"
        kinds = [_unfit(response) for response in row.responses]
        left_out = Counter(kinds[i] or kinds[j] for i, j in combinations(range(len(kinds)), 2) if kinds[i] or kinds[j])
        fit = tuple(response for response, kind in zip(row.responses, kinds, strict=True) if not kind)
        asked = tuple(
            Comparison(prompt=row.prompt, first=one, second=other, origin=origin) for one, other in combinations(fit, 2)
        )
        stated = _stated(row, origin) if isinstance(row, RankedResponses) else ()
        found.append(Question(row.prompt, fit, asked, left_out, stated))
    return found


def _unfit(response: Response) -> str:
    return "empty" if not response.text.strip() else "" if response.finished else "unfinished"


def _stated(row: RankedResponses, origin: str) -> tuple[Judgement, ...]:
    """What the row says: its pairs, and a tie of every two responses of one rank when it states no pairs."""
    said = [(chosen, rejected, "first") for chosen, rejected in pair_positions(row)]
    if row.pairs is None:
        ties = combinations(range(len(row.ranks)), 2)
        said += [(i, j, "tie") for i, j in ties if row.ranks[i] == row.ranks[j]]
    judge = row.annotator or STATED
    return tuple(
        Judgement(
            prompt=row.prompt,
            first=row.responses[i],
            second=row.responses[j],
            outcome="first" if outcome == "first" else "tie",
            judge=judge,
            origin=origin,
        )
        for i, j, outcome in said
    )


def category(judgement: Judgement) -> str:
    """What became of a comparison: `pair`, or why there is none."""
    if judgement.outcome in ("first", "second"):
        return "pair"
    told = {IDENTICAL, INCONSISTENT} if judgement.outcome == "tie" else {UNPARSABLE, FAILED}
    reason = judgement.reason.partition(":")[0]
    return reason if reason in told else judgement.outcome


def tally(judgements: Sequence[Judgement]) -> dict[str, int]:
    """One judge's comparisons by what became of them; a winner it named before, of equal texts, is `repeated`."""
    counts = Counter(category(judgement) for judgement in judgements)
    distinct = len(_winners(judgements))
    repeated = counts["pair"] - distinct
    return {**counts, "pair": distinct} | ({"repeated": repeated} if repeated else {})


def pair_rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The winners in TRL's layout with annotator and weight: the pairs of one prompt weigh 1 together."""
    winners = _winners(judgements)
    pairs_of = Counter(prompt for prompt, _, _, _ in winners)
    rows = []
    for (prompt, _, _, judge), (chosen, rejected) in winners.items():
        row = {
            "prompt": _prompt(prompt),
            "chosen": _completion(prompt, chosen.text),
            "rejected": _completion(prompt, rejected.text),
            "weight": 1 / pairs_of[prompt],
            "annotator": judge,
        }
        if chosen.score is not None and rejected.score is not None:
            row |= {"score_chosen": chosen.score, "score_rejected": rejected.score}
        rows.append(row)
    return rows


def _winners(judgements: Sequence[Judgement]) -> dict[tuple[Prompt, str, str, str], tuple[Response, Response]]:
    """(prompt, text of the winner, of the loser, judge) -> (winner, loser), each said once."""
    found: dict[tuple[Prompt, str, str, str], tuple[Response, Response]] = {}
    for said in judgements:
        if said.outcome in ("first", "second"):
            won, lost = (said.first, said.second) if said.outcome == "first" else (said.second, said.first)
            found.setdefault((said.prompt, won.text, lost.text, said.judge), (won, lost))
    return found


def ranking_rows(
    asked: Sequence[Question], verdicts: Sequence[Sequence[Verdict]]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(rankings of K > 2 responses by comparisons won less lost, ties allowed; what became of each prompt).

    `verdicts` holds, per judge, the verdicts on the comparisons of `asked` in their order. The pairs of one prompt
    weigh 1 together. `incomplete`: a comparison without a verdict would push its responses down; `no order`: all tie,
    or the verdicts go in a circle.
    """
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    pairs_of: Counter[Prompt] = Counter()
    owners: list[Prompt] = []
    for of_judge in verdicts:
        left = iter(of_judge)
        for question in asked:
            said = [next(left).judgement for _ in question.comparisons]
            if len(question.responses) < 3:
                continue
            ranks = _ranks(question, said)
            unanswered = any(judgement.outcome == "skip" for judgement in said)
            result = "incomplete" if unanswered else "no order" if max(ranks) == 1 else "ranking"
            counts[result] += 1
            if result != "ranking":
                continue
            pairs_of[question.prompt] += sum(one != other for one, other in combinations(ranks, 2))
            owners.append(question.prompt)
            texts = [_completion(question.prompt, response.text) for response in question.responses]
            row = {"prompt": _prompt(question.prompt), "responses": texts, "ranking": list(ranks)}
            rows.append(row | {"annotator": said[0].judge})
    weighted = [row | {"weight": 1 / pairs_of[prompt]} for row, prompt in zip(rows, owners, strict=True)]
    return weighted, counts


def _ranks(question: Question, said: Sequence[Judgement]) -> tuple[int, ...]:
    k = len(question.responses)
    won: list[tuple[int, int]] = []
    for (i, j), comparison, judgement in zip(combinations(range(k), 2), question.comparisons, said, strict=True):
        if judgement.outcome in ("first", "second"):
            as_asked = judgement.first.text == comparison.first.text
            won.append((i, j) if (judgement.outcome == "first") == as_asked else (j, i))
    return ranks_from_pairs(k, won)


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [_message(message) for message in prompt]


def _completion(prompt: Prompt, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _message(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def scored_rows(
    rows: Sequence[SampledResponses | RankedResponses], said: Sequence[Judgement]
) -> list[SampledResponses]:
    """The samples with the scores that these judgements state, none where a response has none; order kept.

    What the labelling page needs to ask about close calls first. Rows that are no samples are left out.
    """
    scores = {(j.prompt, side.text): side.score for j in said for side in (j.first, j.second)}
    return [
        replace(row, responses=tuple(replace(r, score=scores.get((row.prompt, r.text))) for r in row.responses))
        for row in rows
        if isinstance(row, SampledResponses)
    ]
