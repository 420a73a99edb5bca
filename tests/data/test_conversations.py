"""Chat templates: the prompt is what generation sees, a finished answer ends as the model must end it."""

from __future__ import annotations

from typing import Any

import pytest
from small_tokenizers import byte_level, family

from preftune.data.conversations import prompt_key, special_tokens
from preftune.data.ranking import pair_positions
from preftune.data.tokens import Encoder, TokenRow
from preftune.errors import DataError
from preftune.records import Demonstration, Message, RankedResponses, Refusal, Response

QUESTION = (Message(role="user", content="the cat"),)
TALK = (*QUESTION, Message(role="assistant", content="sat"), Message(role="user", content="and then?"))

# family, the mark a finished response ends with, what the doctor remarks
FAMILIES = [
    ("llama3", "<|eot_id|>", set()),
    ("chatml", "<|im_end|>", set()),
    ("chatml_base", "<|im_end|>", {"end of turn is not EOS"}),
    ("gemma", "<end_of_turn>", {"end of turn is not EOS"}),
    ("zephyr", "</s>", {"no BOS"}),
    ("mistral", "</s>", {"no generation prompt"}),
    ("two_marks", "</s>", set()),
    ("without_end", "</s>", {"no end of turn", "no BOS"}),
]


def encode(tokenizer: Any, prompt: tuple[Message, ...], *texts: str, finished: bool = True) -> TokenRow | Refusal:
    responses = tuple(Response(text=text, finished=finished) for text in texts)
    row: RankedResponses | Demonstration = Demonstration(prompt=prompt, response=responses[0], origin="f:1")
    if len(texts) > 1:
        row = RankedResponses(prompt=prompt, responses=responses, ranks=tuple(range(1, len(texts) + 1)), origin="f:1")
    (encoded,) = Encoder(tokenizer).encode([row], pair_positions)
    return encoded


def encoded(tokenizer: Any, prompt: tuple[Message, ...], *texts: str, finished: bool = True) -> TokenRow:
    result = encode(tokenizer, prompt, *texts, finished=finished)
    assert isinstance(result, TokenRow), result
    return result


def refused(tokenizer: Any, prompt: tuple[Message, ...], *texts: str) -> str:
    result = encode(tokenizer, prompt, *texts)
    assert isinstance(result, Refusal), "the row was not refused"
    return str(result)


def turns(prompt: tuple[Message, ...], answer: str | None = None) -> list[dict[str, str]]:
    told = [{"role": m.role, "content": m.content} for m in prompt]
    return told if answer is None else [*told, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(("name", "mark", "remarks"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize("prompt", [QUESTION, TALK], ids=["one turn", "three turns"])
def test_every_family_of_templates_is_followed_to_the_token(
    name: str, mark: str, remarks: set[str], prompt: tuple[Message, ...]
) -> None:
    """Prompt == the template's own ids with a generation prompt; prompt + response == the whole conversation's own
    ids up to the mark; the mark stands exactly once, at the end."""
    tokenizer = family(name)
    row = encoded(tokenizer, prompt, "the dog ran", "a good answer")
    opening = tokenizer.apply_chat_template(turns(prompt), add_generation_prompt=True, return_dict=False)
    end = tokenizer.convert_tokens_to_ids(mark)
    assert row.group.prompt.tolist() == opening
    for text, response in zip(("the dog ran", "a good answer"), row.group.responses, strict=True):
        whole = tokenizer.apply_chat_template(turns(prompt, text), return_dict=False)
        both = [*opening, *response.tolist()]
        assert both[:-1] == whole[: len(both) - 1]
        assert response.tolist().count(end) == 1
        assert response[-1] == end
        assert whole[len(both) - 1 :] in ([], [end], [end, *whole[len(both) :]])
    assert row.oddities == remarks


@pytest.mark.parametrize(("name", "mark", "remarks"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_an_unfinished_answer_has_no_end_mark_in_any_family(name: str, mark: str, remarks: set[str]) -> None:
    """A sampler's length limit is not the end of a turn: the words stand alone."""
    tokenizer = family(name)
    row = encoded(tokenizer, QUESTION, "the dog ran", finished=False)
    assert tokenizer.decode(row.group.responses[0]).strip() == "the dog ran"
    assert row.oddities == {*remarks, "unfinished response"}


@pytest.mark.parametrize(("name", "mark", "remarks"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize("behind", ["", "\n"])
def test_an_end_mark_in_the_data_is_not_doubled(name: str, mark: str, remarks: set[str], behind: str) -> None:
    """Answers stored with their mark (and a line break) train the same ids as answers stored without."""
    tokenizer = family(name)
    marked = encoded(tokenizer, QUESTION, f"the dog ran{mark}{behind}")
    assert marked.group.responses[0].tolist() == encoded(tokenizer, QUESTION, "the dog ran").group.responses[0].tolist()
    assert marked.oddities == {*remarks, "end mark spelled"}


def test_the_line_break_behind_the_mark_is_never_trained() -> None:
    """ChatML closes a turn with <|im_end|> and a line break; a sampler stops at the mark."""
    tokenizer = family("chatml")
    assert tokenizer.decode(encoded(tokenizer, QUESTION, "sat").group.responses[0]) == "sat<|im_end|>"


def test_a_template_that_prompts_for_thoughts_and_does_not_render_them_keeps_the_generation_prompt() -> None:
    """The answer follows what the model is shown when it answers, and the mismatch is counted."""
    tokenizer = family("thinking")
    row = encoded(tokenizer, QUESTION, "short\n</think>\n\nsat", "ran")
    assert tokenizer.decode(row.group.prompt).endswith("<|im_start|>assistant\n<think>\n")
    assert [tokenizer.decode(r) for r in row.group.responses] == ["short\n</think>\n\nsat<|im_end|>", "ran<|im_end|>"]
    assert row.oddities == {"template rewrites"}


def test_a_template_that_prompts_with_another_header_than_it_renders_is_counted() -> None:
    """The answer is found in the rendered turn, but not behind the prompt that generation shows."""
    template = family("chatml").chat_template
    tokenizer = family("chatml")
    tokenizer.chat_template = template.replace("<|im_start|>assistant", "<|im_start|>ASSISTANT")
    row = encoded(tokenizer, QUESTION, "sat")
    assert tokenizer.decode(row.group.prompt).endswith("<|im_start|>ASSISTANT\n")
    assert tokenizer.decode(row.group.responses[0]) == "sat<|im_end|>"
    assert row.oddities == {"template rewrites"}


def test_a_template_that_cuts_thoughts_does_not_cut_them_from_the_response() -> None:
    """What a response says is trained on as it is; what the template adds to a plain one is kept."""
    tokenizer = family("stripping")
    row = encoded(tokenizer, QUESTION, "<think>\nhm\n</think>\n\nsat", "ran")
    assert [tokenizer.decode(r) for r in row.group.responses] == [
        "<think>\nhm\n</think>\n\nsat<|im_end|>",
        "<think>\n\n</think>\n\nran<|im_end|>",
    ]
    assert row.oddities == {"template rewrites"}
    assert encoded(tokenizer, QUESTION, "ran").oddities == set()


def test_a_merge_behind_the_generation_prompt_is_tokenised_apart() -> None:
    """An answer's first word must not swallow the space that the generation prompt ends with."""
    tokenizer = byte_level(template=family("without_end").chat_template.replace(":\n", ": "))
    row = encoded(tokenizer, QUESTION, "the cat", "sat")
    assert "boundary merge" in row.oddities
    assert tokenizer.decode(row.group.prompt) == "user: the cat\n\nassistant: "
    assert tokenizer.decode(row.group.responses[0]) == "the cat\n\n</s>"


def test_the_templates_own_trimming_is_followed() -> None:
    """Llama 3's template trims an answer; it stays an exact continuation."""
    row = encoded(family("llama3"), QUESTION, "  sat \n")
    assert family("llama3").decode(row.group.responses[0]) == "sat<|eot_id|>"
    assert row.oddities == set()


def test_a_conversation_the_template_refuses_is_refused_with_its_words() -> None:
    """Gemma knows no system role; its template says so, and the row's refusal repeats it."""
    message = refused(family("gemma"), (Message(role="system", content="be kind"), *QUESTION), "sat")
    assert message == "f:1: prompt: the chat template refuses it: System role not supported"


def test_no_chat_template_is_an_error_that_says_what_to_do() -> None:
    """There is no default template: a made-up one would train another format than the one that is served."""
    with pytest.raises(DataError, match=r"no chat template; use the tokenizer of a chat model.*plain strings"):
        encode(byte_level(), QUESTION, "sat")


def test_a_template_that_leaves_out_the_answer_is_an_error() -> None:
    """Such a template would train on nothing."""
    with pytest.raises(DataError, match="leaves out the assistant's words"):
        encode(byte_level(template="{{ messages[0]['content'] }}"), QUESTION, "sat")


@pytest.mark.parametrize(
    ("messages", "answer", "place"),
    [
        ((Message(role="user", content="hi<|im_end|>\n<|im_start|>system"),), "sat", "prompt: spells"),
        ((Message(role="<|im_start|>", content="hi"),), "sat", "prompt: spells"),
        (QUESTION, "sat<|im_end|>\n<|im_start|>user\nno", "response: spells"),
    ],
    ids=["message", "role", "response"],
)
def test_marks_smuggled_into_a_conversation_are_refused(messages: tuple[Message, ...], answer: str, place: str) -> None:
    """Text that spells the template's marks would open turns that nobody said."""
    message = refused(family("chatml"), messages, answer)
    assert place in message
    assert "special token '<|im_" in message


def test_an_empty_answer_is_refused() -> None:
    """White space alone is no answer."""
    assert refused(family("chatml"), QUESTION, " \n", "sat") == "f:1: chosen: is empty or only white space"


def test_plain_text_with_a_chat_model_is_used_as_it_is_and_reported() -> None:
    """Plain strings never pass through the template."""
    tokenizer = family("chatml")
    row = Demonstration(prompt="the cat", response=Response(text=" sat"))
    (result,) = Encoder(tokenizer).encode([row], pair_positions)
    assert isinstance(result, TokenRow)
    assert tokenizer.decode(result.group.prompt) == "the cat"
    assert result.oddities == {"plain text, chat model"}


def test_the_unknown_token_is_text_and_every_other_mark_is_special() -> None:
    """Marks added beside the named ones count; a tokenizer whose EOS is its unknown token keeps it as a mark."""
    tokenizer = byte_level(extra=("<|im_start|>",))
    tokenizer.unk_token = "!"
    assert set(special_tokens(tokenizer).values()) == {"<s>", "</s>", "<|im_start|>"}
    tokenizer.unk_token = "</s>"
    assert set(special_tokens(tokenizer).values()) == {"<s>", "</s>", "<|im_start|>"}


def test_prompt_keys_ignore_white_space_and_nothing_else() -> None:
    """Two prompts that say the same leak into each other, however they are laid out."""
    assert prompt_key("the  cat\n") == prompt_key("the cat")
    assert prompt_key("the cat") != prompt_key("The cat")
    assert prompt_key(QUESTION) == prompt_key((Message(role="user", content=" the cat"),))
    assert prompt_key(QUESTION) != prompt_key((Message(role="system", content="the cat"),))
