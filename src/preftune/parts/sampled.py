"""A file of samples read back: which numbers of which prompt it holds, and what the answers of a command look like.

One line holds the responses to one prompt from a number on; its key says so: `CONTENT`, `CONTENT+2` from number 2 on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.errors import ArtifactError
from preftune.parts.contestants import Answers
from preftune.parts.measuring import measure_texts, of_texts
from preftune.records import SampledResponses, from_json

__all__ = ["Held", "held_numbers", "looks", "read_back"]


@dataclass(frozen=True, slots=True)
class Held:
    """A line of the file."""

    content: str
    """Hash of prompt, model and sampler: what responses are numbered under."""
    first: int
    """Number of its first response."""
    record: SampledResponses


def read_back(out: Path, lines: Sequence[str]) -> list[Held]:
    """The lines of the file. Raises ArtifactError at one that is none."""
    found = []
    for number, text in enumerate(lines, 1):
        try:
            record: SampledResponses = from_json(text)
            content, _, first = record.key.partition("+")
            found.append(Held(content, int(first or 0), record))
        except (ValueError, TypeError, AttributeError) as problem:
            raise ArtifactError(f"{out}:{number}: no line of samples ({problem}); choose another --out") from None
    return found


def held_numbers(found: Iterable[Held]) -> defaultdict[str, dict[int, int]]:
    """Content -> {first number: how many responses}."""
    held: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for line in found:
        held[line.content][line.first] = len(line.record.responses)
    return held


def looks(found: Iterable[Held], contents: Collection[str]) -> dict[str, Any]:
    """What the answers under these contents look like, each number with its 95 % interval over prompts.

    Every answer that the file holds of them, whichever command wrote it: a repeated command tells the same.
    """
    of: defaultdict[str, list[Held]] = defaultdict(list)
    others = 0
    for line in found:
        if line.content in contents:
            of[line.content].append(line)
        else:
            others += len(line.record.responses)
    answers = [
        Answers(replace(lines[0].record, responses=tuple(one for line in lines for one in line.record.responses)), None)
        for lines in of.values()
    ]
    told: dict[str, Any] = {"answered": len(answers)}
    if answers:
        measured = measure_texts("", answers)
        told |= {"responses": len(measured.rows), **of_texts(measured)}
        cut = sum(not row.finished for row in measured.rows)
        if 2 * cut > len(measured.rows):
            told["cut_off"] = (
                f"{cut:,} of {len(measured.rows):,} responses were cut off by max_tokens; unfinished responses are not "
                "compared by preftune label and not learnt from: a larger max_tokens lets them end"
            )
    if others:
        told["in_the_same_file"] = f"{others:,} responses of other commands, whose settings the notes name"
    return told
