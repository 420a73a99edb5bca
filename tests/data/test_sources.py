"""Files, folders, Parquet and hub data sets -> records with their place."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from demonstration_cases import DEMONSTRATION_CASES
from format_cases import PREFERENCE_CASES
from source_contract import Case, read, write_jsonl

from preftune.data import sources
from preftune.data.sources import open_source
from preftune.data.sources_arrow import open_hub
from preftune.errors import ConfigError, DataError
from preftune.records import Demonstration, RankedResponses, Refusal

CASES = [*PREFERENCE_CASES, *DEMONSTRATION_CASES]
ROWS = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)]


def contents(items: Any) -> list[Any]:
    """Records without their places."""
    return [item if isinstance(item, Refusal) else dataclasses.replace(item, origin="") for item in items]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.format)
def test_every_container_gives_the_same_records(case: Case, tmp_path: Path) -> None:
    """A layout is read alike from JSON Lines, a JSON list, both gzipped, and Parquet through a hub data set."""
    expected = contents(read(write_jsonl(tmp_path / "f.jsonl", case.rows), case))
    for indent in (None, 2):
        path = tmp_path / "f.json"
        path.write_text(json.dumps(case.rows, indent=indent))
        assert contents(read(path, case)) == expected
    for name in ("f.json", "f.jsonl"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert contents(read(packed, case)) == expected


@pytest.mark.parametrize("name", ["trl", "hh", "dpo_repo", "ranking", "summarize_feedback"])
def test_parquet_gives_the_same_records_with_row_numbers(name: str, tmp_path: Path) -> None:
    """Absent keys are nulls in Arrow: optional columns that are null are as good as absent."""
    import pyarrow
    from pyarrow import parquet

    case = next(case for case in PREFERENCE_CASES if case.format == name)
    rows = [row for row in case.rows if not (name == "trl" and isinstance(row["chosen"], list))]
    path = tmp_path / "f.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(_uniform(rows)), path)
    found = read(path, case)
    assert contents(found) == contents(read(write_jsonl(tmp_path / "f.jsonl", rows), case))
    assert [item.origin for item in found] == [f"{path}:row {i}" for i in range(1, len(rows) + 1)]


def _uniform(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def test_a_row_of_invalid_text_in_parquet_is_refused_alone(tmp_path: Path) -> None:
    """Arrow does not check UTF-8 when it reads; the batch is validated before a value of it is used."""
    import pyarrow
    from pyarrow import parquet

    cells = [b"good", b"b\xffd", b"fine"]
    offsets = pyarrow.array([0, 4, 7, 11], pyarrow.int32()).buffers()[1]
    chosen = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"".join(cells))])
    same = pyarrow.array(["p", "q", "r"])
    path = tmp_path / "f.parquet"
    parquet.write_table(pyarrow.table({"prompt": same, "chosen": chosen, "rejected": same}), path)
    first, refusal, last = open_source(path, kind="preferences")
    assert str(refusal).startswith(f"{path}:row 2: row: is not valid Arrow data: ")
    assert [first.responses[0].text, last.responses[0].text] == ["good", "fine"]


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    path.write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(DataError, match=rf"^{path}: cannot be read past row 0: .*; restore the file$"):
        open_source(path, kind="preferences")


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`name` is its train split, `name:split` another; rows carry name, split and number. (Loaded from a folder.)"""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub" / "pairs"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", ROWS[:3])
    write_jsonl(folder / "test.jsonl", ROWS[3:])
    rows, digest = open_hub(str(folder))
    assert [(row.origin, row.value) for row in rows()] == [
        (f"{folder}:train:row {i}", row) for i, row in enumerate(ROWS[:3], start=1)
    ]
    others, other_digest = open_hub(f"{folder}:test")
    assert [row.value for row in others()] == ROWS[3:]
    assert digest() == open_hub(f"{folder}:default:train")[1]() != other_digest()
    with pytest.raises(DataError, match=r"pairs: there is no such file or folder; on the hub: .*[Ss]plit.*"):
        open_hub(f"{folder}:nowhere")


def test_a_name_that_is_no_path_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists here is read here; what looks like a path stays one; only a bare or owner/name goes out."""
    import datasets

    asked = []

    def load(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if name == "nobody/nothing":
            raise ConnectionError("no route\nto host")
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    write_jsonl(tmp_path / "here" / "f.jsonl", ROWS)
    for name in ("owner/pairs", "owner/pairs:test", "pairs:config:test", "here"):
        source = open_source(name, kind="preferences")
        assert source.format == "trl" and len(list(source)) == 5
    assert asked == [("owner/pairs", None, "train"), ("owner/pairs", None, "test"), ("pairs", "config", "test")]
    with pytest.raises(DataError, match=r"^nobody/nothing: there is no such file.*; on the hub: no route to host$"):
        open_source("nobody/nothing", kind="preferences")
    for path in ("./owner/pairs", "a/b/c", "owner/pairs.jsonl", str(tmp_path / "none")):
        with pytest.raises(DataError, match="there is no such file or folder"):
            open_source(path, kind="preferences")
    assert len(asked) == 4


def test_a_folder_is_all_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    """Below subfolders too; hidden files, and files of other kinds, are none of it; origins name the file."""
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "c.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:3])
    (tmp_path / "0.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\np,a,b\n"))
    (tmp_path / "README.md").write_text("not data")
    write_jsonl(tmp_path / ".hidden.jsonl", ROWS)
    origins = [item.origin.removeprefix(f"{tmp_path}/") for item in open_source(tmp_path, kind="preferences")]
    assert origins == ["0.csv.gz:2", "a.jsonl:1", "a.jsonl:2", "b/c.jsonl:1"]


def test_a_scored_table_spread_over_files_keeps_every_place(tmp_path: Path) -> None:
    for name, score in (("a", 1), ("b", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "Hi", "response": name, "score": score}] * 2)
    (record,) = open_source(tmp_path, kind="preferences")
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert record.origin == f"{a}:1,2,{b}:1,{b}:2" and record.ranks == (2, 2, 1, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trian.jsonl", r"trian.jsonl: there is no such file or folder; .* has train.jsonl, void.jsonl$"),
        ("dta/train.jsonl", r"dta/train.jsonl: there is no such file or folder; .* has data$"),
        ("zzz.csv", r"zzz.csv: there is no such file or folder; .* has nothing of a similar name$"),
        ("notes.txt", r"notes.txt: files of this suffix are not read; read are: .jsonl, .json, .csv, .tsv, .parquet"),
        ("empty", r"empty: the folder holds no data file; found: nothing; read are: .jsonl"),
        ("other", r"other: the folder holds no data file; found: a.txt; read are: .jsonl"),
        ("void.jsonl", r"void.jsonl: holds no row"),
        ("data", r"data: the folder holds no data file"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_is_there(name: str, message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "void.jsonl").write_text("\n\n")
    for folder in ("empty", "other", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name, kind="preferences")


def test_a_file_without_permission_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # a test run by root may read what it likes
    with pytest.raises(DataError, match=rf"^{path}: cannot be read past line 0: .*Permission denied"):
        open_source(path, kind="preferences")


def test_an_unknown_policy_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs 'adjacnt' is unknown; allowed: all, .*did you mean adjacent"):
        open_source(tmp_path / "none.jsonl", kind="preferences", pairs="adjacnt")


def test_a_source_is_read_again_from_the_start(tmp_path: Path) -> None:
    source = open_source(write_jsonl(tmp_path / "f.jsonl", ROWS), kind="preferences")
    assert next(iter(source)) == next(iter(source))
    assert list(source) == list(source)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    """A file's is what sha256sum prints; a folder's changes with a byte, a name or a file, not with its place."""
    path = write_jsonl(tmp_path / "f.jsonl", ROWS)
    assert open_source(path, kind="preferences").sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def folder_hash(name: str, files: dict[str, list[Any]]) -> str:
        (tmp_path / name).mkdir()
        for file, rows in files.items():
            write_jsonl(tmp_path / name / file, rows)
        return open_source(tmp_path / name, kind="preferences").sha256

    base = {"a.jsonl": ROWS[:2], "b.jsonl": ROWS[2:]}
    assert folder_hash("one", base) == folder_hash("two", base)
    others = [
        {"a.jsonl": ROWS[:2], "b.jsonl": ROWS[3:]},
        {"a.jsonl": ROWS[:2], "c.jsonl": ROWS[2:]},
        {"a.jsonl": ROWS[:2]},
    ]
    assert len({folder_hash(f"other{i}", files) for i, files in enumerate(others)} | {folder_hash("again", base)}) == 4


def test_rows_that_are_plain_strings_are_text(tmp_path: Path) -> None:
    """A JSON list of strings is a corpus to continue from nothing; objects with `text` may stand among them."""
    path = tmp_path / "f.json"
    path.write_text('[\n"Once.",\n{"text": "Upon."},\n"",\n3\n]')
    source = open_source(path, kind="demonstrations", format="text")
    first, second, empty, number = source
    assert [(d.prompt, d.response.text, d.origin) for d in (first, second)] == [
        ("", "Once.", f"{path}:2"),
        ("", "Upon.", f"{path}:3"),
    ]
    assert [str(r) for r in (empty, number)] == [
        f"{path}:4: text: is empty",
        f"{path}:5: row: is the number 3, an object was expected",
    ]
    path.write_text('["Once.", "Upon."]')
    assert open_source(path, kind="demonstrations").format == "text"
    with pytest.raises(DataError, match=r"the layout is unknown. Columns found: none"):
        open_source(path, kind="preferences")


REAL = [
    # (file, layout, rows, refused by field and reason)
    (
        "hh_single_turn/helpful_train.jsonl.gz",
        "hh",
        4000,
        {"rejected: its history differs from that of chosen": 10, "rejected: is empty in its last turn": 2},
    ),
    (
        "hh_multi_turn/helpful-online.test.jsonl.gz",
        "hh",
        1137,
        {"rejected: is empty in its last turn": 3, "rejected: ends with a turn of Human": 2},
    ),
    ("tldr/validation.jsonl.gz", "trl", 3412, {}),
    ("ultrafeedback/train.jsonl.gz", "trl", 1000, {"chosen: is empty": 1, "rejected: is empty": 1}),
    ("ultrafeedback/short_val.jsonl.gz", "trl", 201, {"rejected: is empty": 1}),
    ("demo_pairs/dpo_en_demo.json", "turns", 300, {}),
]


@pytest.mark.parametrize(("name", "layout", "rows", "refused"), REAL, ids=[name for name, *_ in REAL])
def test_real_preferences_are_read_row_by_row(
    name: str, layout: str, rows: int, refused: dict[str, int], shared: Path
) -> None:
    """Public data sets as published: the layout is detected and every row is a record or a counted refusal."""
    source = open_source(shared / "data" / name, kind="preferences")
    items = list(source)
    assert (source.format, len(items)) == (layout, rows)
    refusals = [f"{item.field}: {item.reason}" for item in items if isinstance(item, Refusal)]
    assert Counter(next(r for r in refused if text.startswith(r)) for text in refusals) == refused
    assert sum(isinstance(item, RankedResponses) for item in items) == rows - len(refusals)


@pytest.mark.parametrize(("name", "rows"), [("text/tinystories_1000.json", 1000), ("imdb/train.jsonl.gz", 25_000)])
def test_real_text_is_read_as_demonstrations(name: str, rows: int, shared: Path) -> None:
    source = open_source(shared / "data" / name, kind="demonstrations")
    assert source.format == "text"
    items = list(source)
    assert len(items) == rows and all(isinstance(item, Demonstration) and item.prompt == "" for item in items)


def test_answers_marked_bad_are_no_demonstrations(shared: Path) -> None:
    """LLaMA-Factory's unpaired sample: half of its conversations are thumbs down, and each is refused as such."""
    items = list(open_source(shared / "data/demo_pairs/kto_en_demo.json", kind="demonstrations"))
    refusals = [item for item in items if isinstance(item, Refusal)]
    assert len(items) == 300 and len(refusals) == 150
    assert {refusal.field for refusal in refusals} == {"label"}
    assert sources.ROWS_TO_DETECT < 300


def test_real_unpaired_data_are_read_row_by_row(shared: Path) -> None:
    """LLaMA-Factory's unpaired sample as published: conversations, half of them thumbs down, none refused."""
    source = open_source(shared / "data/demo_pairs/kto_en_demo.json", kind="preferences")
    items = list(source)
    assert source.format == "unpaired" and len(items) == 300
    assert Counter(item.desirable for item in items) == {True: 150, False: 150}
