"""Text files -> rows with their place: what is flawed is reported where it stands, and hides nothing after it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import flawed_rows
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data import files
from preftune.data.fields import Row
from preftune.data.sources import open_source
from preftune.errors import DataError
from preftune.records import RankedResponses, Refusal

ROWS = [{"prompt": f"p\u2028{i}", "chosen": "a", "rejected": "b\n\u00e9"} for i in range(3)]


def items(path: Path, content: bytes | str) -> list[Row | Refusal]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(files.TEXT_READERS[files.kind_of(path)](path, "f"))


def told(found: list[Row | Refusal]) -> list[Any]:
    """Rows as (origin, value), refusals as their message."""
    return [str(item) if isinstance(item, Refusal) else (item.origin, item.value) for item in found]


def test_every_kind_of_flawed_row_is_reported_at_its_line_by_its_field(tmp_path: Path) -> None:
    """Over fifty kinds in one file: each refused where it stands, naming the field; every good row is read."""
    path = tmp_path / "train.jsonl"
    expected = flawed_rows.write(path)
    assert len(expected) == len(flawed_rows.SOURCE_KINDS) >= 25
    found = list(open_source(path, kind="preferences", format="trl"))
    refusals = [item for item in found if isinstance(item, Refusal)]
    assert [(r.origin, r.field) for r in refusals] == [(f"{path}:{line}", name) for line, name in expected.items()]
    good = [item for item in found if isinstance(item, RankedResponses)]
    lines = range(1, 2 * len(expected) + 2)
    assert [item.origin for item in good] == [f"{path}:{line}" for line in lines if line not in expected]
    assert all(refusal.reason and "\n" not in str(refusal) and str(refusal).isprintable() for refusal in refusals)


def test_flaws_of_meaning_are_left_to_the_doctor(tmp_path: Path) -> None:
    """Identical sides, copies, contradictions and long rows are records here: other rows or tokens show them."""
    path = tmp_path / "train.jsonl"
    for_source, for_doctor = flawed_rows.write_all(path)
    origins = [r.origin for r in open_source(path, kind="preferences") if isinstance(r, RankedResponses)]
    assert {f"{path}:{line}" for lines in for_doctor.values() for line in lines} <= set(origins)
    assert len(for_doctor) == 4 and len(for_source) == len(flawed_rows.SOURCE_KINDS)


REASONS = [
    (b'{"a": "b', "is cut off: the line ends inside a JSON value"),
    (b'{"a": 1', "is cut off: the line ends inside a JSON value"),
    (b'{"a": 1}{"a": 2}', "holds more than one JSON value, the next begins at character 9"),
    (b"{'a': 1}", "is not JSON: Expecting property name enclosed in double quotes at character 2"),
    (b"\xef\xbb\xbf{}", "begins with a byte-order mark in the middle of the file"),
    (b'{"a": "\0"}', "holds a NUL byte (character 8)"),
    (b"[" * 100_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_a_broken_line_is_refused_in_the_words_of_what_happened(tmp_path: Path, line: bytes, reason: str) -> None:
    assert told(items(tmp_path / "f.jsonl", b"1\n" + line + b"\n2\n")) == [
        ("f:1", 1),
        f"f:2: row: {reason}",
        ("f:3", 2),
    ]


def test_a_key_given_twice_is_refused_not_resolved(tmp_path: Path) -> None:
    """JSON readers keep the last silently: the row would be trained on with one of two answers."""
    reason = "is given twice in one object"
    assert told(items(tmp_path / "f.jsonl", '{"a": 1, "a": 1}\n{"x": [{"\\u001b": 1, "\\u001b": 2}]}\n{"a": 1}\n')) == [
        f"f:1: a: {reason}",
        f"f:2: '\\x1b': {reason}",
        ("f:3", {"a": 1}),
    ]


def test_blank_lines_are_refused_between_rows_and_ignored_after_the_last(tmp_path: Path) -> None:
    """A file may end with empty lines; one inside is the trace of a lost row."""
    blank = "row: is a blank line between rows"
    assert told(items(tmp_path / "f.jsonl", "1\n\n \t\r\n2\n\n\n")) == [
        ("f:1", 1),
        f"f:2: {blank}",
        f"f:3: {blank}",
        ("f:4", 2),
    ]
    found = told(items(tmp_path / "f.csv", "a\n1\n\n2\n\n"))
    assert found == [("f:2", {"a": "1"}), f"f:3: {blank}", ("f:4", {"a": "2"})]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_byte_order_mark_and_unicode_separators_are_no_content(tmp_path: Path, end: str) -> None:
    """Windows line ends and a mark at the start are dropped; a line separator inside a string ends no line."""
    text = "\ufeff" + end.join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert told(items(tmp_path / "f.jsonl", text)) == [(f"f:{i}", row) for i, row in enumerate(ROWS, start=1)]
    assert told(items(tmp_path / "f.json", f"\ufeff[1,{end}2]{end}")) == [("f:1", 1), ("f:2", 2)]


def test_json_rows_carry_the_line_they_start_on(tmp_path: Path) -> None:
    """Pretty-printed: the line of the opening brace; on one line: the row's number."""
    pretty = json.dumps(ROWS, indent=1)
    starts = [i for i, line in enumerate(pretty.splitlines(), start=1) if line.strip() == "{"]
    assert told(items(tmp_path / "f.json", pretty)) == [(f"f:{n}", row) for n, row in zip(starts, ROWS, strict=True)]
    one_line = json.dumps(ROWS, ensure_ascii=True)
    assert told(items(tmp_path / "f.json", one_line)) == [(f"f:row {i}", row) for i, row in enumerate(ROWS, start=1)]


def test_json_that_maps_prompts_to_rows_gives_each_its_prompt(tmp_path: Path) -> None:
    """The original DPO repository's file: the key is the prompt, the line is the key's."""
    text = '{\n"Hi": {"pairs": []},\n\n"Ho":\n{"pairs": [1]}, "He": 7\n}'
    assert told(items(tmp_path / "f.json", text)) == [
        ("f:2", {"prompt": "Hi", "pairs": []}),
        ("f:4", {"prompt": "Ho", "pairs": [1]}),
        ("f:5", 7),
    ]
    assert told(items(tmp_path / "f.json", '{"Hi": {"pairs": []}}')) == [("f:row 1", {"prompt": "Hi", "pairs": []})]
    assert told(items(tmp_path / "f.json", "[]")) == told(items(tmp_path / "f.json", "{}")) == []


def test_json_lines_under_the_json_suffix_are_recognised(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS]
    assert told(items(tmp_path / "f.json", "\n".join(lines))) == [(f"f:{i}", r) for i, r in enumerate(ROWS, start=1)]
    assert told(items(tmp_path / "f.json", lines[0])) == [("f:1", ROWS[0])]


def test_a_key_given_twice_in_one_json_row_refuses_that_row_alone(tmp_path: Path) -> None:
    text = '[\n{"a": 1},\n{"a": 1, "a": 2},\n{"a": 3}\n]'
    assert told(items(tmp_path / "f.json", text)) == [
        ("f:2", {"a": 1}),
        "f:3: a: is given twice in one object",
        ("f:4", {"a": 3}),
    ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', "f:3: is not JSON: Expecting value at character 7"),
        ('[\n{"a": 1}\n{"a": 2}]', r"f:3: is not JSON: Expecting '\]' at character 1"),
        ('[\n{"a": 1}', r"f:2: is not JSON: Expecting '\]' at character 9"),
        ("[\n", "f:1: is not JSON: Expecting value at character 2"),
        ('[1]\n{"a": 2}', "f:2: is not JSON: Extra data at character 1"),
        ('{\n"a" {}}', "f:2: is not JSON: Expecting ':' at character 5"),
        ("[\n" + "[" * 100_000, "f:row 1: cannot be decoded"),
        ("Dear sir,", "f: is neither a list of rows nor an object"),
    ],
)
def test_a_json_document_that_cannot_be_split_into_rows_is_an_error_at_its_line(
    tmp_path: Path, text: str, place: str
) -> None:
    with pytest.raises(DataError, match=place):
        items(tmp_path / "f.json", text)


def test_csv_rows_carry_the_line_they_start_on(tmp_path: Path) -> None:
    """Cells may hold commas, quotes and line ends; later rows still have their own line."""
    text = 'a,b\r\n"x\ny","say ""hi"", twice"\r\n\u00e9,\r\n'
    assert told(items(tmp_path / "f.csv", "\ufeff" + text)) == [
        ("f:2", {"a": "x\ny", "b": 'say "hi", twice'}),
        ("f:4", {"a": "\u00e9", "b": ""}),
    ]
    assert told(items(tmp_path / "f.tsv", "a\tb\n1,2\t3\n")) == [("f:2", {"a": "1,2", "b": "3"})]


def test_flawed_csv_rows_are_refused_and_the_next_one_is_read(tmp_path: Path) -> None:
    text = 'a,b\n1\n1,2,3\n"x"y,2\n1,2\n"never closed,2\n1,2\n'
    assert told(items(tmp_path / "f.csv", text)) == [
        "f:2: row: has 1 cells, the header has 2",
        "f:3: row: has 3 cells, the header has 2",
        "f:4: row: is not CSV: ',' expected after '\"' (read to line 4)",
        ("f:5", {"a": "1", "b": "2"}),
        "f:6: row: is not CSV: unexpected end of data (read to line 7)",
    ]


def test_numbers_and_lists_are_read_from_cells(tmp_path: Path) -> None:
    """CSV knows text only: there a number and a list are written out; an empty weight is no weight."""
    path = tmp_path / "t.csv"
    path.write_text('prompt,response,score\nHi,a,1\nHi,b," 2.5 "\nHi,c,high\nHi,d,nan\nHi,,3\n')
    *refusals, record = open_source(path, kind="preferences")
    assert [str(refusal) for refusal in refusals] == [
        f"{path}:4: score: is 'high', a finite number was expected",
        f"{path}:5: score: is the number nan, a finite number was expected",
        f"{path}:6: response: is empty",
    ]
    assert record.ranks == (2, 1) and record.origin == f"{path}:2,3"
    path.write_text('prompt,responses,ranking,weight\nHi,"[""a"", ""b""]","[2, 1]",\nHi,a,1,2\n')
    record, refusal = open_source(path, kind="preferences")
    assert [r.text for r in record.responses] == ["a", "b"] and record.ranks == (2, 1) and record.weight == 1
    assert str(refusal) == f"{path}:3: responses: is not a list written as JSON"


def test_bytes_that_are_not_text_are_refused_by_their_cell(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"prompt,chosen,rejected\nHi,\xff\xfe,b\nHi,a,b\nHi,a,x\0y\n")
    first, good, last = open_source(path, kind="preferences")
    assert str(first) == f"{path}:2: chosen: is not valid Unicode: character 1 is '\\udcff'"
    assert isinstance(good, RankedResponses)
    assert str(last) == f"{path}:4: rejected: holds a NUL character (character 2)"


@pytest.mark.parametrize(("header", "found"), [("a,a", "a, a"), ("a,", "a, ''"), ("", "none")])
def test_a_header_that_names_no_column_or_one_twice_is_an_error(tmp_path: Path, header: str, found: str) -> None:
    with pytest.raises(DataError, match=f"f:1: the header needs a name of its own for each column, found: {found}$"):
        items(tmp_path / "f.csv", f"{header}\n1,2\n")


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
def test_gzip_changes_nothing_but_the_size(tmp_path: Path, name: str) -> None:
    text = {"f.jsonl": '{"a": "1"}\n{"a": "2"}\n', "f.json": '[{"a": "1"},\n{"a": "2"}]', "f.csv": "a\n1\n2\n"}[name]
    assert told(items(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == told(items(tmp_path / name, text))


def test_a_damaged_gzip_file_is_an_error_that_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    """Cut off, altered, or not gzip at all: what follows cannot be counted, so nothing may pass as whole."""
    whole = gzip.compress(b"".join(b'{"a": %d, "b": %d}\n' % (i, i * i % 1009) for i in range(20_000)))
    middle = len(whole) // 2
    cut, altered, broken = whole[:middle], whole[:-8] + b"\0" * 8, whole[:10] + b"\xff" * 20 + whole[30:]
    for damaged in (cut, altered, broken, b"no gzip"):
        with pytest.raises(DataError, match=r"f: cannot be read past line \d+: .*; restore the file"):
            items(tmp_path / "f.jsonl.gz", damaged)
        with pytest.raises(DataError, match=r"f: cannot be read past byte \d+: .*; restore the file"):
            items(tmp_path / "f.json.gz", damaged)


def test_a_line_beyond_the_limit_is_refused_unread_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 10)
    found = told(items(tmp_path / "f.jsonl", '"1234567"\n' + '"12345678"\n' + '"' + "x" * 3_000_000 + '"\n1\n'))
    refused = "row: is longer than 10 bytes"
    assert found == [("f:1", "1234567"), f"f:2: {refused}", f"f:3: {refused}", ("f:4", 1)]
    with pytest.raises(DataError, match=r"f:2: the line is longer than 10 bytes"):
        items(tmp_path / "f.csv", "a\n12345678901\n")


def test_a_gzip_bomb_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it unpacks to many lines or to one: reading stops, whatever the compressed size; plain files may be
    any size."""
    monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 300_000)
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 300_000)
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 100_000)
    lines = b"1\n" * 200_000
    for bomb in (lines, b" " * 5_000_000):
        with pytest.raises(DataError, match=r"f:\d+: the file unpacks to more than 300000 bytes"):
            items(tmp_path / "f.jsonl.gz", gzip.compress(bomb))
        with pytest.raises(DataError, match=r"f: the file unpacks to more than 300000 bytes"):
            items(tmp_path / "f.json.gz", gzip.compress(bomb))
    assert len(items(tmp_path / "f.jsonl", lines)) == 200_000


def test_long_files_are_streamed(tmp_path: Path) -> None:
    """Reading 40 MB of JSON Lines holds a few rows, not the file."""
    import tracemalloc

    path = tmp_path / "f.jsonl"
    line = json.dumps({"text": "x" * 100_000}) + "\n"
    path.write_text(line * 400)
    tracemalloc.start()
    try:
        count = sum(isinstance(row, Row) for row in files.read_jsonl(path, "f"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 400
    assert peak < 2_000_000


LINE = st.binary(max_size=20) | st.sampled_from([b'{"a": 1}', b"", b"[", b'"\xff"', b"NaN", b"\xef\xbb\xbf1", b"\r"])


@settings(max_examples=300, deadline=None)
@given(st.lists(LINE.map(lambda line: line.replace(b"\n", b"")), max_size=8))
def test_every_line_gives_exactly_one_item(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    """Whatever bytes a file holds: items are the lines in order, each once, less the blank ones at the end."""
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    found = items(path, b"\n".join(lines))
    while lines and not lines[-1].decode("utf-8", "surrogateescape").strip():
        lines.pop()
    assert [item.origin for item in found] == [f"f:{i}" for i in range(1, len(lines) + 1)]


@pytest.mark.parametrize(
    ("joined", "reason"), [("a,b", "repeats the header"), ("\ufeffa,b", "begins with a byte-order mark")]
)
def test_csv_files_that_were_joined_show_at_the_second_header(tmp_path: Path, joined: str, reason: str) -> None:
    """A second header is no row to train on, with the mark that spreadsheets put before it or without."""
    assert told(items(tmp_path / "f.csv", f"\ufeffa,b\n1,2\n{joined}\n3,4\n")) == [
        ("f:2", {"a": "1", "b": "2"}), f"f:3: row: {reason}: two files were joined", ("f:4", {"a": "3", "b": "4"}),
    ]  # fmt: skip


def test_a_table_with_another_separator_says_which(tmp_path: Path) -> None:
    """Spreadsheets of many countries write semicolons into what they call CSV."""
    with pytest.raises(DataError, match=r"the header 'prompt;chosen' is one column; .* separated by ';': .csv wants"):
        items(tmp_path / "f.csv", "prompt;chosen\na;b\n")
