"""One JSON Lines file with every kind of flawed row at a known line, a good row between every two of them.

`write(path)` writes what the source must refuse and returns {line: field}. `write_all(path)` adds, at the end, the
kinds that only the doctor can see and returns both. All rows have the layout `trl`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

GOOD = {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seven."}


def _row(**changes: object) -> bytes:
    """The good row with some fields replaced; `...` removes one."""
    row = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(row).encode()


def _turns(*turns: tuple[str, object]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in turns]


BLUE = _turns(("assistant", "Blue."))

SOURCE_KINDS: list[tuple[str, bytes, str]] = [
    # (kind, the line, the field that is named)
    ("cut off in the middle of a string", _row()[:40], "row"),
    ("cut off after a comma", b'{"prompt": "a",', "row"),
    ("two objects on one line", _row() + _row(), "row"),
    ("a Python dict, not JSON", str(GOOD).encode(), "row"),
    ("a list", b'["Name a colour.", " Blue.", " Seven."]', "row"),
    ("a string", b'"Name a colour."', "row"),
    ("a number", b"42", "row"),
    ("null", b"null", "row"),
    ("a blank line between rows", b"", "row"),
    ("white space between rows", b" \t", "row"),
    ("a byte-order mark in the middle of the file", b"\xef\xbb\xbf" + _row(), "row"),
    ("a NUL byte", _row().replace(b"Blue", b"Bl\0ue"), "row"),
    ("a control character inside a string", _row().replace(b"Blue", b"Bl\x01ue"), "row"),
    ("nested too deeply", b"[" * 100_000, "row"),
    ("a number of five thousand digits", _row(weight=1)[:-2] + b"1" * 5_000 + b"}", "row"),
    ("a key given twice", _row()[:-1] + b', "chosen": " Green."}', "chosen"),
    ("a key given twice, further inside", _row(chosen=BLUE).replace(b'{"role"', b'{"role": "x", "role"'), "role"),
    ("bytes that are not UTF-8", _row().replace(b"Blue", b"Bl\xff"), "chosen"),
    ("half a surrogate pair", _row().replace(b"Seven", b"\\ud83d"), "rejected"),
    ("a NUL character", _row().replace(b"Blue", b"Bl\\u0000"), "chosen"),
    ("no prompt", _row(prompt=...), "prompt"),
    ("a null prompt", _row(prompt=None), "prompt"),
    ("an empty prompt", _row(prompt=""), "prompt"),
    ("a prompt without messages", _row(prompt=[]), "prompt"),
    ("no chosen", _row(chosen=...), "chosen"),
    ("a null chosen", _row(chosen=None), "chosen"),
    ("an empty chosen", _row(chosen=""), "chosen"),
    ("a chosen of white space", _row(chosen=" \n"), "chosen"),
    ("no rejected", _row(rejected=...), "rejected"),
    ("an empty rejected", _row(rejected=""), "rejected"),
    ("a number for a text", _row(rejected=7), "rejected"),
    ("a truth value for a text", _row(chosen=True), "chosen"),
    ("NaN for a text", _row(chosen=float("nan")), "chosen"),
    ("a list of strings", _row(chosen=["Blue."]), "chosen[0]"),
    ("a message without content", _row(chosen=[{"role": "assistant"}], rejected=BLUE), "chosen[0].content"),
    ("a message with null content", _row(chosen=_turns(("assistant", None)), rejected=BLUE), "chosen[0].content"),
    ("an empty message", _row(chosen=_turns(("assistant", "")), rejected=BLUE), "chosen[0].content"),
    ("a message of nobody", _row(chosen=[{"content": "Blue."}], rejected=BLUE), "chosen[0].role"),
    ("no final assistant message", _row(chosen=_turns(("user", "Blue.")), rejected=BLUE), "chosen"),
    (
        "different messages before the response",
        _row(
            prompt=_turns(("user", "Hi")),
            chosen=[*_turns(("assistant", "Yes?"), ("user", "A colour.")), *BLUE],
            rejected=[*_turns(("assistant", "Yes?"), ("user", "A number.")), *BLUE],
        ),
        "rejected",
    ),
    ("one side plain, one of messages", _row(chosen=BLUE), "rejected"),
    ("a tool call", _row(chosen=[{**BLUE[0], "tool_calls": [{"name": "f"}]}]), "chosen[0].tool_calls"),
    ("a column that would change the prompt", _row(tools=[{"name": "f"}]), "tools"),
    ("a weight of NaN", _row(weight=float("nan")), "weight"),
    ("an infinite weight", _row(weight=float("inf")), "weight"),
    ("a weight of zero", _row(weight=0), "weight"),
    ("a negative weight", _row(weight=-1), "weight"),
    ("a weight of four hundred digits", _row(weight=1)[:-2] + b"1" * 400 + b"}", "weight"),
    ("a weight as text", _row(weight="2"), "weight"),
    ("a weight of true", _row(weight=True), "weight"),
    ("a score too large for a number", _row(score_chosen=1)[:-2] + b"1e999}", "score_chosen"),
    ("a score as text", _row(score_rejected="high"), "score_rejected"),
]

DOCTOR_KINDS: list[tuple[str, list[bytes]]] = [
    # (kind, the lines; the first of several is the row that the others repeat or contradict)
    ("identical", [_row(prompt="Name a metal.", chosen=" Iron.", rejected=" Iron.")]),
    ("duplicate", [_row(prompt="Name a fruit.", chosen=" Fig.", rejected=" Two.")] * 2),
    (
        "contradictory",
        [
            _row(prompt="Name a bird.", chosen=" Wren.", rejected=" Six."),
            _row(prompt="Name a bird.", chosen=" Six.", rejected=" Wren."),
        ],
    ),
    ("over_length", [_row(prompt="Name a tree.", chosen=" oak" * 5_000, rejected=" Nine.")]),
]


def good_row(number: int) -> dict[str, str]:
    return {**GOOD, "prompt": f"Name colour {number}."}


def write(path: Path, good: Callable[[int], dict[str, str]] = good_row) -> dict[int, str]:
    """{line: field} of every row that the source must refuse. Line 1, every second line and the last are good."""
    return write_all(path, doctor_kinds=[], good=good)[0]


def write_all(
    path: Path,
    *,
    doctor_kinds: list[tuple[str, list[bytes]]] = DOCTOR_KINDS,
    good: Callable[[int], dict[str, str]] = good_row,
) -> tuple[dict[int, str], dict[str, list[int]]]:
    """(the same, {kind: lines} of the rows that the doctor must find)."""
    lines = [json.dumps(good(0)).encode()]
    for_source: dict[int, str] = {}
    for _, line, field in SOURCE_KINDS:
        lines.append(line)
        for_source[len(lines)] = field
        lines.append(json.dumps(good(len(lines))).encode())
    for_doctor: dict[str, list[int]] = {}
    for kind, rows in doctor_kinds:
        for row in rows:
            lines.append(row)
            for_doctor.setdefault(kind, []).append(len(lines))
        lines.append(json.dumps(good(len(lines))).encode())
    path.write_bytes(b"\n".join(lines) + b"\n")
    return for_source, for_doctor
