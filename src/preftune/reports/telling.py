"""Runs in words: what was done, when, what differs between several, and which answers are shown by which rule."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from preftune.records import Judgement, Prompt, Response, RunCard, SampledResponses
from preftune.reports.reading import Answer, RunFolder

__all__ = [
    "Difference",
    "Group",
    "Shown",
    "Side",
    "answer_groups",
    "by_sampler",
    "differences",
    "labels",
    "sentence",
    "when",
    "written",
]

LONGEST_TEXT = 1200  # characters of an answer on the page; the rest is in the file that is named beside it
RANDOM, EXTREME = 6, 4
KINDS, SIDES = 3, 4  # pairs of models, or samplers, whose answers are shown; answers to one prompt side by side
SAMPLER = "temperature {temperature}, top_p {top_p}, at most {max_tokens} tokens"
DONE = {
    "sft": "Supervised fine-tuning of {model} on {data}",
    "dpo": "Preferences into a policy: {model} with loss {loss} on {data}",
    "reward": "A reward model from {model}, loss {loss}, on {data}",
    "ppo": "Reinforcement learning against {reward}: {model} with {algorithm} on {prompts}",
    "sample": "{n} responses of {model} to each prompt of {prompts}, " + SAMPLER,
    "label": "{judge} compares the responses of {samples}",
    "evaluate": "{model} against {reference} on {prompts}",
    "quickstart": "The whole loop on generated film reviews: SFT, sampled pairs, DPO, and the answers before and after",
    "study": "A study in a world where every response can be enumerated",
}
"""Stage -> what was done, with keys of its config."""


def sentence(card: RunCard) -> str:
    """What was done, in one sentence."""
    known = {key: _short(value) for key, value in card.config.items() if value is not None}
    if card.config.get("beta") is not None and "loss" in known:
        known["loss"] = f"{known['loss']} (beta {known['beta']})"
    told = DONE.get(card.stage.partition(" ")[0], "")
    if card.stage == "dpo" and card.config.get("online") is True:
        told = "Online DPO: {model} with loss {loss}, its own responses to {prompts}"
    elif card.stage == "sample" and "engine" in known:
        told = "{n} responses of {engine_model} at {engine} to each prompt of {prompts}, " + SAMPLER
    try:
        said = told.format_map(known)
    except KeyError:
        said = ""
    said = said or f"preftune {card.stage}"
    train = card.data.get("train")
    rows = train.get("pairs") or train.get("responses") if isinstance(train, Mapping) else None
    if isinstance(rows, int):
        said += f": {rows:,} {'pairs' if train and train.get('pairs') else 'responses'}"
    if card.stage == "sample" and isinstance(responses := card.results.get("responses"), int):
        said += f": {responses:,} responses to {card.results['answered']:,} of {card.results['prompts']:,} prompts"
    steps = card.results.get("steps")
    return f"{said}, {steps:,} optimizer steps" if isinstance(steps, int) else said


def when(card: RunCard) -> str:
    """`2026-11-21 05:33 UTC, 2 min 5 s`; what the card does not hold is left out."""
    began, ended = card.times.get("began"), card.times.get("ended")
    if began is None:
        return ""
    said = f"{datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC"
    if ended is None:
        return said
    seconds = max(0, round(ended - began))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    parts = [f"{hours} h" * (hours > 0), f"{minutes} min" * (seconds >= 60), f"{seconds % 60} s" * (hours == 0)]
    return f"{said}, {' '.join(part for part in parts if part)}"


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """Short names of runs for legends: what their paths do not share."""
    parts = [PurePath(run.name).parts or (run.card.stage,) for run in runs]
    shared = 0
    while len(runs) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    if len(runs) == 1:
        return [parts[0][-1]]
    return ["/".join(p[shared:]) for p in parts]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key that is not the same in all runs, with its value in each; None where a run has no such key."""

    key: str
    values: tuple[str | None, ...]


def differences(runs: Sequence[RunFolder]) -> dict[str, list[Difference]]:
    """What differs between runs, settings first: keys that two of them have, but for the folders of their results."""
    found = {}
    for title, part in (
        ("Settings", "config"),
        ("Inputs, SHA-256", "hashes"),
        ("Versions", "versions"),
        ("Host", "host"),
    ):
        held: list[Mapping[str, Any]] = [getattr(run.card, part) for run in runs]
        if part == "hashes":
            data = [(run.card.data.items()) for run in runs]
            sha = [
                {f"{role} data": d["sha256"] for role, d in of if isinstance(d, Mapping) and "sha256" in d}
                for of in data
            ]
            held = [{**a, **b} for a, b in zip(held, sha, strict=True)]
        counted = Counter(key for one in held for key in one)
        keys = [key for key, times in counted.items() if times > 1 and key not in ("out", "resume")]
        rows = [
            Difference(key=key, values=tuple(written(one[key]) if key in one else None for one in held)) for key in keys
        ]
        found[title] = [row for row in rows if len(set(row.values)) > 1]
    return {title: rows for title, rows in found.items() if rows}


def written(value: Any) -> str:
    """A value of a card as text: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One answer as it is shown."""

    name: str
    text: str
    cut: int
    """Characters that are not shown."""
    score: float | None
    won: bool
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A prompt with its answers and where they stand."""

    prompt: tuple[tuple[str, str], ...]
    """(role, text); a plain prompt has no role."""
    sides: tuple[Side, ...]
    verdict: str
    gain: float | None
    """Score of the second less that of the first answer."""
    origin: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Answers chosen by one rule."""

    title: str
    rule: str
    rows: tuple[Shown, ...]


def answer_groups(run: RunFolder) -> Iterator[Group]:
    """Random ones first, then best, worst and longest, of every two models that were compared, or of every sampler."""
    seed = run.card.config.get("seed", 0)
    reference = str(run.card.results.get("reference", ""))
    sampled = by_sampler(run.answers)
    kinds: dict[str, list[Shown]] = {kind: [_line(record, at) for record, at in rows] for kind, rows in sampled.items()}
    for answer in run.answers:
        if isinstance(answer.record, Judgement):
            shown = _shown(answer.record, answer.origin, run.card.stage == "quickstart", reference)
            kinds.setdefault(" against ".join(side.name for side in reversed(shown.sides[:2])), []).append(shown)
    for kind, rows in list(kinds.items())[:KINDS]:
        of = f" ({kind})" if len(kinds) > 1 else ""
        drawn = sorted(random.Random(f"preftune {seed}").sample(range(len(rows)), min(RANDOM, len(rows))))
        yield Group(
            title=f"At random{of}",
            rule=f"{len(drawn)} of {len(rows):,}, drawn with the run's seed ({seed}), in the order of the file",
            rows=tuple(rows[i] for i in drawn),
        )
        if kind in sampled:
            yield from _extremes(sampled[kind], of)
            continue
        scored = [row for row in rows if row.gain is not None]
        up = sorted((row for row in scored if (row.gain or 0) > 0), key=lambda row: -(row.gain or 0))[:EXTREME]
        down = sorted((row for row in scored if (row.gain or 0) < 0), key=lambda row: row.gain or 0)[:EXTREME]
        longest = sorted(rows, key=lambda row: -max(len(side.text) + side.cut for side in row.sides))[:EXTREME]
        for title, rule, picked in (
            ("Best", f"the {len(up)} largest gains of score", up),
            ("Worst", f"the {len(down)} largest losses of score", down),
            ("Longest", f"the {len(longest)} longest answers, in characters", longest),
        ):
            if picked:
                yield Group(title=f"{title}{of}", rule=rule, rows=tuple(picked))
    if rest := list(kinds)[KINDS:]:
        yield Group(title=f"{len(rest)} more", rule=f"not shown: {', '.join(rest)}", rows=())


def by_sampler(answers: Sequence[Answer]) -> dict[str, list[tuple[SampledResponses, str]]]:
    """(line, origin) of samples by who wrote them, called by the words in which they differ: `seed=1`; "" if one did.

    A server is sent a seed of its own for every prompt, so there the seed tells nothing.
    """
    kinds: dict[tuple[str, ...], list[tuple[SampledResponses, str]]] = {}
    for answer in answers:
        if isinstance(answer.record, SampledResponses):
            facts = answer.record.responses[0].facts
            aside = {"tokens"} if facts.get("engine") in (None, "local") else {"tokens", "seed"}
            words = tuple(f"{key}={value}" for key, value in facts.items() if key not in aside)
            kinds.setdefault(words, []).append((answer.record, answer.origin))
    shared = set.intersection(*map(set, kinds)) if kinds else set()
    return {" ".join(word for word in words if word not in shared): rows for words, rows in kinds.items()}


def _extremes(lines: Sequence[tuple[SampledResponses, str]], of: str) -> Iterator[Group]:
    """Single answers of a sampler: the longest, the shortest, and prompts that got the same answer several times."""
    every = [(line, at, i) for line, at in lines for i in range(len(line.responses))]
    by_length = sorted(every, key=lambda one: len(one[0].responses[one[2]].text))
    longest, shortest = by_length[: -EXTREME - 1 : -1], by_length[: min(EXTREME, len(every) - EXTREME)]
    for title, picked in (("Longest", longest), ("Shortest", shortest)):
        if picked:
            rule = f"the {len(picked)} {title.lower()} answers, in characters"
            yield Group(title=f"{title}{of}", rule=rule, rows=tuple(_line(line, at, (i,)) for line, at, i in picked))
    copies = [(*Counter(r.text for r in line.responses).most_common(1)[0], line, at) for line, at in lines]
    again = sorted((one for one in copies if one[1] > 1), key=lambda one: -one[1])
    if again:
        shown = again[:EXTREME]
        rule = f"of {len(again):,} prompts that got one answer several times, the {len(shown)} that got it most often"
        yield Group(title=f"Said again{of}", rule=rule, rows=tuple(_copied(*one) for one in shown))


def _line(record: SampledResponses, origin: str, chosen: Sequence[int] = range(SIDES)) -> Shown:
    """A line of samples: the chosen responses by their numbers, as far as it has them, and how many are not shown."""
    _, _, first = record.key.partition("+")
    number = int(first) if first.isdecimal() else 0
    there = [i for i in chosen if i < len(record.responses)]
    sides = tuple(_side(f"response {number + i + 1}", record.responses[i], False) for i in there)
    rest = len(record.responses) - len(there)
    said = f"{rest:,} more {'response' if rest == 1 else 'responses'} to it" if rest else ""
    return Shown(prompt=_prompt(record.prompt), sides=sides, verdict=said, gain=None, origin=origin)


def _copied(text: str, times: int, record: SampledResponses, origin: str) -> Shown:
    """The answer that a prompt got most often."""
    response = next(one for one in record.responses if one.text == text)
    said = f"{times} of {len(record.responses)} responses to it"
    return Shown(
        prompt=_prompt(record.prompt), sides=(_side(said, response, False),), verdict="", gain=None, origin=origin
    )


def _shown(record: Judgement, origin: str, before_and_after: bool, reference: str) -> Shown:
    first, second = (_model(response) for response in (record.first, record.second))
    if before_and_after:
        first, second = "before", "after"
    elif first == second:
        first, second = "shown first", "shown second"
    pair = [
        _side(first, record.first, record.outcome == "first"),
        _side(second, record.second, record.outcome == "second"),
    ]
    if second == reference:
        pair.reverse()
    scores = [side.score for side in pair]
    told_apart = first != "shown first"  # else neither is the one that should gain
    gain = scores[1] - scores[0] if told_apart and scores[0] is not None and scores[1] is not None else None
    verdict = {"tie": "a tie", "both_bad": "both bad", "skip": "no verdict"}.get(record.outcome, "")
    return Shown(prompt=_prompt(record.prompt), sides=tuple(pair), verdict=verdict, gain=gain, origin=origin)


def _side(name: str, response: Response, won: bool) -> Side:
    cut = max(0, len(response.text) - LONGEST_TEXT)
    text = response.text[:LONGEST_TEXT] if cut else response.text
    return Side(name=name, text=text, cut=cut, score=response.score, won=won, finished=response.finished)


def _prompt(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return (("", prompt),) if isinstance(prompt, str) else tuple((one.role, one.content) for one in prompt)


def _model(response: Response) -> str:
    return response.facts.get("model", "")


def _short(value: Any) -> str:
    """A path by its last two parts, everything else as it is."""
    text = written(value)
    parts = PurePath(text).parts
    return "/".join(parts[-2:]) if len(parts) > 2 and not text.startswith("rule:") else text
