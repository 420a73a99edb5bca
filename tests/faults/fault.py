"""A seeded fault: what a wrong implementation would do, as one exact replacement in one file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`before`, which occurs exactly once in `file`, becomes `after`; `tests` (pytest arguments) must then fail."""

    name: str
    file: str
    before: str
    after: str
    tests: str
