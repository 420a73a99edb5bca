"""What is measured of every model on the same prompts, and the numbers with their intervals that come of it.

A `Row` is one response of one model. Numbers of a model are means over its rows, with intervals over prompts: several
responses to one prompt are drawn together by the resampling. Whatever could not be measured is counted, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from preftune.config.comparison import EvaluateConfig
from preftune.equations.optimum import best_of_n_mean, best_of_n_reward
from preftune.equations.stats import Interval, mean_interval, mean_share, paired_difference, ratio_interval, share
from preftune.errors import RunError
from preftune.evaluation.divergence import Divergence, divergences
from preftune.evaluation.texts import repeated, said_elsewhere, shape
from preftune.models.logprobs import TOLERANCE
from preftune.parts.contestants import Answers, Contestant
from preftune.records import Response

__all__ = [
    "Measured", "Row", "best_of", "by_prompt", "comparable", "measure", "measure_texts", "of_texts",
    "reference_gap", "scored", "summary", "texts_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One response of one model, as `evaluation.jsonl` holds it; None where there is no such number."""

    model: str
    prompt: int
    """Its place among the prompts, from 0."""
    number: int
    """Of the response among those to its prompt, from 0."""
    reward: float | None = None
    truth: float | None = None
    kl: float | None = None
    """Rao-Blackwellised share of KL(model || reference), nats."""
    k1: float | None = None
    """log model(y) - log reference(y), nats."""
    tokens: int | None
    """None where a server does not count them."""
    characters: int
    words: int
    finished: bool
    distinct: float
    loop: bool
    """Whether a piece stands there three times in a row."""


@dataclass(frozen=True, eq=False, slots=True)
class Measured:
    """One model: its answers, its rows, and what the reference's answers say about it."""

    name: str
    answers: list[Answers]
    rows: list[Row]
    forward: list[list[Divergence]]
    """KL(reference || model) from the reference's answers; empty where laws cannot be compared."""
    pair_ratios: list[tuple[float, float]] = field(default_factory=list)
    """Log-ratios of the chosen and the rejected response of every held-out pair."""


def measure(
    contestant: Contestant,
    answers: list[Answers],
    reference: Contestant,
    of_reference: list[Answers],
    cfg: EvaluateConfig,
) -> Measured:
    """Everything that needs both models in memory."""
    found: list[list[Divergence]] = []
    forward: list[list[Divergence]] = []
    if contestant is not reference and comparable(contestant, reference, cfg):
        model, ref = contestant.loaded.model, reference.loaded.model
        batching = contestant.batching(packed=contestant.packed and reference.packed)
        own, theirs = ([one.drawn for one in side] for side in (answers, of_reference))
        found = divergences(model, ref, own, batching, temperature=cfg.temperature, world=contestant.world)
        _check_scores(contestant, answers, found, cfg)
        forward = divergences(ref, model, theirs, batching, temperature=cfg.temperature, world=contestant.world)
    measured = measure_texts(contestant.name, answers)
    if not found:
        return measured
    told = [
        (response, each)
        for one, row in zip(answers, found, strict=True)
        for response, each in zip(one.sampled.responses, row, strict=True)
    ]
    rows = [_with_divergence(row, each, r, cfg) for row, (r, each) in zip(measured.rows, told, strict=True)]
    return replace(measured, rows=rows, forward=forward)


def measure_texts(name: str, answers: list[Answers]) -> Measured:
    """What texts alone tell: all there is of a model behind a server."""
    rows = []
    for x, one in enumerate(answers):
        for i, response in enumerate(one.sampled.responses):
            form = shape(response.text)
            tokens = _told_tokens(response) if one.group is None else len(one.group.responses[i])
            row = Row(
                model=name, prompt=x, number=i, tokens=tokens, words=form.words, characters=form.characters,
                finished=response.finished, distinct=form.distinct, loop=form.loops,
            )  # fmt: skip
            rows.append(row)
    return Measured(name, answers, rows, [])


def _told_tokens(response: Response) -> int | None:
    """What the sampler counted, if it said so."""
    tokens = response.facts.get("tokens")
    return None if tokens is None else int(tokens)


def _check_scores(
    contestant: Contestant, answers: Sequence[Answers], found: Sequence[Sequence[Divergence]], cfg: EvaluateConfig
) -> None:
    """Scored in packed rows and drawn with a cache, a response has one log-prob: two computations of one number."""
    if cfg.top_p < 1:
        return  # the sampler's law is another one
    differences = [
        (scored.k1 + scored.other_logp - (response.logp or 0.0)) / scored.tokens
        for one, row in zip(answers, found, strict=True)
        for response, scored in zip(one.sampled.responses, row, strict=True)
    ]
    allowed = TOLERANCE[contestant.loaded.model.dtype]
    rms = math.sqrt(float(np.mean(np.square(differences))))
    if not rms <= allowed:  # not >, so that NaN is refused too
        raise RunError(
            f"{contestant.name}: responses are {rms:.2g} nats per token more or less likely when scored than when "
            f"drawn, at most {allowed:g} allowed; their KL would be wrong: report it with the model's config.json"
        )


def comparable(contestant: Contestant, reference: Contestant, cfg: EvaluateConfig) -> bool:
    """Whether a KL of the sampled laws exists: one vocabulary, and laws that are more than one response."""
    return cfg.temperature > 0 and contestant.loaded.tokenizer_sha256 == reference.loaded.tokenizer_sha256


def _with_divergence(row: Row, found: Divergence, response: Response, cfg: EvaluateConfig) -> Row:
    """Under top_p < 1 the writer's law is the cut one, known by its log-probs alone; the reference stays whole."""
    if cfg.top_p < 1:
        assert response.logp is not None
        return replace(row, k1=response.logp - found.other_logp)
    return replace(row, kl=found.rao_blackwell, k1=found.k1)


def scored(measured: Measured, rewards: Sequence[float] | None, truths: Sequence[float] | None) -> Measured:
    """With rewards and truths of its rows, in their order; NaN becomes None."""
    rows = measured.rows
    if rewards is not None:
        rows = [replace(row, reward=_told(value)) for row, value in zip(rows, rewards, strict=True)]
    if truths is not None:
        rows = [replace(row, truth=_told(value)) for row, value in zip(rows, truths, strict=True)]
    return replace(measured, rows=rows)


def _told(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summary(measured: Measured, reference: Measured, cfg: EvaluateConfig) -> dict[str, Any]:
    """Every number of one model with its 95 % interval."""
    rows = measured.rows
    found: dict[str, Any] = {"responses": len(rows)}
    for column in ("reward", "truth"):
        if getattr(cfg, column) is not None:
            found[column] = _mean(rows, column)
            found[f"{column}_missing"] = sum(getattr(row, column) is None for row in rows)
            if measured is not reference:
                found[f"{column}_difference"] = reference_gap(rows, reference.rows, column)
    if rows[0].k1 is not None and measured is not reference:
        if rows[0].kl is not None:
            found["kl"] = _mean(rows, "kl")
            found["kl_per_token"] = _per_token(rows)
        found["k1"] = _mean(rows, "k1")
        if cfg.top_p == 1:
            found["forward_kl"] = _of(measured.forward, "rao_blackwell")
            found["forward_k1"] = _of(measured.forward, "k1")
    return found | of_texts(measured)


def of_texts(measured: Measured) -> dict[str, Interval | None]:
    """What the answers look like: lengths, how many ended, how often the same is said."""
    rows = measured.rows
    prompts = [row.prompt for row in rows]
    found: dict[str, Interval | None] = {column: _mean(rows, column) for column in ("tokens", "characters", "words")}
    found["distinct"] = mean_share([row.distinct for row in rows], clusters=prompts)
    for column in ("finished", "loop"):
        found[column] = share([float(getattr(row, column)) for row in rows], clusters=prompts)
    texts = texts_of(measured)
    found["repeated"] = mean_share([repeated(of_prompt) for of_prompt in texts])
    found["said_elsewhere"] = mean_share(said_elsewhere(texts))
    return found


def texts_of(measured: Measured) -> list[list[str]]:
    """What the model said to each prompt."""
    return [[response.text for response in one.sampled.responses] for one in measured.answers]


def reference_gap(rows: Sequence[Row], reference: Sequence[Row], column: str) -> Interval | None:
    """Mean of the model less mean of the reference over the prompts on which both have a number, paired by prompt."""
    ours, theirs = by_prompt(rows, column), by_prompt(reference, column)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    return paired_difference([ours[x] for x in both], [theirs[x] for x in both])


def best_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Best of 1, 2, 4, ... of the reference's responses, chosen by reward: its reward, its truth, and its KL at most.

    Prompts of which a response has no reward are left out, and of the truth those of which one has no truth either.
    """
    told: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        pair = math.nan if row.reward is None else row.reward, math.nan if row.truth is None else row.truth
        told.setdefault(row.prompt, []).append(pair)
    table_PN2 = torch.tensor(list(told.values()), dtype=torch.float64)
    scored_PN2 = table_PN2[table_PN2[..., 0].isfinite().all(1)]
    known_PN2 = scored_PN2[scored_PN2[..., 1].isfinite().all(1)]
    if not len(scored_PN2):
        return []
    most = scored_PN2.shape[1]
    sizes = sorted({2**k for k in range(most.bit_length())} | {most})
    return [
        {"n": n, "reward": mean_interval(best_of_n_reward(scored_PN2[..., 0], n).numpy())}
        | (
            {"truth": mean_interval(best_of_n_mean(known_PN2[..., 0], known_PN2[..., 1], n).numpy())}
            if len(known_PN2)
            else {}
        )
        | {"kl_at_most": math.log(n) - (n - 1) / n}
        for n in sizes
    ]


def by_prompt(rows: Iterable[Row], column: str) -> Mapping[int, float]:
    """Prompt -> mean over its responses that have the number `column`."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if getattr(row, column) is not None:
            values.setdefault(row.prompt, []).append(getattr(row, column))
    return {prompt: float(np.mean(some)) for prompt, some in values.items()}


def _mean(rows: Sequence[Row], column: str) -> Interval | None:
    said = [(getattr(row, column), row.prompt) for row in rows if getattr(row, column) is not None]
    if not said:
        return None
    values, prompts = zip(*said, strict=True)
    return mean_interval(values, clusters=prompts)


def _per_token(rows: Sequence[Row]) -> Interval:
    """Sum of KL / sum of tokens."""
    kl_N, tokens_N = ([getattr(row, column) for row in rows] for column in ("kl", "tokens"))
    return ratio_interval(kl_N, tokens_N, clusters=[row.prompt for row in rows])


def _of(found: Sequence[Sequence[Divergence]], column: str) -> Interval:
    values = [getattr(one, column) for of_prompt in found for one in of_prompt]
    return mean_interval(values, clusters=[x for x, of_prompt in enumerate(found) for _ in of_prompt])
