"""What became of every row of a data set: rows = used + refused + truncated + duplicate, always.

used        trained on, whole
truncated   trained on, but cut to max_length (policies `prompt` and `response`)
duplicate   the same tokens, preferences or label, scores, weight and annotator as an earlier row, which is kept
refused     left out for a reason that names file, line and field; over-length rows dropped on request
            (policy `drop`) are among them and counted once more in `dropped`, for they stop nothing
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preftune.errors import DataError
from preftune.records import Refusal

__all__ = ["ODDITIES", "Cuts", "DataReport", "LengthGap", "Oddity", "Spread", "check_refusals"]

_SHOWN = 20

ODDITIES: dict[str, str] = {
    "BOS more than once": "the text spells BOS although the tokenizer or the template writes it",
    "annotators disagree": "another annotator prefers the other response, or labels it otherwise; both rows are used",
    "boundary merge": "the tokenizer would merge the prompt's end with a response's start, so they are tokenised apart",
    "empty prompt": "the response follows BOS (or EOS, where the tokenizer has no BOS) alone",
    "end mark spelled": "a response spells its end-of-sequence mark; it is taken as the mark, not doubled",
    "end of turn is not EOS": "the chat template ends a turn with a mark of its own; generation must stop there too",
    "no BOS": "the tokenizer begins plain text with BOS, the chat template does not",
    "no end of turn": "the chat template ends a turn without a special token; EOS is appended to what it writes",
    "no generation prompt": "the template has none: right for [INST] templates, else the response holds its header",
    "plain text, chat model": "the tokenizer has a chat template, but the row is plain text and used as it is",
    "scores disagree": "the rejected response of a pair has the higher score; a loss that reads scores sees both",
    "special token in prompt": "a plain prompt spells special tokens; they count as such (a pre-rendered chat)",
    "template rewrites": "the chat template does not write the response as it is; it follows the generation prompt",
    "unfinished response": "a response that its sampler cut off has no end-of-sequence mark",
    "unknown characters": "the tokenizer does not know some characters; they become its unknown token",
}
"""What may be odd about a row that is used nevertheless -> what it means."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Token lengths of one kind of text, before anything is cut: tokens, end marks included."""

    mean: float
    p5: float
    p50: float
    p95: float
    p99: float
    longest: int

    @classmethod
    def of(cls, lengths: NDArray[np.integer[Any]]) -> Spread:
        """Of at least one length."""
        low, middle, high, top = (float(q) for q in np.percentile(lengths, (5, 50, 95, 99)))
        return cls(float(np.mean(lengths)), low, middle, high, top, int(np.max(lengths)))


@dataclass(frozen=True, slots=True)
class LengthGap:
    """Tokens of the chosen minus tokens of the rejected response, over the pairs that are trained on."""

    mean: float
    chosen_longer: float
    """Share of pairs."""
    rejected_longer: float
    """Share of pairs; the rest have equal lengths."""

    @classmethod
    def of(cls, gaps: NDArray[np.integer[Any]]) -> LengthGap:
        """Of at least one pair."""
        values = gaps
        return cls(float(values.mean()), float((values > 0).mean()), float((values < 0).mean()))


@dataclass(frozen=True, slots=True)
class Cuts:
    """What truncation took away from the rows that are trained on."""

    prompts: int = 0
    """Rows whose prompt lost tokens on the left."""
    responses: int = 0
    """Responses that lost tokens on the right."""
    chosen: int = 0
    """Pairs whose chosen response was cut."""
    rejected: int = 0
    """Pairs whose rejected response was cut."""
    desirable: int = 0
    """Responses labelled desirable that were cut."""
    undesirable: int = 0
    """Responses labelled undesirable that were cut."""
    one_sided: int = 0
    """Pairs of which exactly one response was cut: their length gap is partly an artefact."""
    eos_lost: int = 0
    """Responses that lost their end mark."""


@dataclass(frozen=True, slots=True)
class Oddity:
    """Something worth knowing about rows that are used nevertheless."""

    name: str
    """A key of `ODDITIES`."""
    rows: int
    first: tuple[str, ...]
    """Where the first few stand: `file:line`."""

    def __str__(self) -> str:
        more = ", ..." if self.rows > len(self.first) else ""
        return f"{self.name}: {self.rows} rows ({', '.join(self.first)}{more}): {ODDITIES[self.name]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """The doctor's findings on one data set; counts are rows where nothing else is said."""

    rows: int
    used: int
    refused: int
    truncated: int
    duplicate: int
    refusals: tuple[Refusal, ...] = ()
    """All rows with something wrong, in the order of the file."""
    dropped: tuple[Refusal, ...] = ()
    """Over-length rows left out on request; `refused` counts them too."""
    duplicates: tuple[Refusal, ...] = ()
    """Which row is a copy of which."""
    prompts: int = 0
    """Distinct prompts among the rows that are trained on."""
    responses: int = 0
    pairs: int = 0
    rankings: int = 0
    """Rows that order all their responses; every row of two that states no pairs of its own is one."""
    scored: int = 0
    """Responses of rows in which every response has a score."""
    desirable: int = 0
    undesirable: int = 0
    """Responses with that label (unpaired data)."""
    tokens: int = 0
    """Tokens of all prompts and responses that are trained on; the prompt of a row counts once."""
    lengths: dict[str, Spread] = field(default_factory=dict)
    """Of `prompt`, `chosen`, `rejected` (or `desirable`, `undesirable`, or `response`) and `total` (prompt plus longest
    response: max_length bounds it), over all rows that could be tokenised."""
    length_gap: LengthGap | None = None
    cuts: Cuts = Cuts()
    oddities: tuple[Oddity, ...] = ()

    def __post_init__(self) -> None:
        assert self.rows == self.used + self.refused + self.truncated + self.duplicate, "a row vanished"
        assert self.refused == len(self.refusals) + len(self.dropped), "a row was refused without a reason"
        assert self.duplicate == len(self.duplicates), "a duplicate has no original"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types, for the run card; reasons as `file:line: field: reason`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("refusals", "dropped", "duplicates"):
            values[name] = [str(refusal) for refusal in values[name]]
        values["lengths"] = {name: dataclasses.asdict(spread) for name, spread in self.lengths.items()}
        values["length_gap"] = None if self.length_gap is None else dataclasses.asdict(self.length_gap)
        values["cuts"] = dataclasses.asdict(self.cuts)
        values["oddities"] = [
            {**dataclasses.asdict(oddity), "first": list(oddity.first), "meaning": ODDITIES[oddity.name]}
            for oddity in self.oddities
        ]
        return values

    def to_json(self) -> str:
        """What `from_json` turns back into an equal report."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        values = json.loads(text)
        for name in ("refusals", "dropped", "duplicates"):
            values[name] = tuple(Refusal(**refusal) for refusal in values[name])
        values["lengths"] = {name: Spread(**spread) for name, spread in values["lengths"].items()}
        values["length_gap"] = values["length_gap"] and LengthGap(**values["length_gap"])
        values["cuts"] = Cuts(**values["cuts"])
        values["oddities"] = tuple(Oddity(odd["name"], odd["rows"], tuple(odd["first"])) for odd in values["oddities"])
        return cls(**values)

    def summary_lines(self) -> list[str]:
        """The report for a terminal or a log: the accounting first, what needs attention last."""
        labels = self.desirable + self.undesirable
        labelled = f"{self.desirable} desirable and {self.undesirable} undesirable responses"
        compared = f"{self.pairs} pairs, {self.responses} responses"
        lines = [
            f"{self.rows} rows = {self.used} used + {self.refused} refused + {self.truncated} truncated "
            f"+ {self.duplicate} duplicate",
            f"{labelled if labels else compared} to {self.prompts} prompts, {self.tokens} tokens",
        ]
        if self.scored or self.responses > 2 * (self.used + self.truncated):
            lines.append(f"{self.rankings} rows rank all their responses; {self.scored} responses have a score")
        if self.lengths:
            lines.append(f"{'tokens':<11} {'mean':>8} {'5 %':>7} {'50 %':>7} {'95 %':>7} {'99 %':>7} {'longest':>8}")
        for name, s in self.lengths.items():
            numbers = f"{s.mean:>8.1f} {s.p5:>7.0f} {s.p50:>7.0f} {s.p95:>7.0f} {s.p99:>7.0f} {s.longest:>8}"
            lines.append(f"{name:<11} {numbers}")
        if self.length_gap:
            gap = self.length_gap
            lines.append(
                f"chosen - rejected: {gap.mean:+.1f} tokens on average; "
                f"chosen longer in {gap.chosen_longer:.1%} of pairs, rejected in {gap.rejected_longer:.1%}"
            )
        if self.truncated:
            cuts = self.cuts
            by_label = f"{cuts.desirable} desirable, {cuts.undesirable} undesirable"
            by_side = f"{cuts.chosen} pairs lost chosen tokens, {cuts.rejected} rejected ones"
            by_side = f"{by_side}, {cuts.one_sided} only on one side"
            lines.append(
                f"cut: {cuts.prompts} prompts, {cuts.responses} responses ({by_label if labels else by_side}); "
                f"{cuts.eos_lost} responses lost their end mark"
            )
        if self.dropped:
            lines.append(f"{len(self.dropped)} of the refused rows were dropped on request: longer than max_length")
        return lines + [f"note: {oddity}" for oddity in self.oddities]


def check_refusals(report: DataReport, allow_refused: int, write_to: Path | None = None) -> None:
    """Raises DataError when more than `allow_refused` rows have something wrong, or when no row is left.

    The message holds the first 20 refusals and the total. With `write_to` all refused rows go into that file,
    one `file:line: field: reason` per line, whether or not they are too many.
    """
    left_out = [*report.refusals, *report.dropped]
    if write_to is not None and left_out:
        write_to.write_text("".join(f"{refusal}\n" for refusal in left_out), encoding="utf-8")
    found = len(report.refusals)
    if found > allow_refused:
        shown = _lines(report.refusals[:_SHOWN])
        rest = f"\n  ... and {found - _SHOWN} more" if found > _SHOWN else ""
        where = f"; the full list is in {write_to}" if write_to is not None else ""
        left = report.used + report.truncated
        without = f"Repair or remove them, or train without them: --allow-refused {found}"
        raise DataError(
            f"{found} of {report.rows} rows are refused, {allow_refused} allowed{where}:{shown}{rest}\n"
            f"{without if left else 'No row is left: what they have in common is to be repaired in the file'}"
        )
    if report.used + report.truncated == 0:
        reasons = _lines(left_out[:_SHOWN])
        raise DataError(f"none of {report.rows} rows is left to use; a data set needs at least one{reasons}")


def _lines(refusals: Iterable[Refusal]) -> str:
    return "".join(f"\n  {refusal}" for refusal in refusals)
