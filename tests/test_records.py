"""Records that cross files: what JSON takes away it gives back, and no record of nonsense can be made."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from preftune.records import (
    Demonstration,
    Judgement,
    LabelledResponse,
    Message,
    RankedResponses,
    Refusal,
    Response,
    RunCard,
    SampledResponses,
    from_json,
    to_json,
)

GOOD = Response(text=" Blu\u00e9.\n", score=0.1, finished=False, provenance="m1", logp=-3.25)
BAD = Response(text="No")
CHAT = (Message(role="user", content="Hi"), Message(role="assistant", content="Yes?"))
RECORDS: list[Any] = [
    GOOD,
    CHAT[0],
    RankedResponses(prompt=CHAT, responses=(GOOD, BAD), ranks=(2, 1), pairs=((1, 0),), weight=0.1, annotator="a"),
    RankedResponses(prompt="Hi", responses=(GOOD, BAD), ranks=(1, 1), origin="f:1"),
    SampledResponses(prompt=CHAT, responses=(GOOD, BAD), origin="f:1", key="0f"),
    SampledResponses(prompt="Hi", responses=(GOOD,)),
    Demonstration(prompt=CHAT, response=GOOD, weight=3.0, origin="f:2"),
    LabelledResponse(prompt=CHAT, response=GOOD, desirable=False, weight=2.5, annotator="ann", origin="f:3"),
    LabelledResponse(prompt="Hi", response=BAD, desirable=True),
    Refusal(origin="f:4", field="chosen", reason="is null"),
    Judgement(prompt="Hi", first=GOOD, second=BAD, outcome="both_bad", judge="rule"),
    Judgement(prompt=CHAT, first=GOOD, second=BAD, outcome="second", judge="ann", strength=2, reason="It \u2260 true."),
    RunCard(stage="dpo", status="done", config={"beta": 0.1}, notes=("one", "two")),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_json_there_and_back_is_the_identity(record: Any) -> None:
    """One line of JSON, and an equal record of the same type from it."""
    line = to_json(record)
    assert "\n" not in line and json.loads(line)["type"] == type(record).__name__
    assert from_json(line) == record


def test_unknown_types_and_fields_are_refused() -> None:
    """A file of a later version is not half understood."""
    with pytest.raises(ValueError, match="record type 'Pair' is unknown; allowed: Message, Response"):
        from_json('{"type": "Pair"}')
    with pytest.raises(ValueError, match="LabelledResponse has no field good"):
        from_json('{"type": "LabelledResponse", "prompt": "Hi", "good": true}')


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_is_a_finite_number_above_zero(weight: float) -> None:
    """A row of no weight would be a row that has vanished."""
    for make in (
        lambda: LabelledResponse(prompt="Hi", response=BAD, desirable=True, weight=weight, origin="f:1"),
        lambda: RankedResponses(prompt="Hi", responses=(GOOD, BAD), ranks=(1, 2), weight=weight, origin="f:1"),
    ):
        with pytest.raises(ValueError, match="f:1: weight must be a finite number > 0"):
            make()


def test_a_prompt_without_responses_was_not_sampled() -> None:
    """A line of samples that holds none names its place."""
    with pytest.raises(ValueError, match="f:1: needs at least one response"):
        SampledResponses(prompt="Hi", responses=(), origin="f:1")
