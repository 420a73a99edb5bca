"""The whole derivation as one record: from the objective to the DPO loss, every line a number of the library."""

from __future__ import annotations

from preftune.theory.loss_chapters import (
    bradley_terry,
    cancellation,
    constant_reference,
    gradient,
    loss_against_u,
    preferences,
    reward,
)
from preftune.theory.numbers import Lesson
from preftune.theory.policy_chapters import divergence, objective_and_steps, optimal, partition, this_is_a

__all__ = ["lesson"]


def lesson() -> Lesson:
    """Compute every chapter, in a few seconds on one core; the same numbers every time on one machine."""
    return Lesson((
        *objective_and_steps(), optimal(), divergence(), this_is_a(), partition(),
        preferences(), bradley_terry(), reward(), cancellation(),
        loss_against_u(), gradient(), constant_reference(),
    ))  # fmt: skip
