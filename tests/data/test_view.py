"""Examples as the model will see them: decoded, with what is scored, and nothing a terminal would obey."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from rich.console import Console
from small_tokenizers import byte_level, family, sentence_piece

from preftune.data.doctor import prepare
from preftune.data.view import example
from preftune.records import Demonstration, Message, RankedResponses, Response
from preftune.tensors import TokenGroup

TOKENIZER = byte_level()


def group(*texts: str, prompt: Any = "the", tokenizer: Any = TOKENIZER, **settings: Any) -> TokenGroup:
    """The texts are ranked as they stand."""
    responses = tuple(Response(text=text) for text in texts)
    row: RankedResponses | Demonstration = Demonstration(prompt=prompt, response=responses[0], origin="f:1")
    if len(texts) > 1:
        ranks = tuple(range(1, len(texts) + 1))
        row = RankedResponses(prompt=prompt, responses=responses, ranks=ranks, origin="f:1")
    (only,) = prepare([row], tokenizer, **{"max_length": 100, "truncation": "refuse", **settings}).groups
    return only


def shown(group: TokenGroup, tokenizer: Any = TOKENIZER, *, terminal: bool = False) -> str:
    out = io.StringIO()
    colours = "standard" if terminal else None
    Console(file=out, force_terminal=terminal, color_system=colours, width=200).print(example(group, tokenizer))
    return out.getvalue()


def test_an_example_shows_what_is_scored_without_colour() -> None:
    """In a log file the marks | + - say what colour says on a terminal; end marks are visible."""
    assert shown(group(" sat", " ran", prompt="the\n cat")) == (
        "f:1\n"
        "  prompt: 4 tokens, not scored\n    | <s>the\n    |  cat\n"
        "  chosen: 2 tokens, scored, ends with </s>\n    +  sat</s>\n"
        "  rejected: 2 tokens, scored, ends with </s>\n    -  ran</s>\n\n"
    )  # fmt: skip


def test_an_example_is_coloured_on_a_terminal_and_cannot_command_it() -> None:
    """Prompt dim, chosen green, rejected red; escape sequences in the data are shown, not obeyed."""
    text = shown(group(" \x1b[2Jsat", " ran"), terminal=True)
    assert "\x1b[2mthe" in text.replace("\x1b[1;2;7m<s>\x1b[0m", "")
    assert "\x1b[32m \\x1b[2Jsat" in text
    assert "\x1b[31m ran" in text
    assert "\x1b[2J" not in text


def test_an_example_of_a_ranking_names_its_pairs() -> None:
    """A response that wins and loses is marked apart."""
    text = shown(group(" a", " b", " c"))
    assert "f:1, pairs (chosen > rejected): 0 > 1, 0 > 2, 1 > 2" in text
    assert [line.strip() for line in text.split("\n") if "</s>" in line and ":" not in line] == [
        "+  a</s>", "*  b</s>", "-  c</s>"
    ]  # fmt: skip


def test_a_cut_response_is_shown_without_end_mark() -> None:
    """Nothing is drawn that is not trained on."""
    text = shown(group(" sat" * 30, " ran", max_length=20, truncation="response"))
    assert "tokens, scored, no end mark" in text


def test_a_demonstration_has_one_scored_response() -> None:
    """No pair, no rejected side."""
    assert "  response: 2 tokens, scored, ends with </s>\n    +  sat</s>\n" in shown(group(" sat"))


def test_a_labelled_response_shows_its_label() -> None:
    """Good in green with a plus, bad in red with a minus, as chosen and rejected."""
    for label, mark in ((True, "+"), (False, "-")):
        one = dataclasses.replace(group(" sat"), labels=(label,))
        name = "desirable" if label else "undesirable"
        assert f"  {name}: 2 tokens, scored, ends with </s>\n    {mark}  sat</s>\n" in shown(one)


def test_a_mismatched_response_is_marked_apart() -> None:
    """It is scored, but belongs to no pair and is neither chosen nor rejected."""
    pair = group(" sat", " ran")
    lent = dataclasses.replace(pair, responses=(*pair.responses, pair.responses[0]), mismatched=1)
    assert shown(lent).startswith("f:1\n")
    assert "  chosen: " in shown(lent) and "  rejected: " in shown(lent)
    assert "  mismatched: 2 tokens, scored, ends with </s>\n    ~  sat</s>\n" in shown(lent)


def test_a_chat_shows_its_templates_marks() -> None:
    """What the template writes is visible, the end mark of the answer included."""
    chat = family("chatml")
    text = shown(group("sat", "ran", prompt=(Message(role="user", content="hi"),), tokenizer=chat), chat)
    assert "    | <|im_start|>user\n    | hi<|im_end|>\n    | <|im_start|>assistant\n" in text
    assert "    + sat<|im_end|>\n" in text


def test_a_response_keeps_the_space_it_begins_with() -> None:
    """SentencePiece drops the first space of what it decodes; the view decodes the response behind its prompt."""
    pieces = sentence_piece()
    assert "    +  cat</s>\n" in shown(group(" cat", " dog", tokenizer=pieces), pieces)
