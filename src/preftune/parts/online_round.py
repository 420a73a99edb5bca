"""One round's view of a policy: what it answers, how good that is, how far from the start, and the pairs it gives.

    policy -> n responses per prompt -> tokens: KL(policy || start), lengths
                                     -> judge: scores, pairs, labels

    samples.jsonl      SampledResponses, their provenance naming the policy's hash, temperature and seed
    scored.jsonl       the same with the judge's scores; only of a judge that scores
    judgements.jsonl   one Judgement per pair that was asked, with both responses and their provenance
    pairs.jsonl        the winners as `preftune dpo` reads them
    round.json         every number below, written last: what is there is not made again

All of it is a function of the policy's weights, the prompts and the config, so a round that was cut off is made again
and is the same. Several processes draw, measure and judge in turn what one process would in the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from preftune.config.stages import DpoConfig
from preftune.engine.run import Run
from preftune.equations.stats import share
from preftune.evaluation.divergence import divergences
from preftune.models.generate import Drawn, draw, plan
from preftune.models.load import LoadedModel
from preftune.parts.common import Batching, open_model
from preftune.parts.fitting import DrawBudget
from preftune.parts.online_pairs import Answers, comparable, interval_of, judge_round, write_samples
from preftune.records import Prompt
from preftune.tensors import TokenGroup

__all__ = ["examine", "round_seed", "sequence_kl"]

AT_ONCE = 64  # responses sampled between two looks at the signals


def examine(cfg: DpoConfig, number: int, policy: str, prompts: Sequence[Prompt], run: Run) -> dict[str, Any]:
    """Sample, measure and judge the policy that begins round `number`; the look after the last round makes no pairs.

    Returns every number of the round. Means are over responses, with 95 % intervals over prompts; `kl` is that of the
    laws sampled from, at the run's temperature, and `reward` that of the responses that could be compared.
    """
    folder, seed = run.folder / f"round-{number}", round_seed(cfg.seed, number)
    folder.mkdir(exist_ok=True)
    loaded, batching = open_model(policy, cfg, run, role=f"round-{number}")
    run.world.same(loaded.weights_sha256, f"hash of the policy of round {number}")
    drawn = _drawn(loaded, cfg, number, prompts, run)
    start = cfg.reference or cfg.model
    other = loaded if start == policy else open_model(start, cfg, run, role="start")[0]
    kl = sequence_kl(loaded.model, other.model, batching, drawn, temperature=cfg.temperature)
    hashed = loaded.weights_sha256
    sampler = f"model={hashed[:16]} temperature={cfg.temperature:g} max_tokens={cfg.max_tokens} seed={seed}"
    del loaded, other  # a judge, and then training, want the memory
    answers = [Answers(prompt, tuple(one.response for one in row)) for prompt, row in zip(prompts, drawn, strict=True)]
    write_samples("samples.jsonl", answers, folder, run)
    owners = [i for i, row in enumerate(drawn) for _ in row]
    ended = share([one.response.finished for row in drawn for one in row], clusters=owners)
    asked, left_out = comparable(answers)
    numbers: dict[str, Any] = {"policy": hashed, "seed": seed, "prompts": len(prompts), "responses": len(owners)}
    return (
        interval_of("kl", kl)
        | judge_round(cfg, asked, folder, seed, sampler=sampler, last=number > cfg.rounds, run=run)
        | interval_of("tokens", [[len(one.ids) for one in row] for row in drawn])
        | {"finished": ended.estimate, "finished_low": ended.low, "finished_high": ended.high}
        | numbers
        | left_out
    )


def round_seed(seed: int, number: int) -> int:
    """Of the draws and coins of a round: a function of the run's seed and the round, so that no two rounds share it."""
    return int(hashlib.sha256(f"{seed} round {number}".encode()).hexdigest()[:8], 16)


def _drawn(loaded: LoadedModel, cfg: DpoConfig, number: int, prompts: Sequence[Prompt], run: Run) -> list[list[Drawn]]:
    """`cfg.n` responses to every prompt, in their order."""
    size: dict[str, Any] = {"n": cfg.n, "max_tokens": cfg.max_tokens, "batch_size": max(AT_ONCE, cfg.n)}
    batches, budget = plan(loaded.model, loaded.tokenizer, prompts, **size), DrawBudget(run.own_note)

    def answered(rows: Sequence[int]) -> list[list[Drawn]]:
        return draw(
            loaded.model, loaded.tokenizer, [prompts[row] for row in rows], temperature=cfg.temperature,
            seed=round_seed(cfg.seed, number), writer=loaded.weights_sha256[:16], budget=budget, **size,
        )  # fmt: skip

    found: dict[int, list[Drawn]] = {}
    with run.working(f"round {number}: prompts", len(prompts)) as advance:
        told = run.world.in_turn(batches, answered, f"the responses of round {number}", tell=_told, hear=_heard)
        for rows, answers in zip(batches, told, strict=True):
            found |= zip(rows, answers, strict=True)
            run.stopping()
            advance(len(rows))
    return [found[row] for row in range(len(prompts))]


def _told(answers: Sequence[Sequence[Drawn]]) -> list[Any]:
    return [[one.told() for one in row] for row in answers]


def _heard(told: Sequence[Any]) -> list[list[Drawn]]:
    return [[Drawn.of(one) for one in row] for row in told]


def sequence_kl(
    policy: Any, start: Any, batching: Batching, drawn: Sequence[Sequence[Drawn]], *, temperature: float
) -> list[list[float]]:
    """sum_t KL(pi(. | x, y_<t) || pi_0(. | x, y_<t)) of every response y ~ pi: unbiased for KL(pi || pi_0), nats.

    Summed over the vocabulary at every token that was drawn, both laws at `temperature` (Rao-Blackwell): what is left
    to chance is which prefixes were visited.
    """
    groups = [
        TokenGroup(np.array(row[0].prompt, np.int32), tuple(np.array(one.ids, np.int32) for one in row))
        for row in drawn
    ]
    told = divergences(policy, start, groups, batching, temperature=temperature, world=batching.world)
    return [[one.rao_blackwell for one in row] for row in told]
