"""What a layout is, and which one a file has: decided from its first rows, by majority, never by guessing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from preftune.data.fields import Fields, Flaw, Row, printable
from preftune.errors import DataError
from preftune.records import Demonstration, LabelledResponse, RankedResponses, Refusal

__all__ = ["Items", "Layout", "Record", "Rows", "detect", "each"]

Rows = Iterable[Row | Refusal]
Record = RankedResponses | LabelledResponse | Demonstration
Items = Iterator[Record | Refusal]


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write rows down."""

    columns: str
    """What a row holds, for messages."""
    matches: Callable[[Mapping[str, object]], bool]
    """Whether a row looks like it: by its columns, and by its values where two layouts share the columns."""
    items: Callable[[Rows], Items]
    """Rows -> records and refusals, every row accounted for."""
    order: str = "rejected"
    """The column a preference is refused for when it orders nothing."""


def each(read: Callable[[Fields], Record]) -> Callable[[Rows], Items]:
    """The layout in which a row is a record: its `Flaw` becomes the row's `Refusal`, refusals pass through."""

    def items(rows: Rows) -> Items:
        for row in rows:
            if isinstance(row, Refusal):
                yield row
                continue
            try:
                fields = Fields(row)
                fields.refuse_unread()
                record = read(fields)
                fields.refuse_lost(_texts(record))
                yield record
            except Flaw as flaw:
                yield Refusal(origin=row.origin, field=flaw.field, reason=flaw.reason)

    return items


def _texts(record: Record) -> list[str]:
    """All that was read of a row."""
    before = [record.prompt] if isinstance(record.prompt, str) else [message.content for message in record.prompt]
    responses = record.responses if isinstance(record, RankedResponses) else (record.response,)
    return [*before, *(response.text for response in responses)]


def detect(rows: Sequence[Row | Refusal], layouts: Mapping[str, Layout], name: str) -> str:
    """The layout that most of the rows look like. Raises DataError when none fits, or two fit equally well.

    A majority, so that a flawed row among the first is refused later instead of hiding what the file is.
    """
    votes: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, Row) and isinstance(row.value, dict):
            columns.update(str(column) for column in row.value)
            votes.update(layout for layout in layouts if layouts[layout].matches(row.value))
        elif isinstance(row, Row) and isinstance(row.value, str) and "text" in layouts:
            votes["text"] += 1
    best = [layout for layout in layouts if votes[layout] and votes[layout] == max(votes.values())]
    if len(best) == 1:
        return best[0]
    found = ", ".join(printable(column) for column in columns) or "none"
    if best:
        raise DataError(
            f"{name}: the rows fit {' and '.join(best)} equally well (columns found: {found}); "
            f"name the one you mean: format={best[0]} or format={best[1]}"
        )
    first = next((f"; the first row: {row}" for row in rows if isinstance(row, Refusal)), "")
    wanted = "".join(f"\n  {layout}: {layouts[layout].columns}" for layout in layouts)
    raise DataError(
        f"{name}: the layout is unknown. Columns found: {found}{first}. Rename the columns to those of a layout, "
        f"or name it with format=. Layouts read:{wanted}"
    )
