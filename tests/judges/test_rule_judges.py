"""Claims about the rules that judge."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from preftune.errors import ConfigError, RunError
from preftune.judges.contract import Comparison
from preftune.judges.rules import json_rule, length_rule, python_rule, regex_rule
from preftune.judges.scores import ScoreJudge
from preftune.records import Response


def outcome(judge: ScoreJudge, first: str, second: str) -> str:
    (judgement,) = judge([Comparison(prompt="p", first=Response(text=first), second=Response(text=second))])
    return judgement.outcome


def test_length_counts_characters() -> None:
    """Not bytes and not words: three letters beyond ASCII lose against four inside."""
    assert outcome(length_rule(), "\u00e9\u00e9\u00e9", "a b ") == "second"
    assert outcome(length_rule(), "ab", "cd") == "tie"


def test_a_pattern_may_stand_anywhere_and_finding_it_twice_is_no_better() -> None:
    """The rule is found or not found."""
    judge = regex_rule(r"\bno:?t\b")
    assert outcome(judge, "is not", "knot") == "first"
    assert outcome(judge, "not not", "it is not") == "tie" == outcome(judge, "", "yes")


@pytest.mark.parametrize(
    ("text", "valid"),
    [('{"a": [1, 2]}', True), ("3", True), (' "x"\n', True), ("", False), ("{'a': 1}", False), ("NaN", False),
     ("[1,]", False), ('{"a": 1} and more', False), ("-Infinity", False), ("[" * 100_000, False)],
)  # fmt: skip
def test_json_is_the_standard_s(text: str, valid: bool) -> None:
    """The whole response, and none of Python's extensions; depth is no crash."""
    assert outcome(json_rule(), text, "no json") == ("first" if valid else "tie")


def test_a_function_runs_only_when_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming it is not enough; without permission its module is not even imported."""
    (tmp_path / "house_rules.py").write_text("def polite(prompt, response):\n    return response.count('please')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="runs code of your own; say so with --allow_python"):
        python_rule("house_rules:polite", allowed=False)
    assert "house_rules" not in sys.modules
    assert outcome(python_rule("house_rules:polite", allowed=True), "now", "now please") == "second"


@pytest.mark.parametrize(
    ("place", "problem"),
    [("json", "expected rule:python:MODULE:FUNCTION"), ("no.such:f", "cannot import no.such"),
     ("json:no", "module json has no function no"), ("json:__doc__", "has no function __doc__")],
)  # fmt: skip
def test_what_is_no_function_is_refused(place: str, problem: str) -> None:
    """Before anything is judged, with what was expected."""
    with pytest.raises(ConfigError, match=problem):
        python_rule(place, allowed=True)


def test_a_bad_pattern_is_refused() -> None:
    """With what is wrong with it."""
    with pytest.raises(ConfigError, match=r"rule:regex:\(: no regular expression \(missing \), unterminated"):
        regex_rule("(")


def test_every_response_is_scored_once_and_scores_are_the_judge_s() -> None:
    """K responses cost K scores, not K (K - 1); the score comes back with the judgement."""
    asked: list[str] = []

    def score(questions):  # type: ignore[no-untyped-def]
        asked.extend(response.text for _, response in questions)
        return [len(response.text) / 2 for _, response in questions]

    abc = [Response(text="a" * n) for n in (1, 2, 3)]
    pairs = [Comparison(prompt="p", first=a, second=b) for a in abc for b in abc if a != b]
    judgements = ScoreJudge("s", score)(pairs)
    assert asked == ["a", "aa", "aaa"]
    assert [(j.first.score, j.second.score) for j in judgements[:2]] == [(0.5, 1.0), (0.5, 1.5)]
    with pytest.raises(RunError, match="judge s: 0 scores for 3 responses"):
        ScoreJudge("s", lambda questions: [])(pairs)


def test_a_score_that_is_no_number_decides_nothing() -> None:
    """NaN is neither larger nor a tie: the comparison is skipped, and says why."""
    judge = ScoreJudge("s", lambda questions: [1.0, float("nan")])
    (judgement,) = judge([Comparison(prompt="p", first=Response(text="a"), second=Response(text="b"))])
    assert (judgement.outcome, judgement.reason, judgement.second.score) == ("skip", "no score: 1 and nan", None)
