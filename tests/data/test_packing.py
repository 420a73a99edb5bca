"""Claims about rows, micro-batches and the order of training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.data.packing import StepPlan, fed_tokens, micro_batches, pack, pad
from preftune.errors import ConfigError, DataError
from preftune.tensors import PackedBatch, TokenGroup

# Three token ids only, so that responses often begin alike, continue one another, or are equal.
ids = st.lists(st.integers(3, 5), min_size=1, max_size=6).map(lambda x: np.array(x, dtype=np.int32))


@st.composite
def a_group(draw: st.DrawFn) -> TokenGroup:
    responses = tuple(draw(st.lists(ids, min_size=1, max_size=4)))
    positions = range(len(responses))
    pairs = [(w, l) for w in positions for l in positions if w != l]
    chosen = tuple(draw(st.lists(st.sampled_from(pairs), max_size=4))) if pairs else ()
    return TokenGroup(draw(ids), responses, chosen, weight=draw(st.sampled_from([1.0, 2.5])))


some_groups = st.lists(a_group(), min_size=1, max_size=5)


def group(*lengths: int, prompt: int = 3, pairs: int = 1, start: int = 0) -> TokenGroup:
    """Responses of the given lengths that differ from their first token on."""
    responses = tuple(np.full(n, 10 + start + i, dtype=np.int32) for i, n in enumerate(lengths))
    return TokenGroup(np.arange(prompt, dtype=np.int32), responses, ((0, 1),) * pairs if len(lengths) > 1 else ())


def seen_from(batch: PackedBatch, at: int) -> list[tuple[int, int]]:
    """(position, token) of everything a packed row's token sees, itself included, read off the plan."""
    assert batch.plan is not None
    segment = next(s for s in batch.plan.segments if s.start <= at < s.end)
    visible = [*range(segment.prefix_start, segment.prefix_end), *range(segment.start, at + 1)]
    return [(int(batch.position_ids[0, i]), int(batch.input_ids[0, i])) for i in visible]


@given(some_groups)
@settings(max_examples=80, deadline=None)
def test_every_scored_token_is_predicted_from_exactly_its_own_past(groups: list[TokenGroup]) -> None:
    """What the predicting position sees is the prompt and the response so far, at positions 0, 1, 2, ...; no more."""
    batch, scored = pack(groups), 0
    for g in groups:
        for response in g.responses:
            sequence = [*g.prompt, *response]
            for t, token in enumerate(response):
                past = sequence[: len(g.prompt) + t]
                assert seen_from(batch, int(batch.predict_at[scored])) == list(enumerate(past))
                assert batch.targets[scored] == token
                scored += 1
    assert scored == len(batch.targets) == len(batch.predict_at) == batch.lengths.sum()


@given(some_groups)
@settings(max_examples=60, deadline=None)
def test_segments_tile_the_row_and_no_shared_token_is_fed_twice(groups: list[TokenGroup]) -> None:
    batch = pack(groups)
    assert batch.plan is not None
    edges = [0, *(s.end for s in batch.plan.segments)]
    assert [s.start for s in batch.plan.segments] == edges[:-1]
    assert edges[-1] == batch.plan.length == batch.input_ids.numel() == batch.real_tokens
    unique = 0
    for g in groups:
        fed = [[*g.prompt, *r[:-1]] for r in g.responses]
        shared = next(
            (i for i, column in enumerate(zip(*fed, strict=False)) if len(set(column)) > 1), min(map(len, fed))
        )
        unique += shared + sum(len(f) - shared for f in fed)
    assert batch.real_tokens == unique == sum(map(fed_tokens, groups))


@given(some_groups, st.sampled_from([0, 7]))
@settings(max_examples=60, deadline=None)
def test_padded_rows_score_the_same_tokens_in_the_same_order(groups: list[TokenGroup], pad_id: int) -> None:
    """One row per response, fed all but its last token; targets, lengths, pairs and weights equal the packed ones."""
    packed, padded = pack(groups), pad(groups, pad_id=pad_id)
    assert padded.plan is None and padded.attention_mask is not None
    responses = [(g, r) for g in groups for r in g.responses]
    for row, (g, r) in enumerate(responses):
        real = padded.attention_mask[row].bool()
        assert padded.input_ids[row, real].tolist() == [*g.prompt, *r[:-1]]
        assert (padded.input_ids[row, ~real] == pad_id).all()
    flat = padded.input_ids.flatten()[padded.predict_at]
    assert torch.equal(flat, packed.input_ids.flatten()[packed.predict_at])
    for name in ("targets", "lengths"):
        assert torch.equal(getattr(padded, name), getattr(packed, name))
    for name in ("chosen", "rejected", "weight"):
        assert torch.equal(getattr(padded.index, name), getattr(packed.index, name))


def one_longer(g: TokenGroup) -> TokenGroup:
    """Every response followed by one more token: its last token is then fed, to predict that one."""
    return replace(g, responses=tuple(np.append(r, np.int32(9)) for r in g.responses))


@given(some_groups, st.booleans())
@settings(max_examples=80, deadline=None)
def test_responses_fed_whole_are_fed_as_if_one_more_token_followed(groups: list[TokenGroup], packed: bool) -> None:
    """Same tokens, positions and plan as the longer responses give; a response ends where the next is predicted."""

    def rows(of: list[TokenGroup], feed_last: bool) -> PackedBatch:
        return pack(of, feed_last=feed_last) if packed else pad(of, pad_id=7, feed_last=feed_last)

    whole, longer = rows(groups, True), rows([one_longer(g) for g in groups], False)
    assert whole.plan == longer.plan and longer.last_at is None
    assert whole.input_ids.tolist() == longer.input_ids.tolist()
    assert whole.position_ids.tolist() == longer.position_ids.tolist()
    at = list(longer.predict_at.split(longer.lengths.tolist()))
    assert whole.last_at is not None and whole.last_at.tolist() == [int(ends[-1]) for ends in at]
    assert whole.predict_at.tolist() == [i for positions in at for i in positions[:-1].tolist()]
    assert whole.lengths.tolist() == [len(r) for g in groups for r in g.responses]
    assert [fed_tokens(g, feed_last=True) for g in groups] == [fed_tokens(one_longer(g)) for g in groups]


@given(some_groups, st.integers(1, 60), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_budget_counts_the_last_tokens_that_are_fed(groups: list[TokenGroup], budget: int, packed: bool) -> None:
    """Micro-batches of whole responses are those of responses one token longer."""
    whole = list(micro_batches(groups, tokens_per_batch=budget, packed=packed, feed_last=True))
    longer = list(micro_batches([one_longer(g) for g in groups], tokens_per_batch=budget, packed=packed))
    assert [batch.input_ids.tolist() for batch in whole] == [batch.input_ids.tolist() for batch in longer]
    assert all(batch.last_at is not None for batch in whole)


def test_pairs_point_at_responses_of_the_whole_batch() -> None:
    """K = 1, 2 and 4 in one batch: a pair's positions count the responses of all groups before it."""
    four = TokenGroup(
        np.array([1], np.int32), tuple(np.array([5 + i], np.int32) for i in range(4)), ((3, 0), (1, 2)), weight=2.0
    )
    batch = pack([group(2), group(2, 3), four])
    assert batch.index.chosen.tolist() == [1, 6, 4]
    assert batch.index.rejected.tolist() == [2, 3, 5]
    assert batch.index.weight.tolist() == [1.0, 2.0, 2.0] and batch.index.weight.dtype == torch.float32
    assert batch.lengths.tolist() == [2, 2, 3, 1, 1, 1, 1]


def test_a_batch_without_pairs_has_an_empty_index() -> None:
    index = pack([group(3)]).index
    assert index.chosen.shape == index.rejected.shape == index.weight.shape == (0,)
    assert index.chosen.dtype == torch.int64


@given(some_groups, st.integers(1, 60), st.booleans())
@settings(max_examples=80, deadline=None)
def test_micro_batches_hold_every_group_once_within_the_budget(
    groups: list[TokenGroup], budget: int, packed: bool
) -> None:
    """No group is split or lost; a batch over budget is one single group."""
    batches = list(micro_batches(groups, tokens_per_batch=budget, packed=packed))
    assert sorted(id(g) for b in batches for g in b.groups) == sorted(map(id, groups))
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.groups) == 1
        order = [next(i for i, g in enumerate(groups) if g is member) for member in batch.groups]
        assert order == sorted(order)


def test_micro_batches_fill_rows_best_fit_decreasing() -> None:
    """Sizes 3 4 6 7 in budget 10 need two rows; taken in their own order they would need three."""
    sized = [group(1, 1, prompt=n) for n in (3, 4, 6, 7)]
    batches = list(micro_batches(sized, tokens_per_batch=10, packed=True))
    assert [[fed_tokens(g) for g in b.groups] for b in batches] == [[3, 7], [4, 6]]


@pytest.mark.parametrize("packed", [True, False])
def test_a_budget_is_used_to_the_last_token_and_not_beyond(packed: bool) -> None:
    """Two groups that fill 10 tokens packed, 16 padded: one batch at that budget, two at one token less."""
    groups, full = [group(2, 2), group(2, 2, start=2)], 10 if packed else 16
    for budget, batches in ((full, 1), (full - 1, 2)):
        assert len(list(micro_batches(groups, tokens_per_batch=budget, packed=packed))) == batches


def test_micro_batches_are_the_same_every_time() -> None:
    rng = np.random.default_rng(0)
    groups = [group(int(a), int(b)) for a, b in rng.integers(1, 30, (60, 2))]
    first, second = (list(micro_batches(groups, tokens_per_batch=128, packed=True)) for _ in range(2))
    assert [b.input_ids.tolist() for b in first] == [b.input_ids.tolist() for b in second]


def test_padded_micro_batches_put_similar_lengths_together() -> None:
    """Two long and two short groups: the short ones are not padded to the long ones."""
    groups = [group(2, 2), group(40, 40), group(2, 2, start=2), group(40, 40, start=2)]
    widths = [b.input_ids.shape[1] for b in micro_batches(groups, tokens_per_batch=180, packed=False)]
    assert sorted(widths) == [4, 42]


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens_per_batch must be at least 1, not 0"):
        micro_batches([group(1, 1)], tokens_per_batch=0, packed=True)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 99), st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_epoch_uses_every_group_exactly_once(pairs: list[int], batch_size: int, seed: int, shuffle: bool) -> None:
    """Whatever the numbers of pairs: every step has work, and every epoch has the same number of steps."""
    groups = [group(1, 1, pairs=n) for n in pairs]
    plan = StepPlan(groups, batch_size=batch_size, seed=seed, shuffle=shuffle)
    for epoch in range(3):
        steps = [plan.groups_of(epoch, step) for step in range(plan.steps_per_epoch)]
        assert all(steps)
        assert sorted(id(g) for s in steps for g in s) == sorted(map(id, groups))


def test_a_step_is_batch_size_pairs_and_the_short_last_one_stays() -> None:
    plan = StepPlan([group(1, 1) for _ in range(10)], batch_size=4, seed=0, shuffle=True)
    assert [len(plan.groups_of(2, step)) for step in range(plan.steps_per_epoch)] == [4, 4, 2]


def test_demonstrations_count_one_each() -> None:
    plan = StepPlan([group(1, pairs=0) for _ in range(5)], batch_size=2, seed=0, shuffle=False)
    assert [len(plan.groups_of(0, step)) for step in range(plan.steps_per_epoch)] == [2, 2, 1]


def test_steps_of_whole_groups_have_batch_size_pairs_on_average() -> None:
    """Groups of 3 pairs, 8 per step: 9 + 9 + 6 = 24, not 9 every time."""
    plan = StepPlan([group(1, 1, pairs=3) for _ in range(24)], batch_size=8, seed=0, shuffle=False)
    sizes = [sum(len(g.pairs) for g in plan.groups_of(0, step)) for step in range(plan.steps_per_epoch)]
    assert sizes == [9, 9, 6] * 3


def test_a_step_is_a_function_of_seed_epoch_and_step_alone() -> None:
    """A fresh plan asked in any order gives the same groups: the state to save is two integers."""
    groups = [group(1, 1) for _ in range(50)]
    one, other = (StepPlan(groups, batch_size=8, seed=3, shuffle=True) for _ in range(2))
    in_order = {(e, s): one.groups_of(e, s) for e in range(3) for s in range(one.steps_per_epoch)}
    for epoch, step in reversed(in_order):
        assert [id(g) for g in other.groups_of(epoch, step)] == [id(g) for g in in_order[epoch, step]]


def test_epochs_and_seeds_differ_and_without_shuffling_nothing_does() -> None:
    groups = [group(1, 1) for _ in range(50)]

    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        return [id(g) for g in StepPlan(groups, batch_size=50, seed=seed, shuffle=shuffle).groups_of(epoch, 0)]

    assert len({tuple(order(*where)) for where in ((0, 0), (0, 1), (1, 0))}) == 3
    assert order(0, 5, shuffle=False) == list(map(id, groups))


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no row is left to train on"):
        StepPlan([], batch_size=4, seed=0, shuffle=True)
    with pytest.raises(ConfigError, match="batch_size must be at least 1 and seed at least 0, not 0 and 1"):
        StepPlan([group(1, 1)], batch_size=0, seed=1, shuffle=True)
