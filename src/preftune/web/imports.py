"""Labels made elsewhere -> the store: our own history, preference files, Label Studio and Argilla exports.

Every row of a file becomes labels or a `Refusal` with its place; nothing is guessed. Neither tool's export says which
column is the prompt and which are the responses, so `Columns` does; its defaults are the names of their templates.

Label Studio, JSON export: tasks with `data` and `annotations`; a result of type `pairwise` (`selected`: left or right)
or `ranker` (ids of `data`'s list of items, best first). A cancelled annotation is a skip. JSON-MIN: the columns of
`data` with one annotation beside them (it leaves cancelled ones out).
Argilla 2, `records.to_list()` or `to_json()`, flat or not: a ranking question (names of response fields, best first,
or {value, rank}), or a label question whose label names a response field, a tie or both bad. A discarded response is a
skip. Argilla 1, a FeedbackDataset as `datasets` writes it (`to_json()`): the same, a column per field and question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.data.fields import Fields, Flaw, Row, describe
from preftune.data.files import TEXT_READERS, kind_of
from preftune.data.ranking import pair_positions, ranks_from_scores
from preftune.data.sources import open_source
from preftune.errors import DataError
from preftune.records import RankedResponses, Refusal, Response
from preftune.web.export import HISTORY_VERSION
from preftune.web.labels import (
    Answer,
    Event,
    Item,
    Labelled,
    Loan,
    Settings,
    Snapshot,
    answer_from,
    checked,
    item_from_json,
)

__all__ = ["Columns", "read_history", "read_labels"]

NUMBERED = re.compile(r"(.+?)(?:[-_ ]?[0-9]+|[-_ ][A-Za-z])")
TIES = {"tie", "same", "equal", "bothgood", "nopreference"}
BOTH_BAD = {"bothbad", "neither", "bothworse"}
BODIES = ("body", "text", "html", "content", "title")
"""Where an item of Label Studio's List holds its text."""
STUDIO_MIN = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement"}
"""What Label Studio's JSON-MIN adds to the columns of `data` and the controls."""
Labels = Iterator[Labelled | Refusal]


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of another tool's project are called; "" and () look for the usual names."""

    prompt: str = ""
    responses: tuple[str, ...] = ()
    question: str = ""
    """Argilla: the question that ranks or chooses."""


def read_labels(path: Path, columns: Columns = Columns()) -> list[Labelled | Refusal]:
    """The labels of a file, its tool recognised by its rows. Raises DataError when nobody's layout fits."""
    reader = TEXT_READERS.get(kind_of(path))
    rows = list(reader(path, path.name)) if reader and path.is_file() else []
    values = [row.value for row in rows if isinstance(row, Row) and isinstance(row.value, dict)]
    for matches, read in (
        (_is_label_studio, _label_studio),
        (_is_label_studio_min, _label_studio_min),
        (_is_argilla, _argilla),
        (_is_argilla_1, _argilla_1),
    ):
        if any(map(matches, values)):
            return [label for row in rows for label in _each(row, columns, read)]
    return list(_preferences(path))


def _each(row: Row | Refusal, columns: Columns, read: Callable[[Fields, Columns], Labels]) -> Labels:
    if isinstance(row, Refusal):
        yield row
        return
    try:
        yield from read(Fields(row), columns)
    except Flaw as flaw:
        yield Refusal(origin=row.origin, field=flaw.field, reason=flaw.reason)


def _preferences(path: Path) -> Labels:
    for row in open_source(path, kind="preferences"):
        if isinstance(row, Refusal):
            yield row
        elif not isinstance(row, RankedResponses):
            yield Refusal(origin=row.origin, field="label", reason="labels one response; a comparison needs two")
        elif set(pair_positions(row)) != set(pair_positions(replace(row, pairs=None))):
            yield Refusal(origin=row.origin, field="pairs", reason="are not those of any ranking, which a label is")
        else:
            item = Item(prompt=row.prompt, responses=row.responses, origin=row.origin)
            answer = checked(Answer(kind="ranking", ranks=row.ranks), len(row.responses))
            yield Labelled(item=item, annotator=row.annotator or "imported", answer=answer)


def _is_label_studio(row: Mapping[str, object]) -> bool:
    return isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def _label_studio(row: Fields, columns: Columns) -> Labels:
    data = row.fields("data")
    for annotation in row.list_of_fields("annotations"):
        results = annotation.list_of_fields("result")
        found = [result for result in results if result.values.get("type") in ("pairwise", "ranker")]
        if len(found) != 1 and not (annotation.values.get("was_cancelled") and not found):
            raise Flaw(
                annotation.path + "result", f"holds {len(found)} results of type pairwise or ranker; one is read"
            )
        if not found:
            item = _item(row, data, columns, _named_responses(data, columns, ()))
            answer = Answer(kind="skip")
        elif found[0].values["type"] == "pairwise":
            item, answer = _pairwise(row, data, columns, found[0])
        else:
            item, answer = _ranker(row, data, columns, found[0])
        if annotation.values.get("was_cancelled"):
            answer = Answer(kind="skip")
        yield Labelled(item=item, annotator=_completed_by(annotation), answer=answer)


def _is_label_studio_min(row: Mapping[str, object]) -> bool:
    return {"annotator", "annotation_id", "lead_time"} <= set(row)


def _label_studio_min(row: Fields, columns: Columns) -> Labels:
    """As the annotation it was made of; the control's type shows in what it says, its `to_name` is lost."""
    controls = {"selected": "pairwise", "ranker": "ranker"}
    data = {name: value for name, value in row.values.items() if name not in STUDIO_MIN}
    found = [
        {"type": controls[key], "value": said}
        for value in data.values()
        for said in (value if isinstance(value, list) else ())
        for key in controls
        if isinstance(said, dict) and key in said
    ]
    annotation = {"completed_by": row.values["annotator"], "result": found}
    yield from _label_studio(Fields(Row(row.origin, {"data": data, "annotations": [annotation]})), columns)


def _completed_by(annotation: Fields) -> str:
    who = annotation.values.get("completed_by")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    if not isinstance(who, str | int) or isinstance(who, bool) or who == "":
        raise Flaw(annotation.path + "completed_by", f"is {describe(who)}; a user is needed, labels are per annotator")
    return str(who)


def _pairwise(row: Fields, data: Fields, columns: Columns, result: Fields) -> tuple[Item, Answer]:
    names = tuple(name.strip() for name in str(result.values.get("to_name", "")).split(","))
    responses = _named_responses(data, columns, names)
    if len(responses) != 2:
        raise Flaw("data", f"has {len(responses)} responses, Pairwise compares two; name them with columns.responses")
    selected = result.fields("value").get("selected", "left or right")
    if selected not in ("left", "right"):
        raise Flaw(result.path + "value.selected", f"is {selected!r:.40}; left or right was expected")
    ranks = (1, 2) if selected == "left" else (2, 1)
    return _item(row, data, columns, responses), Answer(kind="ranking", ranks=ranks)


def _ranker(row: Fields, data: Fields, columns: Columns, result: Fields) -> tuple[Item, Answer]:
    lists = [name for name, value in data.values.items() if _is_item_list(value)]
    name = columns.responses[0] if columns.responses else lists[0] if len(lists) == 1 else ""
    if name not in lists:
        raise Flaw("data", f"holds {len(lists)} lists of items with ids; name the one with columns.responses")
    items = data.list_of_fields(name)
    ids = [str(item.values["id"]) for item in items]
    texts = [item.text(item.first_of(*BODIES)) for item in items]
    order = result.fields("value").get("ranker", "a list of ids, or one list by name")
    if isinstance(order, dict):
        filled = [bucket for bucket in order.values() if bucket]
        if len(filled) != 1:
            raise Flaw(result.path + "value.ranker", "sorts into buckets, which have no order; one ranked list is read")
        order = filled[0]
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(ids):
        raise Flaw(result.path + "value.ranker", f"ranks {order!r:.80}; every id of {name} was expected once")
    ranks = tuple(list(map(str, order)).index(one) + 1 for one in ids)
    return _item(row, data, columns, dict(zip(ids, texts, strict=True))), Answer(kind="ranking", ranks=ranks)


def _is_item_list(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, dict) and "id" in v for v in value)


def _is_argilla(row: Mapping[str, object]) -> bool:
    flat = any(str(name).endswith(".responses.users") for name in row)
    return flat or (isinstance(row.get("fields"), dict) and isinstance(row.get("responses"), dict))


def _argilla(row: Fields, columns: Columns) -> Labels:
    flat = "fields" not in row.values
    data = row if flat else row.fields("fields")
    suffix = ".responses"
    asked = row.values if flat else row.fields("responses").values
    questions = [name.removesuffix(suffix) for name in asked if name.endswith(suffix) or not flat]
    question = columns.question or (questions[0] if len(questions) == 1 else "")
    if question not in questions:
        raise Flaw("responses", f"answers {', '.join(questions) or 'no question'}; name one with columns.question")
    said = _argilla_flat(row, question) if flat else _argilla_nested(row, question)
    responses = _named_responses(data, columns, tuple(_options(said)))
    item = _item(row, data, columns, responses)
    for value, user, status in said:
        if status in ("draft", "pending"):
            continue
        if not isinstance(user, str) or not user:
            raise Flaw(question + suffix, "has no user; labels are per annotator")
        answer = Answer(kind="skip") if status == "discarded" else _argilla_answer(value, list(responses), question)
        yield Labelled(item=item, annotator=user, answer=answer)


def _is_argilla_1(row: Mapping[str, object]) -> bool:
    return bool(_questions_1(row))


def _argilla_1(row: Fields, columns: Columns) -> Labels:
    """As Argilla 2 would nest it; `datasets` may turn a ranking's list of pairs into a pair of lists."""
    responses: dict[str, object] = {}
    for question in _questions_1(row.values):
        given = [dict(one.values) for one in row.list_of_fields(question)]
        for one in given:
            value = one.get("value")
            if isinstance(value, dict) and all(isinstance(value.get(key), list) for key in ("rank", "value")):
                one["value"] = [{"rank": r, "value": v} for r, v in zip(value["rank"], value["value"], strict=False)]
        responses[question] = given
    fields = {name: value for name, value in row.values.items() if isinstance(value, str)}  # an optional one is null
    yield from _argilla(Fields(Row(row.origin, {"fields": fields, "responses": responses})), columns)


def _questions_1(row: Mapping[str, object]) -> list[str]:
    return [str(name) for name, value in row.items() if f"{name}-suggestion" in row and isinstance(value, list)]


Said = list[tuple[object, object, object]]
"""(value, user, status) of every response to the question."""


def _argilla_flat(row: Fields, question: str) -> Said:
    values = row.items(f"{question}.responses") if row.optional(f"{question}.responses") is not None else []
    users = row.items(f"{question}.responses.users") if values else []
    states = row.optional(f"{question}.responses.status")
    states = states if isinstance(states, list) else [None] * len(values)
    if not len(values) == len(users) == len(states):
        raise Flaw(f"{question}.responses", f"has {len(values)} values, {len(users)} users, {len(states)} states")
    return list(zip(values, users, states, strict=True))


def _argilla_nested(row: Fields, question: str) -> Said:
    given = row.fields("responses").list_of_fields(question)
    return [(one.values.get("value"), one.values.get("user_id"), one.values.get("status")) for one in given]


def _options(said: Said) -> list[str]:
    """The names that answers use, in order of appearance, ties and both bad left out."""
    flat = [part for value, _, _ in said for part in (value if isinstance(value, list) else [value])]
    names = [str(part["value"]) if isinstance(part, dict) and "value" in part else str(part) for part in flat]
    return [name for name in dict.fromkeys(names) if _plain(name) not in TIES | BOTH_BAD]


def _argilla_answer(value: object, names: list[str], question: str) -> Answer:
    field = f"{question}.responses"
    plain = [_plain(name) for name in names]
    if isinstance(value, str):
        if _plain(value) in TIES:
            return Answer(kind="ranking", ranks=(1,) * len(names))
        if _plain(value) in BOTH_BAD:
            return Answer(kind="both_bad")
        if _plain(value) not in plain or len(names) != 2:
            raise Flaw(field, f"is {value!r:.40}; one of {', '.join(names)}, a tie or both bad was expected")
        return Answer(kind="ranking", ranks=(1, 2) if plain[0] == _plain(value) else (2, 1))
    if not isinstance(value, list):
        raise Flaw(field, f"is {describe(value)}; a list of response names, best first, was expected")
    ranks: dict[str, int] = {}
    for place, part in enumerate(value, start=1):
        name, rank = (part.get("value"), part.get("rank")) if isinstance(part, dict) else (part, place)
        if type(rank) is not int or rank < 1:
            raise Flaw(field, f"has the rank {rank!r:.40}; a whole number from 1 was expected")
        ranks[_plain(str(name))] = rank
    if sorted(ranks) != sorted(plain) or len(value) != len(names):
        raise Flaw(field, f"ranks {', '.join(ranks)}; each of {', '.join(names)} was expected once")
    return Answer(kind="ranking", ranks=ranks_from_scores([-ranks[name] for name in plain]))


def _plain(name: str) -> str:
    """`Response-1` and `response_1` name one thing: tools allow other characters in labels than in columns."""
    return "".join(character for character in name.lower() if character.isalnum())


def _named_responses(data: Fields, columns: Columns, mentioned: tuple[str, ...]) -> dict[str, str]:
    """column -> text of the responses, in the order of the columns.

    The columns told; else the one family of numbered columns (response_1, response_2; text_a, text_b) that holds all
    the labels mention; else those the labels mention. Refused when that is not two or more.
    """
    by_plain = {_plain(str(name)): str(name) for name in data.values}
    named = [by_plain[_plain(name)] for name in mentioned if _plain(name) in by_plain]
    families: dict[str, list[str]] = {}
    for name in by_plain.values():
        if numbered := NUMBERED.fullmatch(name):
            families.setdefault(numbered[1], []).append(name)
    fitting = [family for family in families.values() if len(family) > 1 and set(named) <= set(family)]
    found = list(columns.responses) or (fitting[0] if len(fitting) == 1 else named)
    if len(found) < 2:
        there = ", ".join(by_plain.values())
        raise Flaw(data.path + "responses", f"cannot be told among {there}; name them with columns.responses")
    names = found if columns.responses else [name for name in by_plain.values() if name in found]
    return {name: data.completion(name).text for name in names}


def _item(row: Fields, data: Fields, columns: Columns, responses: Mapping[str, str]) -> Item:
    name = columns.prompt or data.first_of("prompt", "instruction", "question", "input", "query")
    prompt = data.prompt(name)
    shown = tuple(Response(text=text) for text in responses.values())
    return Item(prompt=prompt, responses=shown, origin=row.origin)


def read_history(text: str) -> Snapshot:
    """The snapshot whose `export(..., "history")` the text is. Raises DataError with the line that is wrong."""
    settings: Settings | None = None
    items: list[Item] = []
    loans: list[Loan] = []
    events: list[Event] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = json.loads(line)
            kind = values.pop("type")
            if (kind == "history") != (number == 1):
                raise ValueError("the first line, and no other, is the heading of a history")
            if kind == "history":
                if values["version"] != HISTORY_VERSION:
                    raise ValueError(f"is of version {values['version']!r}; version {HISTORY_VERSION} is read")
                settings = Settings(**values["settings"])
            elif kind == "item":
                items.append(item_from_json(json.dumps(values)))
            elif kind == "task":
                loans.append(_loan(values, items, len(loans) + 1))
            elif kind == "event":
                events.append(_event(values, items, loans, events))
            else:
                raise ValueError(f"type {kind!r} is unknown")
        except (ValueError, TypeError, KeyError, AttributeError, DataError) as error:
            raise DataError(f"line {number} of the history: {error}; give a file that was exported whole") from error
    if settings is None:
        raise DataError("the history is empty; give a file that was exported whole")
    return Snapshot(settings=settings, items=tuple(items), loans=tuple(loans), events=tuple(events))


def _loan(values: dict[str, Any], items: list[Item], number: int) -> Loan:
    loan = Loan(**{**values, "order": tuple(values["order"])})
    if loan.id != number or not 1 <= loan.item <= len(items):
        raise ValueError(
            f"is task {loan.id} of item {loan.item}; task {number} of one of {len(items)} items was expected"
        )
    if sorted(loan.order) != list(range(len(items[loan.item - 1].responses))):
        raise ValueError(f"shows {loan.order}, which is no order of the item's responses")
    return loan


def _event(values: dict[str, Any], items: list[Item], loans: list[Loan], before: list[Event]) -> Event:
    answer = None if values["answer"] is None else answer_from(values["answer"])
    event = Event(**{**values, "answer": answer})
    if event.id != len(before) + 1 or not 1 <= event.task <= len(loans):
        raise ValueError(f"is event {event.id} of task {event.task}, out of turn or of no task")
    loan = loans[event.task - 1]
    if event.annotator != loan.annotator:
        raise ValueError(f"is by {event.annotator!r}, its task is {loan.annotator!r}'s")
    if (event.kind == "undo") != (answer is None) or (event.kind == "undo") != (event.undoes is not None):
        raise ValueError(f"is of kind {event.kind!r} with answer {answer} and undoes {event.undoes}")
    if event.undoes is not None and not (0 < event.undoes < event.id and before[event.undoes - 1].task == event.task):
        raise ValueError(f"undoes event {event.undoes}, which is none of its task's before it")
    if answer is not None and checked(answer, len(items[loan.item - 1].responses)) != answer:
        raise ValueError(f"has ranks {answer.ranks}, which skip a number")
    return event
