"""Exports are pure functions of a store's history: the same snapshot gives the same bytes, on every database.

    pairs       prompt, chosen, rejected, weight, annotator                 read by `preftune dpo`, TRL
    unpaired    prompt, completion, label, weight, annotator                best and worst; both bad: all of them
    rankings    prompt, responses, ranking, weight, annotator               for listwise losses
    judgements  `Judgement` per line: every two responses, in the order shown
    history     everything; `imports.read_history` and `Store.restore` make an equal store of it

A prompt counts once: with L labels of a prompt that give rows, n of them from one label, each row weighs 1 / (L n),
so the k (k - 1) / 2 pairs of one ranking weigh 1 together. Gold items check annotators and appear in `history` only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, Literal

from preftune.data.ranking import pair_positions
from preftune.judges.agreement import Agreement, agreement
from preftune.records import Judgement, Prompt, RankedResponses, Response, to_json
from preftune.web.labels import Answer, Item, Loan, Snapshot, item_to_json, standing

__all__ = ["HISTORY_VERSION", "KINDS", "Counts", "Kind", "count", "export", "judgements", "snapshot_agreement"]

Kind = Literal["pairs", "unpaired", "rankings", "judgements", "history"]
HISTORY_VERSION = 1

Label = tuple[Item, Loan, Answer]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a history holds; everything but `gold_*` is about items that are no gold."""

    items: int
    labels: int
    """Current answers, skips left out."""
    annotators: int
    ties: int
    """Rankings in which all responses tie: they give no pair."""
    both_bad: int
    skips: int
    revisions: int
    undone: int
    pairs: int
    gold_items: int
    gold_answers: int


def export(snapshot: Snapshot, kind: Kind) -> str:
    """The lines of one kind, each with its line feed."""
    return "".join(f"{line}\n" for line in KINDS[kind](snapshot))


def count(snapshot: Snapshot) -> Counts:
    """The counts of a history."""
    labels, gold = _labels(snapshot), len(_answers(snapshot))
    answers = [answer for _, _, answer in labels]
    kinds = [answer.kind for answer in answers]
    return Counts(
        items=sum(item.gold is None for item in snapshot.items),
        labels=len(kinds) - kinds.count("skip"),
        annotators=len({loan.annotator for _, loan, _ in labels}),
        ties=sum(answer.kind == "ranking" and set(answer.ranks) == {1} for answer in answers),
        both_bad=kinds.count("both_bad"),
        skips=kinds.count("skip"),
        revisions=sum(event.kind == "revise" for event in snapshot.events),
        undone=sum(event.kind == "undo" for event in snapshot.events),
        pairs=sum(len(_pairs_of(label)) for label in labels),
        gold_items=sum(item.gold is not None for item in snapshot.items),
        gold_answers=gold - len(labels),
    )


def judgements(snapshot: Snapshot) -> Iterator[Judgement]:
    """Every two responses of every answer, first the one shown first: what agreement and position bias are told by."""
    for item, loan, answer in _labels(snapshot):
        for first, second in combinations(loan.order, 2):
            yield Judgement(
                prompt=item.prompt,
                first=item.responses[first],
                second=item.responses[second],
                outcome=_outcome(answer, first, second),
                judge=loan.annotator,
                origin=item.origin,
                strength=answer.strength,
                reason=answer.reason,
            )


def snapshot_agreement(snapshot: Snapshot) -> Agreement:
    """How far the annotators agree, and what sways them; gold items left out."""
    return agreement(list(judgements(snapshot)))


def _outcome(answer: Answer, first: int, second: int) -> Literal["first", "second", "tie", "both_bad", "skip"]:
    if answer.kind != "ranking":
        return answer.kind
    one, other = answer.ranks[first], answer.ranks[second]
    return "tie" if one == other else "first" if one < other else "second"


def _answers(snapshot: Snapshot) -> list[Label]:
    stands = standing(snapshot.events)
    answered = [(loan, stands[loan.id].answer) for loan in snapshot.loans if loan.id in stands]
    labels = [(snapshot.items[loan.item - 1], loan, answer) for loan, answer in answered if answer is not None]
    return sorted(labels, key=lambda label: (label[1].item, label[1].id))


def _labels(snapshot: Snapshot) -> list[Label]:
    """(item, loan, current answer) by item and task, gold items left out."""
    return [label for label in _answers(snapshot) if label[0].gold is None]


def _weighed(snapshot: Snapshot, rows_of: Callable[[Label], list[Row]]) -> Iterator[str]:
    """The rows of all labels as JSON, weighed so that a prompt counts once, with their annotator."""
    of_labels = [(label, rows) for label in _labels(snapshot) if (rows := rows_of(label))]
    labels_of: dict[Prompt, int] = {}
    for (item, _, _), _ in of_labels:
        labels_of[item.prompt] = labels_of.get(item.prompt, 0) + 1
    for (item, loan, _), rows in of_labels:
        weight = 1 / (labels_of[item.prompt] * len(rows))
        for row in rows:
            line = {"prompt": _prompt(item.prompt), **row, "weight": weight, "annotator": loan.annotator}
            yield json.dumps(line)


def _pairs_of(label: Label) -> tuple[tuple[int, int], ...]:
    item, _, answer = label
    if answer.kind != "ranking":
        return ()
    return pair_positions(RankedResponses(prompt=item.prompt, responses=item.responses, ranks=answer.ranks))


def _pairs(snapshot: Snapshot) -> Iterator[str]:
    def rows(label: Label) -> list[Row]:
        text = _texts(label[0])
        return [{"chosen": text[chosen], "rejected": text[rejected]} for chosen, rejected in _pairs_of(label)]

    return _weighed(snapshot, rows)


def _unpaired(snapshot: Snapshot) -> Iterator[str]:
    def rows(label: Label) -> list[Row]:
        item, _, answer = label
        if answer.kind == "skip" or not (answer.kind == "both_bad" or _pairs_of(label)):
            return []
        ranks = answer.ranks or (0,) * len(item.responses)
        ends = {1: True, max(ranks): False}  # what stands between best and worst is called neither
        labelled = [(text, ends[rank]) for text, rank in zip(_texts(item), ranks, strict=True) if rank in ends]
        return [{"completion": text, "label": good} for text, good in labelled]

    return _weighed(snapshot, rows)


def _rankings(snapshot: Snapshot) -> Iterator[str]:
    def rows(label: Label) -> list[Row]:
        return [{"responses": _texts(label[0]), "ranking": label[2].ranks}] if _pairs_of(label) else []

    return _weighed(snapshot, rows)


def _history(snapshot: Snapshot) -> Iterator[str]:
    settings = dataclasses.asdict(snapshot.settings)
    yield json.dumps({"type": "history", "version": HISTORY_VERSION, "settings": settings})
    for item in snapshot.items:
        yield json.dumps({"type": "item", **json.loads(item_to_json(item))})
    for loan in snapshot.loans:
        yield json.dumps({"type": "task", **dataclasses.asdict(loan)})
    for event in snapshot.events:
        yield json.dumps({"type": "event", **dataclasses.asdict(event)})


def _prompt(prompt: Prompt) -> str | list[Row]:
    return prompt if isinstance(prompt, str) else [dataclasses.asdict(message) for message in prompt]


def _texts(item: Item) -> list[str | list[Row]]:
    """The responses as a layout wants them beside this prompt: text after text, a message after messages."""

    def one(response: Response) -> str | list[Row]:
        return response.text if isinstance(item.prompt, str) else [{"role": "assistant", "content": response.text}]

    return [one(response) for response in item.responses]


KINDS: dict[Kind, Callable[[Snapshot], Iterator[str]]] = {
    "pairs": _pairs,
    "unpaired": _unpaired,
    "rankings": _rankings,
    "judgements": lambda snapshot: map(to_json, judgements(snapshot)),
    "history": _history,
}
