"""Prompts with answers -> token groups, as training would see them; the answers of one prompt stay together."""

from __future__ import annotations

from collections.abc import Sequence

from preftune.data.conversations import Tokenizer
from preftune.data.tokens import Encoder
from preftune.errors import DataError
from preftune.records import Demonstration, Prompt, Refusal, Response
from preftune.tensors import Ids, TokenGroup

__all__ = ["answer_groups"]


def answer_groups(
    tokenizer: Tokenizer, asked: Sequence[tuple[Prompt, Response]]
) -> tuple[list[TokenGroup], list[tuple[int, int]]]:
    """The groups, and for every (prompt, response) in order its (group, position among that group's responses).

    Every answer is rendered by itself, so its tokens do not depend on what else is asked; equal ones are one response.
    Raises DataError, with the number of the answer, when a text cannot be rendered or holds no token.
    """
    rows = [Demonstration(prompt=p, response=r, origin=f"answer {i}") for i, (p, r) in enumerate(asked, start=1)]
    first: dict[bytes, TokenGroup] = {}
    answers: dict[bytes, dict[bytes, Ids]] = {}
    keys: list[tuple[bytes, bytes]] = []
    for row in Encoder(tokenizer).encode(rows, lambda _: ()):
        if isinstance(row, Refusal):
            raise DataError(str(row))
        prompt, ids = row.group.prompt.tobytes(), row.group.responses[0]
        first.setdefault(prompt, row.group)
        answers.setdefault(prompt, {}).setdefault(ids.tobytes(), ids)
        keys.append((prompt, ids.tobytes()))
    groups = [TokenGroup(group.prompt, tuple(answers[p].values()), origin=group.origin) for p, group in first.items()]
    at = {(p, answer): (g, i) for g, p in enumerate(first) for i, answer in enumerate(answers[p])}
    return groups, [at[key] for key in keys]
