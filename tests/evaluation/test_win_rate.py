"""Win rates count every verdict once, see past the order of showing, and are honest about prompts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from preftune.equations.stats import wilson
from preftune.errors import DataError
from preftune.evaluation.win_rate import Match, Outcome, between, matches, win_rate, win_rates, written_by
from preftune.records import Judgement, Response


def said(outcome: Outcome, prompt: str = "p", *, turned: bool = False, judge: str = "j") -> Judgement:
    """A judgement on models a and b; `turned`: b was shown first, and the outcome is of what was shown."""
    responses = Response(text="long", provenance="model=a temperature=1"), Response(text="b", provenance="model=b")
    first, second = responses[::-1] if turned else responses
    return Judgement(prompt=prompt, first=first, second=second, outcome=outcome, judge=judge)


def test_every_verdict_is_counted_in_one_place() -> None:
    """Wins, ties, losses, both bad and skips add up; the rate is (wins + half the ties) / all but the skips."""
    verdicts: list[tuple[Outcome, bool]] = [
        ("first", False), ("second", True), ("first", True), ("tie", False), ("both_bad", True), ("skip", False),
        ("first", False),
    ]  # fmt: skip
    found = win_rate(matches(said(o, f"p{i}", turned=t) for i, (o, t) in enumerate(verdicts)), "a", "b")
    assert (found.wins, found.ties, found.losses, found.both_bad, found.skips) == (3, 1, 1, 1, 1)
    assert found.rate.estimate == found.bootstrap.estimate == pytest.approx((3 + 2 / 2) / 6)
    assert (found.rate.n, found.prompts, found.judges) == (6, 6, ("j",))
    assert (found.one_length.estimate, found.other_length.estimate) == (4, 1)
    assert found.rate == found.wilson == wilson(4, 6), "one verdict per prompt: Wilson's own interval"


def test_the_models_exchanged_give_the_complement() -> None:
    """win(a, b) = 1 - win(b, a), ends and counts included."""
    rng = np.random.default_rng(0)
    outcomes: list[Outcome] = ["first", "second", "tie", "both_bad", "skip"]
    found = matches(
        said(outcomes[rng.integers(5)], f"p{rng.integers(40)}", turned=bool(rng.integers(2))) for _ in range(120)
    )
    one, other = win_rate(found, "a", "b"), win_rate(found, "b", "a")
    for name in ("rate", "wilson", "bootstrap"):
        here, there = getattr(one, name), getattr(other, name)
        assert (here.estimate, here.low, here.high) == pytest.approx(
            (1 - there.estimate, 1 - there.high, 1 - there.low)
        )
    assert (one.wins, one.losses, one.one_length) == (other.losses, other.wins, other.other_length)
    assert one.position == other.position or one.position.estimate == pytest.approx(other.position.estimate)
    assert all(match.turned().turned() == match for match in found)


def test_verdicts_on_one_prompt_are_not_taken_as_independent() -> None:
    """Ten equal verdicts per prompt widen nothing's certainty: the quoted interval stays, Wilson's shrinks."""
    rng = np.random.default_rng(1)
    outcomes: list[Outcome] = ["first" if rng.random() < 0.6 else "second" for _ in range(60)]
    once = win_rate(matches(said(o, f"p{i}") for i, o in enumerate(outcomes)), "a", "b")
    tenfold = win_rate(matches(said(o, f"p{i}") for i, o in enumerate(outcomes) for _ in range(10)), "a", "b")

    def width(name: str) -> float:
        return (getattr(tenfold, name).high - getattr(tenfold, name).low) / (once.rate.high - once.rate.low)

    assert width("rate") == pytest.approx(1, abs=0.06) and width("bootstrap") == pytest.approx(1, abs=0.1)
    assert width("wilson") < 0.4 and tenfold.prompts == 60 and tenfold.rate.n == 600


def test_position_bias_is_seen_and_told_from_quality() -> None:
    """A judge that prefers what it saw first 70 % of the time, models equal, shown unevenly: position 0.7."""
    rng = np.random.default_rng(2)
    found = matches(
        said("first" if rng.random() < 0.7 else "second", f"p{i}", turned=bool(rng.random() < 0.2)) for i in range(2000)
    )
    rate = win_rate(found, "a", "b", resamples=500)
    assert rate.rate.estimate > 0.58, "shown first more often, a seems better"
    assert rate.when_first.low < 0.7 < rate.when_first.high and rate.when_second.low < 0.3 < rate.when_second.high
    assert rate.position.low < 0.7 < rate.position.high < 0.8
    assert (rate.when_first.n + rate.when_second.n) == rate.rate.n


def test_one_order_tells_nothing_of_position() -> None:
    """A model that was always shown first may be better or merely first: no number."""
    rate = win_rate(matches(said("first", f"p{i}") for i in range(9)), "a", "b")
    assert math.isnan(rate.position.estimate) and rate.when_second.n == 0 and rate.when_first.estimate == 1
    assert rate.rate.low < 1 == rate.rate.high


def test_each_judge_has_its_own_rate() -> None:
    """Per judge, in order of appearance; together they are the pooled rate."""
    found = matches(
        [said("first", f"p{i}", judge="kind") for i in range(4)]
        + [said("second", f"p{i}", judge="x") for i in range(4)]
    )
    per = win_rates(found, "a", "b")
    assert list(per) == ["kind", "x"] and per["kind"].rate.estimate == 1 and per["x"].rate.estimate == 0
    pooled = win_rate(found, "a", "b")
    assert pooled.judges == ("kind", "x") and pooled.rate.estimate == 0.5 and pooled.prompts == 4


def test_only_skips_leave_no_rate() -> None:
    """NaN and n = 0, never 1/2."""
    rate = win_rate(matches([said("skip")]), "a", "b")
    assert math.isnan(rate.rate.estimate) and rate.rate.n == 0 and rate.skips == 1


def test_models_are_named_by_provenance_or_refused() -> None:
    """model=NAME among other words, else the whole line; nothing at all is an error that says what is missing."""
    assert written_by(Response(text="x", provenance="model=runs/a/model temperature=1")) == "runs/a/model"
    assert written_by(Response(text="x", provenance="gpt-4")) == "gpt-4"
    nameless = replace(said("first"), first=Response(text="x"), origin="f:3")
    with pytest.raises(DataError, match=r"f:3: a response does not say which model wrote it.*model=NAME"):
        matches([nameless])
    assert matches([nameless], model_of=lambda r: r.text, length=lambda r: 7)[0].first_length == 7


def test_models_that_never_met_are_refused_with_those_who_did() -> None:
    """The message names the comparisons at hand; a model has no win rate against itself."""
    found = [Match(prompt="p", judge="j", first="b", second="a", outcome="tie", first_length=1, second_length=1)]
    with pytest.raises(DataError, match="nothing compares a with c; found: a against b"):
        between(found, "a", "c")
    with pytest.raises(DataError, match="a win rate needs two models, not a twice"):
        win_rate(found, "a", "a")
