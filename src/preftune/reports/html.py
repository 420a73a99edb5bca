"""Run folders as one HTML file that can be mailed: no script, nothing loaded, every number named with its file.

Text of models and data sets is escaped wherever it stands, and the page forbids itself (CSP) to run or load anything.
The only arithmetic is what a figure needs, means and shares of what it draws; no torch, no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from preftune.errors import ArtifactError
from preftune.records import Judgement, Response
from preftune.reports import comparison, telling
from preftune.reports.courses import COLOURS, Drawn, courses
from preftune.reports.meanings import number
from preftune.reports.plots import Histogram, histogram
from preftune.reports.reading import RunFolder, Stage, read, tables

__all__ = ["render", "write_report"]

LISTED = 200  # refused rows on the page; all of them are in the file beside the run card
COUNTS = ("used", "truncated", "duplicate", "refused")


@dataclass(frozen=True, kw_only=True)
class _Course:
    """The stages of one kind."""

    title: str
    places: tuple[str, ...]
    drawn: Drawn
    numbers: tuple[comparison.Headline, ...]


@dataclass(frozen=True, kw_only=True)
class _Data:
    """One data set of one stage, as the doctor found it."""

    stage: str
    role: str
    report: Mapping[str, Any]
    source: str
    listed: str
    """The file with all refused rows."""

    @property
    def counted(self) -> bool:
        return all(isinstance(self.report.get(key), int) for key in ("rows", *COUNTS))

    @property
    def bar(self) -> list[tuple[str, float, float]]:
        """(count's name, where its piece begins, its width), in percent of the rows."""
        rows = max(1, self.report["rows"])
        pieces, start = [], 0.0
        for name in COUNTS:
            width = 100 * self.report[name] / rows
            pieces.append((name, round(start, 2), round(width, 2)))
            start += width
        return pieces


def write_report(*folders: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of these runs to `out` and return its path.

    Of one run it is `FOLDER/report.html` where `out` is None, with files named from FOLDER; of several `report.html`
    here, with files named as the runs were given. Raises ArtifactError on a folder that holds no run.
    """
    if len(folders) == 1:
        run = Path(folders[0])
        runs = [read(run)]
        path = (
            Path(out)
            if out is not None
            else run.with_name(f"{run.name}.html")
            if run.is_file()
            else run / "report.html"
        )
    else:
        runs = [read(Path(folder), str(folder)) for folder in folders]
        path = Path(out or "report.html")
    text = render(*runs)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as problem:
        raise ArtifactError(f"{path}: cannot be written ({problem.strerror}); choose another --out") from problem
    return path


def render(*runs: RunFolder) -> str:
    """The page: the same bytes for the same records."""
    names = telling.labels(runs)
    one = runs[0]
    top, rest = comparison.headlines(one) if len(runs) == 1 else ([], [])
    return (
        _environment()
        .get_template("report.html")
        .render(
            runs=list(zip(names, runs, strict=True)),
            title=f"preftune {one.card.stage}" if len(runs) == 1 else f"{len(runs)} runs side by side",
            sentences=[telling.sentence(run.card) for run in runs],
            times=[telling.when(run.card) for run in runs],
            gaps=[gap for run in runs for gap in (*run.gaps, *_unended(run))],
            numbers=top,
            other_numbers=rest,
            matrix=comparison.matrix(runs, names) if len(runs) > 1 else None,
            differences=telling.differences(runs) if len(runs) > 1 else {},
            frontier=_markup(comparison.frontier(runs, names)),
            tables=[
                (name, comparison.grid(table), _markup(comparison.whiskers(table)))
                for name, run in zip(names, runs, strict=True)
                for table in tables(run.card, run.card_file)
                if not comparison.is_told(table)
            ],
            verdicts=[
                (name, *said) for name, run in zip(names, runs, strict=True) for said in comparison.verdicts(run)
            ],
            histograms=[
                (title, figures)
                for title, figures in (("Before and after", list(_histograms(one))), ("Lengths", list(_lengths(one))))
                if figures and len(runs) == 1
            ],
            courses=list(_courses(runs, names)),
            answers=[
                (name, list(telling.answer_groups(run))) for name, run in zip(names, runs, strict=True) if run.answers
            ],
            data=[
                one for name, run in zip(names, runs, strict=True) for one in _data(run, name if len(runs) > 1 else "")
            ],
            listed=LISTED,
            ahead=[ahead for run in runs if {"why", "command"} <= set(ahead := run.card.results.get("look_next", ()))],
            made_by=[made for run in runs for made in _cards(run)],
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "written": telling.written}
    return environment


def _unended(run: RunFolder) -> Iterator[str]:
    """What a reader should know before any number."""
    card = run.card
    if card.status == "running":
        yield f"{run.card_file}: this run had not ended when this was written, or was killed; numbers may be missing"
    elif card.status == "stopped":
        how = "can be continued with --resume" if "resume" in card.config else "goes on with the same command"
        yield f"{run.card_file}: this run was stopped and {how}; these are its numbers so far"
    elif card.status == "failed":
        reason = next((note for note in reversed(card.notes) if note.startswith("failed: ")), "failed")
        yield f"{run.card_file}: this run {reason}"
    for note in card.notes:
        if note.startswith("the report was not written"):
            yield note


def _courses(runs: Sequence[RunFolder], names: Sequence[str]) -> Iterator[_Course]:
    """Stages of one kind together, in the order in which the first of them ran."""
    kinds: dict[str, list[tuple[str, Stage, RunFolder]]] = {}
    for name, run in zip(names, runs, strict=True):
        for stage in run.stages:
            if stage.train or stage.evaluated:
                label = "/".join(part for part in (name if len(runs) > 1 else "", stage.name) if part)
                rounds = " in rounds" * bool(stage.card.config.get("online") and not stage.train)
                kinds.setdefault(f"{stage.card.stage}{rounds}", []).append((label or stage.card.stage, stage, run))
    for kind, found in kinds.items():
        drawn = courses([(label, stage) for label, stage, _ in found])
        alone = found[0][1] if len(found) == 1 and found[0][1].name else None
        of_stage = (
            RunFolder(card=alone.card, stages=(), answers=(), card_file=alone.file("run.json")) if alone else None
        )
        yield _Course(
            title=kind,
            places=tuple(stage.folder for _, stage, _ in found if stage.folder),
            drawn=drawn,
            numbers=tuple(comparison.headlines(of_stage)[0]) if of_stage else (),
        )


def _data(run: RunFolder, name: str) -> Iterator[_Data]:
    for stage in run.stages:
        for role, report in stage.card.data.items():
            if isinstance(report, Mapping):
                label = "/".join(part for part in (name, stage.name) if part) or stage.card.stage
                source = run.card_file if not stage.name else stage.file("run.json")
                beside = run.card_file.endswith(".run.json")  # a file of samples: all that it has is its card
                listed = source if beside else f"{source.removesuffix('run.json')}refused-{role}.txt"
                yield _Data(stage=label, role=role, report=report, source=f"{source}: data.{role}", listed=listed)


def _cards(run: RunFolder) -> Iterator[tuple[str, Any]]:
    yield run.card_file, run.card
    yield from ((stage.file("run.json"), stage.card) for stage in run.stages if stage.name)


def _histograms(run: RunFolder) -> Iterator[Markup]:
    """Scores and lengths of what was compared, before against after."""
    said = [answer.record for answer in run.answers if isinstance(answer.record, Judgement)]
    if not said or run.card.stage != "quickstart":
        return
    source = run.answers[0].origin.rpartition(":")[0]
    sides: dict[str, list[Response]] = {"before": [j.first for j in said], "after": [j.second for j in said]}
    scores = {name: [r.score for r in side if r.score is not None] for name, side in sides.items()}
    if all(scores.values()):
        yield _histogram("reward before and after", "reward", scores, 20, False, f"{source}: first.score, second.score")
    lengths = {name: [len(r.text.split()) for r in side] for name, side in sides.items()}
    where = f"{source}: words of first.text, second.text"
    yield _histogram("length before and after", "length, words", lengths, 30, True, where)


def _lengths(run: RunFolder) -> Iterator[Markup]:
    """How long the answers of every sampler are: in tokens, where all of them were counted, else in words."""
    sampled = list(telling.by_sampler(run.answers).items())[:COLOURS]
    said = {kind: [response for record, _ in rows for response in record.responses] for kind, rows in sampled}
    if not said:
        return
    counted = all("tokens" in response.facts for responses in said.values() for response in responses)
    unit = "tokens" if counted else "words"
    lengths = {
        kind or "all": [int(r.facts["tokens"]) if counted else len(r.text.split()) for r in responses]
        for kind, responses in said.items()
    }
    source = run.answers[0].origin.rpartition(":")[0]
    where = f"{source}: {'tokens of responses[].provenance' if counted else 'words of responses[].text'}"
    yield _histogram("length of answers", f"length, {unit}", lengths, 30, True, where)


def _histogram(
    title: str, axis: str, values: Mapping[str, Sequence[float]], bins: int, whole: bool, source: str
) -> Markup:
    everything = [value for side in values.values() for value in side]
    low, high = min(everything), max(everything)
    if whole:
        width = max(1, -(-(int(high) + 1) // bins))
        edges = [i - 0.5 for i in range(0, int(high) + width + 1, width)]
    else:
        low, high = (
            (min(low, 0.0), max(high, 1.0)) if low >= 0 and high <= 1 else (low, high if high > low else low + 1)
        )
        edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    colours = [name if name in ("before", "after") else f"r{i}" for i, name in enumerate(values)]
    samples = [
        Histogram(label=name, colour=colour, values=side)
        for (name, side), colour in zip(values.items(), colours, strict=True)
    ]
    return Markup(histogram(title, samples, bins=edges, x_label=f"{axis} (answers, %)", source=source))


def _markup(text: str | None) -> Markup | None:
    return None if text is None else Markup(text)
