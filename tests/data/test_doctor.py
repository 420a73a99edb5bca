"""The doctor: no row vanishes, every refusal names its place, truncation is counted by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, family

from preftune.data.conversations import prompt_key
from preftune.data.doctor import DataReport, Prepared, check_refusals, prepare
from preftune.data.report import ODDITIES
from preftune.data.truncation import Truncation
from preftune.errors import ConfigError, DataError
from preftune.records import Demonstration, LabelledResponse, Message, RankedResponses, Refusal, Response
from preftune.tensors import TokenGroup

TOKENIZER = byte_level()
Item = RankedResponses | LabelledResponse | Demonstration | Refusal


def pair(prompt: Any, chosen: str, rejected: str, **settings: Any) -> RankedResponses:
    return RankedResponses(
        prompt=prompt, responses=(Response(text=chosen), Response(text=rejected)), ranks=(1, 2), **settings
    )


def ranking(*ranks: int, texts: str = "abcdefgh", **settings: Any) -> RankedResponses:
    responses = tuple(Response(text=f" {text}") for text in texts[: len(ranks)])
    return RankedResponses(prompt="the cat", responses=responses, ranks=ranks, **settings)


def doctor(*rows: Item, max_length: int = 100, truncation: Truncation = "refuse", **settings: Any) -> Prepared:
    """The rows stand in lines 1, 2, ... of f."""
    for line, row in enumerate(rows, start=1):
        object.__setattr__(row, "origin", f"f:{line}")
    return prepare(rows, TOKENIZER, max_length=max_length, truncation=truncation, **settings)


def refusals(report: DataReport) -> list[str]:
    return [str(refusal) for refusal in report.refusals]


def oddities(report: DataReport) -> dict[str, int]:
    return {oddity.name: oddity.rows for oddity in report.oddities}


def counts(report: DataReport) -> tuple[int, int, int, int, int]:
    return report.rows, report.used, report.refused, report.truncated, report.duplicate


GOOD = ("the cat", " sat on the mat", " ran")


def test_good_rows_are_used_as_they_are() -> None:
    """The plain case: groups in order, nothing to remark."""
    prepared = doctor(pair(*GOOD), pair("the dog", " ran", " sat"))
    assert counts(prepared.report) == (2, 2, 0, 0, 0)
    assert [group.origin for group in prepared.groups] == ["f:1", "f:2"]
    assert (prepared.report.pairs, prepared.report.responses, prepared.report.prompts) == (2, 4, 2)
    assert prepared.report.tokens == sum(len(g.prompt) + sum(map(len, g.responses)) for g in prepared.groups)
    assert oddities(prepared.report) == {}


FLAWS: list[tuple[str, list[Item], list[str]]] = [
    ("source", [Refusal(origin="", field="chosen", reason="is missing")], ["f:1: chosen: is missing"]),
    ("empty", [pair("the cat", "\n", " ran")], ["f:1: chosen: is empty or only white space"]),
    ("identical", [pair("the cat", " sat", " sat")], ["f:1: rejected: has the same tokens as chosen"]),
    ("identical but for the mark", [pair("the cat", " sat</s>", " sat")], ["f:1: rejected: has the same tokens"]),
    ("tie", [ranking(1, 1)], ["f:1: ranks: every response ties"]),
    ("tie of four", [ranking(2, 2, 2, 2)], ["f:1: ranks: every response ties"]),
    ("identical in a ranking", [ranking(1, 2, 3, texts="aba")], ["f:1: responses[2]: has the same tokens as respo"]),
    ("pair stated twice", [ranking(1, 2, pairs=((0, 1), (0, 1)))], ["f:1: pairs: the same pair is stated twice"]),
    ("pair and opposite", [ranking(1, 1, pairs=((0, 1), (1, 0)))], ["f:1: pairs: (0, 1) and its opposite are both"]),
    (
        "contradiction",
        [pair(*GOOD), pair("the dog", " a", " a"), pair("the cat", GOOD[2], GOOD[1])],
        [
            "f:1: chosen: f:3 prefers the other one of the same two",
            "f:2: rejected: has the same tokens",
            "f:3: chosen: f:1 prefers the other one",
        ],
    ),
    (
        "contradiction with a ranking",
        [ranking(1, 2, 3), pair("the cat", " c", " a")],
        ["f:1: pairs: f:2 prefers the other one", "f:2: chosen: f:1 prefers the other one"],
    ),
    (
        "too long",
        [pair("the cat", " sat" * 60, " ran")],
        ["f:1: length: 3 prompt + 61 response tokens = 64, above max"],
    ),
    ("smuggled mark", [pair("the cat", " a", " b<s>")], ["f:1: rejected: spells the special token '<s>'"]),
    ("demonstration", [Demonstration(prompt="a", response=Response(text=""))], ["f:1: response: is empty or only"]),
]


@pytest.mark.parametrize(("rows", "expected"), [flaw[1:] for flaw in FLAWS], ids=[flaw[0] for flaw in FLAWS])
def test_every_flaw_is_refused_with_its_place_and_never_trained_on(rows: list[Item], expected: list[str]) -> None:
    """file:line: field: reason, in the order of the file; the good rows beside it stay."""
    prepared = doctor(*rows, max_length=50)
    found = refusals(prepared.report)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
    refused = {line.split(": ")[0] for line in found}
    assert not refused & {group.origin for group in prepared.groups}
    assert len(prepared.groups) == len(rows) - len(expected) == prepared.report.used


def test_an_exact_copy_is_left_out_and_counted() -> None:
    """The first of the copies is kept; the sides' order in the source does not hide a copy."""
    swapped = RankedResponses(prompt=GOOD[0], responses=(Response(text=GOOD[2]), Response(text=GOOD[1])), ranks=(2, 1))
    prepared = doctor(pair(*GOOD), pair(*GOOD), swapped, Demonstration(prompt="a", response=Response(text="b")))
    assert counts(prepared.report) == (4, 2, 0, 0, 2)
    assert [str(d) for d in prepared.report.duplicates] == ["f:2: row: is a copy of f:1", "f:3: row: is a copy of f:1"]
    assert [group.origin for group in prepared.groups] == ["f:1", "f:4"]


def test_rows_that_differ_in_weight_or_annotator_are_no_copies() -> None:
    """Two people saying the same are two votes."""
    report = doctor(pair(*GOOD), pair(*GOOD, weight=2.0), pair(*GOOD, annotator="ann")).report
    assert counts(report) == (3, 3, 0, 0, 0)


def test_two_annotators_may_disagree_and_one_may_not() -> None:
    """Disagreement between people is data, and reported; within one person it is an error."""
    opposite = (GOOD[0], GOOD[2], GOOD[1])
    report = doctor(pair(*GOOD, annotator="ann"), pair(*opposite, annotator="bob")).report
    assert counts(report) == (2, 2, 0, 0, 0)
    assert oddities(report) == {"annotators disagree": 2}
    same = doctor(pair(*GOOD, annotator="ann"), pair(*opposite, annotator="ann")).report
    assert counts(same) == (2, 0, 2, 0, 0)


def test_a_contradicted_copy_is_a_copy() -> None:
    """It is left out as one, and contradicts nobody a second time; each reason names the first that says otherwise."""
    opposite = (GOOD[0], GOOD[2], GOOD[1])
    report = doctor(pair(*GOOD), pair(*opposite), pair(*GOOD), pair(*opposite, weight=2.0)).report
    assert counts(report) == (4, 0, 3, 0, 1)
    other = "prefers the other one of the same two responses"
    assert refusals(report) == [f"f:{i}: chosen: f:{j} {other}" for i, j in ((1, 2), (2, 1), (4, 1))]
    assert [str(d) for d in report.duplicates] == ["f:3: row: is a copy of f:1"]


def test_rows_with_one_prompt_stay_rows() -> None:
    """Nothing is merged silently: two comparisons on one prompt are two groups."""
    prepared = doctor(pair("the cat", " a", " b"), pair("the cat", " a", " c"))
    assert [group.origin for group in prepared.groups] == ["f:1", "f:2"]
    assert prepared.report.prompts == 1


def test_a_prompt_of_the_evaluation_set_is_never_trained_on() -> None:
    """The held-out report names its prompts; white space does not hide one."""
    held_out = doctor(pair("the cat", " x", " y"), pair("the", " a", " a"))
    assert held_out.prompt_keys == {prompt_key("the cat")}
    report = doctor(pair("the  cat\n", " a", " b"), pair("the", " a", " b"), held_out=held_out.prompt_keys).report
    assert refusals(report)[0].startswith("f:1: prompt: stands in the evaluation data too")
    assert counts(report) == (2, 1, 1, 0, 0)


LONG = pair("the cat " * 8, " sat on the mat" * 4, " ran")


def lengths(group: TokenGroup) -> tuple[int, ...]:
    return (len(group.prompt), *map(len, group.responses))


def whole() -> TokenGroup:
    return doctor(LONG).groups[0]


def test_truncating_the_prompt_keeps_its_right_end_and_its_bos() -> None:
    """All responses keep one shared prompt: BOS and the last tokens; responses are untouched."""
    full = whole()
    limit = sum(lengths(full)[:2]) - 3
    prepared = doctor(LONG, pair(*GOOD), max_length=limit, truncation="prompt")
    (group, _), report = prepared.groups, prepared.report
    assert lengths(group) == (len(full.prompt) - 3, *lengths(full)[1:])
    assert group.prompt.tolist() == [0, *full.prompt[4:].tolist()]
    assert all(np.array_equal(a, b) for a, b in zip(group.responses, full.responses, strict=True))
    assert counts(report) == (2, 1, 0, 1, 0)
    assert (report.cuts.prompts, report.cuts.responses, report.cuts.eos_lost) == (1, 0, 0)


def test_truncating_responses_is_counted_by_side_and_with_lost_end_marks() -> None:
    """Only what is too long is cut, on the right; the mark goes first, and that is said."""
    full = whole()
    limit = sum(lengths(full)[:2]) - 3
    prepared = doctor(LONG, pair(*GOOD), max_length=limit, truncation="response")
    group, cuts = prepared.groups[0], prepared.report.cuts
    assert lengths(group) == (len(full.prompt), len(full.responses[0]) - 3, len(full.responses[1]))
    assert group.responses[0].tolist() == full.responses[0][:-3].tolist()
    assert counts(prepared.report) == (2, 1, 0, 1, 0)
    assert (cuts.prompts, cuts.responses, cuts.chosen, cuts.rejected, cuts.one_sided, cuts.eos_lost) == (
        0,
        1,
        1,
        0,
        1,
        1,
    )
    assert (
        "(1 pairs lost chosen tokens, 0 rejected ones, 1 only on one side); 1 responses lost their end mark"
        in " ".join(prepared.report.summary_lines())
    )


def test_an_unfinished_response_loses_no_end_mark() -> None:
    """It had none."""
    row = Demonstration(prompt="the", response=Response(text=" sat" * 20, finished=False))
    cuts = doctor(row, max_length=9, truncation="response").report.cuts
    assert (cuts.responses, cuts.eos_lost) == (1, 0)


@pytest.mark.parametrize("limit", range(2, 30))
@pytest.mark.parametrize("policy", ["prompt", "response"])
def test_truncation_fits_or_refuses_and_never_empties_a_side(limit: int, policy: Truncation) -> None:
    """At every limit: prompt + longest response fit, no side is below its minimum, or the row is refused."""
    prepared = doctor(LONG, max_length=limit, truncation=policy)
    full = lengths(whole())
    room = limit - (max(full[1:]) if policy == "prompt" else full[0])
    assert (prepared.report.truncated == 1) == (room >= (2 if policy == "prompt" else 1))
    for group in prepared.groups:
        assert len(group.prompt) + max(map(len, group.responses)) == limit
        assert min(map(len, group.responses)) >= 1
        assert group.prompt[0] == 0
    if not prepared.groups:
        assert refusals(prepared.report)[0].startswith(
            "f:1: chosen: leaves no room for the prompt: "
            if policy == "prompt"
            else "f:1: prompt: leaves no room for a"
        )


def test_responses_that_truncation_makes_identical_are_refused() -> None:
    """What is judged is what the model would see."""
    report = doctor(pair("the", " sat on a", " sat on b"), max_length=4, truncation="response").report
    assert refusals(report) == ["f:1: rejected: has the same tokens as chosen once they are truncated"]


def test_dropping_is_counted_apart_and_stops_nothing() -> None:
    """The user asked for it: the rows are refused in the accounting but need no permission."""
    prepared = doctor(LONG, pair(*GOOD), max_length=20, truncation="drop")
    report = prepared.report
    assert counts(report) == (2, 1, 1, 0, 0)
    assert str(report.dropped[0]).startswith("f:1: length: ")
    assert str(report.dropped[0]).endswith("above max_length 20; dropped on request")
    check_refusals(report, 0)
    assert "1 of the refused rows were dropped on request" in " ".join(report.summary_lines())


def test_a_limit_nothing_could_fit_is_an_error() -> None:
    """A prompt and a response need a token each."""
    with pytest.raises(ConfigError, match=r"max_length is 1; .* at least 2 tokens"):
        doctor(max_length=1)


def test_length_gap_and_percentiles() -> None:
    """Counted in tokens, end mark included, by hand."""
    report = doctor(pair("!", "....", "!"), pair("!", "..", "!!!!"), pair("!", "?!", "!?")).report
    assert report.length_gap is not None
    assert report.length_gap.mean == pytest.approx((3 - 2 + 0) / 3)
    assert (report.length_gap.chosen_longer, report.length_gap.rejected_longer) == (1 / 3, 1 / 3)
    assert (report.lengths["chosen"].longest, report.lengths["rejected"].p50, report.lengths["prompt"].mean) == (
        5,
        3,
        2,
    )
    assert report.lengths["chosen"].mean - report.lengths["rejected"].mean == pytest.approx(report.length_gap.mean)
    assert report.lengths["total"].longest == 7


def test_a_ranking_shares_its_prompt_and_counts_every_pair() -> None:
    """Ties give no pair: ranks 1 2 2 3 give five."""
    prepared = doctor(ranking(1, 2, 2, 3))
    assert len(prepared.groups[0].pairs) == prepared.report.pairs == 5
    assert (1, 2) not in prepared.groups[0].pairs
    assert prepared.report.responses == 4


ROWS = st.one_of(
    st.builds(
        pair,
        st.sampled_from(["the", "the cat", "", "the dog " * 4]),
        st.sampled_from([" a", " b", " c", " sat on the mat" * 3, "", " a</s>", "x<s>"]),
        st.sampled_from([" a", " b", " c", " sat on the mat" * 3]),
        annotator=st.sampled_from(["", "ann"]),
    ),
    st.builds(ranking, *[st.integers(1, 3)] * 3, texts=st.sampled_from(["abc", "aab", "cba"])),
    st.builds(
        lambda text: Demonstration(prompt="the", response=Response(text=text)), st.sampled_from(["", " a", " b" * 40])
    ),
    st.builds(
        lambda text, desirable: LabelledResponse(prompt="the", response=Response(text=text), desirable=desirable),
        st.sampled_from(["", " a", " b" * 40]),
        st.booleans(),
    ),
    st.builds(lambda: Refusal(origin="", field="row", reason="is not JSON")),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(ROWS, max_size=25), st.sampled_from(get_args(Truncation)), st.integers(3, 30))
def test_no_row_vanishes(rows: list[Item], truncation: Truncation, limit: int) -> None:
    """in = used + refused + truncated + duplicate for any rows, and every row left out is named exactly once."""
    prepared = doctor(*rows, max_length=limit, truncation=truncation, held_out=[prompt_key("the cat")])
    report = prepared.report
    assert report.rows == len(rows) == report.used + report.refused + report.truncated + report.duplicate
    assert len(prepared.groups) == report.used + report.truncated
    named = [r.origin for r in (*report.refusals, *report.dropped, *report.duplicates)]
    trained = [group.origin for group in prepared.groups]
    assert sorted(named + trained) == sorted(f"f:{line}" for line in range(1, len(rows) + 1))
    assert [int(r.origin[2:]) for r in report.refusals] == sorted(int(r.origin[2:]) for r in report.refusals)
    for group in prepared.groups:
        assert len(group.prompt) + max(map(len, group.responses)) <= limit
        assert all(not np.array_equal(group.responses[w], group.responses[l]) for w, l in group.pairs)
    stated = {
        (g.prompt.tobytes(), g.responses[w].tobytes(), g.responses[l].tobytes())
        for g in prepared.groups
        for w, l in g.pairs
    }
    labels = {(g.prompt.tobytes(), g.responses[0].tobytes(), g.labels) for g in prepared.groups if g.labels}
    assert not any((prompt, text, (not label,)) in labels for prompt, text, (label,) in labels)
    contradictions = sum((prompt, l, w) in stated for prompt, w, l in stated)
    assert contradictions == 0 or "annotators disagree" in oddities(report)


def test_the_report_is_json_and_complete() -> None:
    """What the run card stores: every refusal, every count, every meaning."""
    rows = [pair("the", f" {i}", f" {i}") for i in range(50)]
    report = doctor(*rows, pair("", " a", " b"), pair("", " a", " b")).report
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored == report.to_dict()
    assert stored["refusals"][49] == "f:50: rejected: has the same tokens as chosen"
    assert stored["duplicates"] == ["f:52: row: is a copy of f:51"]
    assert (stored["rows"], stored["used"], stored["refused"], stored["truncated"], stored["duplicate"]) == (
        52,
        1,
        50,
        0,
        1,
    )
    assert stored["oddities"] == [
        {"name": "empty prompt", "rows": 1, "first": ["f:51"], "meaning": ODDITIES["empty prompt"]}
    ]
    assert report.summary_lines()[0] == "52 rows = 1 used + 50 refused + 0 truncated + 1 duplicate"


def test_refused_rows_stop_the_run_and_say_what_to_do(tmp_path: Path) -> None:
    """First 20, the total, the way out; all of them in the file; an allowance lets them go."""
    report = doctor(*[pair("the", f" {i}", f" {i}") for i in range(25)], pair("the", " a", " b")).report
    with pytest.raises(DataError) as stop:
        check_refusals(report, 24, tmp_path / "refused.txt")
    lines = str(stop.value).split("\n")
    assert lines[0].startswith("25 of 26 rows are refused, 24 allowed; the full list is in ")
    assert lines[20] == "  f:20: rejected: has the same tokens as chosen"
    assert lines[21:] == ["  ... and 5 more", "Repair or remove them, or train without them: --allow-refused 25"]
    assert (tmp_path / "refused.txt").read_text().splitlines() == refusals(report)
    check_refusals(report, 25)


def test_nothing_left_is_an_error_even_when_allowed() -> None:
    """An allowance for all rows is not a data set, and where it would be one it is not advised."""
    report = doctor(pair("the", " a", " a")).report
    with pytest.raises(DataError, match=r"(?s)none of 1 rows is left to use.*f:1: rejected"):
        check_refusals(report, 5)
    with pytest.raises(DataError, match=r"\nNo row is left: what they have in common is to be repaired in the file$"):
        check_refusals(report, 0)


def test_conversations_go_through_the_same_examination() -> None:
    """Messages and plain strings differ in rendering only."""
    prompt = (Message(role="user", content="the cat"),)
    row = pair(prompt, "sat", "ran", origin="f:1")
    prepared = prepare([row, row], family("chatml"), max_length=100, truncation="refuse")
    assert counts(prepared.report) == (2, 1, 0, 0, 1)
    assert [family("chatml").decode(r) for r in prepared.groups[0].responses] == ["sat<|im_end|>", "ran<|im_end|>"]


def test_every_oddity_a_row_can_have_has_a_meaning() -> None:
    """A finding without an explanation would be noise."""
    import re

    import preftune.data.conversations as conversations
    import preftune.data.doctor as doctor_module
    import preftune.data.tokens as tokens

    sources = "".join(Path(str(m.__file__)).read_text() for m in (conversations, tokens, doctor_module))
    used = {name for name in ODDITIES if f'"{name}"' in sources}
    assert used == set(ODDITIES)
    assert {*re.findall(r'\{"([^"{}]+)"\} if', sources), *re.findall(r'"([^"]+)": bool\(', sources)} <= used
