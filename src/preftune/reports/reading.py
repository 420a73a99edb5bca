"""What a report knows: the files of run folders as records. Nothing is computed here.

    RUN/run.json             results with their intervals, settings, data doctor, versions, hardware
    RUN/metrics.jsonl        curves
    RUN/results.jsonl        arms of a study: `{"family", "setting", "seed", "points": [{"step", "kl", "reward"}, ...]}`
    RUN/evaluation.jsonl     comparisons of answers, else RUN/judgements.jsonl; only where answers were compared
    RUN/STAGE/run.json       the same of every stage that the run was made of, also RUN/ROUND/STAGE/
    RUN/STAGE/metrics.jsonl

A run of a single stage is its own STAGE. A sample file, which has its card beside it, is a run too: FILE.run.json.
What a kill tore or what cannot be read is a gap that the report states; a folder without a readable card is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from preftune.errors import ArtifactError
from preftune.records import Judgement, RunCard, SampledResponses, from_json

__all__ = ["Answer", "Result", "Row", "RunFolder", "Stage", "Table", "finite", "read", "results", "tables"]

Row = Mapping[str, Any]
"""One line of metrics, with `step` and `time`."""

STAGES_READ = 12  # a study leaves more folders below it than anyone looks at


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number of a run card, with its interval where it has one."""

    key: str
    """Its place in the results, dots between: `models.dpo.reward`."""
    value: float
    low: float | None = None
    high: float | None = None
    source: str = ""
    """File and key it stands in."""

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval, None without one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of equal kind among the results: a list of objects."""

    name: str
    rows: tuple[Mapping[str, Any], ...]
    """Column -> number, text, or `{"estimate", "low", "high"}`."""
    source: str

    @property
    def columns(self) -> tuple[str, ...]:
        """In the order in which they come first; what a row does not have it leaves empty."""
        return tuple(dict.fromkeys(column for row in self.rows for column in row))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Two answers to one prompt, or several of one sampler, and where they stand."""

    record: Judgement | SampledResponses
    origin: str
    """`FILE:LINE`"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its card and its metrics."""

    name: str
    """Its folder below the run's, "" for that folder itself."""
    card: RunCard
    train: tuple[Row, ...]
    """Metrics of every optimizer step, with `step` and `time`."""
    evaluated: tuple[Row, ...]
    """The same of every evaluation."""
    folder: str = ""
    """As files of this stage are named on the page, with a slash; "" where the page stands in that folder."""

    def file(self, name: str) -> str:
        """A file of this stage, as the page names it."""
        return f"{self.folder}{name}"


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Everything a report shows of one run."""

    card: RunCard
    stages: tuple[Stage, ...]
    """Those with metrics or data of their own, in the order in which they ran."""
    answers: tuple[Answer, ...]
    arms: tuple[Mapping[str, Any], ...] = ()
    """Runs of a study, each with the points it passed."""
    gaps: tuple[str, ...] = ()
    """What is missing, torn or left out, one sentence each."""
    name: str = ""
    """As the run was given, "" where the page stands in its folder."""
    card_file: str = "run.json"
    """The card, as the page names it."""


def read(run: Path, name: str = "") -> RunFolder:
    """The run in the folder `run`, or of the sample file `run`; `name` is how its files are named, none: by themselves.

    Raises ArtifactError without a card, and on answers that are no records.
    """
    prefix = f"{name.rstrip('/')}/" if name else ""
    gaps: list[str] = []
    if run.is_file():
        beside = f"{run.name}.run.json"
        card, shown = _card(run.with_name(beside)), f"{name or run.name}"
        own = Stage(name="", card=card, train=(), evaluated=())
        answers = tuple(_answers(run, shown))
        return RunFolder(card=card, stages=(own,), answers=answers, name=name, card_file=f"{shown}.run.json")
    own = _stage(run, "", prefix, gaps)
    below = []
    paths = sorted(path.parent for pattern in ("*/run.json", "*/*/run.json") for path in run.glob(pattern))
    for path in paths[:STAGES_READ]:
        stage = path.relative_to(run).as_posix()
        try:
            below.append(_stage(path, stage, f"{prefix}{stage}/", gaps))
        except ArtifactError as problem:
            gaps.append(f"left out: {problem}")
    if len(paths) > STAGES_READ:
        gaps.append(f"{len(paths) - STAGES_READ} of {len(paths)} runs below {name or 'this folder'} are not shown")
    stages = sorted((stage for stage in (own, *below) if stage.train or stage.evaluated or stage.card.data), key=_start)
    files = [run / file for file in ("evaluation.jsonl", "judgements.jsonl") if (run / file).exists()]
    arms = tuple(_arms(run / "results.jsonl", f"{prefix}results.jsonl", gaps))
    compared = (tuple(_answers(path, f"{prefix}{path.name}")) for path in files)
    return RunFolder(
        card=own.card,
        stages=tuple(stages),
        answers=next((found for found in compared if found), ()),
        arms=arms,
        gaps=tuple(gaps),
        name=name,
        card_file=f"{prefix}run.json",
    )


def results(card: RunCard, file: str) -> dict[str, Result]:
    """The numbers among the results: `{"estimate", "low", "high"}`, or `name` beside `name_low` and `name_high`."""
    found = {}
    for key, value, siblings in _leaves(card.results, ""):
        interval = value if isinstance(value, Mapping) else {"estimate": value}
        number = interval.get("estimate")
        if finite(number) and not key.endswith(("_low", "_high")):
            name = key.rpartition(".")[2]
            low, high = (interval.get(end, siblings.get(f"{name}_{end}")) for end in ("low", "high"))
            ends = (low, high) if finite(low) and finite(high) else (None, None)
            found[key] = Result(key=key, value=number, low=ends[0], high=ends[1], source=f"{file}: results.{key}")
    return found


def tables(card: RunCard, file: str) -> list[Table]:
    """Lists of objects among the results, and objects of objects with a key in common: `{"models": {"sft": {...}}}`."""
    return list(_tables(card.results, "", file))


def _tables(values: Mapping[str, Any], above: str, file: str) -> Iterator[Table]:
    for name, value in values.items():
        rows: Any = value
        if isinstance(value, Mapping) and "estimate" not in value:
            objects = {key: row for key, row in value.items() if isinstance(row, Mapping) and "estimate" not in row}
            shared = set.intersection(*map(set, objects.values())) if len(objects) == len(value) > 1 else set()
            if not shared:
                yield from _tables(value, f"{above}{name}.", file)
                continue
            rows = [{"name": key, **row} for key, row in objects.items()]
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
            folded = tuple(map(_folded, rows))
            yield Table(name=f"{above}{name}", rows=folded, source=f"{file}: results.{above}{name}")


def _folded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """`name` with `name_low` and `name_high` beside it becomes one estimate."""
    whole = [key for key in row if {f"{key}_low", f"{key}_high"} <= set(row)]
    parts = {f"{key}_{end}" for key in whole for end in ("low", "high")}
    ends = {key: {"estimate": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]} for key in whole}
    return {key: ends.get(key, value) for key, value in row.items() if key not in parts}


def finite(value: Any) -> TypeGuard[float]:
    """Is it a number that can be drawn? Run folders write NaN and infinities as text."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _leaves(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(key with dots, value, its object) of everything that is no object itself, or an estimate."""
    for name, value in values.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and "estimate" not in value:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value, values


def _card(path: Path) -> RunCard:
    try:
        card = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no run card ({error}); name the folder of a run") from error
    if not isinstance(card, RunCard):
        raise ArtifactError(f"{path} is a {type(card).__name__}, no run card; name the folder of a run")
    return card


def _stage(folder: Path, name: str, shown: str, gaps: list[str]) -> Stage:
    card = _card(folder / "run.json")
    rows: dict[str, list[Row]] = {"train": [], "eval": []}
    torn = []
    path = folder / "metrics.jsonl"
    for number, line in enumerate(_lines(path) if path.exists() else (), start=1):
        try:
            row = json.loads(line)
            rows[row["kind"]].append({"step": int(row["step"]), "time": float(row["time"]), **row["metrics"]})
        except (ValueError, TypeError, KeyError):
            torn.append(str(number))
    if torn:
        gaps.append(f"{shown}metrics.jsonl: {len(torn)} unreadable lines are left out ({', '.join(torn[:3])})")
    return Stage(name=name, card=card, train=tuple(rows["train"]), evaluated=tuple(rows["eval"]), folder=shown)


def _start(stage: Stage) -> tuple[float, str]:
    times = [row["time"] for row in (*stage.train[:1], *stage.evaluated[:1])]
    return min(times, default=stage.card.times.get("began", 0.0)), stage.name


def _answers(path: Path, shown: str) -> Iterable[Answer]:
    """Every line of a file of answers. Raises ArtifactError with file and line; records of another kind are skipped."""
    for number, line in enumerate(_lines(path), start=1):
        try:
            values = json.loads(line)
            record = from_json(line) if isinstance(values, dict) and "type" in values else None
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ArtifactError(f"{path}:{number}: cannot be read ({error})") from error
        if isinstance(record, (Judgement, SampledResponses)):
            yield Answer(record=record, origin=f"{shown}:{number}")


def _arms(path: Path, shown: str, gaps: list[str]) -> Iterator[Mapping[str, Any]]:
    """The lines of a study; one that is none is a gap."""
    for number, line in enumerate(_lines(path) if path.exists() else (), start=1):
        try:
            arm = json.loads(line)
            points = [{key: float(point[key]) for key in ("step", "kl", "reward")} for point in arm["points"]]
            yield {"family": str(arm["family"]), "setting": str(arm["setting"]), "points": points}
        except (ValueError, TypeError, KeyError):
            gaps.append(f"{shown}:{number} is no run of a study and is left out")


def _lines(path: Path) -> list[str]:
    """The lines of a JSONL file; a line ends at a line feed alone, whatever stands in a text."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace").removesuffix("\n")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    return text.split("\n") if text else []
