"""The label store: items in, tasks out, one label per (annotator, item), every acknowledged label on disk.

    store = Store.open("labels.db", Settings(overlap=2))
    store.add_items(items)
    for task in store.next_tasks("ann", 2):
        store.answer("ann", task.id, Answer(kind="ranking", ranks=(1, 2)), client_key="...")

All methods may be called from several threads and processes. Current labels are the fold `labels.standing` of the
events; the row of a task keeps which event stands, written in the transaction that adds the event.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from random import Random
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, exists, func, insert, or_, select, update

from preftune.errors import DataError
from preftune.web.accounts import Accounts
from preftune.web.database import Database
from preftune.web.labels import (
    Added,
    Answer,
    Event,
    Item,
    Labelled,
    Loan,
    Progress,
    Settings,
    Snapshot,
    Task,
    TaskGone,
    UnknownTask,
    answer_from,
    checked,
    dumps,
    item_from_json,
    standing,
)
from preftune.web.rows import (
    drawn_order,
    event_from,
    event_values,
    is_right,
    item_from,
    item_values,
    loan_from,
    loan_values,
    standing_values,
    task_from,
)
from preftune.web.schema import events, items, settings, tasks

__all__ = ["Store"]

MAX_NAME_CHARS = 200
_answered = tasks.join(items, items.c.id == tasks.c.item).join(events, events.c.id == tasks.c.standing)


class Store:
    """A database of items, tasks and events. Close it when done."""

    def __init__(self, database: Database, wanted: Settings | None, clock: Callable[[], float]):
        self._database = database
        self._clock = clock
        with database.writing() as connection:
            stored = connection.scalars(select(settings.c.content)).one()
            self.settings = wanted or (Settings(**json.loads(stored)) if stored else Settings())
            _keep(connection, self.settings)
        self.accounts = Accounts(database, clock)

    @classmethod
    def open(
        cls,
        url: str,
        settings: Settings | None = None,
        *,
        clock: Callable[[], float] = time.time,
        new: bool = True,
    ) -> Store:
        """The store at a path ("labels.db"), "sqlite:///..." or "postgresql+psycopg://..."; its tables are made.

        Settings replace those stored; None keeps them. `clock` gives seconds since 1970. Raises ConfigError, without
        `new` also for a file that is not there.
        """
        return cls(Database(url, new=new), settings, clock)

    def close(self) -> None:
        """Give the database's connections back."""
        self._database.close()

    def is_empty(self) -> bool:
        """Whether it holds no item."""
        with self._database.reading() as connection:
            return not _last(connection, items.c.id)

    def add_items(self, new: Iterable[Item]) -> Added:
        """Add items by content: one that is there already stays as it is, but takes the new priority, if any."""
        fresh: dict[str, Item] = {}
        known = 0
        with self._database.writing() as connection:
            there = set(connection.scalars(select(items.c.key)))
            for item in new:
                if (key := item.key) not in there and key not in fresh:
                    fresh[key] = item
                    continue
                known += 1
                if item.priority is not None and key in there:
                    connection.execute(update(items).where(items.c.key == key).values(priority=item.priority))
            first = _last(connection, items.c.id) + 1
            _insert(connection, items, [item_values(n, item) for n, item in enumerate(fresh.values(), start=first)])
        return Added(len(fresh), known)

    def add_labels(self, labels: Iterable[Labelled]) -> Added:
        """Add labels made elsewhere, with their items; who has a task of an item already keeps what was said there.

        They fill places of their items, even beyond the overlap: what was labelled was labelled.
        """
        given = list(labels)
        for label in given:
            _check_name("annotator", label.annotator)
        self.add_items(label.item for label in given)
        new = 0
        with self._database.writing() as connection:
            ids = {row.key: row.id for row in connection.execute(select(items.c.key, items.c.id))}
            for label in given:
                k, item = len(label.item.responses), ids[label.item.key]
                there = select(tasks.c.id).where(tasks.c.item == item, tasks.c.annotator == label.annotator)
                if connection.execute(there).first() is not None:
                    continue
                number, event = _last(connection, tasks.c.id) + 1, _last(connection, events.c.id) + 1
                stated = Event(
                    id=event,
                    task=number,
                    annotator=label.annotator,
                    kind="answer",
                    answer=checked(label.answer, k),
                    undoes=None,
                    client_key=f"import {label.item.key}",
                    at=self._now(),
                )
                order = tuple(range(k))
                loan = Loan(id=number, item=item, annotator=label.annotator, order=order, expires=stated.at)
                connection.execute(insert(tasks).values(loan_values(loan, stated)))
                connection.execute(insert(events).values(event_values(stated)))
                new += 1
        return Added(new, len(given) - new)

    def next_tasks(self, annotator: str, count: int) -> list[Task]:
        """The annotator's open tasks, oldest first, filled up with new ones to `count`; fewer when items run out.

        Asking again gives the same tasks until they are answered, so a reload or a second tab costs nothing.
        """
        _check_name("annotator", annotator)
        with self._database.writing() as connection:
            expires = self._now() + 1000 * self.settings.lease_seconds
            found = self._open_tasks(connection, annotator, count, expires)
            while len(found) < count and (row := self._pick(connection, annotator)) is not None:
                item = item_from_json(row.content)
                order = drawn_order(self.settings.seed, item, annotator)
                number = _last(connection, tasks.c.id) + 1
                loan = Loan(id=number, item=row.id, annotator=annotator, order=order, expires=expires)
                connection.execute(insert(tasks).values(loan_values(loan, None)))
                found.append(Task(id=number, item=item.blind, order=order))
            return found

    def task(self, annotator: str, task_id: int) -> Task:
        """A task this annotator was given, answered or not. Raises UnknownTask."""
        query = select(tasks, items.c.content).join(items, items.c.id == tasks.c.item)
        with self._database.reading() as connection:
            row = connection.execute(query.where(tasks.c.id == task_id, tasks.c.annotator == annotator)).first()
        if row is None:
            raise UnknownTask(f"task {task_id} is not one of this annotator's; ask for the next tasks")
        return task_from(row)

    def answer(self, annotator: str, task_id: int, answer: Answer, client_key: str) -> Event:
        """State the first answer to a task; when this returns, the answer is on disk.

        A task that has an answer (a retry, a double click, a second tab) keeps it, and its event is returned: compare
        `client_key` to see whose it is. Raises UnknownTask, TaskGone, DataError.
        """
        return self._state("answer", annotator, task_id, answer, client_key)

    def revise(self, annotator: str, task_id: int, answer: Answer, client_key: str) -> Event:
        """Replace the current answer to a task. Raises UnknownTask, TaskGone, and DataError when it has no answer."""
        return self._state("revise", annotator, task_id, answer, client_key)

    def undo(self, annotator: str, client_key: str) -> Event:
        """Take back the annotator's last answer or revision that still counts, as one more event.

        A task left without answer is open again. Raises DataError when there is nothing to take back.
        """
        _check_name("client_key", client_key)
        with self._database.writing() as connection:
            if (done := _done(connection, annotator, client_key)) is not None:
                return done if done.kind == "undo" else _refuse_key(client_key)
            undone = select(events.c.undoes).where(events.c.undoes.is_not(None))
            counts = and_(events.c.annotator == annotator, events.c.kind != "undo", events.c.id.not_in(undone))
            last = connection.execute(select(events).where(counts).order_by(events.c.id.desc()).limit(1)).first()
            if last is None:
                raise DataError("there is no answer to take back")
            task = connection.execute(select(tasks).where(tasks.c.id == last.task)).one()
            return self._append(connection, task, "undo", None, last.id, client_key)

    def history(self, annotator: str, limit: int) -> list[tuple[Task, Answer]]:
        """The annotator's answered tasks with their current answers, the most recently answered first."""
        query = select(tasks, items.c.content, events.c.answer).select_from(_answered)
        query = query.where(tasks.c.annotator == annotator).order_by(tasks.c.standing.desc()).limit(limit)
        with self._database.reading() as connection:
            return [(task_from(row), answer_from(json.loads(row.answer))) for row in connection.execute(query)]

    def progress(self, annotator: str) -> Progress:
        """How far the annotator and the team are."""
        now = datetime.fromtimestamp(self._clock()).astimezone()
        midnight = int(1000 * now.replace(hour=0, minute=0, second=0, microsecond=0).timestamp())
        mine, is_gold = tasks.c.annotator == annotator, items.c.is_gold
        counted = select(func.count()).select_from(_answered)
        with self._database.reading() as connection:
            gold = select(items.c.content, events.c.answer).select_from(_answered).where(mine, is_gold)
            seen = [
                (answer_from(json.loads(row.answer)), item_from_json(row.content).gold)
                for row in connection.execute(gold)
            ]
            wanted = self.settings.overlap * connection.execute(select(func.count()).where(~is_gold)).scalar_one()
            return Progress(
                own=connection.execute(counted.where(mine, ~is_gold)).scalar_one(),
                own_today=connection.execute(counted.where(mine, ~is_gold, events.c.at >= midnight)).scalar_one(),
                team=connection.execute(counted.where(~is_gold, tasks.c.answered != "skip")).scalar_one(),
                total=wanted,
                gold_right=sum(gold is not None and is_right(given, gold) for given, gold in seen),
                gold_seen=len(seen),
            )

    def snapshot(self) -> Snapshot:
        """Everything but accounts, at one moment."""
        with self._database.reading() as connection:
            stored = connection.scalars(select(settings.c.content)).one()
            return Snapshot(
                settings=Settings(**json.loads(stored)),
                items=tuple(item_from(row) for row in connection.execute(select(items).order_by(items.c.id))),
                loans=tuple(loan_from(row) for row in connection.execute(select(tasks).order_by(tasks.c.id))),
                events=tuple(event_from(row) for row in connection.execute(select(events).order_by(events.c.id))),
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Make this empty store what the snapshot says. Raises DataError when it holds items already."""
        stands = standing(snapshot.events)
        with self._database.writing() as connection:
            if _last(connection, items.c.id):
                raise DataError("a history can only be imported into an empty store; name a new database for it")
            _keep(connection, snapshot.settings)
            _insert(
                connection, items, [item_values(number, item) for number, item in enumerate(snapshot.items, start=1)]
            )
            _insert(connection, tasks, [loan_values(loan, stands.get(loan.id)) for loan in snapshot.loans])
            _insert(connection, events, [event_values(event) for event in snapshot.events])
        self.settings = snapshot.settings

    def _now(self) -> int:
        return int(1000 * self._clock())

    def _takes_place(self) -> ColumnElement[bool]:
        """Whether a task fills one of its item's places: it has a label, or it is open and its time is not over."""
        waits = and_(tasks.c.answered.is_(None), tasks.c.expires > self._now())
        return or_(tasks.c.answered.in_(("ranking", "both_bad")), waits)

    def _has_room(self, connection: Connection, task: Row[Any]) -> bool:
        """Whether a label of this task would be one of its item's `overlap`; gold items have room for everybody."""
        is_gold = select(items.c.is_gold).where(items.c.id == task.item)
        has_place = select(tasks.c.id).where(tasks.c.id == task.id, self._takes_place())
        if connection.execute(is_gold).scalar_one() or connection.execute(has_place).first() is not None:
            return True
        places = select(func.count()).where(tasks.c.item == task.item, self._takes_place())
        return connection.execute(places).scalar_one() < self.settings.overlap

    def _open_tasks(self, connection: Connection, annotator: str, count: int, expires: int) -> list[Task]:
        query = select(tasks, items.c.content).join(items, items.c.id == tasks.c.item)
        query = query.where(tasks.c.annotator == annotator, tasks.c.answered.is_(None)).order_by(tasks.c.id)
        rows = [row for row in connection.execute(query) if self._has_room(connection, row)][:count]
        of_rows = tasks.c.id.in_([row.id for row in rows])
        connection.execute(update(tasks).where(of_rows).values(expires=expires))
        return [task_from(row) for row in rows]

    def _pick(self, connection: Connection, annotator: str) -> Row[Any] | None:
        """The item an annotator sees next: gold, drawn at random, or the first by priority; None when all are done."""
        number = connection.execute(select(func.count()).where(tasks.c.annotator == annotator)).scalar_one()
        draw = Random(f"{self.settings.seed}/{annotator}/{number}")
        wants_gold, wants_random = draw.random() < self.settings.gold_rate, draw.random() < self.settings.random_share
        seen = exists().where(tasks.c.item == items.c.id, tasks.c.annotator == annotator)
        # An item's key is a hash of its text: an order by it is random, and the same for all, so that places fill up.
        by_chance = (items.c.key,)
        by_priority = (items.c.priority.is_(None), items.c.priority.desc(), items.c.id)
        if wants_gold:
            gold = select(items).where(items.c.is_gold, ~seen).order_by(*by_chance).limit(1)
            if (row := connection.execute(gold).first()) is not None:
                return row
        taken = select(tasks.c.item, func.count().label("places")).where(self._takes_place()).group_by(tasks.c.item)
        counted = taken.subquery()
        free = func.coalesce(counted.c.places, 0) < self.settings.overlap
        query = select(items).outerjoin(counted, counted.c.item == items.c.id).where(~items.c.is_gold, ~seen, free)
        return connection.execute(query.order_by(*(by_chance if wants_random else by_priority)).limit(1)).first()

    def _state(
        self, kind: Literal["answer", "revise"], annotator: str, task_id: int, answer: Answer, client_key: str
    ) -> Event:
        _check_name("client_key", client_key)
        with self._database.writing() as connection:
            if (done := _done(connection, annotator, client_key)) is not None:
                return done if (done.task, done.kind) == (task_id, kind) else _refuse_key(client_key)
            query = select(tasks, items.c.content).join(items, items.c.id == tasks.c.item)
            task = connection.execute(query.where(tasks.c.id == task_id, tasks.c.annotator == annotator)).first()
            if task is None:
                raise UnknownTask(f"task {task_id} is not one of this annotator's; ask for the next tasks")
            if kind == "answer" and task.standing is not None:
                return event_from(connection.execute(select(events).where(events.c.id == task.standing)).one())
            if kind == "revise" and task.standing is None:
                raise DataError(f"task {task_id} has no answer to revise; answer it")
            stated = checked(answer, len(item_from_json(task.content).responses))
            return self._append(connection, task, kind, stated, None, client_key)

    def _append(
        self,
        connection: Connection,
        task: Row[Any],
        kind: Literal["answer", "revise", "undo"],
        answer: Answer | None,
        undoes: int | None,
        client_key: str,
    ) -> Event:
        """Add an event and bring its task up to date; refused when the item would get a label too many."""
        if (answer is None or answer.kind != "skip") and not self._has_room(connection, task):
            raise TaskGone(f"task {task.id} was open too long: its item has all its labels now; go on with the next")
        event = Event(
            id=_last(connection, events.c.id) + 1,
            task=task.id,
            annotator=task.annotator,
            kind=kind,
            answer=answer,
            undoes=undoes,
            client_key=client_key,
            at=self._now(),
        )
        connection.execute(insert(events).values(event_values(event)))
        of_task = connection.execute(select(events).where(events.c.task == task.id).order_by(events.c.id))
        values = standing_values(standing(event_from(row) for row in of_task).get(task.id))
        if values["standing"] is None:  # open again, and still the annotator's
            values["expires"] = event.at + 1000 * self.settings.lease_seconds
        connection.execute(update(tasks).where(tasks.c.id == task.id).values(values))
        return event


def _keep(connection: Connection, kept: Settings) -> None:
    connection.execute(update(settings).values(content=dumps(dataclasses.asdict(kept))))


def _insert(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(insert(table), rows)


def _last(connection: Connection, column: ColumnElement[int]) -> int:
    return connection.execute(select(func.coalesce(func.max(column), 0))).scalar_one()


def _done(connection: Connection, annotator: str, client_key: str) -> Event | None:
    """The event that an earlier request with this key left."""
    same = and_(events.c.annotator == annotator, events.c.client_key == client_key)
    row = connection.execute(select(events).where(same)).first()
    return None if row is None else event_from(row)


def _refuse_key(client_key: str) -> Event:
    raise DataError(f"client_key {client_key!r} belongs to another act of this annotator; make a new one for each act")


def _check_name(field: str, name: str) -> None:
    if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
        raise DataError(f"{field} is {ascii(name)[:80]}; 1 to {MAX_NAME_CHARS} printable characters are needed")
