"""Before a run: what it needs and how long it takes, from a configuration and lengths alone.

    config.json -> Shape      models/cost.py: FLOPs, bytes, traffic
    data -> Work of a pair    tokenised as training would, or mean lengths as given
    every setting, in ranges  parts/planning.py

Every number is printed with the formula it comes from, and everything assumed is said.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from preftune.config.plan import PlanConfig
from preftune.data.columns import column
from preftune.errors import DataError, RunError
from preftune.models.cost import Shape, Work, flops
from preftune.models.outline import read_configuration, read_tokenizer
from preftune.models.tokenizer import tokenizer_sha256
from preftune.parts.outlook import work_of
from preftune.parts.planning import (
    ACCELERATORS,
    PER_NODE,
    SHARE_OF_BANDWIDTH,
    SHARE_OF_PEAK,
    USABLE,
    Accelerator,
    Job,
    Range,
    Setting,
    advised,
    reference_seconds,
    settings,
    shortest,
    sized,
    spoken,
)
from preftune.parts.reading import examined

__all__ = ["Plan", "PlanConfig", "main", "table"]

_YES = {False: "no", True: "yes"}
_CHECKPOINTING = {False: "none", True: "full"}  # as the key takes it


@dataclass(frozen=True)
class Plan:
    """The answer: every setting, the advised one among them."""

    job: Job
    accelerator: Accelerator
    rows: int | None
    """Pairs of an epoch, where known."""
    settings: list[Setting]
    advised: Setting | None
    reference: Range | None
    """Seconds of computing log pi_ref once; None where the reference is in the loop or `rows` unknown."""


def main(cfg: PlanConfig) -> Plan:
    """Print the plan, write it to `out`, and return it. Raises ArtifactError, ConfigError and DataError."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    shape = Shape.of(read_configuration(cfg.model), torch.bfloat16)
    pair, longest, rows, said = _from_data(cfg) if cfg.data else _from_lengths(cfg)
    job = Job(shape, pair, longest, cfg.batch_size, cfg.gpus, cfg.lora_rank, cfg.reference_in_loop)
    found = settings(job, on := _accelerator(cfg), cfg.tokens_per_batch)
    reference = reference_seconds(job, on, rows) if rows and not cfg.reference_in_loop else None
    plan = Plan(job, on, rows, found, advised(found), reference)
    for line in (*_opening(cfg, plan, said), "", *table(plan), "", *_advice(plan)):
        console.print(line)
    if cfg.out:
        try:
            Path(cfg.out).write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
        except OSError as problem:
            raise RunError(f"cannot write {cfg.out}: {problem.strerror}") from problem
    return plan


def _from_lengths(cfg: PlanConfig) -> tuple[Work, int, int | None, str]:
    prompt, chosen, rejected = cfg.prompt_tokens or 0, cfg.chosen_tokens or 0, cfg.rejected_tokens or 0
    longest = int(prompt + max(chosen, rejected))
    said = f"lengths as given: {prompt:g} prompt + {chosen:g} / {rejected:g} response tokens, all pairs alike"
    return Work.of(prompt, (chosen, rejected)), longest, cfg.rows, said


def _from_data(cfg: PlanConfig) -> tuple[Work, int, int, str]:
    tokenizer = read_tokenizer(cfg.model)
    _, prepared = examined(
        str(cfg.data), cfg, tokenizer, tokenizer_sha256(tokenizer), kind="preferences", note=Console().print
    )
    groups, report = prepared.groups, prepared.report
    kept = column(groups, "pairs") > 0
    if not kept.any():
        raise DataError(f"{cfg.data}: no pair is left to plan for; `preftune inspect` says where the rows went")
    pairs = int(column(groups, "pairs").sum())
    longest = int((column(groups, "prompt") + column(groups, "longest"))[kept].max())
    work = work_of(groups, kept=kept).times(1 / pairs)
    said = f"{cfg.data}: {pairs} pairs of {report.rows} rows ({report.refused} refused), longest {longest} tokens"
    return work, longest, cfg.rows or pairs, said


def _accelerator(cfg: PlanConfig) -> Accelerator:
    on = ACCELERATORS[cfg.gpu]
    if cfg.bandwidth is not None:
        on = replace(on, link=cfg.bandwidth, network=cfg.bandwidth)
    return replace(on, tflops=cfg.tflops or on.tflops, memory=cfg.memory or on.memory)


def _opening(cfg: PlanConfig, plan: Plan, said: str) -> list[str]:
    shape, pair, on = plan.job.shape, plan.job.pair, plan.accelerator
    trained = f", {_count(shape.trained(cfg.lora_rank))} trained (rank {cfg.lora_rank})" if cfg.lora_rank else ""
    limit = flops(shape, pair, rank=cfg.lora_rank) / 1e12
    formula = "4 N U + 4 H C + 3.5 A X, and 6 U for adapters" if cfg.lora_rank else "6 N U + 6 H C + 3.5 A X"
    return [
        f"{cfg.model}: {_count(shape.parameters)} parameters{trained}; N = {_count(shape.body)} in the decoder's "
        f"linear layers, H = {_count(shape.head)} in the head, {shape.layers} layers, bfloat16",
        said,
        f"of a pair: U = {pair.fed:.0f} tokens fed, C = {pair.scored:.0f} scored, X = {pair.attended:.3g} attended",
        f"limit: {limit:.4g} TFLOP a pair = {formula}",
        f"on {cfg.gpus} x {cfg.gpu}: {on.tflops:g} TFLOP/s, {on.memory:g} GB, {on.memory_bandwidth:g} GB/s of memory, "
        f"{on.bandwidth(cfg.gpus):g} GB/s between devices ({PER_NODE} a node)",
        f"assumed: {_percent(SHARE_OF_PEAK)} of the FLOP rate, {_percent(SHARE_OF_BANDWIDTH)} of bandwidths; "
        "communication hidden wholly (fast end) or not at all (slow end), latency none; "
        f"{USABLE:.0%} of memory may be planned with",
    ]


def table(plan: Plan) -> list[str]:
    """A row per setting, in Markdown: ranges run from the fast to the slow end."""
    lines = [
        "| shard | activation_checkpointing | tokens_per_batch | a device holds | fits | sends a step | a step "
        "| pairs/s | an epoch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in plan.settings:
        epoch = "" if plan.rows is None else spoken(one.seconds, plan.rows / plan.job.batch_size)
        cells = (
            _YES[one.shard], _CHECKPOINTING[one.activation_checkpointing], str(one.tokens_per_batch),
            sized(one.memory.total), _YES[one.fits], sized(one.traffic.sent), spoken(one.seconds),
            f"{shortest(one.pairs_per_second.slow)} to {shortest(one.pairs_per_second.fast)}", epoch,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _advice(plan: Plan) -> list[str]:
    best = plan.advised
    if best is None:
        least = min(plan.settings, key=lambda one: one.memory.total)
        return [
            f"nothing fits: the least, {sized(least.memory.total)}, is above {USABLE:.0%} of "
            f"{plan.accelerator.memory:g} GB; take more devices, an adapter (--lora_rank) or shorter rows"
        ]
    parts = ", ".join(f"{name} {sized(value)}" for name, value in asdict(best.memory).items() if value)
    lines = [f"advised: {_named(best)}: the fastest at the slow end of what fits", f"its memory: {parts}"]
    if best.shard:
        replicas = advised([one for one in plan.settings if not one.shard])
        lines.append(f"without --shard: {_named(replicas) if replicas else 'nothing fits'}")
    if plan.reference:
        once = spoken(plan.reference)
        lines.append(f"once, log pi_ref of all pairs (2 N U + 2 H C + A X): {once}; later runs read it")
    return lines


def _named(one: Setting) -> str:
    return (
        f"shard {_YES[one.shard]}, activation_checkpointing {_CHECKPOINTING[one.activation_checkpointing]}, "
        f"tokens_per_batch {one.tokens_per_batch}, micro-batches a step {one.micro_batches}"
    )


def _count(number: float) -> str:
    """`8.03B`."""
    unit, name = next((u for u in ((1e9, "B"), (1e6, "M")) if number >= u[0]), (1e3, "k"))
    return f"{number / unit:.3g}{name}"


def _percent(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.0%} to {ends[1]:.0%}"
