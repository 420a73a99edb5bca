"""A prompt and a response -> the text the model reads and the text it must write, nothing tokenised yet.

Plain strings stay what they are. Conversations go through the tokenizer's own chat template and nothing else: the
prompt is the conversation rendered with `add_generation_prompt=True`, what must be written is the rest of the
conversation rendered with the response as the last turn. What ends that turn is found by rendering a probe:

    family    the template closes a turn with    a finished response ends with
    Llama 3   <|eot_id|>                         <|eot_id|>      (the instruct tokenizers' EOS)
    ChatML    <|im_end|>\n                       <|im_end|>      (EOS of the instruct models, not of the base ones)
    Zephyr    </s>\n                             </s>
    Gemma     <end_of_turn>\n                    <end_of_turn>   (not the EOS: generation must stop there)
    without   \n                                 \n and then EOS, for nothing else says that the turn is over

so the mark is EOS where the template writes it, else the first special token it writes, else EOS appended. What
follows the mark is cut: a sampler stops at the mark, the model never has to write it.

A special token spelled inside a response or a message is refused, never encoded as text: chat templates put text and
marks into one string, where nobody can tell them apart again. Two spellings are accepted and counted: the mark at the
very end of a finished response (it is the mark), and special tokens in plain prompts (pre-rendered chats).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from preftune.errors import DataError
from preftune.records import Demonstration, LabelledResponse, Message, Prompt, RankedResponses, Response

__all__ = ["Candidates", "Rendered", "Row", "RowRefused", "Tokenizer", "Writer", "prompt_key", "special_tokens"]

Row = RankedResponses | LabelledResponse | Demonstration
_PROBE = "preftune"


class Tokenizer(Protocol):
    """What `data` asks of a tokenizer; every transformers tokenizer answers it. The pad token is never looked at."""

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    chat_template: Any
    all_special_ids: Sequence[int]
    all_special_tokens: Sequence[str]
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: list[str], **settings: Any) -> Mapping[str, Any]: ...

    def decode(self, ids: Sequence[int], **settings: Any) -> Any: ...

    def apply_chat_template(self, conversation: list[dict[str, str]], **settings: Any) -> Any: ...


class RowRefused(Exception):
    """One row cannot be trained on: (field, reason). Never leaves `data`: the doctor makes it a `Refusal`."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field, self.reason = field, reason


@dataclass(frozen=True, slots=True)
class Candidates:
    """The responses of a row that are trained on, and what the row says about them; see `TokenGroup`."""

    responses: tuple[Response, ...]
    fields: tuple[str, ...]
    """What each response is called in messages: `chosen`, `rejected`, `response` or `responses[i]`."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(chosen, rejected) positions into `responses`."""
    ranks: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Rendered:
    """One row as text: what every response starts from, and what each response adds."""

    record: Row
    prompt: str
    candidates: Candidates
    completions: tuple[str, ...]
    """What each candidate adds; in a chat with the template's end of turn when the response is finished."""
    chat: bool
    oddities: frozenset[str]
    """Keys of `report.ODDITIES` that hold for this row."""


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Id -> spelling of every token that is a mark and no text; the unknown token is text nobody could read."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = tokenizer.unk_token_id
    is_only_unknown = unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id)  # GPT-2 has one token for all
    return {i: text for i, text in {**named, **added}.items() if not (is_only_unknown and i == unknown)}


def prompt_key(prompt: Prompt) -> str:
    """A name two prompts share when they say the same, white space apart; what leakage is looked for with."""
    parts = [prompt] if isinstance(prompt, str) else [text for m in prompt for text in (m.role, m.content)]
    return hashlib.sha256(json.dumps([" ".join(part.split()) for part in parts]).encode()).hexdigest()[:32]


class Writer:
    """Renders rows for one tokenizer. Raises DataError when that tokenizer cannot serve them at all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no EOS token, so a model could never learn to stop; name one of its tokens "
                '"eos_token" in tokenizer_config.json (or set tokenizer.eos_token and save the folder)'
            )
        self.eos = tokenizer.eos_token_id
        self.special = special_tokens(tokenizer)
        self._tokenizer = tokenizer
        # Longest first: a token's spelling may begin with another one's.
        spellings = sorted(self.special.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spellings)))

    def render(self, row: Row, candidates: Candidates) -> Rendered:
        """The row's prompt and, after it, each of the candidates. Raises RowRefused, DataError."""
        chat = not isinstance(row.prompt, str)
        prompt, oddities = self._opening(row.prompt)
        completions = []
        for name, response in zip(candidates.fields, candidates.responses, strict=True):
            text = self._own_words(name, response, self.chat_end if chat else self.eos)
            oddities |= {"end mark spelled"} if text != response.text else set()
            oddities |= {"unfinished response"} if not response.finished else set()
            if not isinstance(row.prompt, str):
                text, verbatim = self._turn(row.prompt, prompt, text, response.finished)
                oddities |= {"template rewrites"} if not verbatim else set()
            completions.append(text)
        return Rendered(
            record=row,
            prompt=prompt,
            candidates=candidates,
            completions=tuple(completions),
            chat=chat,
            oddities=frozenset(oddities),
        )

    @cached_property
    def closing(self) -> str:
        """What the chat template writes after the words of the last turn."""
        _, probe, closing = self._apply(self._probe, generate=False).rpartition(_PROBE)
        if not probe:
            raise DataError("the chat template leaves out the assistant's words; use a template that renders them")
        return closing

    @cached_property
    def chat_end(self) -> int:
        """The id that ends a turn of the assistant: EOS where the template writes it, else its first special token."""
        spelled = self._spelled.findall(self.closing)
        ids = [next(i for i, text in self.special.items() if text == word) for word in spelled]
        return self.eos if self.eos in ids or not ids else ids[0]

    @cached_property
    def _probe(self) -> tuple[Message, ...]:
        return (Message(role="user", content="Hello"), Message(role="assistant", content=_PROBE))

    @cached_property
    def _chat_oddities(self) -> set[str]:
        question = self._probe[:1]
        found = {
            "no generation prompt": self._apply(question, generate=True) == self._apply(question, generate=False),
            "no end of turn": self.special[self.chat_end] not in self.closing,
            "end of turn is not EOS": self.chat_end != self.eos,
        }
        return {name for name, holds in found.items() if holds}

    def _opening(self, prompt: Prompt) -> tuple[str, set[str]]:
        """The text before the response, and what is odd about it."""
        if isinstance(prompt, str):
            _encodable("prompt", prompt)
            found = {
                "plain text, chat model": bool(self._tokenizer.chat_template),
                "empty prompt": not prompt.strip(),
                "special token in prompt": bool(self._spelled.search(prompt)),
            }
            return prompt, {name for name, holds in found.items() if holds}
        for message in prompt:
            self._check_text("prompt", message.role)
            self._check_text("prompt", message.content)
        return self._apply(prompt, generate=True), set(self._chat_oddities)

    def _turn(self, prompt: tuple[Message, ...], opening: str, text: str, finished: bool) -> tuple[str, bool]:
        """What stands after the generation prompt when `text` is the answer, and whether the template wrote it so.

        Templates that strip reasoning, or that open a turn in another way than they prompt for one, do not: then the
        text follows the generation prompt as it is, for that is what the model sees when it answers.
        """
        whole = self._apply((*prompt, Message(role="assistant", content=text)), generate=False)
        verbatim = whole.startswith(opening) and text.strip() in whole[len(opening) :]
        turn = whole[len(opening) :] if verbatim else text + self.closing
        if finished:
            return turn, verbatim
        return (turn.removesuffix(self.closing) if turn.endswith(self.closing) else text), verbatim

    def _own_words(self, field: str, response: Response, end: int) -> str:
        """The response's text without the end mark it may spell itself. Raises RowRefused."""
        text, stripped = response.text, response.text.rstrip()
        for mark in (self.special[end], self.special[self.eos]) if response.finished else ():
            if stripped.endswith(mark):
                text = stripped.removesuffix(mark)
                break
        self._check_text(field, text)
        if not text.strip():
            raise RowRefused(field, "is empty or only white space")
        return text

    def _check_text(self, field: str, text: str) -> None:
        _encodable(field, text)
        if found := self._spelled.search(text):
            reason = f"spells the special token {found[0]!r} at character {found.start()}; take it out of the text"
            raise RowRefused(field, reason)

    def _apply(self, messages: Sequence[Message], *, generate: bool) -> str:
        if not self._tokenizer.chat_template:
            raise DataError(
                "the data are conversations but the tokenizer has no chat template; use the tokenizer of a chat model, "
                "put a chat_template.jinja into the model folder, or give prompts and responses as plain strings"
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
        except Exception as problem:  # a template is a program: it raises what it likes, and means this conversation
            raise RowRefused("prompt", f"the chat template refuses it: {' '.join(str(problem).split())}") from problem


def _encodable(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        code = f"U+{ord(text[problem.start]):04X}"
        raise RowRefused(field, f"holds half a character ({code} at character {problem.start})") from None
