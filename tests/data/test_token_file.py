"""Groups on disk are the groups that were written, and cost next to nothing until they are looked at."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level
from test_packing import a_group

from preftune.data import doctor, token_file
from preftune.data.columns import COLUMNS, fed, measured
from preftune.data.doctor import prepare
from preftune.data.packing import StepPlan
from preftune.data.token_file import Entry, TokenGroups, TokenRows, TokenWriter
from preftune.data.tokens import TokenRow
from preftune.records import RankedResponses, Response
from preftune.tensors import TokenGroup

ROWS_AT_ONCE = 5


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows are several record batches."""
    monkeypatch.setattr(token_file, "ROWS_AT_ONCE", ROWS_AT_ONCE)


def entry(group: TokenGroup, number: int) -> Entry:
    digest = number.to_bytes(16)
    return Entry(
        group=group, position=number + 1, key=digest, content=digest[::-1], claims=[2**64 - 1, number][: number % 3],
        gaps=[-number], annotator=f"ann {number}", field="chosen", oddities=number, counts=[number, 1],
    )  # fmt: skip


def write(folder: Path, groups: list[TokenGroup], kept: list[int]) -> TokenGroups:
    writer = TokenWriter(folder / "tokens.arrow")
    for number, group in enumerate(groups):
        writer.add(entry(group, number))
    writer.close()
    np.save(folder / "rows.npy", np.array(kept, dtype=np.int64))
    return TokenGroups(folder / "tokens.arrow", folder / "rows.npy")


def content(group: TokenGroup) -> list[Any]:
    """Every field, arrays as lists with their type."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return [str(value.dtype), *value.tolist()]
        return [plain(item) for item in value] if isinstance(value, tuple) else (type(value), value)

    return [plain(getattr(group, field.name)) for field in fields(group)]


OPTIONAL: list[dict[str, Any]] = [
    {},
    {"ranks": (1, 2), "scores": (0.1, -2.5e-300), "weight": 0.1, "origin": "d\udcff/\u00e9.jsonl:7"},
    {"ranks": (1, 1), "origin": "a.csv:2,3"},
]


@given(st.lists(a_group(), max_size=23), st.data())
@settings(max_examples=40, deadline=None)
def test_groups_come_back_as_they_were(groups: list[TokenGroup], data: st.DataObject) -> None:
    """Field by field, types included, by index, slice and iteration; also when some rows were left out."""
    import tempfile

    two = (np.array([1], np.int32), np.array([2, 3], np.int32))
    groups += [TokenGroup(two[0], two, ((0, 1),), **more) for more in OPTIONAL]
    groups += [TokenGroup(two[0], two[:1], labels=(True,)), TokenGroup(two[1], two, labels=(False,), mismatched=1)]
    kept = sorted(data.draw(st.sets(st.integers(0, len(groups) - 1))))
    with tempfile.TemporaryDirectory() as folder:
        found = write(Path(folder), groups, kept)
    expected = [groups[row] for row in kept]
    assert len(found) == len(kept)
    assert [content(group) for group in found] == [content(group) for group in expected]
    assert [content(group) for group in found[1::2]] == [content(group) for group in expected[1::2]]
    for name in COLUMNS:
        assert found.column(name).tolist() == measured(expected, name).tolist(), name
    assert found.prompt_keys() == {row.to_bytes(16).hex() for row in kept}
    with pytest.raises(IndexError):
        found[len(kept)]


def test_what_the_doctor_notes_comes_back(tmp_path: Path) -> None:
    """Columns whole, over several batches, the last one short; lists of the rows that are kept."""
    groups = [TokenGroup(np.array([1], np.int32), (), origin=f"f:{n}") for n in range(12)]
    write(tmp_path, groups, [])
    rows = TokenRows(tmp_path / "tokens.arrow")
    assert len(rows) == 12
    assert rows.column("position", np.int64).tolist() == list(range(1, 13))
    assert rows.column("key", "S16")[11] == bytes(15) + b"\x0b"
    assert rows.text("annotator", 10) == "ann 10" and rows.value("oddities", 7) == 7
    kept = np.arange(12) % 2 == 1
    assert np.concatenate(list(rows.lists("claims", kept))).tolist() == [
        2**64 - 1,
        2**64 - 1,
        5,
        2**64 - 1,
        2**64 - 1,
        11,
    ]
    assert np.concatenate(list(rows.lists("gaps", kept))).tolist() == [-1, -3, -5, -7, -9, -11]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux, which tells what is mapped")
def test_columns_leave_no_page_of_the_tokens_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of a file larger than memory is read through; groups that were looked at before stay what they are."""
    monkeypatch.setattr(token_file, "BATCHES_MAPPED", 2)
    ids = np.arange(2000, dtype=np.int32)
    groups = write(tmp_path, [TokenGroup(ids[: 1000 + n], (ids[:50],)) for n in range(400)], list(range(400)))
    before = groups[7]
    assert groups.column("prompt").tolist() == list(range(1000, 1400))
    assert mapped(tmp_path / "tokens.arrow") < (tmp_path / "tokens.arrow").stat().st_size / 10
    assert before.prompt.tolist() == list(range(1007)) and groups[399].prompt.tolist() == list(range(1399))


def mapped(path: Path) -> int:
    """Bytes of the file that are resident in this process."""
    of_file, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            of_file = line.endswith(str(path))
        elif of_file and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def pair(number: int) -> RankedResponses:
    prompt = f"the {number}"
    responses = Response(text=" cat" * (1 + number % 7)), Response(text=" dog")
    return RankedResponses(prompt=prompt, responses=responses, ranks=(1, 2), origin=f"data/train.jsonl:{number + 1}")


class Tokenised:
    """In place of the encoder: rows of 20 to 60 tokens, made when they are asked for."""

    def __init__(self, _: Any) -> None:
        pass

    def encode(self, numbers: range, _: Any) -> Iterator[TokenRow]:
        for number in numbers:
            ids = np.arange(number, number + 40, dtype=np.int32)
            responses = ids[: 10 + number % 7].copy(), ids[20:].copy()
            group = TokenGroup(ids[:10].copy(), responses, ((0, 1),), ranks=(1, 2), origin=f"train.jsonl:{number + 1}")
            yield TokenRow(pair(number), group, ("chosen", "rejected"), (True, True), frozenset())


def test_what_is_held_of_a_row_is_a_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of examining, reading and planning, the peak grows by less than 100 bytes a row, where a group takes 1,500.

    The slope from 1,000 to 6,000 rows, as Python and numpy allocate.
    """
    monkeypatch.setattr(token_file, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(doctor, "Encoder", Tokenised)
    tokenizer: Any = SimpleNamespace(bos_token_id=None)

    def peak(rows: int) -> int:
        tracemalloc.start()
        groups = prepare(range(rows), tokenizer, max_length=64, truncation="refuse").groups  # type: ignore[arg-type]
        plan = StepPlan(groups, batch_size=8, seed=0, shuffle=True)
        assert len(groups) == rows == fed(groups).size and len(plan.groups_of(0, 3)) == 8
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(600)
    small, large = peak(1000), peak(6000)
    assert (large - small) / 5000 < 100


def test_rows_that_only_share_a_short_digest_are_no_copies_and_no_opposites(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all 64-bit digests equal, but for the direction of a comparison, the full content decides."""
    real = doctor._content
    monkeypatch.setattr(doctor, "_opposable", lambda claim: 2 + (claim[1] < claim[2]))
    monkeypatch.setattr(doctor, "_content", lambda *of: bytes(8) + real(*of)[8:])
    rows = [*map(pair, range(40)), replace(pair(3), origin="copy")]
    report = prepare(rows, byte_level(), max_length=64, truncation="refuse").report
    assert (report.used, report.refused) == (40, 0)
    assert list(map(str, report.duplicates)) == ["copy: row: is a copy of data/train.jsonl:4"]
