"""Demonstration layouts -> `Demonstration`: the answer to imitate in supervised fine-tuning.

Every preference layout is one too: its best response is the demonstration (Preferred-FT, DPO paper section 6);
of responses that tie for best, the first. `unpaired` rows are read here as what they are without their label,
`prompt_completion` or `messages`; those marked as bad are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from preftune.data.fields import Fields, Flaw, Row, answer, conversation
from preftune.data.formats import PREFERENCES, stated_pairs
from preftune.data.layouts import Items, Layout, Rows, each
from preftune.records import Demonstration, RankedResponses, Response

__all__ = ["DEMONSTRATIONS"]

ANSWERS = ("completion", "response", "output", "chosen", "completions", "responses")


def best_response(record: RankedResponses) -> Demonstration:
    """The response of the smallest rank, the first of those that tie."""
    best = record.responses[record.ranks.index(min(record.ranks))]
    return Demonstration(prompt=record.prompt, response=best, weight=record.weight, origin=record.origin)


def _best_of(layout: Layout) -> Layout:
    def items(rows: Rows) -> Items:
        for item in layout.items(rows):
            yield best_response(item) if isinstance(item, RankedResponses) else item

    return Layout(layout.columns, layout.matches, items)


def prompt_completion(row: Fields) -> Demonstration:
    """prompt, and completion or response, plain or messages."""
    _refuse_bad(row)
    prompt, text = answer(row)
    return Demonstration(prompt=prompt, response=Response(text=text), weight=row.weight(), origin=row.origin)


def messages(row: Fields) -> Demonstration:
    """A conversation; its last message, the assistant's, is the response, all others are the prompt."""
    _refuse_bad(row)
    prompt, text = conversation(row)
    return Demonstration(prompt=prompt, response=Response(text=text), weight=row.weight(), origin=row.origin)


def alpaca(row: Fields) -> Demonstration:
    """instruction, input, output; a given input follows the instruction after a blank line."""
    prompt = row.text("instruction")
    if row.optional("input") not in (None, ""):
        prompt = f"{prompt}\n\n{row.text('input')}"
    response = Response(text=row.text("output"))
    return Demonstration(prompt=prompt, response=response, weight=row.weight(), origin=row.origin)


def text(row: Fields) -> Demonstration:
    """Plain text to continue from nothing: the prompt is empty."""
    return Demonstration(prompt="", response=Response(text=row.text("text")), weight=row.weight(), origin=row.origin)


def texts(rows: Rows) -> Items:
    """Rows that are a string, or an object with `text`."""
    as_objects = (
        Row(row.origin, {"text": row.value}, row.cells) if isinstance(row, Row) and isinstance(row.value, str) else row
        for row in rows
    )
    yield from each(text)(as_objects)


def stated_target(row: Fields) -> Demonstration:
    """The original DPO repository names the demonstration itself; without one, the best response."""
    record = stated_pairs(row)
    if row.optional("sft_target") is None:
        return best_response(record)
    response = Response(text=row.text("sft_target"))
    return Demonstration(prompt=record.prompt, response=response, weight=record.weight, origin=record.origin)


def _refuse_bad(row: Fields) -> None:
    """Unpaired data marks bad answers with `label: false`, or 0: they are not to be imitated."""
    if row.truth("label") is False:
        raise Flaw("label", f"is {str(row.values['label']).lower()}: an answer marked as bad is no demonstration")


def _is_prompt_completion(row: Mapping[str, object]) -> bool:
    return "prompt" in row and ("completion" in row or ("response" in row and "score" not in row))


def _is_conversation(row: Mapping[str, object]) -> bool:
    return ("messages" in row or "conversations" in row) and "chosen" not in row


def _is_text(row: Mapping[str, object]) -> bool:
    return "text" in row and not any(answer in row for answer in (*ANSWERS, "messages", "conversations"))


DEMONSTRATIONS: dict[str, Layout] = {
    "prompt_completion": Layout(
        "prompt, completion or response[, weight]", _is_prompt_completion, each(prompt_completion)
    ),
    "messages": Layout("messages or conversations, ending with the assistant's", _is_conversation, each(messages)),
    "alpaca": Layout(
        "instruction, output[, input]", lambda row: "instruction" in row and "output" in row, each(alpaca)
    ),
    "text": Layout("text, or rows that are plain strings", _is_text, texts),
    **{name: _best_of(layout) for name, layout in PREFERENCES.items() if name != "unpaired"},
    "dpo_repo": Layout(PREFERENCES["dpo_repo"].columns, PREFERENCES["dpo_repo"].matches, each(stated_target)),
}
