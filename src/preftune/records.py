"""The records that cross files: frozen, free of torch, JSON round trip is the identity.

A *prompt* is a plain string or a tuple of messages (then the tokenizer's chat template renders it).
A *pair* is a `RankedResponses` with K = 2.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "Demonstration",
    "Judgement",
    "LabelledResponse",
    "Message",
    "Prompt",
    "RankedResponses",
    "Refusal",
    "Response",
    "RunCard",
    "SampledResponses",
    "from_json",
    "to_json",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: `system`, `user`, `assistant` or whatever the chat template knows."""
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One answer to a prompt: the text of the assistant's turn, without end-of-sequence marks."""

    text: str
    score: float | None = None
    """The source's own score, any unit, larger is better; None when it has none."""
    finished: bool = True
    """False when the sampler stopped at its length limit: such an answer gets no end-of-sequence token."""
    provenance: str = ""
    """Which model and sampler wrote it: one line of `key=value` words, or free text of the source."""
    logp: float | None = None
    """Log-prob of the whole response, end mark included, under the sampler that wrote it; nats, None when unknown."""

    @property
    def facts(self) -> dict[str, str]:
        """The `key=value` words of the provenance, in their order; free text has none."""
        return dict(word.split("=", 1) for word in self.provenance.split() if "=" in word)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedResponses:
    """K >= 2 responses to one prompt with their ranks, ties allowed.

    `ranks[i]` is the rank of `responses[i]`: 1 is best, equal numbers tie.
    `pairs`, when the source states comparisons rather than an order, lists (chosen, rejected) positions
    into `responses` and then stands above `ranks`.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    ranks: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] | None = None
    weight: float = 1.0
    """How much every pair of this group counts, > 0; a row of weight 2 equals the row given twice."""
    annotator: str = ""
    origin: str = ""
    """Where the row stands: `file:line`."""

    def __post_init__(self) -> None:
        k = len(self.responses)
        if k < 2 or len(self.ranks) != k:
            raise ValueError(f"{self.origin}: needs K >= 2 responses and K ranks, not {k} and {len(self.ranks)}")
        _check_weight(self.weight, self.origin)
        for chosen, rejected in self.pairs or ():
            if chosen == rejected or not (0 <= chosen < k and 0 <= rejected < k):
                raise ValueError(f"{self.origin}: pair ({chosen}, {rejected}) needs two different positions below {k}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledResponses:
    """One prompt with the responses one sampler wrote to it, in the order of their numbers; nothing is compared yet."""

    prompt: Prompt
    responses: tuple[Response, ...]
    origin: str = ""
    """Where the prompt stands: `file:line`."""
    key: str = ""
    """Content hash of the prompt and the sampler's settings: what a continued file already holds."""

    def __post_init__(self) -> None:
        if not self.responses:
            raise ValueError(f"{self.origin}: needs at least one response")


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One prompt with the one response to imitate (supervised fine-tuning)."""

    prompt: Prompt
    response: Response
    weight: float = 1.0
    origin: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledResponse:
    """One prompt with one response that is called good or bad by itself, compared with no other (unpaired data)."""

    prompt: Prompt
    response: Response
    desirable: bool
    """True: more of this; False: less of this."""
    weight: float = 1.0
    """How much the response counts, > 0; a row of weight 2 equals the row given twice."""
    annotator: str = ""
    origin: str = ""
    """Where the row stands: `file:line`."""

    def __post_init__(self) -> None:
        _check_weight(self.weight, self.origin)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A row that cannot be trained on, and why: `file:line: field: reason`."""

    origin: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.field}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One blind comparison of two responses: what was shown first, and what was said."""

    prompt: Prompt
    first: Response
    second: Response
    outcome: Literal["first", "second", "tie", "both_bad", "skip"]
    judge: str
    """Who decided: an annotator, a rule's name, a model."""
    origin: str = ""
    strength: int | None = None
    """How clear the preference is, on the judge's own scale, larger is clearer; None when nobody said."""
    reason: str = ""
    """Why, in the judge's words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCard:
    """What a run was: enough to repeat it and to trust its numbers. Stored as `run.json`."""

    stage: str
    """`sft`, `dpo`, ..."""
    status: Literal["running", "done", "stopped", "failed"]
    config: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    """Hardware: processor, cores, memory, accelerator."""
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of model, reference, tokenizer and data."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data doctor's report, one entry per data set."""
    results: dict[str, Any] = field(default_factory=dict)
    """Final numbers, each with its interval where it has one."""
    git_commit: str = ""
    notes: tuple[str, ...] = ()
    """Whatever the run had to decide: fall-backs taken, settings derived."""
    times: dict[str, float] = field(default_factory=dict)
    """`began`, and `ended` once it did, seconds since 1970; a continued run keeps its beginning."""


_TYPES: dict[str, type] = {
    c.__name__: c
    for c in (
        Message,
        Response,
        RankedResponses,
        SampledResponses,
        Demonstration,
        LabelledResponse,
        Refusal,
        Judgement,
        RunCard,
    )
}


def to_json(record: Any) -> str:
    """One line of JSON that `from_json` turns back into an equal record."""
    return json.dumps({"type": type(record).__name__, **dataclasses.asdict(record)}, ensure_ascii=False)


def from_json(line: str) -> Any:
    """The record that `to_json` wrote. Raises ValueError on an unknown type or field."""
    values = json.loads(line)
    kind = values.pop("type", None)
    if kind not in _TYPES:
        raise ValueError(f"record type {kind!r} is unknown; allowed: {', '.join(_TYPES)}")
    return _restore(_TYPES[kind], values)


def _restore(kind: type, values: dict[str, Any]) -> Any:
    unknown = set(values) - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    values = dict(values)
    if isinstance(values.get("prompt"), list):
        values["prompt"] = tuple(Message(**m) for m in values["prompt"])
    for name in ("response", "first", "second"):
        if isinstance(values.get(name), dict):
            values[name] = Response(**values[name])
    if "responses" in values:
        values["responses"] = tuple(Response(**r) for r in values["responses"])
    if kind is RankedResponses:
        values["ranks"] = tuple(values["ranks"])
        if values.get("pairs") is not None:
            values["pairs"] = tuple((int(w), int(l)) for w, l in values["pairs"])
    if kind is RunCard:
        values["notes"] = tuple(values.get("notes", ()))
    return kind(**values)


def _check_weight(weight: float, origin: str) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{origin}: weight must be a finite number > 0, not {weight!r}")
