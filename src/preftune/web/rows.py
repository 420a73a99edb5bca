"""Records <-> rows of the tables, in one place each."""

from __future__ import annotations

import dataclasses
import json
from random import Random
from typing import Any

from sqlalchemy import Row

from preftune.web.labels import (
    Answer,
    Event,
    Item,
    Loan,
    Task,
    answer_from,
    dumps,
    item_from_json,
    item_to_json,
)

__all__ = [
    "drawn_order",
    "event_from",
    "event_values",
    "is_right",
    "item_from",
    "item_values",
    "loan_from",
    "loan_values",
    "standing_values",
    "task_from",
]


def item_values(number: int, item: Item) -> dict[str, Any]:
    """The row of an item."""
    content = item_to_json(dataclasses.replace(item, priority=None))
    is_gold = item.gold is not None
    return {"id": number, "key": item.key, "content": content, "is_gold": is_gold, "priority": item.priority}


def item_from(row: Row[Any]) -> Item:
    """The item of a row, gold answer and priority included."""
    return dataclasses.replace(item_from_json(row.content), priority=row.priority)


def loan_values(loan: Loan, stands: Event | None) -> dict[str, Any]:
    """The row of a task and of the event that states its answer."""
    row = {"id": loan.id, "item": loan.item, "annotator": loan.annotator, "expires": loan.expires}
    return {**row, "shown": dumps(loan.order), **standing_values(stands)}


def standing_values(stands: Event | None) -> dict[str, Any]:
    """What a task's row keeps of the fold of its events."""
    if stands is None or stands.answer is None:
        return {"standing": None, "answered": None}
    return {"standing": stands.id, "answered": stands.answer.kind}


def loan_from(row: Row[Any]) -> Loan:
    """The task of a row, as stored."""
    order = tuple(json.loads(row.shown))
    return Loan(id=row.id, item=row.item, annotator=row.annotator, order=order, expires=row.expires)


def task_from(row: Row[Any]) -> Task:
    """The task of a row joined with its item, as its annotator may see it."""
    return Task(id=row.id, item=item_from_json(row.content).blind, order=tuple(json.loads(row.shown)))


def event_values(event: Event) -> dict[str, Any]:
    """The row of an event."""
    answer = None if event.answer is None else dumps(dataclasses.asdict(event.answer))
    return {field.name: getattr(event, field.name) for field in dataclasses.fields(event)} | {"answer": answer}


def event_from(row: Row[Any]) -> Event:
    """The event of a row."""
    answer = None if row.answer is None else answer_from(json.loads(row.answer))
    return Event(
        id=row.id,
        task=row.task,
        annotator=row.annotator,
        kind=row.kind,
        answer=answer,
        undoes=row.undoes,
        client_key=row.client_key,
        at=row.at,
    )


def drawn_order(seed: int, item: Item, annotator: str) -> tuple[int, ...]:
    """Which response is shown at which place: every order equally likely, the same for the same three arguments."""
    order = list(range(len(item.responses)))
    Random(f"{seed}/{item.key}/{annotator}").shuffle(order)
    return tuple(order)


def is_right(given: Answer, gold: Answer) -> bool:
    """Whether an answer says what the gold answer says; strength and reason aside."""
    return (given.kind, given.ranks) == (gold.kind, gold.ranks)
