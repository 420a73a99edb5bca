"""The doctor reads every row once and says what became of it; what it lets through is exactly what is trained on.

In this order, a row is refused when its source, text or tokenisation is flawed, when its prompt stands in the
evaluation data, when it is too long, or when it compares identical responses; it is a duplicate when it says the same
as an earlier row; and rows of one annotator that contradict each other, in what they prefer or how they label one
response, are refused, all of them. Identical, duplicate and contradictory are judged on the final tokens, after
truncation: on what the model would see.
Rows are never merged: two rows with one prompt stay two groups.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import permutations, zip_longest

import numpy as np

from preftune.data.conversations import RowRefused, Tokenizer, prompt_key
from preftune.data.ranking import pair_positions
from preftune.data.report import Cuts, DataReport, LengthGap, Oddity, Spread, check_refusals
from preftune.data.tokens import Encoder, Row, TokenRow
from preftune.data.truncation import Truncation, excess, fit
from preftune.errors import ConfigError
from preftune.records import Demonstration, Refusal
from preftune.tensors import Ids, TokenGroup

__all__ = ["DataReport", "Prepared", "check_refusals", "prepare"]

_LENGTHS = ("prompt", "chosen", "rejected", "desirable", "undesirable", "response", "total")


@dataclass(frozen=True)
class Prepared:
    """What a data set is trained on, and what became of its rows."""

    groups: list[TokenGroup]
    """Used and truncated rows, in the order of the source."""
    report: DataReport


def prepare(
    source: Iterable[Row | Refusal],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation,
    pairs: str = "all",
    seed: int = 0,
    held_out: Iterable[str] = (),
) -> Prepared:
    """Tokenise and examine a data set; a refused row is entered in the report, nothing is raised for it.

    `max_length` bounds prompt + response in tokens, end mark included; `truncation` says what becomes of a longer row
    (see `truncation`); `pairs` and `seed` say which pairs a ranking gives (see `ranking.pair_positions`). A row whose
    prompt has its `prompt_key` in `held_out`, the `prompt_keys` of another report, is refused.
    Raises DataError when the tokenizer cannot serve the data at all, ConfigError when no row could ever fit.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a prompt and a response need at least 2 tokens")
    books = _Books(max_length, truncation, frozenset(held_out), tokenizer.bos_token_id)
    for item in Encoder(tokenizer).encode(source, lambda row: pair_positions(row, pairs, seed=seed)):
        books.enter(item)
    return books.close()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A row that got through, with what is counted about it."""

    position: int
    """Which row of the source, from 1."""
    group: TokenGroup
    key: str
    """The `prompt_key` of its prompt."""
    field: str
    """What its pairs or its label are called in messages."""
    cut_prompt: bool
    cut_responses: tuple[bool, ...]
    eos_lost: int
    oddities: frozenset[str]

    @property
    def opposite(self) -> str:
        """What a row does that contradicts this one."""
        if self.group.labels:
            return "gives the same response the other label"
        return "prefers the other one of the same two responses"

    @property
    def cut(self) -> bool:
        return self.cut_prompt or any(self.cut_responses)


@dataclass
class _Books:
    """Every item entered ends in exactly one of `kept`, `refused`, `dropped` and `duplicates`."""

    max_length: int
    truncation: Truncation
    held_out: frozenset[str]
    bos: int | None
    rows: int = 0
    kept: list[_Kept] = field(default_factory=list)
    refused: list[tuple[int, Refusal]] = field(default_factory=list)
    """With the row's position: contradictions are found last, but listed where they stand."""
    dropped: list[Refusal] = field(default_factory=list)
    duplicates: list[Refusal] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    stated: dict[object, str] = field(default_factory=dict)
    """Content of a row -> where it stood first."""
    comparisons: defaultdict[tuple[bytes, bytes, bytes], list[tuple[int, str, str]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """(prompt, better, worse), see `_claims` -> (position, origin, annotator) of every row that says so."""

    def enter(self, item: TokenRow | Refusal) -> None:
        self.rows += 1
        if isinstance(item, Refusal):
            self.refused.append((self.rows, item))
            return
        self._measure(item.group)
        try:
            self._examine(item)
        except RowRefused as problem:
            refusal = Refusal(origin=item.group.origin, field=problem.field, reason=problem.reason)
            self.refused.append((self.rows, refusal))

    def _measure(self, group: TokenGroup) -> None:
        sizes = [len(response) for response in group.responses]
        found = {"prompt": [len(group.prompt)]}
        if group.pairs:
            found["chosen"] = [sizes[chosen] for chosen, _ in group.pairs]
            found["rejected"] = [sizes[rejected] for _, rejected in group.pairs]
        elif group.labels:
            for size, label in zip(sizes, group.labels, strict=True):
                found.setdefault("desirable" if label else "undesirable", []).append(size)
        else:
            found["response"] = sizes
        found["total"] = [len(group.prompt) + max(sizes)]
        for name, lengths in found.items():
            self.lengths.setdefault(name, []).extend(lengths)

    def _examine(self, row: TokenRow) -> None:
        whole, origin, key = row.group, row.group.origin, prompt_key(row.record.prompt)
        if key in self.held_out:
            raise RowRefused("prompt", "stands in the evaluation data too, whose numbers would then prove nothing")
        problem = excess(whole, self.max_length)
        if problem and self.truncation == "drop":
            self.dropped.append(Refusal(origin=origin, field="length", reason=f"{problem}; dropped on request"))
            return
        group = fit(row, self.max_length, self.truncation, self.bos)
        for chosen, rejected in _orders(group):
            if np.array_equal(group.responses[chosen], group.responses[rejected]):
                when = " once they are truncated" if problem else ""
                raise RowRefused(row.fields[rejected], f"has the same tokens as {row.fields[chosen]}{when}")
        if first := self._stated_before(row.record, group):
            self.duplicates.append(Refusal(origin=origin, field="row", reason=f"is a copy of {first}"))
            return
        cut = tuple(len(new) < len(old) for new, old in zip(group.responses, whole.responses, strict=True))
        self.kept.append(
            _Kept(
                position=self.rows,
                group=group,
                key=key,
                field="label" if group.labels else "chosen" if "chosen" in row.fields else "pairs",
                cut_prompt=len(group.prompt) < len(whole.prompt),
                cut_responses=cut,
                eos_lost=sum(gone and finished for gone, finished in zip(cut, row.finished, strict=True)),
                oddities=row.oddities,
            )
        )

    def _stated_before(self, record: Row, group: TokenGroup) -> str | None:
        """Where a row with the same content stood; None, and the content noted, for the first of its kind."""
        prompt, responses = _digest(group.prompt), [_digest(response) for response in group.responses]
        says = [(prompt, better, worse) for better, worse in _claims(group, responses)]
        annotator = "" if isinstance(record, Demonstration) else record.annotator
        stated = frozenset(zip_longest(responses, group.ranks, group.scores))
        content = (prompt, frozenset(says), stated, group.weight, annotator)
        if content in self.stated:
            return self.stated[content]
        self.stated[content] = group.origin
        for comparison in says:
            self.comparisons[comparison].append((self.rows, group.origin, annotator))
        return None

    def _opposed(self) -> tuple[dict[int, str], set[int]]:
        """Rows that contradict one of the same annotator -> where that stands; rows another annotator contradicts."""
        contradicted: dict[int, str] = {}
        disputed: set[int] = set()
        for (prompt, better, worse), rows in self.comparisons.items():
            opposite = self.comparisons.get((prompt, worse, better), [])
            for position, _, annotator in rows:
                for _, origin, other in opposite:
                    if annotator == other:
                        contradicted.setdefault(position, origin)
                    else:
                        disputed.add(position)
        return contradicted, disputed

    def close(self) -> Prepared:
        contradicted, disputed = self._opposed()
        for row in self.kept:
            if row.position in contradicted:
                reason = f"{contradicted[row.position]} {row.opposite}"
                refusal = Refusal(origin=row.group.origin, field=row.field, reason=reason)
                self.refused.append((row.position, refusal))
        kept = [row for row in self.kept if row.position not in contradicted]
        groups = [row.group for row in kept]
        odd: defaultdict[str, list[str]] = defaultdict(list)
        for row in kept:
            disagree = {"annotators disagree"} if row.position in disputed else set()
            backwards = {"scores disagree"} if _scored_backwards(row.group) else set()
            for name in row.oddities | disagree | backwards:
                odd[name].append(row.group.origin)
        report = DataReport(
            rows=self.rows,
            used=sum(not row.cut for row in kept),
            refused=len(self.refused) + len(self.dropped),
            truncated=sum(row.cut for row in kept),
            duplicate=len(self.duplicates),
            refusals=tuple(refusal for _, refusal in sorted(self.refused, key=lambda entry: entry[0])),
            dropped=tuple(self.dropped),
            duplicates=tuple(self.duplicates),
            prompts=len({row.key for row in kept}),
            responses=sum(len(group.responses) for group in groups),
            pairs=sum(len(group.pairs) for group in groups),
            rankings=sum(bool(group.ranks) for group in groups),
            scored=sum(len(group.scores) for group in groups),
            desirable=sum(group.labels.count(True) for group in groups),
            undesirable=sum(group.labels.count(False) for group in groups),
            tokens=sum(len(group.prompt) + sum(map(len, group.responses)) for group in groups),
            lengths={name: Spread.of(self.lengths[name]) for name in _LENGTHS if name in self.lengths},
            length_gap=_length_gap(groups),
            cuts=_cuts(kept),
            oddities=tuple(Oddity.of(name, odd[name]) for name in sorted(odd)),
            prompt_keys=frozenset(row.key for row in kept),
        )
        return Prepared(groups, report)


def _orders(group: TokenGroup) -> list[tuple[int, int]]:
    """(better, worse) positions of every two responses that the group's pairs or ranks compare."""
    ranks = group.ranks
    ranked = {(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]}
    return sorted(ranked.union(group.pairs))


def _claims(group: TokenGroup, responses: list[bytes]) -> list[tuple[bytes, bytes]]:
    """(better, worse) of every pair and label: a label says better, or worse, than no response at all."""
    pairs = [(responses[chosen], responses[rejected]) for chosen, rejected in group.pairs]
    labelled = zip(responses, group.labels, strict=False)
    return pairs + [(response, b"") if label else (b"", response) for response, label in labelled]


def _scored_backwards(group: TokenGroup) -> bool:
    return bool(group.scores) and any(group.scores[chosen] < group.scores[rejected] for chosen, rejected in group.pairs)


def _length_gap(groups: list[TokenGroup]) -> LengthGap | None:
    gaps = [len(g.responses[chosen]) - len(g.responses[rejected]) for g in groups for chosen, rejected in g.pairs]
    return LengthGap.of(gaps) if gaps else None


def _cuts(kept: list[_Kept]) -> Cuts:
    sides = [(r.cut_responses[chosen], r.cut_responses[rejected]) for r in kept for chosen, rejected in r.group.pairs]
    return Cuts(
        prompts=sum(row.cut_prompt for row in kept),
        responses=sum(sum(row.cut_responses) for row in kept),
        chosen=sum(chosen for chosen, _ in sides),
        rejected=sum(rejected for _, rejected in sides),
        desirable=sum(cut for row in kept for cut, label in _labelled_cuts(row) if label),
        undesirable=sum(cut for row in kept for cut, label in _labelled_cuts(row) if not label),
        one_sided=sum(chosen != rejected for chosen, rejected in sides),
        eos_lost=sum(row.eos_lost for row in kept),
    )


def _labelled_cuts(row: _Kept) -> list[tuple[bool, bool]]:
    return list(zip(row.cut_responses, row.group.labels, strict=False))


def _digest(ids: Ids) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
