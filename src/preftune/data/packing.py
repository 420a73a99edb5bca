"""Token groups -> rows a model is fed: each unique token once, in an order that two integers restore.

A response of L tokens is fed without its last one (nothing is predicted from it): the fed sequence of response r is
`s_r = prompt + response_r[:-1]`, and its L tokens are predicted at the positions `P - 1 ... P + L - 2` of `s_r`.
What reads whole responses, a reward model, asks for the last one too: `feed_last`.

Legend of shapes: N tokens in one packed row, R responses, S longest fed sequence, C scored tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.data.columns import column, shared_prefix
from preftune.errors import ConfigError, DataError
from preftune.tensors import AttentionPlan, Ids, PackedBatch, PairIndex, Segment, TokenGroup

__all__ = ["StepPlan", "best_fit", "by_group", "fed_tokens", "idle", "micro_batches", "pack", "pad"]

T = TypeVar("T")


def pack(groups: Sequence[TokenGroup], *, feed_last: bool = False) -> PackedBatch:
    """One row: every group is `[shared prefix | rest 1 | rest 2 ...]`, its shared tokens computed once.

    The prefix is the longest common token prefix of the fed sequences and may run into the responses; shared
    response tokens are still scored once per response. Prefix and first rest are one causal segment; every further
    rest is a segment that also sees the prefix. A rest may be empty (one response continues another).
    `feed_last`: responses are fed whole, and `last_at` says where each ends.
    """
    assert groups, "a batch holds at least one group"
    tokens: list[Ids] = []
    fed: list[tuple[int, int]] = []  # first position and number of what is fed of a response
    scored: list[tuple[int, int]] = []  # first place in the row and number of what predicts it, shared and own
    last_at: list[int] = []
    segments: list[Segment] = []
    end = 0
    for group in groups:
        first, prompt, bodies = end, len(group.prompt), _bodies(group, feed_last)
        prefix = prompt + shared_prefix(bodies)
        tokens.append(group.prompt)
        for r, (response, body) in enumerate(zip(group.responses, bodies, strict=True)):
            own_from = 0 if r == 0 else prefix  # the first response brings the prefix along
            tokens.append(body if r == 0 else body[prefix - prompt :])
            start, end = end, end + prompt + len(body) - own_from
            fed.append((own_from, end - start))
            if end > start:
                segments.append(Segment(start, end) if r == 0 else Segment(start, end, first, first + prefix))
            last = prompt - 1 + len(response)  # predictions are made from prompt - 1 on, and end before it
            shared, moved = min(prefix, last) - (prompt - 1), start - own_from
            scored += [(first + prompt - 1, shared), (moved + prompt - 1 + shared, len(response) - shared)]
            last_at.append(first + last if last < prefix else moved + last)
    plan, ends = AttentionPlan(tuple(segments), end), torch.tensor(last_at) if feed_last else None
    return _batch(groups, _row(tokens)[None], _ranges(fed)[None], _ranges(scored), plan, last_at=ends)


def pad(groups: Sequence[TokenGroup], *, pad_id: int, feed_last: bool = False) -> PackedBatch:
    """One row per response, `pad_id` on the right: for architectures that cannot share, and the oracle of `pack`."""
    assert groups, "a batch holds at least one group"
    fed = [np.concatenate((g.prompt, body)) for g in groups for body in _bodies(g, feed_last)]
    width = max(map(len, fed))
    input_ids = np.full((len(fed), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, ids in enumerate(fed):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    prompts = [len(g.prompt) for g in groups for _ in g.responses]
    predict_at = [
        row * width + np.arange(p - 1, len(ids)) for row, (p, ids) in enumerate(zip(prompts, fed, strict=True))
    ]
    last_at = None
    if feed_last:  # nothing is predicted there
        last_at, predict_at = _row([at[-1:] for at in predict_at]), [at[:-1] for at in predict_at]
    rows, position_ids = torch.from_numpy(input_ids), torch.arange(width).repeat(len(fed), 1)
    return _batch(groups, rows, position_ids, _row(predict_at), None, torch.from_numpy(mask), last_at=last_at)


def idle(*, packed: bool, feed_last: bool = False) -> PackedBatch:
    """One token of nobody: what a process feeds that has no group left while others still compute."""
    none, one = torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    plan, mask = (AttentionPlan((Segment(0, 1),), 1), None) if packed else (None, torch.ones_like(one))
    index = PairIndex.of(())
    return PackedBatch(one, one, plan, mask, none, none, none, index, (), none if feed_last else None)


def fed_tokens(group: TokenGroup, *, feed_last: bool = False) -> int:
    """Unique tokens the model is fed for a packed group: P plus what is fed of every response, shared tokens once."""
    bodies = _bodies(group, feed_last)
    shared = shared_prefix(bodies)
    return len(group.prompt) + shared + sum(len(body) - shared for body in bodies)


def micro_batches(
    groups: Sequence[TokenGroup], *, tokens_per_batch: int, packed: bool, pad_id: int = 0, feed_last: bool = False
) -> Iterator[PackedBatch]:
    """The groups in as few batches of at most `tokens_per_batch` fed tokens as a greedy rule finds; always the same.

    A group is never split: one that is larger than the budget gets a batch of its own. Packed rows are filled
    best-fit decreasing; padded rows longest first, where padding counts as fed. Batches, and groups inside a
    batch, keep the order of `groups`. A batch is built when it is asked for.
    """
    if tokens_per_batch < 1:
        raise ConfigError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
    if packed:
        bins = best_fit([fed_tokens(group, feed_last=feed_last) for group in groups], tokens_per_batch)
    else:
        bins = _by_length(groups, tokens_per_batch, feed_last)
    members = [[groups[i] for i in bin_] for bin_ in sorted(map(sorted, bins))]
    if packed:
        return (pack(m, feed_last=feed_last) for m in members)
    return (pad(m, pad_id=pad_id, feed_last=feed_last) for m in members)


def by_group(
    groups: Sequence[TokenGroup],
    batches: Iterable[PackedBatch],
    work: Callable[[Iterable[PackedBatch]], Iterable[Sequence[T]]],
) -> list[list[T]]:
    """What `work` tells of each batch, one thing of a response, as a list for every group, in their order.

    A batch that `work` has let go is gone.
    """
    order: list[TokenGroup] = []

    def noted() -> Iterator[PackedBatch]:
        for batch in batches:
            order.extend(batch.groups)
            yield batch

    things = iter([thing for of_batch in work(noted()) for thing in of_batch])
    found = {id(group): [next(things) for _ in group.responses] for group in order}
    return [found[id(group)] for group in groups]


class StepPlan:
    """Which groups an optimizer step takes: a function of (epoch, step), the two integers that restore it.

    `batch_size` counts pairs; a group without any (a demonstration, a labelled response) counts one, and a group of
    more pairs than `batch_size` fills one step. Groups are never split: step k takes those that start before the
    (k + 1) * batch_size-th pair of the epoch, so a step that runs over leaves less to the next and the mean stays
    `batch_size`. Every group is used exactly once per epoch; the short last step stays. The order is the data's
    (`shuffle` False) or a permutation drawn from (seed, epoch).

    Raises ConfigError on a batch size or seed out of range, DataError when there is no group.
    """

    def __init__(self, groups: Sequence[TokenGroup], *, batch_size: int, seed: int, shuffle: bool) -> None:
        if batch_size < 1 or seed < 0:
            raise ConfigError(f"batch_size must be at least 1 and seed at least 0, not {batch_size} and {seed}")
        if not groups:
            raise DataError("no row is left to train on; `preftune inspect` says where the rows went")
        self._groups = groups
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._pairs = np.clip(column(groups, "pairs"), 1, batch_size).astype(np.int32)
        # The last group of an epoch may be any group: only what holds for the largest holds in every epoch.
        self.steps_per_epoch = int(self._pairs.sum() - self._pairs.max()) // batch_size + 1
        self._epoch = -1
        self._order = self._starts = np.empty(0, dtype=np.int64)

    def groups_of(self, epoch: int, step: int) -> list[TokenGroup]:
        """The groups of step `step` in [0, steps_per_epoch) of `epoch` >= 0."""
        return [self._groups[i] for i in self.positions_of(epoch, step).tolist()]

    def positions_of(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Where these groups stand in the data; no token is looked at."""
        assert epoch >= 0 and 0 <= step < self.steps_per_epoch, (epoch, step)
        if epoch != self._epoch:
            n = len(self._groups)
            draw = np.random.default_rng([self._seed, epoch])
            self._order = draw.permutation(n) if self._shuffle else np.arange(n)
            before = self._pairs[self._order].cumsum() - self._pairs[self._order]  # pairs before each group
            starts = np.searchsorted(before, self._batch_size * np.arange(self.steps_per_epoch))
            self._starts, self._epoch = np.append(starts, n), epoch
        return self._order[self._starts[step] : self._starts[step + 1]]


def _bodies(group: TokenGroup, feed_last: bool) -> list[Ids]:
    """What is fed of each response: all of it, or all but its last token."""
    return [response if feed_last else response[:-1] for response in group.responses]


def best_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each item, largest first, goes where the least room stays."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(free, (sizes[item], -1))
        room, bin_ = free.pop(at) if at < len(free) else (budget, len(bins))
        if bin_ == len(bins):
            bins.append([])
        bins[bin_].append(item)
        insort(free, (room - sizes[item], bin_))
    return bins


def _by_length(groups: Sequence[TokenGroup], budget: int, feed_last: bool) -> list[list[int]]:
    """Longest first, so that rows of one batch are of similar length: rows x longest stays within the budget."""
    longest = [len(g.prompt) + max(map(len, _bodies(g, feed_last))) for g in groups]
    bins: list[list[int]] = []
    rows = width = 0
    for item in sorted(range(len(groups)), key=lambda i: (-longest[i], i)):
        rows += len(groups[item].responses)
        if not bins or rows * width > budget:
            bins.append([])
            rows, width = len(groups[item].responses), longest[item]
        bins[-1].append(item)
    return bins


def _ranges(parts: Sequence[tuple[int, int]]) -> Tensor:
    """[sum of counts] first, first + 1, ... of every (first, count), one after the other."""
    firsts, counts = np.array(parts, dtype=np.int64).T
    return torch.from_numpy(np.repeat(firsts - (counts.cumsum() - counts), counts) + np.arange(counts.sum()))


def _row(pieces: Iterable[NDArray[np.integer]]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(pieces)).astype(np.int64))


def _batch(
    groups: Sequence[TokenGroup],
    input_ids: Tensor,
    position_ids: Tensor,
    predict_at: Tensor,
    plan: AttentionPlan | None,
    attention_mask: Tensor | None = None,
    *,
    last_at: Tensor | None,
) -> PackedBatch:
    """Adds what `pack` and `pad` share: targets, lengths and pairs, ordered group, response, time."""
    responses = [r for g in groups for r in g.responses]
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        plan=plan,
        attention_mask=attention_mask,
        predict_at=predict_at,
        targets=_row(responses),
        lengths=torch.tensor([len(r) for r in responses]),
        index=PairIndex.of(groups),
        groups=tuple(groups),
        last_at=last_at,
    )
