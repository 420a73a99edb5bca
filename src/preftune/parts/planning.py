"""How long a step takes and whether it fits, for every setting of shards and activation checkpointing.

    seconds of compute        FLOPs of the busiest device / (share of peak x rate)
    seconds of communication  bytes it sends / (share of bandwidth x bandwidth)
    seconds of the optimizer  bytes it reads and writes / (share of bandwidth x memory bandwidth)

The shares are assumptions, and ranges: the fast end takes the high shares and hides communication behind compute
wholly, the slow end takes the low ones and hides nothing. A true step lies between, or the assumption is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preftune.models.checkpointing import Recomputed
from preftune.models.cost import Memory, Shape, Traffic, Work, flops, forward_flops, memory, traffic

__all__ = [
    "ACCELERATORS",
    "PER_NODE",
    "SHARE_OF_BANDWIDTH",
    "SHARE_OF_PEAK",
    "USABLE",
    "Accelerator",
    "Job",
    "Range",
    "Setting",
    "advised",
    "reference_seconds",
    "settings",
    "shortest",
    "sized",
    "spoken",
]

SHARE_OF_PEAK = (0.25, 0.7)
"""Of FLOPs done, recomputation included: public DPO runs reach 0.2 to 0.31, the best plain training known 0.67."""
SHARE_OF_BANDWIDTH = (0.4, 0.8)
USABLE = 0.7
"""Of memory: the rest is for steps fuller than the mean one, fragments and the libraries (results/step-hh.json)."""
MOST_TOKENS = 32768
PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A data sheet; bandwidths are of one direction."""

    tflops: float
    """Dense bfloat16, TFLOP/s."""
    memory: float
    """GB."""
    memory_bandwidth: float
    """GB/s."""
    link: float
    """GB/s one device sends inside a node."""
    network: float
    """GB/s a node sends, all its network cards together: what a ring over nodes is bound by."""

    def bandwidth(self, devices: int) -> float:
        """GB/s of a ring over so many."""
        return self.link if devices <= PER_NODE else min(self.link, self.network)


ACCELERATORS = {
    "a100": Accelerator(312, 80, 2039, 300, 200),
    "h100": Accelerator(989, 80, 3350, 450, 400),
    "h200": Accelerator(989, 141, 4800, 450, 400),
}
"""SXM; the network is eight cards of 200 or 400 Gbit/s a node."""


@dataclass(frozen=True, slots=True)
class Range:
    """From the fast end of the assumptions to the slow one."""

    fast: float
    slow: float


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained on what."""

    shape: Shape
    pair: Work
    """Of one pair, on average."""
    longest: int
    """Tokens of the longest prompt + response: a micro-batch must hold it."""
    batch_size: int
    """Pairs."""
    devices: int
    rank: int = 0
    reference_in_loop: bool = False

    @property
    def pairs_per_device(self) -> int:
        """Of the busiest one."""
        return math.ceil(self.batch_size / self.devices)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a job, and what it costs."""

    shard: bool
    activation_checkpointing: bool
    tokens_per_batch: int
    fits: bool
    micro_batches: int
    """Per device and step."""
    memory: Memory
    flops: float
    """Per step, all devices."""
    traffic: Traffic
    seconds: Range
    """Of a step."""
    pairs_per_second: Range


def settings(job: Job, on: Accelerator, tokens_per_batch: int | None = None) -> list[Setting]:
    """All of them, also those that do not fit; on one device there is nothing to shard.

    Without `tokens_per_batch` the largest power of two that fits is taken, up to MOST_TOKENS and to what a step needs.
    """
    found = []
    for shard in (False, True) if job.devices > 1 else (False,):
        for checkpointing in (False, True):
            sizes = [tokens_per_batch] if tokens_per_batch else _sizes(job)
            tried = [_setting(job, on, shard, checkpointing, size) for size in sizes]
            found.append(next((one for one in tried if one.fits), tried[-1]))
    return found


def advised(found: Sequence[Setting]) -> Setting | None:
    """The fastest at the slow end of those that fit, shards only where they gain a tenth; None where nothing fits.

    Latency is not counted, and shards send many more messages.
    """
    fitting = (one for one in found if one.fits)
    return min(fitting, key=lambda one: one.seconds.slow * (1.1 if one.shard else 1.0), default=None)


def reference_seconds(job: Job, on: Accelerator, pairs: int) -> Range:
    """Of log pi_ref of so many pairs, a forward of each, once: later runs read them."""
    work = forward_flops(job.shape, job.pair) * math.ceil(pairs / job.devices)
    low, high = SHARE_OF_PEAK
    return Range(work / (high * on.tflops * 1e12), work / (low * on.tflops * 1e12))


def spoken(seconds: Range, times: float = 1.0) -> str:
    """`1.3 to 3.7 s`, in the unit that suits the slow end; `1.3 s` where both ends are said alike."""
    unit, name = next(
        (u for u in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s")) if seconds.slow * times >= 2 * u[0]),
        (1e-3, "ms") if seconds.slow * times < 0.1 else (1.0, "s"),
    )
    ends = dict.fromkeys(shortest(end * times / unit) for end in (seconds.fast, seconds.slow))
    return f"{' to '.join(ends)} {name}"


def shortest(value: float) -> str:
    """Two digits, plain."""
    return f"{float(f'{value:.2g}'):g}"


def sized(held: float) -> str:
    """`33.2 GB`: three digits, in the unit that suits so many bytes, 1e9 to a GB."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((u for u in units if held >= u[0]), (1.0, "B"))
    return f"{float(f'{held / unit:.3g}'):g} {name}"


def _sizes(job: Job) -> list[int]:
    """Budgets to try, largest first; the last must be tried whatever it costs."""
    needed = max(job.longest, job.pair.fed * job.pairs_per_device)
    powers = [2**n for n in range(MOST_TOKENS.bit_length()) if job.longest <= 2**n < 2 * needed]
    return powers[::-1] or [2 ** math.ceil(math.log2(job.longest))]


def _setting(job: Job, on: Accelerator, shard: bool, checkpointing: bool, tokens: int) -> Setting:
    mine = job.pair.times(job.pairs_per_device)
    micro_batches = max(1, math.ceil(mine.fed / tokens))
    part = job.pair.times(min(tokens, mine.fed) / job.pair.fed)
    options: dict[str, Any] = {"reference_in_loop": job.reference_in_loop, "rank": job.rank}
    recomputed: Recomputed = "full" if checkpointing else "none"
    held = memory(job.shape, part, shards=job.devices if shard else 1, recomputed=recomputed, **options)
    moved = traffic(job.shape, devices=job.devices, shard=shard, micro_batches=micro_batches, **options)
    options["checkpointing"] = checkpointing
    done = flops(job.shape, mine, **options)
    seconds = Range(*(_seconds(job, on, done, moved, end) for end in (1, 0)))
    return Setting(
        shard=shard,
        activation_checkpointing=checkpointing,
        tokens_per_batch=tokens,
        fits=held.total <= USABLE * on.memory * 1e9,
        micro_batches=micro_batches,
        memory=held,
        flops=flops(job.shape, job.pair.times(job.batch_size), **options),
        traffic=moved,
        seconds=seconds,
        pairs_per_second=Range(job.batch_size / seconds.fast, job.batch_size / seconds.slow),
    )


def _seconds(job: Job, on: Accelerator, done: float, moved: Traffic, end: int) -> float:
    """Of a step: everything hidden that can be at the fast end (1), nothing at the slow one (0)."""
    compute = done / (SHARE_OF_PEAK[end] * on.tflops * 1e12)
    sending = moved.sent / (SHARE_OF_BANDWIDTH[end] * on.bandwidth(job.devices) * 1e9)
    optimizer = moved.optimizer / (SHARE_OF_BANDWIDTH[end] * on.memory_bandwidth * 1e9)
    return (max(compute, sending) if end else compute + sending) + optimizer
