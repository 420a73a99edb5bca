"""What answers look like, with intervals that say nothing impossible."""

from __future__ import annotations

import pytest

from preftune.parts.contestants import Answers
from preftune.parts.measuring import measure_texts, of_texts
from preftune.records import Response, SampledResponses


def test_no_share_of_the_answers_is_less_than_none_or_more_than_all() -> None:
    """Nearly every run of words differs, nearly nothing is said twice: no interval leaves [0, 1], none is empty."""
    anew = [(f"answer {x} says something else", f"and here is yet another one to {x}") for x in range(8)]
    texts = [
        *anew,
        ("so it is so it is what", "so it is so it is what"),
        ("twice to two", "once"),
        ("twice to two", ""),
    ]
    answers = [
        Answers(SampledResponses(prompt=f"{x}", responses=tuple(Response(text=text) for text in both)), None)
        for x, both in enumerate(texts)
    ]
    found = of_texts(measure_texts("model", answers))
    expected = {"distinct": (20 + 2 * 4 / 5) / 22, "repeated": 1 / 22, "said_elsewhere": 1 / 11}
    for name in ("distinct", "finished", "loop", "repeated", "said_elsewhere"):
        interval = found[name]
        assert interval is not None
        assert 0 <= interval.low < interval.high <= 1, name
        assert interval.estimate == pytest.approx(expected.get(name, interval.estimate)), name
