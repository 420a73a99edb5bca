"""Mismatched responses: lent by another prompt, decided by seed and data alone, never compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.data.mismatched import with_mismatched
from preftune.data.packing import StepPlan, micro_batches, pack, pad
from preftune.errors import DataError
from preftune.models.attention import install
from preftune.models.load import load
from preftune.models.logprobs import check_packing, score
from preftune.tensors import PairIndex, ResponseLogps, TokenGroup


def group(prompt: int, number: int, k: int = 1, length: int = 3) -> TokenGroup:
    """Prompt `prompt`; every response is unlike any other in the data set: (number, i, ...)."""
    responses = tuple(np.array([100 + number, 10 + i, *range(length)], np.int32) for i in range(k))
    more = {"pairs": ((0, 1),), "ranks": tuple(range(1, k + 1)), "scores": (0.5,) * k} if k > 1 else {"labels": (True,)}
    return TokenGroup(np.array([prompt, 7], np.int32), responses, origin=f"f:{number + 1}", **more)  # type: ignore[arg-type]


def givers(groups: list[TokenGroup], lent: list[TokenGroup]) -> list[int]:
    """Which group each one's last response comes from."""
    return [int(g.responses[-1][0]) - 100 for g in lent]


some_groups = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=2, max_size=30).map(
    lambda rows: [group(prompt, number, k) for number, (prompt, k) in enumerate(rows)]
)


@given(some_groups, st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_every_group_is_lent_one_response_of_another_prompt(groups: list[TokenGroup], seed: int) -> None:
    """However often prompts repeat: never its own, and each gives once unless one prompt holds the majority."""
    prompts = [int(g.prompt[0]) for g in groups]
    if len(set(prompts)) == 1:
        with pytest.raises(DataError, match="at least two different prompts"):
            with_mismatched(groups, seed=seed, max_length=99)
        return
    lent, cut = with_mismatched(groups, seed=seed, max_length=99)
    assert cut == 0 and len(lent) == len(groups)
    for before, after, giver in zip(groups, lent, givers(groups, lent), strict=True):
        assert prompts[giver] != int(before.prompt[0])
        assert any(np.array_equal(after.responses[-1], r) for r in groups[giver].responses)
        assert (after.mismatched, after.own) == (1, before.own)
        assert all(a is b for a, b in zip(after.responses, before.responses, strict=False))
        assert replace(after, responses=before.responses, mismatched=0).origin == before.origin
    largest, n = max(Counter(prompts).values()), len(groups)
    gave = Counter(givers(groups, lent))
    assert max(gave.values()) <= -(-largest // (n - largest))
    if 2 * largest <= n:
        assert sorted(gave) == list(range(n))


def test_who_lends_to_whom_depends_on_seed_and_data_alone() -> None:
    """Neither on the order of the file nor on the call; another seed draws anew."""
    groups = [group(number % 15, number, k=1 + number % 3) for number in range(40)]
    lent = {g.origin: g.responses[-1].tolist() for g in with_mismatched(groups, seed=3, max_length=99)[0]}
    shuffled = [groups[i] for i in np.random.default_rng(0).permutation(40)]
    assert {g.origin: g.responses[-1].tolist() for g in with_mismatched(shuffled, seed=3, max_length=99)[0]} == lent
    other = {g.origin: g.responses[-1].tolist() for g in with_mismatched(groups, seed=4, max_length=99)[0]}
    assert sum(other[origin] != response for origin, response in lent.items()) > 30


def test_the_lender_is_no_neighbour_and_gives_any_of_its_responses() -> None:
    """A rotation of the file would lend each row the next one's, and the first response only."""
    groups = [group(number, number, k=2) for number in range(200)]
    lent, _ = with_mismatched(groups, seed=0, max_length=99)
    distance = [(giver - i) % 200 for i, giver in enumerate(givers(groups, lent))]
    assert len(set(distance)) > 100
    given_away = Counter(int(g.responses[-1][1]) - 10 for g in lent)
    assert 60 < given_away[0] < 140


def test_what_does_not_fit_is_cut_on_the_right_and_counted() -> None:
    """The prompt is 2 tokens: of a lent response of 10, all fit in 12, 9 in 11, 1 in 3 and none in 2."""
    groups = [group(0, 0, length=1), group(1, 1, length=8)]
    for limit, kept in ((12, 10), (11, 9), (3, 1)):
        lent, cut = with_mismatched(groups, seed=0, max_length=limit)
        assert lent[0].responses[-1].tolist() == groups[1].responses[0][:kept].tolist()
        assert cut == (kept < 10) + (limit == 3)
    with pytest.raises(DataError, match=r"f:\d: the prompt alone fills max_length 2; raise it"):
        with_mismatched(groups, seed=0, max_length=2)


@pytest.mark.parametrize("groups", [[group(0, 0)], [group(0, i) for i in range(3)]], ids=["one", "one prompt"])
def test_a_single_prompt_cannot_lend(groups: list[TokenGroup]) -> None:
    """The message says what is needed."""
    with pytest.raises(DataError, match=rf"all {len(groups)} rows have the same one; give data with at least two"):
        with_mismatched(groups, seed=0, max_length=99)


def test_a_lent_response_is_scored_and_never_compared_ranked_or_labelled() -> None:
    """Packed or padded it is one more response; pairs, rankings and labels see what they saw without it."""
    groups = [group(0, 0, 2), group(1, 1), group(2, 2, 3), group(0, 3)]
    lent, _ = with_mismatched(groups, seed=1, max_length=99)
    packed, padded = pack(lent), pad(lent, pad_id=0)
    assert torch.equal(packed.targets, padded.targets) and torch.equal(packed.lengths, padded.lengths)
    fed = [batch.input_ids.flatten()[batch.predict_at] for batch in (packed, padded)]
    assert torch.equal(*fed)
    owner = [(i, r) for i, g in enumerate(lent) for r in range(len(g.responses))]
    is_lent = torch.tensor([r >= lent[i].own for i, r in owner])
    assert is_lent.sum() == 4
    values = torch.arange(1.0, len(owner) + 1, dtype=torch.float64)

    def read(of: list[TokenGroup], values_R: Tensor) -> tuple[list[Tensor], Tensor]:
        logps = ResponseLogps(values_R, -values_R, torch.ones_like(values_R))
        pairs, lists, labels = logps.pairs(PairIndex.of(of)), logps.lists(of), logps.labelled(of)
        compared = [
            pairs.chosen, pairs.rejected, pairs.weight, pairs.score_gap, lists.policy, lists.rank, lists.score,
            labels.policy, labels.desirable, labels.weight,
        ]  # fmt: skip
        return [column for column in compared if column is not None], labels.mismatched_log_ratio

    (with_them, strays), (without, none) = read(lent, values), read(groups, values[~is_lent])
    assert strays.tolist() == (-values[is_lent]).tolist() and none.numel() == 0
    assert len(with_them) == 10
    for one, other in zip(with_them, without, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_log_probs_of_lent_responses_are_those_of_the_sequence_alone(tiny_model_folder: Path) -> None:
    """Packed and padded rows score them as they would be scored alone."""
    model = load(str(tiny_model_folder), dtype=torch.float32, device=torch.device("cpu")).model
    assert install(model) is None
    lent, _ = with_mismatched([group(n, n, k=1 + n % 3) for n in range(5)], seed=0, max_length=99)
    with torch.no_grad():
        packed, padded = score(model, pack(lent)), score(model, pad(lent, pad_id=0))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    check_packing(model, pack(lent))


def test_steps_and_micro_batches_take_lent_responses_along() -> None:
    """A step counts them as nothing; who lends to whom is the same however a step is split."""
    groups = [group(number, number, k=1 + number % 3) for number in range(12)]
    lent = list(with_mismatched(groups, seed=0, max_length=99)[0])
    sizes = [StepPlan(of, batch_size=4, seed=0, shuffle=True).steps_per_epoch for of in (groups, lent)]
    assert sizes[0] == sizes[1]
    for budget in (1, 30, 1000):
        batches = list(micro_batches(lent, tokens_per_batch=budget, packed=True))
        members = [g for batch in batches for g in batch.groups]
        assert sorted(map(id, members)) == sorted(map(id, lent))
        assert sum(len(batch.lengths) for batch in batches) == sum(len(g.responses) for g in groups) + 12
