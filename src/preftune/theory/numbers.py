"""What the executed derivation hands on: named numbers, tables of them, and what figures draw; plain, no tensors.

Titles, columns and labels may hold formulas between backticks; `plain` takes the backticks away for a terminal.
`to_json` of a `Lesson` is the file the page is made from, so every number on the page can be found there by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Chapter", "Lesson", "Number", "Table", "number", "plain", "table", "to_json"]


@dataclass(frozen=True, slots=True)
class Number:
    """One result."""

    name: str
    """Unique in the lesson."""
    meaning: str
    """What it is, with its unit."""
    value: int | float | str
    """Exact; text only for the message of a refusal that was provoked."""
    text: str
    """As shown: the value to the digits that mean something."""


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers side by side; the first cell of a row is its label."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Number, ...], ...]


@dataclass(frozen=True, slots=True)
class Chapter:
    """One idea: a claim, the numbers that show it."""

    key: str
    title: str
    claim: str
    """One sentence or equation."""
    numbers: tuple[Number, ...]
    tables: tuple[Table, ...] = ()
    series: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Name -> what a figure draws along one axis."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """The derivation, in the order of its chapters."""

    chapters: tuple[Chapter, ...]

    def numbers(self) -> Iterator[Number]:
        """Every number, those in tables included."""
        for chapter in self.chapters:
            yield from chapter.numbers
            cells = (cell for table in chapter.tables for row in table.rows for cell in row)
            yield from (cell for cell in cells if isinstance(cell, Number))


def number(name: str, value: int | float | str, meaning: str, digits: int = 5) -> Number:
    """A number shown to so many significant digits; from 10^15 on, and below 10^-4, as a power of ten."""
    return Number(name, meaning, value, value if isinstance(value, str) else _shown(value, digits))


def table(name: str, columns: tuple[str, ...], rows: Mapping[str, tuple[Any, ...]], digits: int = 5) -> Table:
    """label -> values, as numbers named `table.label.column`; text stays text; `columns` starts with the labels'."""

    def cell(label: str, column: str, value: Any) -> str | Number:
        if isinstance(value, str):
            return value
        return number(plain(f"{name}.{label}.{column}"), value, plain(f"{columns[0]} {label}: {column}"), digits)

    cells = {label: zip(columns[1:], values, strict=True) for label, values in rows.items()}
    return Table(name, columns, tuple((label, *(cell(label, *at) for at in cells[label])) for label in rows))


def plain(text: str) -> str:
    """The text without the marks of its formulas."""
    return text.replace("`", "")


def to_json(lesson: Lesson) -> str:
    """The lesson as one JSON document, floats to the last digit."""
    return json.dumps(asdict(lesson), indent=1, allow_nan=False) + "\n"


def _shown(value: int | float, digits: int) -> str:
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}"
    size = abs(value)
    if size >= 10**15:
        return f"{'-' * (value < 0)}10^{math.log10(size):.2f}"
    if size and size < 1e-4:
        return f"{value:.1e}"
    text = f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}" if size else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text
