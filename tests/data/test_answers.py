"""Answers as token groups: the tokens training sees, each prompt once, every answer found again."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from preftune.data.answers import answer_groups
from preftune.data.tokens import Encoder
from preftune.errors import DataError
from preftune.records import Message, RankedResponses, Response

CAT, DOG, CUT = Response(text=" sat on the mat"), Response(text=" ran"), Response(text=" sat on", finished=False)


def test_answers_have_the_tokens_of_training(tiny_model_folder: Path) -> None:
    """One group per prompt in the order of first mention; ids and end marks are those of a preference row."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    asked = [("the cat", CAT), ("the dog", DOG), ("the cat", CUT), ("the cat", DOG)]
    groups, places = answer_groups(tokenizer, asked)
    assert places == [(0, 0), (1, 0), (0, 1), (0, 2)] and [len(g.responses) for g in groups] == [3, 1]
    row = RankedResponses(prompt="the cat", responses=(CAT, CUT), ranks=(1, 2))
    [trained] = Encoder(tokenizer).encode([row], lambda _: [(0, 1)])
    assert trained.group.prompt.tolist() == groups[0].prompt.tolist()
    assert [r.tolist() for r in trained.group.responses] == [r.tolist() for r in groups[0].responses[:2]]
    assert groups[0].responses[0][-1] == tokenizer.eos_token_id != groups[0].responses[1][-1]


def test_an_answer_given_twice_counts_twice(tiny_model_folder: Path) -> None:
    """Equal answers keep a place each, as draws do; the same text unfinished has other tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    cut = Response(text=CAT.text, finished=False)
    groups, places = answer_groups(tokenizer, [("the cat", CAT), ("the cat", cut), ("the cat", CAT)])
    one, other, again = (r.tolist() for r in groups[0].responses)
    assert places == [(0, 0), (0, 1), (0, 2)] and one == again == [*other, tokenizer.eos_token_id]


def test_an_answer_without_tokens_is_refused_by_its_number(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with pytest.raises(DataError, match="answer 2: response: is empty or only white space"):
        answer_groups(tokenizer, [("the cat", CAT), ("the cat", Response(text=" "))])
    with pytest.raises(DataError, match="no chat template"):
        answer_groups(tokenizer, [((Message(role="user", content="hello"),), CAT)])
