"""What the labelling page is about: items, tasks, answers, events; current labels are a pure fold of the events.

An *item* is a prompt with K >= 2 responses. A *task* is an item lent to one annotator, responses in a drawn order. An
*event* is what an annotator did: `answer`, `revise` or `undo`; events are added, never changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from preftune.data.ranking import ranks_from_scores
from preftune.errors import DataError
from preftune.records import Message, Prompt, Response

__all__ = [
    "Added",
    "Answer",
    "Event",
    "Item",
    "Labelled",
    "Loan",
    "Progress",
    "Settings",
    "Snapshot",
    "Task",
    "TaskGone",
    "UnknownTask",
    "answer_from",
    "checked",
    "dumps",
    "item_from_json",
    "item_to_json",
    "standing",
]

STRENGTHS = range(1, 6)
MAX_REASON_CHARS = 4000


class UnknownTask(DataError):
    """The task does not exist, or belongs to another annotator."""


class TaskGone(DataError):
    """The loan ran out and another annotator has the item: one more label would be one too many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How a store hands out its items."""

    overlap: int = 1
    """Labels wanted per item, >= 1, each by another annotator; never exceeded. Gold items are for everybody."""
    gold_rate: float = 0.0
    """Share of an annotator's tasks that are gold items, in [0, 1], while there are gold items not seen yet."""
    random_share: float = 0.2
    """Share of tasks drawn regardless of priority, in [0, 1]: what keeps the labels a sample of all items."""
    seed: int = 0
    lease_seconds: int = 3600
    """How long a task is kept for its annotator; then the item is free for others."""

    def __post_init__(self) -> None:
        if self.overlap < 1 or self.lease_seconds < 1:
            raise DataError(f"overlap {self.overlap} and lease_seconds {self.lease_seconds} must both be at least 1")
        if not (0 <= self.gold_rate <= 1 and 0 <= self.random_share <= 1):
            raise DataError(f"gold_rate {self.gold_rate} and random_share {self.random_share} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an annotator said of an item."""

    kind: Literal["ranking", "both_bad", "skip"]
    ranks: tuple[int, ...] = ()
    """Of a ranking: `ranks[i]` is the rank of `item.responses[i]`, 1 is best, equal numbers tie. (1, 2) says that the
    first of two is better, (1, 1) that they tie."""
    strength: int | None = None
    """How clear it is, 1 (slightly) to 5."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A prompt and the K >= 2 responses to compare."""

    prompt: Prompt
    responses: tuple[Response, ...]
    origin: str = ""
    gold: Answer | None = None
    """The known answer, for checking annotators; such labels are not exported as training data."""
    priority: float | None = None
    """Larger is asked first (for example minus the margin of a reward model); None comes last, in order of arrival."""

    def __post_init__(self) -> None:
        if len(self.responses) < 2:
            raise DataError(f"{self.origin}: an item needs K >= 2 responses, not {len(self.responses)}")
        numbers = [self.priority, *(n for r in self.responses for n in (r.score, r.logp))]
        if not all(number is None or math.isfinite(number) for number in numbers):
            raise DataError(f"{self.origin}: priority, scores and logp must be finite numbers, not {numbers}")
        if self.gold is not None and checked(self.gold, len(self.responses)) != self.gold:
            raise DataError(
                f"{self.origin}: the gold answer's ranks {self.gold.ranks} skip a number; write them densely"
            )

    @property
    def key(self) -> str:
        """SHA-256 of what an annotator sees: the prompt and the texts in their order."""
        prompt = self.prompt if isinstance(self.prompt, str) else [[m.role, m.content] for m in self.prompt]
        return hashlib.sha256(dumps([prompt, [r.text for r in self.responses]]).encode()).hexdigest()

    @property
    def blind(self) -> Item:
        """The item as an annotator may see it: no gold answer, no priority, nothing about who wrote a response."""
        shown = tuple(Response(text=r.text, finished=r.finished) for r in self.responses)
        return Item(prompt=self.prompt, responses=shown)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An item lent to one annotator."""

    id: int
    item: Item
    """Blind: without provenance, scores, origin, gold answer."""
    order: tuple[int, ...]
    """`order[place]` is the response shown at that place; drawn once per task and stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loan:
    """A task as stored: which item, to whom, shown in which order, until when."""

    id: int
    item: int
    annotator: str
    order: tuple[int, ...]
    expires: int
    """Milliseconds since 1970, UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing an annotator did."""

    id: int
    task: int
    annotator: str
    kind: Literal["answer", "revise", "undo"]
    answer: Answer | None
    """None for an undo."""
    undoes: int | None
    """Of an undo: the event that no longer counts."""
    client_key: str
    """Chosen by the client, once per act: the same key again is a retry and changes nothing."""
    at: int
    """Milliseconds since 1970, UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A label made elsewhere: what was compared, by whom, and the answer."""

    item: Item
    annotator: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Added:
    """How many items (or labels) were new, and how many the store had already."""

    new: int
    known: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Counts of current answers: skips count as own work, not as the team's labels; gold counts for `gold_*` only."""

    own: int
    own_today: int
    """Since midnight, local time of the server."""
    team: int
    """Labels of all annotators."""
    total: int
    """Labels wanted: items times overlap."""
    gold_right: int
    gold_seen: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """Everything a store holds but accounts: exports are pure functions of it."""

    settings: Settings
    items: tuple[Item, ...]
    """Item number i is `items[i - 1]`."""
    loans: tuple[Loan, ...]
    events: tuple[Event, ...]


def standing(events: Iterable[Event]) -> dict[int, Event]:
    """task -> the event that states its current answer: the last one that was not undone."""
    stated: dict[int, list[Event]] = {}
    for event in events:
        of_task = stated.setdefault(event.task, [])
        if event.kind == "undo":
            of_task[:] = [earlier for earlier in of_task if earlier.id != event.undoes]
        else:
            of_task.append(event)
    return {task: of_task[-1] for task, of_task in stated.items() if of_task}


def checked(answer: Answer, k: int) -> Answer:
    """The answer to an item of k responses with dense ranks (1, 3, 3 becomes 1, 2, 2). Raises DataError."""
    ranks = answer.ranks
    if answer.kind not in ("ranking", "both_bad", "skip"):
        raise DataError(f"answer kind {answer.kind!r} is unknown; allowed: ranking, both_bad, skip")
    if answer.kind == "ranking" and (len(ranks) != k or any(type(rank) is not int or rank < 1 for rank in ranks)):
        raise DataError(f"ranks are {ranks}; {k} whole numbers from 1 (best) are needed, one per response")
    if answer.kind != "ranking" and ranks:
        raise DataError(f"{answer.kind} was answered with ranks {ranks}; only a ranking has them")
    if answer.strength is not None and answer.strength not in STRENGTHS:
        raise DataError(f"strength is {answer.strength}; allowed: none, or {STRENGTHS[0]} to {STRENGTHS[-1]}")
    if len(answer.reason) > MAX_REASON_CHARS:
        raise DataError(f"the reason has {len(answer.reason)} characters; allowed: {MAX_REASON_CHARS}")
    return replace(answer, ranks=ranks_from_scores([-rank for rank in ranks])) if ranks else answer


def dumps(value: Any) -> str:
    """ASCII JSON: any text, NUL and lone surrogates too, fits every database column and keeps its bytes."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def item_to_json(item: Item) -> str:
    """One line that `item_from_json` turns back into an equal item."""
    return dumps(dataclasses.asdict(item))


def item_from_json(line: str) -> Item:
    """The item that `item_to_json` wrote."""
    values = json.loads(line)
    if isinstance(values["prompt"], list):
        values["prompt"] = tuple(Message(**message) for message in values["prompt"])
    values["responses"] = tuple(Response(**response) for response in values["responses"])
    values["gold"] = None if values["gold"] is None else answer_from(values["gold"])
    return Item(**values)


def answer_from(values: dict[str, Any]) -> Answer:
    """The answer that `dataclasses.asdict` took apart."""
    return Answer(**{**values, "ranks": tuple(values["ranks"])})
