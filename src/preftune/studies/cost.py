"""Is DPO as easy as SFT, with only two models? Weights held, FLOPs, CPU time and peak memory of one update.

    FLOPs of the update / FLOPs of one forward of the same responses        one forward: a padded row per response

against the usual count, a backward being two forwards and a response one generated:

    SFT 3      DPO 3, 6 a pair, its reference cached; 4, 8 a pair, in the loop
    RLOO       generation 1 + reference 1 + reward 1 + 3 = 6
    PPO        generation 1 + reference 1 + reward 1 + value 1 + epochs (3 + 3) = 28 at 4 epochs

What is counted is the training code of the recipes at work: every matrix product under torch's FLOP counter, all that
torch's allocator hands out, the reward asked from a model. A PPO update is a rollout with all its epochs. All step with
AdamW, so that no method has fewer moments than another.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from preftune.equations.stats import Interval
from preftune.evaluation.claims import Finding, above, inside, of_seeds
from preftune.models.logprobs import score
from preftune.parts.common import Batching
from preftune.reports.claim_figures import Panel
from preftune.studies.claims import Lines, Telling, by_arm, series
from preftune.studies.frontier import Arm
from preftune.studies.rl import padded
from preftune.studies.updates import METHODS, Update
from preftune.studies.world import Start
from preftune.tensors import TokenGroup

__all__ = ["ARMS", "MODEL", "SIZES", "Cost", "copies", "forwards", "held", "peak", "run", "tell"]

SIZES = (16, 64, 256)  # responses of an update
REPEATS = 5  # updates timed


@dataclass(frozen=True)
class Cost:
    """One update of so many responses."""

    step: int
    """Responses: two of a pair."""
    forwards: float
    """FLOPs in forwards of the same responses."""
    copies: float
    """Weights held while training, over the policy's."""
    held: int
    """Bytes between two updates: weights and moments of all models."""
    peak: int
    """Bytes alive at the most during an update, those of `held` included."""
    milliseconds: float
    """CPU time per response, the optimizer's included: the median of `REPEATS` updates after two."""


def run(start: Start, arm: Arm) -> list[Cost]:
    """An update of every size, counted once and then timed."""
    course = replace(start.setting.preferences, optimizer="adamw")
    start = replace(start, setting=replace(start.setting, preferences=course))
    rows = padded(start) if arm.setting == "padded" else start.batching
    points = []
    for size in SIZES:
        update = METHODS[arm.family](start, rows, size)
        with FlopCounterMode(display=False) as spent:
            groups = update.take(1)
        alone = forwards(spent.get_total_flops(), start.reference.model, padded(start), groups)
        standing = held(update)
        most = peak(partial(update.take, 2), standing)
        seconds = []
        for step in range(3, 3 + REPEATS):
            began = time.process_time()
            update.take(step)
            seconds.append(time.process_time() - began)
        responses = sum(len(group.responses) for group in groups)
        milliseconds = 1000 * float(np.median(seconds)) / responses
        points.append(Cost(responses, alone, copies(update.models), standing, most, milliseconds))
    return points


def forwards(flops: float, model: Any, rows: Batching, groups: Sequence[TokenGroup]) -> float:
    """`flops` in units of one forward of these groups in these rows."""
    with FlopCounterMode(display=False) as one, torch.no_grad():
        for batch in rows(groups):
            score(model, batch)
    return flops / one.get_total_flops()


def copies(models: Sequence[nn.Module]) -> float:
    """Weights of the models, shared ones once, over those of the first."""
    own = {weight.data_ptr(): weight.numel() for model in models for weight in model.parameters()}
    return sum(own.values()) / sum({w.data_ptr(): w.numel() for w in models[0].parameters()}.values())


def held(update: Update) -> int:
    """Bytes of what stays between two updates, memory that tensors share once."""
    weights = (tensor for model in update.models for tensor in (*model.parameters(), *model.buffers()))
    moments = (tensor for optimizer in update.optimizers for tensor in optimizer.tensors().values())
    memory = [tensor.untyped_storage() for tensor in (*weights, *moments)]
    return sum({own.data_ptr(): own.nbytes() for own in memory}.values())


def peak(work: Callable[[], object], before: int) -> int:
    """Most bytes alive at once while `work` runs: `before`, which outlive it, and what torch's CPU allocator hands out.

    The allocator's own events, every one of them (torch.profiler); scratch memory of libraries is none of its.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler tells stderr of every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    alive: dict[int, int] = {}
    now = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        place, size = event["args"]["Addr"], event["args"]["Bytes"]
        now += size if size > 0 else -alive.pop(place, 0)  # 0: it was there before
        most = max(most, now)
        if size > 0:
            alive[place] = size
    return before + most


MODEL = dict(zip(METHODS, (3, 3, 4, 6, 28), strict=True))
"""Forwards per response, as counted above."""
ARMS = tuple(Arm(name, rows, "update") for name in METHODS for rows in ("padded", "packed"))


def tell(lines: Lines) -> Telling:
    """Of the largest update, peaks of the smallest too; ratios are taken within a seed."""
    arms = by_arm(lines)

    def values(name: str, rows: str, key: str, at: int = SIZES[-1]) -> list[float]:
        return [next(p[key] for p in points if p["step"] == at) for _, points in sorted(arms[name, rows].items())]

    def over(name: str, base: str, key: str, rows: str = "padded", at: int = SIZES[-1]) -> list[float]:
        pairs = zip(values(name, rows, key, at), values(base, "padded", key, at), strict=True)
        return [mine / theirs for mine, theirs in pairs]

    titles = {
        "FLOPs in forwards, padded rows": ("padded", "forwards"),
        "FLOPs in forwards, packed rows": ("packed", "forwards"),
        "CPU milliseconds per response, padded rows": ("padded", "milliseconds"),
    }
    panels = [
        Panel(title, "responses per update", {
            name: series({n: values(name, rows, key, n) for n in SIZES}) for name in METHODS
        }, log_x=True)
        for title, (rows, key) in titles.items()
    ]  # fmt: skip
    peaks = {name: series({n: over(name, PLAIN, "peak", at=n) for n in SIZES}) for name in METHODS}
    panels.append(Panel("Bytes at the peak over those of SFT, padded rows", "responses per update", peaks, log_x=True))
    return Telling((*work(values, over), *memory(over)), panels)


PLAIN, CACHED, LIVE, *RLHF = METHODS
NARROW = "responses of at most 3 tokens, two narrow layers"


def work(values: Callable[..., list[float]], over: Callable[..., list[float]]) -> Iterator[Finding]:
    """Claims about models, FLOPs and time."""
    two, more = (of_seeds({name: values(name, "padded", "copies") for name in n}) for n in ((CACHED, LIVE), RLHF))
    held, flops = "weights held while training, over the policy's", "FLOPs per response over those of"
    yield Finding("Only two models", f"{held}, at most 2.05", two, inside(two, 0, 2.05),
                  "weights only; the cached reference was a model once, for one forward")  # fmt: skip
    yield Finding("... and RLHF holds more", f"{held}, above 2.05", more, above(more, 2.05),
                  "separate models, no adapters that share a base")  # fmt: skip
    cached, live = (of_seeds({name: over(name, PLAIN, "forwards")}) for name in (CACHED, LIVE))
    yield Finding("As easy as SFT", f"{flops} SFT on the same responses, at most 1.1, the reference cached", cached,
                  inside(cached, 0, 1.1),
                  NARROW + "; filling the cache, one forward of every pair, is not in it")  # fmt: skip
    yield Finding("... with both models in memory", f"{flops} SFT on the same responses, at most 1.1", live,
                  inside(live, 0, 1.1), NARROW)  # fmt: skip
    spent = of_seeds({name: over(name, PLAIN, "milliseconds") for name in (CACHED, LIVE)})
    yield Finding("... also in time", "CPU time per response over that of SFT, at most 1.1", spent,
                  inside(spent, 0, 1.1),
                  NARROW + "; one thread, beside whatever else ran; overheads weigh much")  # fmt: skip
    dear = of_seeds({name: over(name, LIVE, "forwards") for name in RLHF})
    yield Finding("RLHF costs more", f"{flops} DPO with both models, above 1", dear, above(dear, 1),
                  NARROW + "; an update, not what it brings")  # fmt: skip
    count = of_seeds({name: [x / MODEL[name] for x in values(name, "padded", "forwards")] for name in METHODS})
    yield Finding("Forwards per response: SFT 3, DPO 3 or 4, RLOO 6, PPO 28", "measured over that, within 10 % of 1",
                  count, inside(count, 0.9, 1.1), f"{NARROW}; {SIZES[-1]} responses an update")  # fmt: skip
    packed = of_seeds({name: over(name, name, "forwards", "packed") for name in (CACHED, LIVE)})
    yield Finding("Packed rows with shared prompts save work", "FLOPs packed over padded, at most 1", packed,
                  inside(packed, 0, 1),
                  NARROW + ": attention by blocks of many responses weighs more here")  # fmt: skip


def memory(over: Callable[..., list[float]]) -> Iterator[Finding]:
    """Claims about the peak of an update: the smallest, where weights and moments count, and the largest."""

    def peaks(names: Sequence[str], base: str) -> dict[str, Interval]:
        ends = (SIZES[0], SIZES[-1])
        return of_seeds({f"{name}, {n}": over(name, base, "peak", at=n) for name in names for n in ends})

    cached, live, more = peaks([CACHED], PLAIN), peaks([LIVE], PLAIN), peaks(RLHF, LIVE)
    bytes_ = f"bytes at the peak of an update of {SIZES[0]} and of {SIZES[-1]} responses over those of"
    limits = NARROW + ": activations weigh more, weights less than in a large model; float32, AdamW"
    yield Finding("As easy as SFT, in memory", f"{bytes_} SFT on as many, at most 1.1, the reference cached", cached,
                  inside(cached, 0, 1.1), limits)  # fmt: skip
    yield Finding("... with both models in memory", f"{bytes_} SFT on as many, at most 1.1", live,
                  inside(live, 0, 1.1), limits)  # fmt: skip
    yield Finding("RLHF needs more memory", f"{bytes_} DPO with both models, above 1", more, above(more, 1), limits)
