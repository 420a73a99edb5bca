"""The border between prompt and response is exact, BOS stands once, and a finished response ends with one end mark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level, sentence_piece
from tokenizers import AddedToken, normalizers

from preftune.data.ranking import pair_positions
from preftune.data.tokens import Encoder, Row, TokenRow
from preftune.errors import DataError
from preftune.records import Demonstration, LabelledResponse, RankedResponses, Refusal, Response

BYTES = byte_level()
PIECES = sentence_piece()
WORDS = st.lists(st.sampled_from(["the", "cat", "c", "at", " ", "  ", "\n", "!", "'s", "12"]), min_size=1).map("".join)
TEXTS = st.one_of(WORDS, st.text(max_size=20))


def pair(prompt: str, *texts: str, **settings: Any) -> RankedResponses:
    responses = tuple(Response(text=text, **settings) for text in texts)
    return RankedResponses(prompt=prompt, responses=responses, ranks=tuple(range(1, len(texts) + 1)), origin="f:1")


def encode(tokenizer: Any, row: Row) -> TokenRow | Refusal:
    (encoded,) = Encoder(tokenizer).encode([row], pair_positions)
    return encoded


def encoded(tokenizer: Any, row: Row) -> TokenRow:
    result = encode(tokenizer, row)
    assert isinstance(result, TokenRow), result
    return result


def refused(tokenizer: Any, row: Row) -> str:
    result = encode(tokenizer, row)
    assert isinstance(result, Refusal), "the row was not refused"
    return str(result)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS, TEXTS)
@example("the c", "at sat", "!")
@example("the\n", "\n cat\n\n", "cat")
@example("the\n\n", "\n x", "cat")
@example("", "the", "cat")
def test_prompt_and_response_decode_to_the_original_text(prompt: str, first: str, second: str) -> None:
    """decode(prompt + response) is BOS, the two texts as they were, EOS: whatever the tokenizer merges."""
    assume(first.strip() and second.strip() and not any("s>" in text for text in (prompt, first, second)))
    group = encoded(BYTES, pair(prompt, first, second)).group
    for text, response in zip((first, second), group.responses, strict=True):
        assert BYTES.decode(np.concatenate([group.prompt, response])) == f"<s>{prompt}{text}</s>"
        assert BYTES.decode(response) == f"{text}</s>"


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS)
@example("the c", "at sat")
def test_the_prompt_is_tokenised_as_at_generation_and_whole_texts_as_a_whole(prompt: str, text: str) -> None:
    """The prompt's ids are the tokenizer's own; prompt + response too, unless exactly that is reported as a merge."""
    assume(text.strip() and not any("s>" in t for t in (prompt, text)))
    row = encoded(BYTES, Demonstration(prompt=prompt, response=Response(text=text), origin="f:1"))
    assert row.group.prompt.tolist() == BYTES(prompt)["input_ids"]
    both = [*row.group.prompt.tolist(), *row.group.responses[0].tolist()]
    assert (both == [*BYTES(prompt + text)["input_ids"], 1]) == ("boundary merge" not in row.oddities)


def test_a_merge_across_the_border_is_tokenised_apart_and_counted() -> None:
    """`the c` + `at` would become `the` ` cat`: the prompt keeps its own last token."""
    row = encoded(BYTES, pair("the c", "at sat", "!"))
    assert "boundary merge" in row.oddities
    assert row.group.prompt.tolist() == [0, *ids(BYTES, "the c")]
    assert row.group.responses[0].tolist() == [*ids(BYTES, "at sat"), 1]
    assert row.group.responses[1].tolist() == [*ids(BYTES, "!"), 1]


def test_a_response_that_continues_a_word_gets_no_space_in_front() -> None:
    """SentencePiece puts a space before every text; tokenised apart, the response must not gain one."""
    row = encoded(PIECES, pair("once upon a ti", "me", "re"))
    assert "boundary merge" in row.oddities
    for text, response in zip(("me", "re"), row.group.responses, strict=True):
        assert PIECES.decode(np.concatenate([row.group.prompt, response])) == f"<s> once upon a ti{text}</s>"


@pytest.mark.parametrize("prompt", ["the cat", "<s>the cat"])
def test_bos_stands_once(prompt: str) -> None:
    """A text that spells BOS at its start does not get a second one."""
    row = encoded(BYTES, pair(prompt, " sat", " ran"))
    assert row.group.prompt.tolist() == [0, *ids(BYTES, "the cat")]
    assert all(0 not in response for response in row.group.responses)
    assert ("special token in prompt" in row.oddities) == ("<s>" in prompt)


def test_a_tokenizer_that_writes_no_bos_is_left_alone() -> None:
    """Having a BOS token does not mean beginning texts with it (GPT-2, Qwen): nothing is added, nothing is odd."""
    tokenizer = byte_level(writes_bos=False)
    row = encoded(tokenizer, pair("the cat", " sat", " ran"))
    assert row.group.prompt.tolist() == ids(tokenizer, "the cat")
    assert row.oddities == set()


def test_two_spelled_bos_are_reported() -> None:
    """What the text itself doubles is kept, and said."""
    assert "BOS more than once" in encoded(BYTES, pair("<s><s>the", " cat", " dog")).oddities


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (BYTES, [0]),
        (byte_level(writes_bos=False), [0]),
        (byte_level(bos=None, eos="<|end|>", extra=("<|other|>",)), [0]),
        (PIECES, [1]),
    ],
    ids=["bos", "bos it does not write itself", "eos as separator", "sentence piece"],
)
def test_an_empty_prompt_becomes_the_start_of_a_document(tokenizer: Any, expected: list[int]) -> None:
    """BOS, or EOS where there is no BOS, so that the first token is predicted from something."""
    row = encoded(tokenizer, pair("", "the cat", "the dog"))
    assert row.group.prompt.tolist() == expected
    assert row.group.responses[0].tolist() == [*ids(tokenizer, "the cat"), tokenizer.eos_token_id]
    assert "empty prompt" in row.oddities


@pytest.mark.parametrize("text", ["sat", "sat</s>", "sat</s>\n"])
def test_a_finished_response_ends_with_exactly_one_eos(text: str) -> None:
    """Spelled at its end or not: one EOS, at the end; a spelled one is counted."""
    row = encoded(BYTES, pair("the cat ", text, "ran"))
    assert row.group.responses[0].tolist() == [*ids(BYTES, "sat"), 1]
    assert ("end mark spelled" in row.oddities) == (text != "sat")


def test_an_unfinished_response_has_no_eos() -> None:
    """Its sampler stopped it, not the model."""
    row = encoded(BYTES, pair("the cat", " sat", " ran", finished=False))
    assert row.group.responses[0].tolist() == ids(BYTES, " sat")
    assert "unfinished response" in row.oddities


@pytest.mark.parametrize("text", ["sat</s> down", "sat</s></s>", "sat <s>"])
def test_a_special_token_inside_a_response_is_refused(text: str) -> None:
    """Neither a crash nor a response that ends in its middle: the token and its place are named."""
    message = refused(BYTES, pair("the cat ", text, "ran"))
    assert message.startswith("f:1: chosen: spells the special token '<")
    assert "take it out" in message


def test_eos_made_by_the_tokenizers_own_rewriting_is_refused() -> None:
    """A normaliser may turn innocent text into EOS; the response is refused, not cut there."""
    tokenizer = byte_level(eos="<end>")
    tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens({"eos_token": AddedToken("<stop>", normalized=True, special=True)})
    message = refused(tokenizer, pair("the cat ", "sat <STOP> down", "ran"))
    assert message == "f:1: chosen: holds text that the tokenizer turns into the end-of-sequence mark"


def test_a_response_of_nothing_but_lost_characters_is_refused() -> None:
    """A tokenizer may leave nothing of a text; then there is nothing to learn."""
    tokenizer = byte_level()
    tokenizer._tokenizer.normalizer = normalizers.Replace("\u200b", "")
    message = refused(tokenizer, pair("the cat", "\u200b", " ran"))
    assert message == "f:1: chosen: holds no token once the tokenizer is through with it"


@pytest.mark.parametrize(("prompt", "text", "field"), [("a\ud800", "b", "prompt"), ("b", "a\ud800", "chosen")])
def test_half_a_character_is_refused(prompt: str, text: str, field: str) -> None:
    """A lone surrogate would stop the tokenizer, and with it the whole data set."""
    message = refused(BYTES, pair(prompt, text, "c"))
    assert message == f"f:1: {field}: holds half a character (U+D800 at character 1)"


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(bos=None, eos="<|end|>")], ids=["bos", "no bos"])
def test_the_pad_token_does_not_matter(tokenizer: Any) -> None:
    """pad == eos gives the very same ids as no pad token."""
    row = pair("the cat", " sat", " ran")
    without = encoded(tokenizer, row).group
    tokenizer.pad_token = tokenizer.eos_token
    same = encoded(tokenizer, row).group
    assert [r.tolist() for r in (same.prompt, *same.responses)] == [
        r.tolist() for r in (without.prompt, *without.responses)
    ]


def test_a_tokenizer_that_appends_eos_to_every_text_does_not_end_the_prompt() -> None:
    """What the tokenizer writes behind a plain text belongs behind the response only."""
    from tokenizers import processors

    tokenizer = byte_level()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    group = encoded(tokenizer, pair("the cat", " sat", " ran")).group
    assert group.prompt.tolist() == [0, *ids(tokenizer, "the cat")]
    assert group.responses[0].tolist() == [*ids(tokenizer, " sat"), 1]


def test_a_tokenizer_without_eos_is_refused_with_the_remedy() -> None:
    """A model trained without an end mark could never stop."""
    with pytest.raises(DataError, match=r"no EOS token.*eos_token.*tokenizer_config\.json"):
        Encoder(byte_level(eos=None))


def test_responses_share_one_prompt_and_unused_ones_are_left_out() -> None:
    """Best against worst of four compares two: only they are tokenised, and the pair points at them."""
    row = pair("the", " cat", " dog", " mat", " park")
    (encoded_row,) = Encoder(BYTES).encode([row], lambda r: pair_positions(r, "best_worst"))
    assert isinstance(encoded_row, TokenRow)
    assert encoded_row.group.pairs == ((0, 1),)
    assert [BYTES.decode(r) for r in encoded_row.group.responses] == [" cat</s>", " park</s>"]
    assert encoded_row.fields == ("responses[0]", "responses[3]")


@pytest.mark.parametrize(
    ("policy", "kept", "ranks"),
    [("all", "abcde", (3, 1, 2, 3, 1)), ("best_worst", "abde", (2, 1, 2, 1)), ("adjacent", "abcde", (3, 1, 2, 3, 1))],
)
def test_a_group_ranks_and_scores_the_responses_it_keeps(policy: str, kept: str, ranks: tuple[int, ...]) -> None:
    """Ranks are dense again among those that are left, ties stay ties, and each score stays with its response."""
    score = {"a": -1.0, "b": 7.5, "c": 3.0, "d": -1.0, "e": 7.5}
    responses = tuple(Response(text=f" {name}", score=score[name]) for name in "abcde")
    row = RankedResponses(prompt="the", responses=responses, ranks=(9, 2, 5, 9, 2), origin="f:1")
    (found,) = Encoder(BYTES).encode([row], lambda r: pair_positions(r, policy))
    assert isinstance(found, TokenRow)
    assert [BYTES.decode(r) for r in found.group.responses] == [f" {name}</s>" for name in kept]
    assert found.group.ranks == ranks
    assert found.group.scores == tuple(score[name] for name in kept)
    assert found.group.labels == () and found.group.mismatched == 0


def test_stated_pairs_are_no_order_and_a_missing_score_leaves_none() -> None:
    """What was derived from comparisons is not passed on as stated; scores of some responses compare nothing."""
    responses = (Response(text=" a", score=1.0), Response(text=" b", score=2.0), Response(text=" c"))
    row = RankedResponses(prompt="the", responses=responses, ranks=(1, 2, 3), pairs=((0, 1), (1, 2)), origin="f:1")
    assert (encoded(BYTES, row).group.ranks, encoded(BYTES, row).group.scores) == ((), ())
    row = RankedResponses(prompt="the", responses=responses, ranks=(1, 2, 3), pairs=((0, 1),), origin="f:1")
    assert encoded(BYTES, row).group.scores == (1.0, 2.0)
    demonstration = Demonstration(prompt="the", response=responses[0], origin="f:1")
    assert encoded(BYTES, demonstration).group.scores == ()


@pytest.mark.parametrize("desirable", [True, False])
def test_a_labelled_response_is_a_group_of_one_with_its_label(desirable: bool) -> None:
    """The same tokens as a demonstration, no pair, and the label."""
    labelled = LabelledResponse(
        prompt="the", response=Response(text=" cat"), desirable=desirable, weight=2.0, origin="f:3"
    )
    row = encoded(BYTES, labelled)
    assert (row.group.labels, row.group.pairs, row.group.ranks) == ((desirable,), (), ())
    assert [BYTES.decode(r) for r in row.group.responses] == [" cat</s>"]
    assert (row.group.weight, row.group.origin, row.fields) == (2.0, "f:3", ("response",))


def test_ids_are_int32_and_weight_and_origin_are_kept() -> None:
    """The contract of TokenGroup."""
    row = RankedResponses(
        prompt="the", responses=(Response(text=" a"), Response(text=" b")), ranks=(2, 1), weight=2.5, origin="f:7"
    )
    result = encoded(BYTES, row)
    assert {array.dtype for array in (result.group.prompt, *result.group.responses)} == {np.dtype(np.int32)}
    assert (result.group.weight, result.group.origin, result.group.pairs) == (2.5, "f:7", ((1, 0),))
    assert result.fields == ("rejected", "chosen")


def test_unknown_characters_are_reported() -> None:
    """Text the tokenizer cannot write is worth knowing about."""
    assert "unknown characters" in encoded(PIECES, pair("the cat", " s\u00e9t", " ran")).oddities
    assert "unknown characters" not in encoded(PIECES, pair("the cat", " sat", " ran")).oddities


def test_order_is_kept_over_many_chunks() -> None:
    """Refusals and rows come out as they went in."""
    items = [
        Refusal(origin=f"f:{i}", field="row", reason="r")
        if i % 7 == 0
        else Demonstration(prompt="the", response=Response(text=f" {i}"), origin=f"f:{i}")
        for i in range(1300)
    ]
    out = list(Encoder(BYTES).encode(items, pair_positions))
    assert [item.origin if isinstance(item, Refusal) else item.group.origin for item in out] == [
        i.origin for i in items
    ]
    texts = [BYTES.decode(item.group.responses[0]) for item in out if isinstance(item, TokenRow)]
    assert texts == [f" {i}</s>" for i in range(1300) if i % 7]
