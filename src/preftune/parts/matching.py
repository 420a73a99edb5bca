"""Blind comparisons between the answers of models: who is asked, what was said, the win rates that follow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

from preftune.config.comparison import EvaluateConfig
from preftune.config.loop import LabelConfig
from preftune.engine.run import Run
from preftune.evaluation.leaderboard import leaderboard
from preftune.evaluation.length_control import length_controlled
from preftune.evaluation.power import needed_sentence, noise_sentence
from preftune.evaluation.win_rate import WinRate, matches, win_rate, win_rates
from preftune.judges.contract import Comparison, Judge, Verdict
from preftune.judges.scores import ScoreJudge
from preftune.parts.judging import open_judges, verdicts_on
from preftune.parts.measuring import Measured
from preftune.records import Prompt, Response

__all__ = ["compared"]


def compared(field: Sequence[Measured], cfg: EvaluateConfig, run: Run) -> tuple[list[Verdict], dict[str, Any]]:
    """(every verdict, results about them); nothing where neither a judge nor a reward is given."""
    if cfg.judge is None and cfg.reward is None:
        return [], {}
    reference, *models = field
    pairings = [(model, reference) for model in models]
    if cfg.against == "all":
        pairings += list(combinations(models, 2))
    labels = LabelConfig(
        samples=cfg.prompts, judge=cfg.judge or cfg.reward, out=cfg.out, orders=cfg.orders, seed=cfg.seed,
        criteria=cfg.criteria, allow_python=cfg.allow_python,
    )  # fmt: skip
    asked = [comparison for one, other in pairings for comparison in _comparisons(one, other)]
    verdicts: list[Verdict] = []
    with _judges(field, cfg, labels) as judges:
        for judge in judges:
            verdicts += verdicts_on(judge, asked, labels, run)
    found = matches(verdict.judgement for verdict in verdicts)
    rates = [win_rate(found, one.name, other.name, seed=cfg.seed) for one, other in pairings]
    decided = [rate for rate in rates if rate.prompts > 1]  # one prompt has no spread to resample
    results: dict[str, Any] = {
        "win_rates": rates,
        "length_controlled": [length_controlled(found, rate.one, rate.other, seed=cfg.seed) for rate in decided],
        "noise": [noise_sentence(rate.prompts, _tied(rate)) for rate in decided],
        "needed": [
            f"{rate.one} against {rate.other}: {told}"
            for rate in decided
            if (told := needed_sentence(rate.rate, rate.prompts, _tied(rate)))
        ],
    }
    if len(models) > 1 and decided:
        results["leaderboard"] = leaderboard(found, anchor=reference.name, seed=cfg.seed)
    if len(rates and rates[0].judges) > 1:
        results["by_judge"] = [win_rates(found, one.name, other.name, seed=cfg.seed) for one, other in pairings]
    return verdicts, results


def _tied(rate: WinRate) -> float:
    """The share of its verdicts that are ties."""
    return (rate.ties + rate.both_bad) / rate.rate.n


def _comparisons(one: Measured, other: Measured) -> Iterator[Comparison]:
    """The i-th answer of one model with the i-th of the other, prompt by prompt."""
    for ours, theirs in zip(one.answers, other.answers, strict=True):
        for first, second in zip(ours.sampled.responses, theirs.sampled.responses, strict=True):
            yield Comparison(prompt=ours.sampled.prompt, first=first, second=second, origin=ours.sampled.origin)


@contextmanager
def _judges(field: Sequence[Measured], cfg: EvaluateConfig, labels: LabelConfig) -> Iterator[list[Judge]]:
    """Those of `cfg.judge`; without any the rewards decide, which are known already."""
    if cfg.judge is None:
        known = {}
        for one in field:
            rows = iter(one.rows)
            for answers in one.answers:
                for response in answers.sampled.responses:
                    reward = next(rows).reward
                    known[answers.sampled.prompt, response.text] = math.nan if reward is None else reward

        def look_up(asked: Sequence[tuple[Prompt, Response]]) -> list[float]:
            return [known[prompt, response.text] for prompt, response in asked]

        yield [ScoreJudge(str(cfg.reward), look_up)]
        return
    with open_judges(labels) as judges:
        yield judges
