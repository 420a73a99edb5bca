"""Room for an answer: a prompt that leaves a model none is a refused row, named before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from preftune.data.prompts import Prompts
from preftune.data.ranking import pair_positions
from preftune.data.tokens import Encoder
from preftune.models.folder import base_of, find, is_adapter
from preftune.models.generate import encode_prompt
from preftune.models.outline import read_configuration
from preftune.models.tokenizer import load_tokenizer, tokenizer_sha256
from preftune.records import Prompt, RankedResponses, Refusal

__all__ = ["Reader", "reader", "rows_with_room", "with_room"]


@dataclass(frozen=True, eq=False)
class Reader:
    """Who is asked: what becomes of its prompts, and how many tokens it has places for."""

    name: str
    tokenizer: Any
    positions: float = math.inf
    limit: str = ""
    """What the bound is called in messages; empty: the positions of `name`."""

    @classmethod
    def of(cls, name: str, tokenizer: Any, *models: Any) -> Reader:
        """Of models that all read the same tokens; the one with the fewest positions decides."""
        return cls(name, tokenizer, min(_positions(model.config) for model in models if model is not None))


def reader(name: str) -> Reader:
    """Of a model folder or hub name, before any weight is loaded. Raises ArtifactError."""
    folder = find(name)
    whole = base_of(folder) if is_adapter(folder) else str(folder)
    return Reader(name, load_tokenizer(folder), _positions(read_configuration(whole)))


def with_room(found: Prompts, readers: Sequence[Reader], max_tokens: int) -> Prompts:
    """The prompts that every reader can read with `max_tokens` behind them; the others are refused, row by row."""
    kept: list[tuple[Prompt, str]] = []
    refusals: list[Refusal] = []
    for prompt, origin in found.prompts:
        problem = next(_problems(prompt, readers, max_tokens), None)
        if problem is None:
            kept.append((prompt, origin))
        else:
            refusals.append(Refusal(origin=origin, field="prompt", reason=problem))
    return replace(found, prompts=tuple(kept), refusals=(*found.refusals, *refusals))


def rows_with_room(
    rows: Sequence[RankedResponses], readers: Iterable[Reader]
) -> tuple[list[RankedResponses], list[Refusal]]:
    """The rows of which every reader can read prompt and responses whole, and the others, refused, in their order."""
    tightest: dict[str, Reader] = {}
    for one in readers:
        kept = tightest.setdefault(tokenizer_sha256(one.tokenizer), one)
        tightest[tokenizer_sha256(one.tokenizer)] = min(kept, one, key=lambda reader: reader.positions)
    refused: dict[int, Refusal] = {}
    for one in tightest.values():
        for i, item in enumerate(Encoder(one.tokenizer).encode(rows, pair_positions)):
            if isinstance(item, Refusal):
                refused.setdefault(i, item)
                continue
            tokens = len(item.group.prompt) + max(map(len, item.group.responses))
            if tokens > one.positions:
                reason = f"{tokens} tokens exceed the {one.positions:g} positions of {one.name}"
                refused.setdefault(i, Refusal(origin=rows[i].origin, field="length", reason=reason))
    return [row for i, row in enumerate(rows) if i not in refused], [refused[i] for i in sorted(refused)]


def _problems(prompt: Prompt, readers: Iterable[Reader], max_tokens: int) -> Iterator[str]:
    for one in readers:
        try:
            tokens = len(encode_prompt(one.tokenizer, prompt))
        except (TemplateError, ValueError) as problem:  # ValueError: there is no template
            yield f"the chat template of {one.name} does not take it ({' '.join(str(problem).split())[:120]})"
            continue
        if tokens + max_tokens > one.positions:
            advice = f"lower max_tokens to {one.positions - tokens:g}" if one.positions > tokens else "shorten it"
            limit = one.limit or f"the {one.positions:g} positions of {one.name}"
            yield f"{tokens} tokens and max_tokens {max_tokens} exceed {limit}; {advice}"


def _positions(config: Any) -> float:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
