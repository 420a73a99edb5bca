"""Rows -> token ids; the border between prompt and response is a border between tokens, for every row.

For a row of prompt x and responses y_1 .. y_K:

    ids(x), ids(x + y_k)      if ids(x) is a prefix of every ids(x + y_k), the rest of each is its response
    ids(x), ids(y_k)          else for all K: the tokenizer would merge across the border ("boundary merge")

so all responses share the prompt's ids, and nothing is ever cut at a length that is not a prefix. BOS and whatever else
the tokenizer writes before a text stands once, in front; an empty prompt becomes BOS (EOS, the separator of documents,
where there is no BOS), because the first token must be predicted from something. A finished response ends with exactly
one end mark (see `conversations`), an unfinished one with none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from preftune.data.conversations import Candidates, Rendered, Row, RowRefused, Tokenizer, Writer
from preftune.data.ranking import ranks_from_scores
from preftune.records import LabelledResponse, RankedResponses, Refusal
from preftune.tensors import TokenGroup

__all__ = ["Encoder", "Row", "TokenRow"]

_ROWS_AT_ONCE = 512  # enough to keep the tokenizer's threads busy, little enough to stay small in memory


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row as token ids, with what the doctor still needs of its source."""

    record: Row
    group: TokenGroup
    fields: tuple[str, ...]
    """What each response of `group` is called in messages."""
    finished: tuple[bool, ...]
    oddities: frozenset[str]
    """Keys of `report.ODDITIES`."""


class Encoder:
    """Tokenises rows by the conventions of one tokenizer, which it learns by asking. Raises DataError without EOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._writer = Writer(tokenizer)
        bare = self._ids(["a"])[0]
        dressed = self._ids(["a"], add_special_tokens=True)[0]
        starts = (i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)
        self._head = dressed[: next(starts, 0)]
        bos = tokenizer.bos_token_id
        self._separator = self._writer.eos if bos is None else bos

    def encode(
        self, items: Iterable[Row | Refusal], pairs_of: Callable[[RankedResponses], Sequence[tuple[int, int]]]
    ) -> Iterator[TokenRow | Refusal]:
        """Every item, in order, as ids or as a refusal. Responses no pair uses are left out of the group."""
        source = iter(items)
        while chunk := list(islice(source, _ROWS_AT_ONCE)):
            texts = [self._render(item, pairs_of) for item in chunk]
            ids = iter(self._encode([text for text in texts if isinstance(text, Rendered)]))
            for text in texts:
                yield text if isinstance(text, Refusal) else self._token_row(text, *next(ids))

    def _render(
        self, row: Row | Refusal, pairs_of: Callable[[RankedResponses], Sequence[tuple[int, int]]]
    ) -> Rendered | Refusal:
        try:
            if isinstance(row, Refusal):
                return row
            if isinstance(row, RankedResponses):
                return self._writer.render(row, _compared(row, pairs_of(row)))
            labels = (row.desirable,) if isinstance(row, LabelledResponse) else ()
            return self._writer.render(row, Candidates((row.response,), ("response",), labels=labels))
        except RowRefused as problem:
            return Refusal(origin=row.origin, field=problem.field, reason=problem.reason)

    def _encode(self, rows: Sequence[Rendered]) -> Iterator[tuple[list[int], list[list[int]], bool]]:
        """(prompt ids, ids of each completion, whether the tokenizer would merge across the border) of every row."""
        prompts = self._ids([row.prompt for row in rows])
        joint = iter(self._ids([row.prompt + text for row in rows for text in row.completions]))
        for row, prompt in zip(rows, prompts, strict=True):
            wholes = [next(joint) for _ in row.completions]
            exact = all(whole[: len(prompt)] == prompt for whole in wholes)
            rests = [whole[len(prompt) :] for whole in wholes] if exact else self._apart(row.completions)
            if not row.chat and prompt[: len(self._head)] != self._head:
                prompt = self._head + prompt
            yield prompt or [self._separator], rests, not exact

    def _apart(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue something: behind a line break, so that no tokenizer puts a space in front."""
        anchor, *anchored = self._ids(["\n", *("\n" + text for text in texts)])
        alone = self._ids(list(texts))
        return [
            whole[len(anchor) :] if whole[: len(anchor)] == anchor else by_itself
            for whole, by_itself in zip(anchored, alone, strict=True)
        ]

    def _token_row(self, text: Rendered, prompt: list[int], rests: list[list[int]], merged: bool) -> TokenRow | Refusal:
        record, said, end = text.record, text.candidates, self._chat_end if text.chat else (self._writer.eos, 0)
        finished = tuple(response.finished for response in said.responses)
        try:
            responses = [_ended(*response, *end) for response in zip(said.fields, rests, finished, strict=True)]
        except RowRefused as problem:
            return Refusal(origin=record.origin, field=problem.field, reason=problem.reason)
        group = TokenGroup(
            prompt=np.array(prompt, dtype=np.int32),
            responses=tuple(np.array(ids, dtype=np.int32) for ids in responses),
            pairs=said.pairs,
            weight=record.weight,
            origin=record.origin,
            ranks=said.ranks,
            scores=said.scores,
            labels=said.labels,
        )
        oddities = text.oddities | self._odd_ids(prompt, responses) | ({"boundary merge"} if merged else set())
        return TokenRow(record, group, said.fields, finished, oddities)

    @cached_property
    def _chat_end(self) -> tuple[int, int]:
        """The id that ends a turn, and how often the template writes it."""
        return self._writer.chat_end, self._ids([self._writer.closing])[0].count(self._writer.chat_end)

    def _odd_ids(self, prompt: list[int], responses: Sequence[list[int]]) -> set[str]:
        bos, unknown = self._tokenizer.bos_token_id, self._tokenizer.unk_token_id
        found = set()
        if bos is not None and bos != self._writer.eos:
            count = prompt.count(bos)
            found |= {"no BOS"} if count == 0 and bos in self._head else set()
            found |= {"BOS more than once"} if count > 1 else set()
        if unknown not in self._writer.special and any(unknown in ids for ids in (prompt, *responses)):
            found.add("unknown characters")
        return found

    def _ids(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _compared(row: RankedResponses, pairs: Sequence[tuple[int, int]]) -> Candidates:
    """The responses some pair uses, and what the row says about them. Raises RowRefused.

    They have ranks unless the row states its pairs itself: its ranks are then derived, and it states no order.
    They have scores when every one of them has.
    """
    if not pairs:
        raise RowRefused("ranks", "every response ties with every other, so there is no pair to learn from")
    stated = set(pairs)
    if len(stated) != len(pairs):
        raise RowRefused("pairs", "the same pair is stated twice; state it once and use the row's weight")
    for chosen, rejected in pairs:
        if (rejected, chosen) in stated:
            raise RowRefused("pairs", f"({chosen}, {rejected}) and its opposite are both stated")
    used = sorted({position for pair in pairs for position in pair})
    new = {position: i for i, position in enumerate(used)}
    names = {position: f"responses[{position}]" for position in used}
    if len(row.responses) == 2:
        names = {pairs[0][0]: "chosen", pairs[0][1]: "rejected"}
    scores = [score for i in used if (score := row.responses[i].score) is not None]
    return Candidates(
        responses=tuple(row.responses[i] for i in used),
        fields=tuple(names[i] for i in used),
        pairs=tuple((new[chosen], new[rejected]) for chosen, rejected in pairs),
        ranks=() if row.pairs is not None else ranks_from_scores([-row.ranks[i] for i in used]),
        scores=tuple(scores) if len(scores) == len(used) else (),
    )


def _ended(field: str, ids: list[int], finished: bool, end: int, written: int) -> list[int]:
    """`ids` with one end mark at their end when `finished`, else with none. Raises RowRefused.

    `written` is how often the text itself holds the mark: 0 for plain text, what the chat template writes for a turn.
    """
    if ids.count(end) != (written if finished else 0):
        raise RowRefused(field, "holds text that the tokenizer turns into the end-of-sequence mark")
    if finished:
        ids = ids[: ids.index(end) + 1] if written else [*ids, end]
    if not ids or ids == [end]:
        raise RowRefused(field, "holds no token once the tokenizer is through with it")
    return ids
