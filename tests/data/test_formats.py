"""Layouts -> records: one contract for all, and what each layout alone promises."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from demonstration_cases import DEMONSTRATION_CASES
from format_cases import PREFERENCE_CASES, said
from hypothesis import given, settings
from hypothesis import strategies as st
from source_contract import Case, check_source, read, write_jsonl

from preftune.data import fields
from preftune.data.demonstrations import DEMONSTRATIONS
from preftune.data.fields import Row
from preftune.data.formats import PREFERENCES
from preftune.data.layouts import detect
from preftune.data.sources import open_source
from preftune.errors import ConfigError, DataError
from preftune.records import Demonstration, LabelledResponse, RankedResponses, Refusal

CASES = [*PREFERENCE_CASES, *DEMONSTRATION_CASES]
LAYOUTS = {"preferences": PREFERENCES, "demonstrations": DEMONSTRATIONS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.format)
def test_layout_keeps_the_contract(case: Case, tmp_path: Path) -> None:
    """Known rows come back, every row is accounted for, a flawed field is named at its line, the order is fixed."""
    check_source(case, tmp_path)


def test_every_layout_has_a_case() -> None:
    assert [case.format for case in PREFERENCE_CASES] == list(PREFERENCES)
    assert {case.format for case in CASES} == DEMONSTRATIONS.keys() | {"unpaired"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text("a \n\0\ud800", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[Case, Any]:
    """A good row of some layout, with one value anywhere inside replaced by any JSON value, or removed."""
    case = draw(st.sampled_from(CASES))
    row = inside = copy.deepcopy(draw(st.sampled_from(case.rows)))
    while True:
        key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if not isinstance(inside[key], dict | list) or not inside[key] or draw(st.booleans()):
            break
        inside = inside[key]
    if draw(st.integers(0, 4)) == 0:
        del inside[key]
    else:
        inside[key] = draw(JSON)
    return case, row


@settings(max_examples=400, deadline=None)
@given(damaged())
def test_whatever_a_row_holds_it_is_a_record_or_a_refusal(example: tuple[Case, Any]) -> None:
    """Never an exception, never nothing: as preferences and as demonstrations, one item for the row."""
    case, row = example
    for kind in ("preferences", "demonstrations"):
        if case.format in LAYOUTS[kind]:
            (item,) = LAYOUTS[kind][case.format].items([Row("f:1", row)])
            assert item.origin == "f:1"
            assert isinstance(item, RankedResponses | LabelledResponse | Demonstration | Refusal)
            if isinstance(item, RankedResponses | LabelledResponse):
                several = item.responses if isinstance(item, RankedResponses) else [item.response]
                texts = [response.text for response in several]
                assert all(text.strip() and text.encode() and "\0" not in text for text in texts)


WORDS = st.lists(st.sampled_from(["a", "ab", "b", "blue", " ", "  ", "\n", "big", "."]), max_size=8).map("".join)


@settings(max_examples=500, deadline=None)
@given(WORDS, WORDS, WORDS)
def test_an_implicit_prompt_never_corrupts_a_text(start: str, one: str, other: str) -> None:
    """Prompt + response is the text to the character, no word is torn, and both responses keep a word."""
    chosen, rejected = start + one, start + other
    row = Row("f:1", {"chosen": chosen, "rejected": rejected})
    (item,) = PREFERENCES["trl_implicit"].items([row])
    ends_of_words = [
        cut
        for cut in range(1, min(len(chosen), len(rejected)))
        if chosen[:cut] == rejected[:cut] and not chosen[cut - 1].isspace()
        and all(text[cut].isspace() and text[cut:].strip() for text in (chosen, rejected))
    ]  # fmt: skip
    if not ends_of_words:
        assert isinstance(item, Refusal) and item.field in ("prompt", "chosen", "rejected")
        return
    assert isinstance(item, RankedResponses) and item.prompt == chosen[: max(ends_of_words)]
    assert [item.prompt + response.text for response in item.responses] == [chosen, rejected]


def test_a_transcript_is_prompt_plus_response_to_the_character(shared: Path) -> None:
    """Anthropic's official multi-turn test split: what is read joins to what the file holds, leading space included."""
    path = shared / "data/hh_multi_turn/harmless-base.test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    for row, item in zip(rows, open_source(path, kind="preferences"), strict=True):
        if isinstance(item, RankedResponses):
            assert item.prompt.endswith("\n\nAssistant:")
            whole = [item.prompt + response.text for response in item.responses]
            assert whole == [row["chosen"], row["rejected"]]


def test_messages_that_differ_before_the_response_are_refused_with_the_reason(tmp_path: Path) -> None:
    """Only the final assistant message may differ: another common history would train on a prompt of one side."""
    chosen = [said("user", "Hi"), said("assistant", "Yes?"), said("user", "A"), said("assistant", "a")]
    rejected = [said("user", "Hi"), said("assistant", "No?"), said("user", "A"), said("assistant", "b")]
    path = write_jsonl(tmp_path / "f.jsonl", [{"chosen": chosen, "rejected": rejected}])
    (refusal,) = open_source(path, kind="preferences", format="trl_implicit")
    assert str(refusal) == (
        f"{path}:1: rejected: its earlier messages differ from those of chosen, only the final one may differ"
    )


def test_a_null_field_is_reported_as_file_line_field_reason(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": None, "rejected": "b"}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    _, refusal = open_source(path, kind="preferences")
    assert str(refusal) == f"{path}:2: chosen: is null, a string or a list of messages was expected"


def test_a_text_beyond_the_limit_is_refused_by_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "MAX_TEXT_CHARS", 10)
    row = Row("f:1", {"prompt": "0123456789", "chosen": "0123456789a", "rejected": "b"})
    (refusal,) = PREFERENCES["trl"].items([row])
    assert str(refusal) == "f:1: chosen: has 11 characters, at most 10 were expected"


def test_a_preference_in_which_all_tie_is_refused_but_demonstrates_its_first_response(tmp_path: Path) -> None:
    """A tie has no pair, never an arbitrary winner; as a demonstration the first of equally good answers serves."""
    path = write_jsonl(tmp_path / "f.jsonl", [{"prompt": "Hi", "responses": ["a", "b"], "ranking": [1, 1]}])
    (refusal,) = open_source(path, kind="preferences")
    reason = "orders none of the 2 responses above another, so there is no pair"
    assert refusal == Refusal(origin=f"{path}:1", field="ranking", reason=reason)
    (item,) = open_source(path, kind="demonstrations")
    assert isinstance(item, Demonstration) and item.response.text == "a"


def test_a_pair_policy_is_written_into_the_records(tmp_path: Path) -> None:
    """`all` leaves the ranks to speak; another policy states its pairs, and explicit pairs of a row stay."""
    rows = [
        {"prompt": "Hi", "responses": ["a", "b", "c"], "ranking": [3, 1, 2]},
        {"prompt": "Ho", "responses": ["a", "b", "c"], "ranking": [3, 1, 2], "pairs": [[0, 1]]},
    ]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    pairs = {
        p: [r.pairs for r in open_source(path, kind="preferences", pairs=p)] for p in ("all", "adjacent", "best_worst")
    }
    assert pairs == {
        "all": [None, ((0, 1),)],
        "adjacent": [((1, 2), (2, 0)), ((0, 1),)],
        "best_worst": [((1, 0),), ((0, 1),)],
    }
    drawn = {
        seed: next(iter(open_source(path, kind="preferences", pairs="best_random", seed=seed))) for seed in range(20)
    }
    assert {record.pairs for record in drawn.values()} == {((1, 0),), ((1, 2),)}


def test_the_layout_is_what_most_of_the_first_rows_are(tmp_path: Path) -> None:
    """A flawed first row is refused as a row; it does not decide, or hide, what the file is."""
    rows = [{"chosen": "a"}, *[{"prompt": "Hi", "chosen": "a", "rejected": str(i)} for i in range(3)]]
    source = open_source(write_jsonl(tmp_path / "f.jsonl", rows), kind="preferences")
    assert source.format == "trl"
    assert [isinstance(item, Refusal) for item in source] == [True, False, False, False]


def test_an_unknown_layout_lists_the_columns_found_and_those_wanted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"question": "Hi", "good": "a", "bad\x1b[2J": "b"}])
    with pytest.raises(DataError) as error:
        open_source(path, kind="preferences")
    message = str(error.value)
    assert f"{path}: the layout is unknown. Columns found: question, good, 'bad\\x1b[2J'" in message
    assert all(f"\n  {name}: {layout.columns}" in message for name, layout in PREFERENCES.items())


def test_an_ambiguous_layout_has_to_be_named(tmp_path: Path) -> None:
    """Preferences that carry the conversation as well are two kinds of demonstration; the user chooses."""
    row = {"prompt": "Hi", "completion": "c", "messages": [said("user", "Hi"), said("assistant", "m")]}
    path = write_jsonl(tmp_path / "f.jsonl", [row])
    with pytest.raises(
        DataError, match=r"fit prompt_completion and messages equally well.*format=prompt_completion or"
    ):
        open_source(path, kind="demonstrations")
    answers = {}
    for name in ("prompt_completion", "messages"):
        (item,) = open_source(path, kind="demonstrations", format=name)
        answers[name] = item.response.text
    assert answers == {"prompt_completion": "c", "messages": "m"}


def test_each_layout_is_detected_among_all_others() -> None:
    """No case of one layout is taken for another, as preferences or as demonstrations."""
    for case in CASES:
        for kind, layouts in LAYOUTS.items():
            if case.format in layouts:
                assert detect([Row("f:1", row) for row in case.rows], layouts, "f") == case.format, (case.format, kind)


def test_the_examples_of_the_documentation_are_read_as_what_they_stand_under(tmp_path: Path) -> None:
    """docs/data.md: two rows below each layout's name, all of them records, detected as that layout."""
    examples: dict[str, list[str]] = {}
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for line in page.splitlines():
        if named := re.match(r"\*\*`(\w+)`\*\*", line):
            name = named[1]
        elif line.startswith(("    {", '    "')):
            examples.setdefault(name, []).append(line.strip())
    assert examples.keys() == PREFERENCES.keys() | DEMONSTRATIONS.keys()
    for name, rows in examples.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows))
        source = open_source(path, kind="preferences" if name in PREFERENCES else "demonstrations")
        assert source.format == name and len(rows) == 2
        assert not [item for item in source if isinstance(item, Refusal)]


def test_a_label_beside_a_score_has_to_be_named(tmp_path: Path) -> None:
    """A row with both could be ranked among its prompt's or judged alone; the user says which."""
    rows = [{"prompt": "Hi", "response": r, "score": s, "label": s > 0} for r, s in (("a", 1), ("b", -1))]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    with pytest.raises(DataError, match=r"fit scored_table and unpaired equally well.*format=unpaired"):
        open_source(path, kind="preferences")
    assert [item.desirable for item in open_source(path, kind="preferences", format="unpaired")] == [True, False]
    (record,) = open_source(path, kind="preferences", format="scored_table")
    assert record.ranks == (1, 2)


def test_a_pair_that_carries_a_label_stays_a_pair(tmp_path: Path) -> None:
    """Class labels and the like beside chosen and rejected are ignored, as they were."""
    path = write_jsonl(
        tmp_path / "f.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b", "response": "c", "label": 1}]
    )
    assert open_source(path, kind="preferences").format == "trl"


def test_labels_in_a_csv_are_read_from_text(tmp_path: Path) -> None:
    """In cells, and only there; what pandas and spreadsheets write counts, anything else is refused by its place."""
    path = tmp_path / "f.csv"
    path.write_text(
        "prompt,completion,label,annotator\nHi,a,True,\nHi,b,FALSE,ann\nHi,c,1,\nHi,d,0,\nHi,e,-1,\nHi,f,,\n"
    )
    *records, minus, empty = open_source(path, kind="preferences")
    assert [(r.response.text, r.desirable, r.annotator) for r in records] == [
        ("a", True, ""), ("b", False, "ann"), ("c", True, ""), ("d", False, "")
    ]  # fmt: skip
    assert [(r.origin, r.field) for r in (minus, empty)] == [(f"{path}:6", "label"), (f"{path}:7", "label")]
    assert minus.reason.endswith("true or false (1 or 0) was expected")
    shown = list(open_source(path, kind="demonstrations"))
    assert [isinstance(item, Refusal) for item in shown] == [False, True, False, True, False, False]
    assert str(shown[1]) == f"{path}:3: label: is false: an answer marked as bad is no demonstration"


def test_an_unknown_format_is_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match=r"format 'trll' is unknown; allowed: auto, trl, .*did you mean trl\?"):
        open_source(path, kind="preferences", format="trll")
    with pytest.raises(ConfigError, match=r"format 'text' is unknown; allowed: auto, trl"):
        open_source(path, kind="preferences", format="text")


def test_a_row_of_another_layout_is_refused_not_reinterpreted(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.format == "trl")
    rows = [*case.rows, {"prompt": "Hi", "responses": ["a", "b"], "ranking": [1, 2]}]
    *good, last = read(write_jsonl(tmp_path / "f.jsonl", rows), case)
    assert not any(isinstance(item, Refusal) for item in good)
    assert isinstance(last, Refusal) and last.field == "chosen"


LOST = {
    "question": {"chosen": "It is blue.", "rejected": "It is big.", "question": "What colour is the sky?"},
    "system": {"prompt": "Hi", "chosen": "Arr", "rejected": "Hello", "system": "Speak like a pirate."},
    "input": {"prompt": "Add.", "chosen": "3", "rejected": "4", "input": "1 2"},
    "history": {"instruction": "And now?", "output": "Now too.", "history": [["Is it raining?", "Yes."]]},
    "context": {"prompt": "Who won?", "response": "Rome", "score": 1, "context": "Rome and Carthage were at war."},
}


@pytest.mark.parametrize("column", LOST)
def test_words_of_the_prompt_that_a_layout_does_not_read_refuse_the_row(tmp_path: Path, column: str) -> None:
    """A question, system prompt or history in a column of its own is never left out in silence."""
    kind = "demonstrations" if column == "history" else "preferences"
    path = write_jsonl(tmp_path / "f.jsonl", [LOST[column], {**LOST[column], column: LOST[column][column] or "x"}])
    told = [str(item) for item in open_source(path, kind=kind)]
    assert [line.partition(": holds words that this layout does not read")[0] for line in told] == [
        f"{path}:1: {column}", f"{path}:2: {column}"
    ]  # fmt: skip


def test_a_column_that_repeats_the_prompt_or_holds_no_words_is_metadata(tmp_path: Path) -> None:
    """Many sets carry the question again beside the conversation, an empty system prompt, or facts about the source."""
    said_too = {"question": " What is it? ", "system": "", "history": [], "context": {"source": "web"}, "input": None}
    row = {"prompt": "Be short. What is it?", "chosen": "a", "rejected": "b", **said_too}
    (item,) = open_source(write_jsonl(tmp_path / "f.jsonl", [row]), kind="preferences")
    assert isinstance(item, RankedResponses)
