"""What a report knows: the files of a run folder as records. Nothing is computed here.

    FOLDER/run.json             results with their intervals, settings, versions, hardware
    FOLDER/evaluation.jsonl     judgements of the answer before (`first`) and after (`second`) training, with the
                                rewards as scores; only where answers were compared
    FOLDER/STAGE/run.json       data doctor, settings and notes of every stage
    FOLDER/STAGE/metrics.jsonl  its curves

A folder of a single stage is its own STAGE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preftune.errors import ArtifactError
from preftune.records import Judgement, RunCard, from_json

__all__ = ["Result", "Row", "RunFolder", "Stage", "finite", "read", "results"]

Row = Mapping[str, Any]
"""One line of metrics, with `step` and `time`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number of a run card, with its interval where it has one."""

    key: str
    value: float
    low: float | None
    high: float | None
    source: str
    """File and key it stands in."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage: its card and its metrics."""

    name: str
    """Its folder below the report's, "" for that folder itself."""
    card: RunCard
    train: tuple[Row, ...]
    """Metrics of every optimizer step, with `step` and `time`."""
    evaluated: tuple[Row, ...]
    """The same of every evaluation."""

    def file(self, name: str) -> str:
        """A file of this stage, as seen from the report's folder."""
        return f"{self.name}/{name}" if self.name else name


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Everything a report shows."""

    card: RunCard
    stages: tuple[Stage, ...]
    """In the order in which they ran."""
    answers: tuple[Judgement, ...]
    """Before (`first`) and after (`second`), one per held-out prompt; scores are rewards."""


def read(folder: Path) -> RunFolder:
    """The run in `folder` with its stages. Raises ArtifactError without one, and on a line that is no record."""
    own = _stage(folder, "")
    below = [_stage(path.parent, path.parent.name) for path in folder.glob("*/run.json")]
    stages = sorted((stage for stage in (own, *below) if stage.train), key=lambda s: (s.train[0]["time"], s.name))
    path = folder / "evaluation.jsonl"
    answers = tuple(_parsed(path, from_json)) if path.exists() else ()
    if bad := [type(a).__name__ for a in answers if not isinstance(a, Judgement) or not _scored(a)]:
        raise ArtifactError(f"{path}: needs judgements whose responses have scores, found {bad[0]}")
    return RunFolder(card=own.card, stages=tuple(stages), answers=answers)


def results(card: RunCard, file: str) -> dict[str, Result]:
    """The numbers among the results: `{"estimate", "low", "high"}`, or `name` beside `name_low` and `name_high`."""
    flat: dict[str, Any] = {}
    for key, value in card.results.items():
        parts = value.items() if isinstance(value, Mapping) else [("estimate", value)]
        flat |= {key if part == "estimate" else f"{key}_{part}": number for part, number in parts}
    found = {}
    for key, value in flat.items():
        if finite(value) and not key.endswith(("_low", "_high", "_n")):
            low, high = (flat.get(f"{key}_{end}") for end in ("low", "high"))
            source = f"{file}: results.{key}"
            found[key] = Result(
                key=key,
                value=value,
                low=low if finite(low) else None,
                high=high if finite(high) else None,
                source=source,
            )
    return found


def finite(value: Any) -> bool:
    """Is it a number that can be drawn? Run folders write NaN and infinities as text."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _stage(folder: Path, name: str) -> Stage:
    path, metrics = folder / "run.json", folder / "metrics.jsonl"
    try:
        card = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is no run card ({error}); name the folder of a run") from error
    if not isinstance(card, RunCard):
        raise ArtifactError(f"{path} is a {type(card).__name__}, no run card; name the folder of a run")
    lines = _parsed(metrics, json.loads) if metrics.exists() else []
    rows: dict[Literal["train", "eval"], list[Row]] = {"train": [], "eval": []}
    for line in lines:
        rows[line["kind"]].append({"step": line["step"], "time": line["time"], **line["metrics"]})
    return Stage(name=name, card=card, train=tuple(rows["train"]), evaluated=tuple(rows["eval"]))


def _parsed(path: Path, parse: Any) -> list[Any]:
    """Every line of a JSONL file. Raises ArtifactError with file and line."""
    items = []
    text = path.read_text(encoding="utf-8").removesuffix("\n")
    for number, line in enumerate(text.split("\n") if text else (), start=1):  # splitlines would split inside a text
        try:
            items.append(parse(line))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path}:{number}: cannot be read ({error})") from error
    return items


def _scored(answer: Judgement) -> bool:
    return finite(answer.first.score) and finite(answer.second.score)
