"""The learning rate is a pure function of the step, and the one transformers' schedulers give."""

from __future__ import annotations

import pytest
import torch
import transformers

from preftune.engine.schedule import SCHEDULES, learning_rate
from preftune.errors import ConfigError

PEAK = 3e-6


def rates(schedule: str, warmup: int, total: int, beyond: int = 0) -> list[float]:
    return [
        learning_rate(step, peak=PEAK, schedule=schedule, warmup_steps=warmup, total_steps=total)
        for step in range(1, total + 1 + beyond)
    ]


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (1, 10), (3, 10), (10, 10), (15, 10), (150, 1000)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_equals_the_scheduler_of_transformers(schedule: str, warmup: int, total: int) -> None:
    """Step k, counted from 1, has the rate that transformers' scheduler gives after k - 1 scheduler steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    counts = {"num_warmup_steps": warmup} | ({} if schedule == "constant" else {"num_training_steps": total})
    scheduler = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, **counts)
    expected = []
    for _ in range(total + 3):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    if schedule == "cosine":  # theirs rises again behind its end
        expected = expected[:total]
    assert rates(schedule, warmup, total, beyond=3)[: len(expected)] == pytest.approx(expected, rel=1e-12, abs=1e-20)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_reaches_zero_after_the_last_step_and_not_before(schedule: str) -> None:
    """The last step still learns; the rate that would follow it, and every later one, is 0."""
    values = rates(schedule, 2, 20, beyond=30)
    assert values[19] > 0
    assert values[20:] == [0.0] * 30
    assert max(values) == values[2] == PEAK


def test_an_unknown_schedule_is_refused_with_the_allowed_names() -> None:
    """The message names what was found and what is allowed."""
    with pytest.raises(ConfigError, match="schedule 'square' is unknown; allowed: constant, linear, cosine"):
        learning_rate(1, peak=1.0, schedule="square", warmup_steps=0, total_steps=1)
    assert list(SCHEDULES) == ["constant", "linear", "cosine"]


@pytest.mark.parametrize(("warmup", "total"), [(-1, 5), (0, 0)])
def test_impossible_counts_are_refused(warmup: int, total: int) -> None:
    """A negative warm-up and an empty run have no schedule."""
    with pytest.raises(ConfigError, match=f"warmup_steps {warmup} and total_steps {total}"):
        learning_rate(1, peak=1.0, schedule="linear", warmup_steps=warmup, total_steps=total)
