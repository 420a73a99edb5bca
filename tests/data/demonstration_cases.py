"""One `Case` per demonstration layout: rows as people write them, and the records they are."""

from __future__ import annotations

from typing import Any

from format_cases import HI, PING, PING_JSON, said
from source_contract import Case

from preftune.records import Demonstration, Response

__all__ = ["DEMONSTRATION_CASES"]


def shown(prompt: Any, text: str, line: int, **changes: Any) -> Demonstration:
    return Demonstration(prompt=prompt, response=Response(text=text), origin=str(line), **changes)


DEMONSTRATION_CASES = [
    Case(
        "prompt_completion",
        kind="demonstrations",
        rows=[
            {"prompt": "Hi", "completion": " a", "label": True},
            {"prompt": "Hi", "response": " b", "weight": 2},
            {"prompt": [said("user", "Hi")], "completion": [said("assistant", "c")]},
        ],
        records=[shown("Hi", " a", 1), shown("Hi", " b", 2, weight=2.0), shown((HI,), "c", 3)],
        required=["prompt", "completion"],
        broken=[
            ({"label": False}, "label"),
            ({"label": 0}, "label"),
            ({"completion": ""}, "completion"),
            ({"completion": [said("user", "a")]}, "completion"),
            ({"weight": -1}, "weight"),
        ],
    ),
    Case(
        "messages",
        kind="demonstrations",
        rows=[
            {"messages": [*PING_JSON, said("assistant", "a")]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "b"}]},
        ],
        records=[shown(PING, "a", 1), shown((HI,), "b", 2)],
        required=["messages"],
        broken=[
            ({"messages": PING_JSON}, "messages"),
            ({"messages": [said("assistant", "a")]}, "messages"),
            ({"messages": "Hi"}, "messages"),
            ({"messages": []}, "messages"),
            ({"label": False}, "label"),
            ({"tools": [1]}, "tools"),
        ],
    ),
    Case(
        "alpaca",
        kind="demonstrations",
        rows=[
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction ..."},
            {"instruction": "Hi", "input": "", "output": "a"},
            {"instruction": "Hi", "output": "b"},
        ],
        records=[shown("Add.\n\n1 2", "3", 1), shown("Hi", "a", 2), shown("Hi", "b", 3)],
        required=["instruction", "output"],
        broken=[({"input": 3}, "input"), ({"output": " "}, "output")],
    ),
    Case(
        "text",
        kind="demonstrations",
        rows=[{"text": "Once upon a time.", "label": 0, "rating": 3}, {"text": "b", "weight": 2}],
        records=[shown("", "Once upon a time.", 1), shown("", "b", 2, weight=2.0)],
        required=["text"],
        broken=[({"text": ""}, "text")],
    ),
]
