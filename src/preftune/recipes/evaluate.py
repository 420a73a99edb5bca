"""Evaluation as a stage: one or several models and a reference answer the same prompts; what that says, with intervals.

    read prompts -> every model answers, temperature the same                 parts/contestants.py
    KL to the reference, rewards, texts                                       parts/measuring.py, evaluation/
    blind comparisons of the answers -> win rates, leaderboard                parts/matching.py, evaluation/
    held-out pairs -> calibration, implicit rewards, drift in plain words     parts/diagnosing.py, evaluation/

Beside `run.json` (results, each number with its interval) the folder holds a line per response (`evaluation.jsonl`),
one per comparison (`judgements.jsonl`; `shown.jsonl` where both orders were asked), and what the models said
(`samples/`, `tokens/`), which a repeated command reuses. Several processes share all that models compute, in the
batches of one process, so the numbers are the same to the last bit; rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from preftune.config.comparison import EvaluateConfig, is_served, served_model
from preftune.engine.card import jsonable
from preftune.engine.parallel import launched
from preftune.engine.run import Run
from preftune.errors import ConfigError
from preftune.judges.scores import Scorer
from preftune.models.remote import endpoint
from preftune.parts.contestants import Answers, ask, machine, model_folder, open_contestant, read_prompts
from preftune.parts.diagnosing import Pair, calibration, findings, implicit, pair_ratios, read_pairs
from preftune.parts.ending import finish, opened
from preftune.parts.evaluation_table import show
from preftune.parts.harness import harness, run_tasks
from preftune.parts.matching import compared
from preftune.parts.measuring import Measured, best_of, comparable, measure, measure_texts, scored, summary
from preftune.parts.scoring import open_scorer
from preftune.parts.served import ask_server
from preftune.records import Prompt, Response, RunCard, to_json

__all__ = ["EvaluateConfig", "main"]

MAY_DIFFER = frozenset({"resume", "out", "allow_refused", "batch_size", "tokens_per_batch", "concurrency"})


def main(cfg: EvaluateConfig) -> RunCard:
    """Ask, measure and compare; results are in `cfg.out`/run.json and printed. Raises what its parts raise."""
    if cfg.lm_eval is not None and launched()[1] > 1:
        raise ConfigError("lm_eval runs in one process: it loads and runs models by itself; start it without torchrun")
    for place in filter(is_served, cfg.contestants().values()):
        endpoint(served_model(place)[0])  # refuses before anything is sampled
        if launched()[1] > 1:
            raise ConfigError("a server is asked by one process: start without torchrun, raise --concurrency instead")
    with opened(cfg.out, stage="evaluate", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        scorers = {name: _scorer(getattr(cfg, name), cfg, run) for name in ("reward", "truth")}
        if cfg.lm_eval is not None:
            harness()
        prompts = read_prompts(cfg, run)
        pairs = read_pairs(cfg, run) if cfg.pairs else []
        field = _with_scores(_measured(cfg, prompts, pairs, run), scorers)
        reference = field[0]
        run.write("evaluation.jsonl", [json.dumps(asdict(row)) for one in field for row in one.rows])
        results: dict[str, Any] = {
            "reference": reference.name,
            "prompts": len(prompts),
            "models": {
                one.name: summary(one, reference, cfg) | (implicit(one.pair_ratios, pairs) if one.pair_ratios else {})
                for one in field
            },
        }
        if cfg.reward is not None:
            results["best_of_n"] = best_of(reference.rows)
        verdicts, comparisons = compared(field, cfg, run)
        if verdicts:
            run.write("judgements.jsonl", (to_json(verdict.judgement) for verdict in verdicts))
        if any(len(verdict.shown) > 1 for verdict in verdicts):
            run.write("shown.jsonl", (to_json(shown) for verdict in verdicts for shown in verdict.shown))
        results |= comparisons
        if pairs:
            results["calibration"] = calibration(pairs, scorers, run)
        results["findings"] = findings(field, pairs, results, cfg, run)
        if cfg.lm_eval is not None:
            results["lm_eval"] = _benchmarks(cfg, run)
        card = finish(run, jsonable(results))
    if not run.world.rank:
        show(card, cfg)
    return card


def _scorer(name: str | None, cfg: EvaluateConfig, run: Run) -> Scorer | None:
    if name is None:
        return None
    return open_scorer(
        name, device=cfg.device, tokens_per_batch=cfg.tokens_per_batch, allow_code=cfg.allow_python, together=run.world
    )


def _measured(
    cfg: EvaluateConfig, prompts: Sequence[tuple[Prompt, str]], pairs: Sequence[Pair], run: Run
) -> list[Measured]:
    """The reference first; besides it one model at a time is in memory."""
    (first, folder), *others = cfg.contestants().items()
    reference = open_contestant(first, folder, cfg, run)
    of_reference = ask(reference, prompts, cfg, run)
    field = [measure(reference, of_reference, reference, of_reference, cfg)]
    for name, folder in others:
        if is_served(folder):
            field.append(measure_texts(name, ask_server(name, folder, prompts, cfg, run)))
            continue
        contestant = open_contestant(name, folder, cfg, run)
        answers: list[Answers] = ask(contestant, prompts, cfg, run)
        one = measure(contestant, answers, reference, of_reference, cfg)
        if pairs and contestant.loaded.tokenizer_sha256 == reference.loaded.tokenizer_sha256:
            one = replace(one, pair_ratios=pair_ratios(contestant, reference, pairs))
        field.append(one)
        if not comparable(contestant, reference, cfg):
            reason = "temperature 0 has no law" if cfg.temperature == 0 else "its tokenizer is not the reference's"
            run.warn(f"{name}: no KL to {first}, because {reason}")
    if cfg.top_p < 1:
        run.warn(
            f"top_p {cfg.top_p:g} cuts every law: k1 compares the cut law of a model with the whole law of {first}; "
            "against the cut law of the reference a KL is infinite as soon as one drawn token lies outside its cut"
        )
    return field


def _with_scores(field: Sequence[Measured], scorers: dict[str, Scorer | None]) -> list[Measured]:
    """Every response scored once per scorer, in one call for all models."""
    asked: list[tuple[Prompt, Response]] = [
        (answers.sampled.prompt, response)
        for one in field
        for answers in one.answers
        for response in answers.sampled.responses
    ]
    values = {name: score(asked) if score else None for name, score in scorers.items()}
    found, start = [], 0
    for one in field:
        part = slice(start, start + len(one.rows))
        rewards, truths = (values[name] for name in ("reward", "truth"))
        found.append(scored(one, rewards and rewards[part], truths and truths[part]))
        start = part.stop
    return found


def _benchmarks(cfg: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Per model, what lm-evaluation-harness says."""
    assert cfg.lm_eval is not None
    where = {name: model_folder(folder) for name, folder in cfg.contestants().items()}
    device, dtype = machine(cfg, run.world)
    found = {}
    with run.working("models on benchmarks", len(where)) as advance:
        for name, folder in where.items():
            found[name] = run_tasks(
                folder, cfg.lm_eval, dtype=str(dtype).removeprefix("torch."), device=str(device),
                batch_size=cfg.batch_size, seed=cfg.seed,
            )  # fmt: skip
            advance(1)
    return found
