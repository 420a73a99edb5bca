"""Rows longer than max_length: which side gives way, and when nothing can.

    prompt     the prompt loses tokens on its left; BOS and at least one more token stay, and all responses of the
               row keep sharing the one prompt that is left
    response   every response loses tokens on its right, its end mark first; at least one token stays
    refuse     the row is refused
    drop       the row is left out because the user said so

A row that does not fit after the cut either is refused: no policy touches both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from preftune.data.conversations import RowRefused
from preftune.data.tokens import TokenRow
from preftune.tensors import TokenGroup

__all__ = ["Truncation", "excess", "fit"]

Truncation = Literal["refuse", "drop", "prompt", "response"]


def excess(group: TokenGroup, max_length: int) -> str:
    """What is too long about a group, in numbers; empty when prompt + longest response <= max_length tokens."""
    prompt, response = len(group.prompt), max(map(len, group.responses))
    if prompt + response <= max_length:
        return ""
    return f"{prompt} prompt + {response} response tokens = {prompt + response}, above max_length {max_length}"


def fit(row: TokenRow, max_length: int, policy: Truncation, bos: int | None) -> TokenGroup:
    """The row's group with prompt + longest response <= max_length tokens. Raises RowRefused."""
    group, problem = row.group, excess(row.group, max_length)
    if not problem:
        return group
    lengths = [len(response) for response in group.responses]
    if policy == "prompt":
        head = int(group.prompt[0] == bos)
        room = max_length - max(lengths)
        if room <= head:
            raise RowRefused(row.fields[int(np.argmax(lengths))], f"leaves no room for the prompt: {problem}")
        tail = group.prompt[len(group.prompt) - (room - head) :]
        return replace(group, prompt=np.concatenate([group.prompt[:head], tail]))
    if policy == "response":
        room = max_length - len(group.prompt)
        if room < 1:
            raise RowRefused("prompt", f"leaves no room for a response: {problem}")
        return replace(group, responses=tuple(response[:room] for response in group.responses))
    raise RowRefused("length", f"{problem}; raise max_length, or choose truncation drop, prompt or response")
