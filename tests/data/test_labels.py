"""Labelled rows, rankings and scores through the doctor: what it promises of pairs it keeps for them too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from small_tokenizers import byte_level

from preftune.data.doctor import DataReport, Prepared, prepare
from preftune.data.packing import StepPlan
from preftune.records import Demonstration, LabelledResponse, RankedResponses, Refusal, Response

TOKENIZER = byte_level()
Item = RankedResponses | LabelledResponse | Demonstration | Refusal


def labelled(text: str, desirable: bool, prompt: str = "the", **settings: Any) -> LabelledResponse:
    return LabelledResponse(prompt=prompt, response=Response(text=text), desirable=desirable, **settings)


def ranking(*ranks: int, scores: tuple[float | None, ...] = (), texts: str = "abcdefgh", **settings: Any) -> Item:
    scored = zip(texts, scores or [None] * len(ranks), strict=False)
    responses = tuple(Response(text=f" {text}", score=score) for text, score in scored)
    return RankedResponses(prompt="the", responses=responses, ranks=ranks, **settings)


def doctor(*rows: Item, max_length: int = 100, truncation: Any = "refuse", pairs: str = "all") -> Prepared:
    """The rows stand in lines 1, 2, ... of f."""
    for line, row in enumerate(rows, start=1):
        object.__setattr__(row, "origin", f"f:{line}")
    return prepare(rows, TOKENIZER, max_length=max_length, truncation=truncation, pairs=pairs)


def counts(report: DataReport) -> tuple[int, int, int, int, int]:
    return report.rows, report.used, report.refused, report.truncated, report.duplicate


def found(report: DataReport) -> list[str]:
    return [str(finding) for finding in (*report.refusals, *report.duplicates)]


def test_labels_reach_the_groups_and_the_report() -> None:
    """Counted by label, measured by label, in this order; a step counts each row as one."""
    prepared = doctor(labelled("!", False), labelled("....", True), labelled("!!", False), labelled("?", True))
    report = prepared.report
    assert counts(report) == (4, 4, 0, 0, 0)
    assert [group.labels for group in prepared.groups] == [(False,), (True,), (False,), (True,)]
    assert (report.desirable, report.undesirable, report.pairs, report.rankings) == (2, 2, 0, 0)
    assert list(report.lengths) == ["prompt", "desirable", "undesirable", "total"]
    assert [report.lengths[name].longest for name in ("desirable", "undesirable")] == [5, 3]
    assert report.summary_lines()[1] == f"2 desirable and 2 undesirable responses to 1 prompts, {report.tokens} tokens"
    stored = json.loads(json.dumps(report.to_dict()))
    assert (stored["desirable"], stored["undesirable"]) == (2, 2)
    plan = StepPlan(prepared.groups, batch_size=3, seed=0, shuffle=False)
    assert [len(plan.groups_of(0, step)) for step in range(plan.steps_per_epoch)] == [3, 1]


def test_a_labelled_row_is_a_copy_only_with_the_same_label_weight_and_annotator() -> None:
    """Two people who agree are two votes; the same row again is one."""
    rows = [labelled(" a", True), labelled(" a", True), labelled(" a", True, weight=2.0)]
    report = doctor(*rows, labelled(" a", True, annotator="ann"), labelled(" b", True), labelled(" a", True)).report
    assert counts(report) == (6, 4, 0, 0, 2)
    assert found(report) == ["f:2: row: is a copy of f:1", "f:6: row: is a copy of f:1"]


def test_one_annotator_cannot_call_a_response_both() -> None:
    """Both rows are refused, each naming the other; another response, or another prompt, is no contradiction."""
    rows = [labelled(" a", True), labelled(" b", False), labelled(" a", False), labelled(" a", False, prompt="the cat")]
    prepared = doctor(*rows)
    assert counts(prepared.report) == (4, 2, 2, 0, 0)
    assert found(prepared.report) == [
        "f:1: label: f:3 gives the same response the other label",
        "f:3: label: f:1 gives the same response the other label",
    ]
    assert [group.origin for group in prepared.groups] == ["f:2", "f:4"]


def test_annotators_who_label_differently_disagree_and_both_count() -> None:
    """Disagreement between people is data, and reported."""
    report = doctor(labelled(" a", True, annotator="ann"), labelled(" a", False, annotator="bob")).report
    assert counts(report) == (2, 2, 0, 0, 0)
    assert [(oddity.name, oddity.rows) for oddity in report.oddities] == [("annotators disagree", 2)]


def test_what_truncation_takes_is_counted_by_label() -> None:
    """Only responses above the limit lose tokens; two that are alike once cut contradict each other."""
    long = [labelled(" sat" * 20, False), labelled(" ran" * 20, False), labelled(" cat" * 20, True)]
    rows = [labelled(" sat on the mat", True), *long]
    prepared = doctor(*rows, max_length=12, truncation="response")
    report = prepared.report
    assert counts(report) == (4, 1, 0, 3, 0)
    assert (report.cuts.responses, report.cuts.desirable, report.cuts.undesirable, report.cuts.eos_lost) == (3, 1, 2, 3)
    assert "cut: 0 prompts, 3 responses (1 desirable, 2 undesirable); 3 responses lost their end mark" in " ".join(
        report.summary_lines()
    )
    assert {len(g.prompt) + len(g.responses[0]) for g in prepared.groups[1:]} == {12}
    cut_alike = doctor(labelled(" sat" * 20, True), labelled(" sat" * 21, False), max_length=12, truncation="response")
    assert counts(cut_alike.report) == (2, 0, 2, 0, 0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (labelled(" ", True), "f:1: response: is empty or only white space"),
        (labelled(" a</s>b", False), "f:1: response: spells the special token '</s>' at character 2"),
        (labelled(" sat" * 200, False), "f:1: length: 2 prompt + 201 response tokens = 203, above max_length 100"),
    ],
)
def test_a_flawed_labelled_row_is_refused_with_its_place(row: LabelledResponse, expected: str) -> None:
    assert found(doctor(row).report)[0].startswith(expected)


def test_rankings_and_scores_are_counted() -> None:
    """A plain pair ranks two; stated pairs rank nothing; scores count only where the whole row has them."""
    report = doctor(
        ranking(1, 2, 3, scores=(3.0, 2.0, 1.0)),
        ranking(1, 2, scores=(2.0, None), texts="xy"),
        ranking(1, 2, 2, pairs=((0, 1), (0, 2)), scores=(1.0, 0.0, 0.0), texts="uvw"),
    ).report
    assert (report.rankings, report.scored, report.responses, report.pairs) == (2, 6, 8, 6)
    assert report.summary_lines()[2] == "2 rows rank all their responses; 6 responses have a score"
    plain = doctor(ranking(1, 2)).report
    assert (plain.rankings, plain.scored) == (1, 0)
    assert not any("rank all" in line for line in plain.summary_lines())


def test_rows_that_score_differently_are_no_copies() -> None:
    """The scores are trained on, so a row with others says something else; in another order it says the same."""
    same = RankedResponses(
        prompt="the", responses=(Response(text=" b", score=1.0), Response(text=" a", score=2.0)), ranks=(2, 1)
    )
    report = doctor(ranking(1, 2, scores=(2.0, 1.0)), ranking(1, 2, scores=(3.0, 1.0)), ranking(1, 2), same).report
    assert found(report) == ["f:4: row: is a copy of f:1"]


def test_a_preference_against_its_own_scores_is_remarked() -> None:
    """Used as it is, for the preference is what the row states; equal scores are nothing odd."""
    rows = [ranking(1, 2, scores=(1.0, 2.0)), ranking(1, 2, scores=(1.0, 1.0)), ranking(1, 2, scores=(2.0, 1.0))]
    report = doctor(*rows).report
    assert report.used == 3
    assert [(oddity.name, oddity.first) for oddity in report.oddities] == [("scores disagree", ("f:1",))]


def test_a_ranking_of_identical_responses_is_refused_whatever_is_paired() -> None:
    """Neighbours differ, first and third are one text: a list that ranks it above itself teaches nothing."""
    report = doctor(ranking(1, 2, 3, texts="aba"), pairs="adjacent").report
    assert found(report) == ["f:1: responses[2]: has the same tokens as responses[0]"]
