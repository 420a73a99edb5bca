"""Prompts of any layout: each once, at its first place, every row accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.data.prompts import PROMPTS, distinct_prompts
from preftune.data.sources import open_source
from preftune.errors import DataError
from preftune.records import Message


def source(folder: Path, rows: list[Any]) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(path, kind="prompts")


def test_rows_are_prompts_duplicates_and_refusals(tmp_path: Path) -> None:
    """rows = prompts + duplicates + refusals, and a prompt's origin is its first line."""
    found = distinct_prompts(iter(source(tmp_path, [{"prompt": p} for p in ("a", "b", "a", "", None, "a", "c")])))
    assert [(prompt, origin.rpartition(":")[2]) for prompt, origin in found.prompts] == [
        ("a", "1"),
        ("b", "2"),
        ("c", "7"),
    ]
    assert found.duplicates == 2 and [str(r).rpartition("rows.jsonl:")[2] for r in found.refusals] == [
        "4: prompt: is empty",
        "5: prompt: is null, a string or a list of messages was expected",
    ]


USER = {"role": "user", "content": "a"}
BOTH = [USER, {"role": "assistant", "content": "x"}]
ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a", "id": 7},
    "prompt_completion": {"prompt": "a", "completion": "x"},
    "messages": {"messages": BOTH},
    "alpaca": {"instruction": "a", "output": "x"},
    "trl": {"prompt": "a", "chosen": "x", "rejected": "y"},
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"},
    "dpo_repo": {"prompt": "a", "responses": ["x", "y"], "pairs": [[0, 1]]},
    "ranking": {"prompt": "a", "responses": ["x", "y"], "ranking": [2, 1]},
    "scored_table": {"prompt": "a", "response": "x", "score": 1.0},
    "unpaired": {"prompt": "a", "completion": "x", "label": False},
}


@pytest.mark.parametrize("layout", ROWS)
def test_the_prompt_of_every_layout_is_found(layout: str, tmp_path: Path) -> None:
    """The layout is recognised, and what precedes its answers is the prompt."""
    opened = source(tmp_path, [ROWS[layout]])
    assert opened.format == layout and layout in PROMPTS
    ((prompt, _),) = distinct_prompts(iter(opened)).prompts
    said = prompt if isinstance(prompt, str) else prompt[-1].content
    assert said.strip().removeprefix("Human: ").removesuffix("\n\nAssistant:") == "a"
    assert layout != "messages" or prompt == (Message(role="user", content="a"),)


def test_plain_texts_are_no_prompts(tmp_path: Path) -> None:
    """A corpus to imitate has no prompt: the message lists what is read."""
    with pytest.raises(DataError, match=r"the layout is unknown\. Columns found: text"):
        source(tmp_path, [{"text": "once upon a time"}])
