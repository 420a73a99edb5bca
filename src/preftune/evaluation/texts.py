"""What responses look like, without judging them: length, repetition, loops, copies. No torch.

A unit is a word, what white space separates; of a text without white space, a character.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Loop", "Shape", "distinct_ngrams", "longest_loop", "repeated", "said_elsewhere", "shape", "units"]

COPIES = 3
"""So many copies in a row make a loop."""
PERIOD = 32
"""Units of the longest piece that is looked for."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A piece that is said again and again: `copies` times in a row, the last one possibly cut off."""

    piece: tuple[str, ...]
    units: int
    """Units covered by all copies; 0 where nothing is repeated in a row."""

    @property
    def copies(self) -> float:
        return self.units / len(self.piece) if self.piece else 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """One response, measured."""

    characters: int
    words: int
    distinct: float
    """Share of runs of three units that are different, in (0, 1]; 1 for shorter texts."""
    loop: Loop
    """The longest one."""

    @property
    def loops(self) -> bool:
        """Whether a piece stands there `COPIES` times in a row or more: "when when when"."""
        return self.loop.copies >= COPIES


def shape(text: str) -> Shape:
    """Everything about one text."""
    parts = units(text)
    return Shape(len(text), len(text.split()), distinct_ngrams(parts), longest_loop(parts))


def units(text: str) -> Sequence[str]:
    """Words; the characters of a text that is one word."""
    words = text.split()
    return words if len(words) > 1 else "".join(words)


def distinct_ngrams(parts: Sequence[str], n: int = 3) -> float:
    """Different runs of n units / all runs of n units; 1 where there is none. Raises ValueError unless n >= 1."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    runs = [tuple(parts[start : start + n]) for start in range(len(parts) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def longest_loop(parts: Sequence[str]) -> Loop:
    """The loop that covers most units; of equally long ones that of the shortest piece. O(PERIOD * units).

    parts[i] == parts[i - p] for r units in a row: a piece of p units covers r + p units, a loop when r + p >= COPIES p.
    """
    best = Loop((), 0)
    for period in range(1, min(PERIOD, len(parts) // COPIES) + 1):
        run = 0
        for i in range(period, len(parts) + 1):
            if i < len(parts) and parts[i] == parts[i - period]:
                run += 1
                continue
            if run + period > best.units and run + period >= COPIES * period:
                start = i - run - period
                best = Loop(tuple(parts[start : start + period]), run + period)
            run = 0
    return best


def repeated(texts: Sequence[str]) -> float:
    """Share of a prompt's samples that an earlier sample said already, in [0, 1)."""
    return 1 - len(set(texts)) / len(texts) if texts else 0.0


def said_elsewhere(texts_P: Sequence[Sequence[str]]) -> list[float]:
    """[P] share of each prompt's samples that are, word for word, an answer to another prompt too, in [0, 1]."""
    prompts_with = Counter(text for texts in texts_P for text in set(texts))
    return [sum(prompts_with[text] > 1 for text in texts) / len(texts) if texts else 0.0 for texts in texts_P]
