"""Ranges of the losses' knobs and marks of their state, as annotations: a signature says name, default and range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

__all__ = ["Finite", "NonNegative", "OpenSmoothing", "Positive", "Range", "Share", "Smoothing", "State", "Unit"]


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to below `high`; `low` itself only when `closed`. NaN and infinity are in no range."""

    low: float
    high: float = math.inf
    closed: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low <= value if self.closed else self.low < value) and value < self.high

    def __str__(self) -> str:
        if math.isinf(self.low):
            return "that is finite"
        if math.isinf(self.high):
            return f"{'>=' if self.closed else '>'} {self.low:g}"
        just_above = float(f"{self.high:g}") < self.high
        return f"in {'[' if self.closed else '('}{self.low:g}, {self.high:g}{']' if just_above else ')'}"


Finite = Annotated[float, Range(-math.inf)]
Positive = Annotated[float, Range(0.0)]
NonNegative = Annotated[float, Range(0.0, closed=True)]
Smoothing = Annotated[float, Range(0.0, 0.5, closed=True)]
"""The share of labels believed to be flipped: at one half a label says nothing, above it says the opposite."""
OpenSmoothing = Annotated[float, Range(0.0, 0.5)]
"""The same where a label that is certain has no finite loss."""
Unit = Annotated[float, Range(0.0, math.nextafter(1.0, 2.0), closed=True)]
"""A share: 0 to 1, both included."""
Share = Annotated[float, Range(0.0, math.nextafter(1.0, 2.0))]
"""A share that is not nothing: above 0, up to 1."""
State = Annotated[float, "state"]
"""Not a knob but a number the loss remembers from step to step; the default is where it starts."""
