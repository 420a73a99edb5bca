"""What every layout promises, checked from one `Case` per layout: a new layout is a function and a row here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from preftune.data.layouts import Record
from preftune.data.sources import open_source
from preftune.records import Demonstration, RankedResponses, Refusal

Item = Record | Refusal


@dataclass(frozen=True)
class Case:
    """A layout, two or more good rows of it, the records they are, and rows that must be refused."""

    format: str
    rows: list[Any]
    records: list[Record]
    """With line numbers alone for `origin`."""
    required: list[str]
    """The columns without which there is no record."""
    kind: Literal["preferences", "demonstrations"] = "preferences"
    broken: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """(changes to the first row, field to be named)."""
    truths: list[str] = field(default_factory=list)
    """The required columns in which true is a good value."""
    best: list[str] = field(default_factory=list)
    """Of preferences: the response of each record that is its demonstration."""

    @property
    def name(self) -> str:
        return f"{self.format} as {self.kind}"


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def places(record: Item) -> list[int]:
    """The lines a record or refusal stands for."""
    return [int(line) for line in record.origin.rpartition(":")[2].split(",")]


def read(path: Path, case: Case, format: str = "auto") -> list[Item]:
    return list(open_source(path, kind=case.kind, format=format))


def check_source(case: Case, folder: Path) -> None:
    """Known rows come back; every row is accounted for, in a fixed order; a flawed field is named at its line."""
    check_round_trip(case, folder)
    flawed = [_without(case.rows[0], column) for column in case.required]
    _check_refused(case, folder, flawed, case.required, "is missing")
    _check_refused(case, folder, [case.rows[0] | {c: None} for c in case.required], case.required, "is null")
    others = [c for c in case.required if c not in case.truths]
    _check_refused(case, folder, [case.rows[0] | {c: True} for c in others], others, "is true")
    changed = [case.rows[0] | changes for changes, _ in case.broken]
    _check_refused(case, folder, changed, [name for _, name in case.broken], "", exact=True)
    if case.best:
        _check_demonstrations(case, folder)


def check_round_trip(case: Case, folder: Path) -> None:
    path = write_jsonl(folder / "good.jsonl", case.rows)
    source = open_source(path, kind=case.kind)
    assert source.format == case.format
    expected = [_placed(record, lambda line: f"{path}:{line}") for record in case.records]
    assert list(source) == expected
    assert list(source) == expected, "the second reading differs from the first"
    assert read(path, case, case.format) == expected, "forcing the detected format changes the records"
    assert sorted(line for record in expected for line in places(record)) == list(range(1, len(case.rows) + 1))


def _check_refused(
    case: Case, folder: Path, flawed: list[Any], fields: list[str], reason: str, *, exact: bool = False
) -> None:
    """Flawed rows between good ones: each refused by line and field, and the good records are what they were."""
    lines = [*case.rows]
    expected: dict[int, str] = {}
    for row, name in zip(flawed, fields, strict=True):
        lines.append(row)
        expected[len(lines)] = name
    path = write_jsonl(folder / "flawed.jsonl", lines)
    items = read(path, case, case.format)
    refusals = {places(item)[0]: item for item in items if isinstance(item, Refusal)}
    assert refusals.keys() == expected.keys()
    for line, name in expected.items():
        refusal = refusals[line]
        assert refusal.origin == f"{path}:{line}"
        assert refusal.field == name or (not exact and refusal.field.startswith((f"{name}.", f"{name}["))), refusal
        assert reason in refusal.reason, refusal
    assert sorted(line for item in items for line in places(item)) == list(range(1, len(lines) + 1))
    good = [item for item in items if not isinstance(item, Refusal)]
    assert good == [_placed(record, lambda line: f"{path}:{line}") for record in case.records]


def _check_demonstrations(case: Case, folder: Path) -> None:
    path = write_jsonl(folder / "good.jsonl", case.rows)
    source = open_source(path, kind="demonstrations")
    assert source.format == case.format
    for item, record, text in zip(source, case.records, case.best, strict=True):
        assert isinstance(item, Demonstration) and isinstance(record, RankedResponses)
        assert (item.prompt, item.response.text, item.weight) == (record.prompt, text, record.weight)
        assert sorted(places(item)) == [int(line) for line in record.origin.split(",")]


def _without(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}


def _placed(record: Any, place: Callable[[int], str]) -> Any:
    """The record at its place: the `2,5` of a case becomes `file:2,5`."""
    lines = [int(line) for line in record.origin.split(",")]
    return dataclasses.replace(record, origin=",".join([place(lines[0]), *map(str, lines[1:])]))
