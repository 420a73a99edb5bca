"""The studies: what each runs for every seed, at which size, and what tells of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.recipes import (
    study_anchor,
    study_cost,
    study_data,
    study_frontier,
    study_gradient,
    study_length,
    study_report,
    study_shift,
    study_tuning,
)
from preftune.recipes.study_claims import page
from preftune.recipes.study_frontier import Arm
from preftune.recipes.study_settings import FAST, FULL, LONG, SMALL, TINY, Setting
from preftune.recipes.study_world import Start

__all__ = ["STUDIES", "Study"]


@dataclass(frozen=True)
class Study:
    """A study of the enumerable world."""

    arms: Sequence[Arm]
    run: Callable[[Start, Arm], Sequence[Any]]
    """One arm -> what was measured, dataclasses."""
    write: Callable[[Path, str, Sequence[Mapping[str, Any]]], list[str]]
    """Of all lines: the page and the figures; returns the verdicts."""
    full: Setting
    fast: Setting
    fast_arms: Sequence[Arm] | None = None
    """With `fast`, where those are fewer."""
    courses: Mapping[str, str] = field(default_factory=dict)
    """Kind of an arm -> the field of `Setting` that no other kind reads."""


STUDIES: dict[str, Study] = {
    "frontier": Study(
        study_frontier.ARMS, study_frontier.run, study_report.write, FULL, FAST, courses=study_frontier.COURSES
    ),
    "tuning": Study(
        study_tuning.ARMS, study_tuning.run, page(study_tuning.tell), SMALL, TINY, fast_arms=study_tuning.FAST_ARMS
    ),
    "data": Study(study_data.ARMS, study_data.run, page(study_data.tell), study_data.FULL, study_data.FAST),
    "anchor": Study(study_anchor.ARMS, study_anchor.run, page(study_anchor.tell), LONG, TINY),
    "shift": Study(study_shift.ARMS, study_shift.run, page(study_shift.tell), study_shift.FULL, study_shift.FAST),
    "length": Study(study_length.ARMS, study_length.run, page(study_length.tell), study_length.FULL, study_length.FAST),
    "gradient": Study(study_gradient.ARMS, study_gradient.run, page(study_gradient.tell), SMALL, TINY),
    "cost": Study(study_cost.ARMS, study_cost.run, page(study_cost.tell), SMALL, TINY),
}
"""Name -> study."""
