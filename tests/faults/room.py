"""Prompts without room that are not noticed in time."""

from __future__ import annotations

from fault import Fault

_ROOM = "src/preftune/parts/room.py"
_TESTS = "tests/parts/test_room.py -k"

FAULTS = [
    Fault(
        "room: one token too many passes",
        _ROOM,
        "if tokens + max_tokens > one.positions:",
        "if tokens + max_tokens > one.positions + 1:",
        f"{_TESTS} to_the_token",
    ),
    Fault(
        "room: the model with the most positions decides",
        _ROOM,
        "return cls(name, tokenizer, min(",
        "return cls(name, tokenizer, max(",
        f"{_TESTS} to_the_token",
    ),
    Fault(
        "room: only the first reader counts",
        _ROOM,
        "    for one in readers:\n        try:",
        "    for one in readers[:1]:\n        try:",
        f"{_TESTS} every_reader",
    ),
    Fault(
        "room: online rounds forget that training refuses long rows",
        "src/preftune/recipes/online.py",
        'if cfg.truncation != "refuse":',
        'if cfg.truncation == "refuse":',
        f"{_TESTS} rounds_refuse",
    ),
    Fault(
        "room: a text longer than the reward model's positions is scored all the same",
        "src/preftune/data/answers.py",
        "len(row.group.prompt) + len(row.group.responses[0]) <= longest",
        "len(row.group.responses[0]) <= longest",
        "tests/judges/test_reward_scorer.py -k positions",
    ),
]
