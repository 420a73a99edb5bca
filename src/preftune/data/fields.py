"""Typed reading of one row: what is wrong with it is raised as a `Flaw` that names the field.

A row read from CSV holds text only (`cells`): there, and only there, "0.5" is a number and "[1, 2]" a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from preftune.records import Message, Prompt

__all__ = [
    "MAX_TEXT_CHARS",
    "Completion",
    "Fields",
    "Flaw",
    "Row",
    "answer",
    "conversation",
    "describe",
    "printable",
    "shared_prompt",
]

MAX_TEXT_CHARS = 10_000_000
"""Longer than any context window: such a field is a damaged file, not a text."""

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""`from` of a ShareGPT message -> role."""

UNREAD = ("tools", "image", "images", "video", "videos", "audio", "audios", "chat_template_kwargs")
"""Columns that would change what is trained on if they were read: a row that fills one is refused, not misread."""
CONTEXT = ("system", "system_prompt", "history", "instruction", "question", "query", "input", "context")
"""Where other tools keep the prompt or a part of it: a row is refused if its layout leaves such words unread."""
UNREAD_IN_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "thinking")

TEXT_OR_MESSAGES = "a string or a list of messages"


class Flaw(ValueError):
    """What is wrong with a row, and in which field."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file gives it."""

    origin: str
    value: object
    cells: bool = False
    """True when every value is text because the file format knows nothing else (CSV)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One response as a row gives it: plain text, or messages of which the last is the response."""

    field: str
    text: str
    earlier: tuple[Message, ...] = ()
    conversational: bool = False


class Fields:
    """The fields of one row, each read as the type its layout wants."""

    def __init__(self, row: Row, path: str = ""):
        if not isinstance(row.value, dict):
            raise Flaw(path.rstrip(".") or "row", f"is {describe(row.value)}, an object was expected")
        self.row = row
        self.values: dict[str, object] = row.value
        self.path = path

    @property
    def origin(self) -> str:
        return self.row.origin

    def has(self, *names: str) -> bool:
        return all(name in self.values for name in names)

    def first_of(self, *names: str) -> str:
        """The first of the names that the row has, else the first name."""
        return next((name for name in names if name in self.values), names[0])

    def get(self, name: str, wanted: str) -> object:
        if name not in self.values:
            raise Flaw(self.path + name, f"is missing, {wanted} was expected")
        return self.values[name]

    def optional(self, name: str) -> object | None:
        """The value, or None when it is missing, null or an empty cell."""
        value = self.values.get(name)
        return None if self.row.cells and value == "" else value

    def text(self, name: str) -> str:
        return _text(self.get(name, "a string"), self.path + name)

    def prompt(self, name: str = "prompt") -> Prompt:
        value = self.get(name, TEXT_OR_MESSAGES)
        if isinstance(value, list):
            return _messages(value, self.path + name)
        return _text(value, self.path + name, TEXT_OR_MESSAGES)

    def messages(self, name: str) -> tuple[Message, ...]:
        return _messages(self.get(name, "a list of messages"), self.path + name)

    def completion(self, name: str) -> Completion:
        return _completion(self.get(name, TEXT_OR_MESSAGES), self.path + name)

    def completions(self, name: str) -> list[Completion]:
        return [_completion(value, f"{self.path}{name}[{i}]") for i, value in enumerate(self.items(name))]

    def number(self, name: str, *, text: bool = False) -> float:
        """A finite number; with `text` one written as text counts, as it always does in a cell."""
        return _number(self.get(name, "a finite number"), self.path + name, text or self.row.cells)

    def optional_number(self, name: str) -> float | None:
        return None if self.optional(name) is None else self.number(name)

    def truth(self, name: str) -> bool | None:
        """What a mark of yes or no says, written true or 1, false or 0 (as text in a cell); None when it is neither."""
        value = self.values.get(name)
        if self.row.cells and isinstance(value, str):
            value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
        return bool(value) if isinstance(value, int | float) and value in (0, 1) else None

    def items(self, name: str) -> list[object]:
        value = self.get(name, "a list")
        if self.row.cells and isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise Flaw(self.path + name, "is not a list written as JSON") from error
        if not isinstance(value, list):
            raise Flaw(self.path + name, f"is {describe(value)}, a list was expected")
        return value

    def integers(self, name: str) -> list[int]:
        return [_integer(value, f"{self.path}{name}[{i}]") for i, value in enumerate(self.items(name))]

    def integer_pairs(self, name: str) -> list[tuple[int, int]]:
        pairs = []
        for i, pair in enumerate(self.items(name)):
            field = f"{self.path}{name}[{i}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise Flaw(field, f"is {describe(pair)}, a list of two whole numbers was expected")
            pairs.append((_integer(pair[0], f"{field}[0]"), _integer(pair[1], f"{field}[1]")))
        return pairs

    def integer(self, name: str) -> int:
        return _integer(self.get(name, "a whole number"), self.path + name)

    def fields(self, name: str) -> Fields:
        """The object inside the field, read the same way."""
        return Fields(Row(self.origin, self.get(name, "an object")), f"{self.path}{name}.")

    def list_of_fields(self, name: str) -> list[Fields]:
        path = f"{self.path}{name}"
        return [Fields(Row(self.origin, value), f"{path}[{i}].") for i, value in enumerate(self.items(name))]

    def weight(self) -> float:
        """The row's weight, 1 when it has none."""
        weight = self.optional_number("weight")
        if weight is not None and weight <= 0:
            raise Flaw("weight", f"is {weight:g}, a finite number above 0 was expected")
        return 1.0 if weight is None else weight

    def annotator(self) -> str:
        """Who judged the row, "" when it does not say."""
        return "" if self.optional("annotator") is None else self.text("annotator")

    def refuse_unread(self) -> None:
        for name in UNREAD:
            if self.optional(name) not in (None, [], {}, ""):
                raise Flaw(name, "is given, but is not read: this row would be trained on without it")

    def refuse_lost(self, read: Sequence[str]) -> None:
        """Refuse words of `CONTEXT` that stand in none of the texts that were `read`; metadata are no text."""
        for name in CONTEXT:
            value = self.optional(name)
            if isinstance(value, str) and any(value.strip() in text for text in read):
                continue
            if value and isinstance(value, str | list):
                reason = "holds words that this layout does not read; make them part of the prompt, or drop the column"
                raise Flaw(name, reason)


def describe(value: object) -> str:
    """What a value is, in a few words for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value!r:.30}"
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def printable(name: str) -> str:
    """A column's name as it can be shown on one line of any terminal."""
    return name if name.isprintable() and name else ascii(name)


def shared_prompt(prompt: Prompt | None, completions: Sequence[Completion]) -> Prompt:
    """The prompt of all completions of a row: what is given as such, and the messages before every response.

    Messages before the final one must be equal in all completions. A given prompt that they repeat (as in
    conversations stored whole) counts once; a plain one before messages is the user's turn.
    """
    first = completions[0]
    for other in completions[1:]:
        if other.conversational != first.conversational:
            raise Flaw(other.field, f"is not of the same kind as {first.field}: one is text, one is messages")
        if other.earlier != first.earlier:
            raise Flaw(
                other.field, f"its earlier messages differ from those of {first.field}, only the final one may differ"
            )
    if not first.conversational and prompt is not None:
        return prompt
    if isinstance(prompt, str):
        told = any(message.content == prompt for message in first.earlier)
        return first.earlier if told else (Message(role="user", content=prompt), *first.earlier)
    before = prompt or ()
    whole = first.earlier if first.earlier[: len(before)] == before else before + first.earlier
    if not whole:
        raise Flaw(first.field, "holds no message before the response, so there is no prompt")
    return whole


def answer(row: Fields) -> tuple[Prompt, str]:
    """(prompt, response) of a row with prompt, and completion or response, plain or messages."""
    completion = row.completion(row.first_of("completion", "response"))
    return shared_prompt(row.prompt("prompt"), [completion]), completion.text


def conversation(row: Fields) -> tuple[Prompt, str]:
    """(prompt, response) of a row with messages (or conversations): all of them but the last, the assistant's."""
    name = row.first_of("messages", "conversations")
    row.messages(name)  # a conversation, where a completion could be plain
    completion = row.completion(name)
    return shared_prompt(None, [completion]), completion.text


def _text(value: object, field: str, wanted: str = "a string", *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise Flaw(field, f"is {describe(value)}, {wanted} was expected")
    if len(value) > MAX_TEXT_CHARS:
        raise Flaw(field, f"has {len(value)} characters, at most {MAX_TEXT_CHARS} were expected")
    if "\0" in value:
        raise Flaw(field, f"holds a NUL character (character {value.index(chr(0)) + 1})")
    if not may_be_empty and not value.strip():
        raise Flaw(field, "holds only white space" if value else "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = value[error.start]
        raise Flaw(field, f"is not valid Unicode: character {error.start + 1} is {found!a}") from error
    return value


def _number(value: object, field: str, from_text: bool) -> float:
    if from_text and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Flaw(field, f"is {value!r:.40}, a finite number was expected") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Flaw(field, f"is {describe(value)}, a finite number was expected")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Flaw(field, f"is {describe(value)}, a finite number was expected")
    return number


def _integer(value: object, field: str) -> int:
    number = _number(value, field, from_text=False)
    if number != int(number):
        raise Flaw(field, f"is {describe(value)}, a whole number was expected")
    return int(number)


def _message(value: object, field: str) -> Message:
    if not isinstance(value, dict):
        raise Flaw(field, f"is {describe(value)}, a message with role and content was expected")
    fields = Fields(Row("", value), f"{field}.")
    share_gpt = fields.has("from") and not fields.has("role")
    speaker, said = ("from", "value") if share_gpt else ("role", "content")
    role = fields.text(speaker)
    if share_gpt:
        if role not in SPEAKERS:
            raise Flaw(f"{field}.from", f"is {role!r}; allowed: {', '.join(SPEAKERS)}")
        role = SPEAKERS[role]
    for name in UNREAD_IN_MESSAGE:
        if value.get(name):
            raise Flaw(f"{field}.{name}", "is given, but is not read")
    # An empty system message is a choice (no default system prompt); an empty turn of a speaker is a flaw.
    content = _text(fields.get(said, "a string"), f"{field}.{said}", may_be_empty=role == "system")
    return Message(role=role, content=content)


def _messages(value: object, field: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise Flaw(field, f"is {describe(value)}, a list of messages was expected")
    if not value:
        raise Flaw(field, "is an empty list, a list of messages was expected")
    return tuple(_message(message, f"{field}[{i}]") for i, message in enumerate(value))


def _completion(value: object, field: str) -> Completion:
    if isinstance(value, list | dict):
        messages = _messages(value, field) if isinstance(value, list) else (_message(value, field),)
        if messages[-1].role != "assistant":
            raise Flaw(field, f"ends with a message of {messages[-1].role!r}, the assistant's was expected")
        return Completion(field, messages[-1].content, messages[:-1], conversational=True)
    return Completion(field, _text(value, field, TEXT_OR_MESSAGES))
