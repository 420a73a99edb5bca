"""Files -> items of the label store: what `preftune sample` wrote, and gold items from any preference file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preftune.data.ranking import ranks_from_scores
from preftune.data.sources import open_source
from preftune.errors import DataError
from preftune.records import RankedResponses, Refusal, Response, SampledResponses, from_json
from preftune.web.labels import Answer, Item

__all__ = ["MAX_RESPONSES", "gold_items", "sampled_items"]

MAX_RESPONSES = 9
"""Of one item: ranks are given with one key."""


def sampled_items(path: Path) -> Iterator[Item]:
    """The items of a file of `SampledResponses`, one per line. Raises DataError with `file:line`.

    Where every response has a score, items whose two best are closest are asked first.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror}; give the samples.jsonl of preftune sample") from None
    except UnicodeDecodeError:
        raise DataError(f"cannot read {path}: it is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        origin = f"{path.name}:{number}"
        try:
            sampled = from_json(line)
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise DataError(f"{origin}: is no record of preftune sample: {problem}") from None
        if not isinstance(sampled, SampledResponses):
            raise DataError(f"{origin}: is a {type(sampled).__name__}; lines of SampledResponses are needed")
        _check_number(origin, len(sampled.responses))
        yield Item(
            prompt=sampled.prompt,
            responses=sampled.responses,
            origin=sampled.origin or origin,
            priority=_closeness(sampled.responses),
        )


def gold_items(path: Path) -> Iterator[Item]:
    """Items with their known answer, from pairs or rankings of any layout. Raises DataError on the first flawed row."""
    for row in open_source(path, kind="preferences"):
        if isinstance(row, Refusal):
            raise DataError(str(row))
        if not isinstance(row, RankedResponses):
            raise DataError(f"{row.origin}: a gold item needs two or more responses to compare")
        _check_number(row.origin, len(row.responses))
        gold = Answer(kind="ranking", ranks=ranks_from_scores([-rank for rank in row.ranks]))
        yield Item(prompt=row.prompt, responses=row.responses, origin=row.origin, gold=gold)


def _check_number(origin: str, k: int) -> None:
    if not 2 <= k <= MAX_RESPONSES:
        raise DataError(f"{origin}: holds {k} responses; 2 to {MAX_RESPONSES} can be compared")


def _closeness(responses: tuple[Response, ...]) -> float | None:
    """Minus the margin between the two best scores, or None when a score is missing."""
    scores = sorted((response.score for response in responses if response.score is not None), reverse=True)
    return scores[1] - scores[0] if len(scores) == len(responses) else None
