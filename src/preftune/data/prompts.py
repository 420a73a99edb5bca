"""Prompts to be answered: a column `prompt`, or whatever preferences and demonstrations are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from preftune.data.demonstrations import DEMONSTRATIONS
from preftune.data.fields import Fields
from preftune.data.formats import PREFERENCES
from preftune.data.layouts import Items, Layout, Rows, each
from preftune.records import Demonstration, Prompt, Refusal, Response

__all__ = ["PROMPTS", "Prompts", "distinct_prompts"]

ANSWERS = ("chosen", "completion", "completions", "instruction", "response", "responses", "messages", "conversations")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Every row of a source accounted for: rows = len(prompts) + duplicates + len(refusals)."""

    prompts: tuple[tuple[Prompt, str], ...]
    """(prompt, origin), each prompt once, at its first place."""
    duplicates: int
    refusals: tuple[Refusal, ...]


def distinct_prompts(items: Items) -> Prompts:
    """The prompts of records, in their order; a prompt that comes again is counted."""
    first: dict[Prompt, str] = {}
    refusals: list[Refusal] = []
    records = 0
    for item in items:
        if isinstance(item, Refusal):
            refusals.append(item)
        else:
            records += 1
            first.setdefault(item.prompt, item.origin)
    return Prompts(tuple(first.items()), records - len(first), tuple(refusals))


def prompt_alone(row: Fields) -> Demonstration:
    """The prompt of a row that has no answer: the response is empty, and nobody reads it."""
    return Demonstration(prompt=row.prompt("prompt"), response=Response(text=""), origin=row.origin)


def _table_prompts(rows: Rows) -> Items:
    """Of a scored table, row by row: a prompt with one response can be answered, though not compared."""
    yield from each(prompt_alone)(rows)


def _is_unlabelled(layout: Layout) -> Layout:
    return replace(layout, matches=lambda row: "label" not in row and layout.matches(row))


def _is_prompt_alone(row: Mapping[str, object]) -> bool:
    return "prompt" in row and not any(column in row for column in ANSWERS)


PROMPTS: dict[str, Layout] = {
    "prompt": Layout("prompt (text, or messages)", _is_prompt_alone, each(prompt_alone)),
    **{name: layout for name, layout in DEMONSTRATIONS.items() if name != "text"},
    "prompt_completion": _is_unlabelled(DEMONSTRATIONS["prompt_completion"]),
    "messages": _is_unlabelled(DEMONSTRATIONS["messages"]),
    "scored_table": replace(DEMONSTRATIONS["scored_table"], items=_table_prompts),
    "unpaired": PREFERENCES["unpaired"],
}
"""Layout -> records whose prompts are to be answered."""
