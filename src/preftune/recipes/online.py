"""Online DPO: the policy answers, a judge compares, DPO learns it, and the next round begins with the new policy.

    for every round:    policy -> responses -> judge -> pairs      parts/online_round.py, out/round-N/
                        pairs -> the next policy                   recipes/dpo.py, a run of its own in out/round-N/dpo/
    after the last:     a look at what came of it, as in every round

The reference of a round is `fixed` (the policy's start pi_0: with labels of Bradley-Terry the fixed point is
pi*_beta ~ pi_0 exp(r / beta)) or `moving` (the policy that began the round: n rounds lead to pi_0 exp(n r / beta), as
much as one with beta / n). Whichever it is, every round measures KL(policy || pi_0) on the policy's own samples, and
`max_kl` is a budget: the result is the last policy within it.

A round is a run of DPO, so each one begins with fresh moments and its own learning rate schedule: moments of the last
round belong to other data, and with a moving reference to another objective. What is on the disk is not made again and
everything else is a function of config and files, so a stopped run continues to the same bits on a CPU.

Several processes share all of a round; what is on the disk already rank 0 says, so that they decide alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preftune.config.loop import Online
from preftune.config.stages import DpoConfig
from preftune.data.conversations import prompt_key
from preftune.data.prompts import distinct_prompts
from preftune.data.sources import open_source
from preftune.engine.card import jsonable, read_card
from preftune.engine.run import Run, Stopped
from preftune.errors import DataError
from preftune.models.load import save
from preftune.parts.common import MAY_DIFFER, open_model
from preftune.parts.ending import finish, opened
from preftune.parts.model_card import model_card
from preftune.parts.online_round import examine
from preftune.parts.room import Reader, reader, with_room
from preftune.records import Prompt, Refusal, RunCard

__all__ = ["run_rounds"]

SHOWN = 20
Train = Callable[[DpoConfig], RunCard]
Numbers = dict[str, Any]


def run_rounds(cfg: DpoConfig, train: Train) -> RunCard:
    """`cfg.rounds` rounds from `cfg.model`, each learnt by `train`; the result is a Hugging Face folder, `out/model`.

    Raises as `train` does, and DataError when the first round has no pair to learn from.
    """
    # What a process draws from, measures or saves it holds whole: drawing in parts, all would wait at every token.
    whole = cfg.model_copy(update={"shard": False, "offload": False})
    with opened(cfg.out, stage="dpo", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        prompts = read_prompts(cfg, run)
        run.note(_described(cfg))
        run.rewind(_rounds_seen(run.folder))
        policy, course, kept = cfg.model, list[Numbers](), (cfg.model, Numbers())
        for number in range(1, cfg.rounds + 2):
            seen = look(whole, number, policy, prompts, run)
            course.append(seen)
            if cfg.max_kl is not None and seen["kl"] > cfg.max_kl:
                run.warn(
                    f"stopped: after round {number - 1} KL(policy || start) is {seen['kl']:.3g} nats, above max_kl "
                    f"{cfg.max_kl:g}; the result is {kept[0]}, the policy before that round"
                )
                break
            kept = (policy, seen)
            if number > cfg.rounds or not _has_pairs(seen, number, run):
                break
            policy = learn(cfg, number, policy, train, run)
        return _finish(whole, *kept, course, run)


def look(cfg: DpoConfig, number: int, policy: str, prompts: Sequence[Prompt], run: Run) -> Numbers:
    """The numbers of round-N/round.json: read when that is there, else made; metrics.jsonl has them at step N."""
    path = run.folder / f"round-{number}" / "round.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    seen: Numbers | None = run.world.of_first(there, f"whether round {number} is there")
    if seen is None:
        seen = dict(jsonable(examine(cfg, number, policy, prompts, run)))
        run.evaluated(number, seen)
        run.write(f"round-{number}/round.json", [json.dumps(seen, indent=1)])
    return seen


def learn(cfg: DpoConfig, number: int, policy: str, train: Train, run: Run) -> str:
    """The policy after a round of DPO on its pairs, as a folder."""
    run.stopping()
    if run.stop_signal is not None:
        raise Stopped(run.stop_signal)
    folder = run.folder / f"round-{number}"
    out, reference = folder / "dpo", cfg.reference
    if cfg.online_reference == "fixed" and number > 1 and cfg.uses_reference():
        reference = cfg.reference or cfg.model
    status = read_card(out / "run.json").status if (out / "run.json").exists() else None
    status = run.world.of_first(status, f"whether round {number} is learnt")
    if status != "done":
        same = cfg.model_dump(exclude=set(Online.model_fields))
        mine = {"model": policy, "data": str(folder / "pairs.jsonl"), "reference": reference, "out": str(out)}
        run.note(f"round {number} of {cfg.rounds} learns {folder / 'pairs.jsonl'}")
        train(DpoConfig(**{**same, **mine, "pairs": "all", "resume": status is not None}))
    return str(out / "model")


def read_prompts(cfg: DpoConfig, run: Run) -> list[Prompt]:
    """Every prompt once, and in the run card what became of each row; none that stands in `eval_data`.

    Raises DataError on more refused rows than `allow_refused`.
    """
    held_out: set[str] = set()
    if cfg.eval_data:
        rows = open_source(cfg.eval_data, kind="preferences")
        held_out = {prompt_key(row.prompt) for row in rows if not isinstance(row, Refusal)}
    source = open_source(cfg.data, kind="prompts")
    found = with_room(distinct_prompts(iter(source)), _readers(cfg), cfg.max_tokens)
    reason = "stands in the evaluation data too, whose numbers would then prove nothing"
    leaks = [Refusal(origin=at, field="prompt", reason=reason) for p, at in found.prompts if prompt_key(p) in held_out]
    prompts = [prompt for prompt, _ in found.prompts if prompt_key(prompt) not in held_out]
    refusals = [*found.refusals, *leaks]
    facts = {"path": cfg.data, "format": source.format, "sha256": source.sha256, "used": len(prompts)}
    facts |= {"rows": len(prompts) + found.duplicates + len(refusals), "refused": len(refusals)}
    run.record(data={"prompts": facts | {"truncated": 0, "duplicate": found.duplicates}})
    run.note(f"prompts {cfg.data}: {source.format}, {len(prompts)} used, {len(refusals)} refused")
    if len(refusals) > cfg.allow_refused or not prompts:
        shown = "".join(f"\n  {refusal}" for refusal in refusals[:SHOWN])
        raise DataError(
            f"{cfg.data}: {len(refusals)} rows are refused, {cfg.allow_refused} allowed, and {len(prompts)} prompts "
            f"are left; mend or remove the rows, or do without them: --allow_refused {len(refusals)}{shown}"
        )
    return prompts


def _readers(cfg: DpoConfig) -> list[Reader]:
    """Who reads the prompts with their responses: the model, and training, which may refuse what is too long."""
    model = reader(cfg.model)
    if cfg.truncation != "refuse":
        return [model]
    return [model, replace(model, positions=cfg.max_length, limit=f"max_length {cfg.max_length}")]


def _described(cfg: DpoConfig) -> str:
    """What the rounds converge to, in a sentence."""
    anchor = cfg.reference or cfg.model
    if not cfg.uses_reference():
        return f"online, {cfg.rounds} rounds of loss {cfg.loss}, which has no reference: nothing but max_kl holds it"
    where = f"fixed at {anchor}" if cfg.online_reference == "fixed" else "moving: n rounds pull as one with beta / n"
    labels = "" if cfg.labels == "bradley_terry" or not cfg.judge_scores else (
        "; the larger score always wins, so beta sets the speed and not where the policy ends: watch kl"
    )  # fmt: skip
    return f"online, {cfg.rounds} rounds, reference {where}{labels}"


def _rounds_seen(folder: Path) -> int:
    """How many rounds from the first on have their numbers on the disk."""
    number = 0
    while (folder / f"round-{number + 1}" / "round.json").exists():
        number += 1
    return number


def _has_pairs(seen: Numbers, number: int, run: Run) -> bool:
    if seen["pair"]:
        return True
    counts = ", ".join(f"{seen[name]} {name}" for name in ("tie", "near_tie", "repeated", "unfinished", "empty"))
    text = f"round {number} has no pair to learn from: {counts}; raise n, temperature or max_tokens, or lower min_gap"
    if number == 1:
        raise DataError(text)
    run.warn(f"stopped: {text}")
    return False


def _finish(cfg: DpoConfig, policy: str, seen: Numbers, course: Sequence[Numbers], run: Run) -> RunCard:
    """Write the model and close the card: the numbers of what is kept, then those of every round."""
    learnt = sorted(run.folder.glob("round-*/dpo/run.json"))
    steps = sum(int(read_card(path).results["steps"]) for path in learnt)
    loaded, _ = open_model(policy, cfg, run, role="model")
    if run.world.rank:
        return run.finish({})
    run.record(results={"rounds": len(learnt), "steps": steps, **seen})
    method = f"Online DPO, loss `{cfg.loss}`, {len(learnt)} rounds judged by `{cfg.judge}`."
    card = model_card(run.card, base_model=cfg.model, method=method)
    save(loaded.model, loaded.tokenizer, run.folder / "model", state=None, card=card)
    return finish(run, {"course": list(course)})
