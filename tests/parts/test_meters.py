"""Claims about what several ranks tell each other of a step: everything, in one message."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.data.packing import pack
from preftune.engine.clock import Clock
from preftune.engine.parallel import World
from preftune.equations.losses import LOSSES
from preftune.equations.objective import Objective, Term
from preftune.parts.meters import PreferenceMeter, TokenMeter
from preftune.parts.reward_meter import RewardMeter
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup

OBJECTIVE = Objective((Term(1.0, LOSSES["dpo"].bind(beta=0.1)), Term(0.5, LOSSES["nll"].bind())))
CLOCK = ("share_", "_per_second")


def batch_of(*numbers: int) -> PackedBatch:
    """A pair for each number, whose lengths and tokens follow from it."""
    return pack([
        TokenGroup(
            np.arange(3 + n, dtype=np.int32), (np.arange(n, 2 * n + 2, dtype=np.int32), np.array([90 + n], np.int32)),
            ((0, 1),), weight=1.0 + n, origin=f"row {n}",
        )
        for n in numbers
    ])  # fmt: skip


def values_of(batch: PackedBatch) -> Tensor:
    """[C] a number for every token, the same wherever the token stands."""
    return torch.sin(batch.targets.float()) - 1.5


def preferences(*numbers: int) -> tuple[Any, list[PackedBatch]]:
    batch, meter = batch_of(*numbers), PreferenceMeter(OBJECTIVE)
    logps = ResponseLogps.from_tokens(values_of(batch), batch.lengths, 0.9 * values_of(batch))
    meter.add(batch.groups, logps, OBJECTIVE.evaluate(logps, batch.groups, {}), {})
    return meter, [batch]


def demonstrations(*numbers: int) -> tuple[Any, list[PackedBatch]]:
    batch, meter = batch_of(*numbers), TokenMeter()
    meter.add(batch, -values_of(batch))
    return meter, [batch]


def comparisons(*numbers: int) -> tuple[Any, list[PackedBatch]]:
    batch, meter = batch_of(*numbers), RewardMeter("pair")
    rewards = torch.cos(batch.lengths.float())
    w, l = batch.index.chosen, batch.index.rejected
    meter.add(batch, rewards, rewards[w] - rewards[l], batch.index.weight)
    return meter, [batch]


def ticked() -> Clock:
    """A clock on which a phase has taken a while."""
    clock = Clock()
    clock.lap("forward")
    return clock


MADE = {"preferences": preferences, "demonstrations": demonstrations, "comparisons": comparisons}


def told(make: Any, numbers: tuple[int, ...]) -> Any:
    """What a rank with these rows says of them."""
    said: list[Any] = []

    class Hearing(World):
        def gather(self, value: Any, what: str) -> list[Any]:
            said.append(json.loads(json.dumps(value)))
            return [value, value]

    meter, batches = make(*numbers)
    meter.join(Hearing(0, 2), batches)
    (message,) = said
    return message


@pytest.mark.parametrize("kind", MADE)
def test_a_step_is_told_in_one_message_and_known_to_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks' rows become those of one process, in every number of the step and of an evaluation; said once."""
    make, shares = MADE[kind], ((1, 4), (2,), (3, 5, 6))
    messages = [told(make, share) for share in shares]
    asked: list[str] = []

    def gather(world: World, value: Any, what: str) -> list[Any]:
        asked.append(what)
        return messages

    monkeypatch.setattr(World, "gather", gather)
    whole, batches = make(1, 4, 2, 3, 5, 6)
    whole.join(World(), batches)
    for rank, share in enumerate(shares):
        meter, own = make(*share)
        asked.clear()
        meter.join(World(rank, 3), own)
        mine, expected = (
            {name: value for name, value in each.metrics(ticked()).items() if not any(part in name for part in CLOCK)}
            for each in (meter, whole)
        )
        assert asked == ["the numbers of the step"]
        assert mine == expected and mine["unique_tokens"] == sum(b.real_tokens for b in batches)
        assert meter.held_out() == whole.held_out()


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons"])
def test_parts_that_follow_each_other_are_the_whole(kind: str) -> None:
    """A held-out set measured in three parts has the numbers of the set measured at once, to the last digit."""
    make = MADE[kind]
    whole, _ = make(1, 4, 2, 3, 5, 6)
    meter, _ = make(1, 4)
    for share in ((2,), (3, 5, 6)):
        meter.extend(make(*share)[0])
    assert meter.held_out() == whole.held_out()
