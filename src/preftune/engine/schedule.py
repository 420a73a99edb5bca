"""The learning rate of every optimizer step, as one pure function."""

from __future__ import annotations

import math
from collections.abc import Callable

from preftune.errors import ConfigError

__all__ = ["SCHEDULES", "learning_rate"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Share of the peak after the warm-up, by progress through the remaining steps in [0, 1]."""


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 1: `peak` times the share reached when `step - 1` steps are done.

    With W = warmup_steps, T = total_steps and n = step - 1 the share is n / W while n < W, then the schedule's at
    progress (n - W) / (T - W). So the first of W > 0 warm-up steps has rate 0, step W + 1 is the first at the peak,
    and `linear` and `cosine` reach 0 exactly when all T steps are done (at n = T): the last step still learns.
    A warm-up longer than the run never reaches the peak. These are the values of transformers'
    `get_constant_schedule_with_warmup`, `get_linear_...` and `get_cosine_...`, whose `current_step` is n.

    Raises ConfigError when the schedule is unknown or a count is impossible.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule {schedule!r} is unknown; allowed: {', '.join(SCHEDULES)}")
    if warmup_steps < 0 or total_steps < 1:
        raise ConfigError(
            f"warmup_steps {warmup_steps} and total_steps {total_steps}: need warmup_steps >= 0 and total_steps >= 1"
        )
    assert step >= 1, f"steps are counted from 1, not {step}"
    done = step - 1
    if done < warmup_steps:
        return peak * done / warmup_steps
    progress = (done - warmup_steps) / (total_steps - warmup_steps) if done < total_steps else 1.0
    return peak * SCHEDULES[schedule](progress)
