"""Claims about the work that each of several ranks gets of a step: as much arithmetic, not as many tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from preftune.engine.parallel import World
from preftune.models.cost import Shape, Work, flops
from preftune.parts.common import Batching
from preftune.tensors import TokenGroup

SHAPE = Shape.of(
    LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    torch.float32,
)  # fmt: skip


def group(prompt: int, *responses: int) -> TokenGroup:
    """A prompt and responses that share no beginning."""
    ids = np.arange(prompt, dtype=np.int32)
    answers = tuple(np.arange(i, i + n, dtype=np.int32) for i, n in enumerate(responses))
    return TokenGroup(ids, answers, ((0, 1),))


LONG_PROMPTS, LONG_ANSWERS = [group(400, 10, 12)] * 8, [group(22, 200, 200)] * 8
STEP = [one for both in zip(LONG_PROMPTS, LONG_ANSWERS, strict=True) for one in both]
"""All of them feed 420 tokens."""


def loads(batching: Batching, ranks: int) -> list[float]:
    """FLOPs of each rank's share of STEP."""
    parts = [replace(batching, world=World(rank, ranks)).share(STEP) for rank in range(ranks)]
    assert sum(map(len, parts)) == len(STEP)
    return [sum(flops(SHAPE, Work.of(len(g.prompt), [len(r) for r in g.responses])) for g in part) for part in parts]


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_are_equal_in_flops(ranks: int) -> None:
    """Groups of equal tokens, every other one scored throughout: by tokens one rank would do twice as much."""
    batching = Batching(8192, True, 0, torch.device("cpu"), shape=SHAPE)
    fair = loads(batching, ranks)
    blind = loads(replace(batching, shape=None), ranks)
    assert max(fair) == pytest.approx(min(fair), rel=1e-9)
    assert max(blind) > 2 * min(blind)


def test_a_group_weighs_what_it_costs() -> None:
    """One long answer is worth so many long prompts, by the cost model: it is one rank's work, they are the other's."""
    answer, prompt = LONG_ANSWERS[0], LONG_PROMPTS[0]
    one, other = (flops(SHAPE, Work.of(len(g.prompt), [len(r) for r in g.responses])) for g in (answer, prompt))
    assert one / other > 1.8, "else as many tokens are as much work"
    batching = Batching(8192, True, 0, torch.device("cpu"), shape=SHAPE)
    step = [*[prompt] * round(one / other), answer]
    parts = [replace(batching, world=World(rank, 2)).share(step) for rank in range(2)]
    assert sorted(map(len, parts)) == [1, len(step) - 1] and parts[0] == [answer]


def test_a_reward_model_meets_no_vocabulary() -> None:
    """What is scored costs nothing there: the shares of a step with a vocabulary ten times as large are the same."""
    batching = Batching(8192, True, 0, torch.device("cpu"), feed_last=True, shape=SHAPE)
    larger = replace(batching, shape=replace(SHAPE, vocabulary=40960))
    for rank in range(3):
        mine, same = (replace(one, world=World(rank, 3)).share(STEP) for one in (batching, larger))
        assert [id(one) for one in mine] == [id(one) for one in same]


def test_padded_rows_cost_their_tokens() -> None:
    """Every sequence is fed whole there, and no arithmetic of packed rows is counted."""
    batching = Batching(8192, False, 0, torch.device("cpu"), shape=SHAPE)
    parts = [replace(batching, world=World(rank, 2)).share(STEP) for rank in range(2)]
    tokens = [sum(2 * len(g.prompt) + sum(map(len, g.responses)) for g in part) for part in parts]
    assert abs(tokens[0] - tokens[1]) <= 2 * 400 + 22
