"""The plan's arithmetic: where its numbers must lie, and what it must never advise."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from preftune.models.cost import Shape, Work, flops
from preftune.parts.planning import (
    ACCELERATORS,
    SHARE_OF_PEAK,
    USABLE,
    Job,
    advised,
    reference_seconds,
    settings,
)

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape.of(
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    torch.bfloat16,
)  # fmt: skip
HH = Work.of(130, (70, 70))
JOB = Job(SHAPE, HH, longest=512, batch_size=128, devices=8)
H100, H200 = ACCELERATORS["h100"], ACCELERATORS["h200"]


def test_published_throughputs_lie_between_the_ends() -> None:
    """8B at 4096 tokens a sequence on one H200 with checkpointing, 10471 tokens/s; on 8 H100, 5762 to 6667 a device."""
    sequence = Work(4096, 4096, 4096**2 / 2)
    one = Job(SHAPE, sequence, longest=4096, batch_size=8, devices=1)
    on_one = next(s for s in settings(one, H200, 4096) if s.activation_checkpointing)
    assert on_one.pairs_per_second.slow < 10_471 / 4096 < on_one.pairs_per_second.fast
    eight = replace(one, batch_size=16, devices=8)
    sharded = next(s for s in settings(eight, H100, 8192) if s.shard and s.activation_checkpointing)
    for tokens in (5762, 6667):
        assert sharded.pairs_per_second.slow < 8 * tokens / 4096 < sharded.pairs_per_second.fast


def test_published_dpo_lies_between_the_ends() -> None:
    """7-8B on 8 H100, prompts shared, reference in the loop, checkpointing: HH 155 pairs/s, UltraFeedback 53."""
    for total, ratio, published in ((186, 2.15, 155.0), (409, 0.42, 53.2)):  # median tokens, prompt : completions
        prompt = total * ratio / (1 + ratio)
        answer = (total - prompt) / 2
        job = replace(JOB, pair=Work.of(prompt, (answer, answer)), reference_in_loop=True)
        sharded = next(s for s in settings(job, H100, 4096) if s.shard and s.activation_checkpointing)
        assert sharded.pairs_per_second.slow < published < sharded.pairs_per_second.fast


def test_one_device_spends_its_time_computing() -> None:
    """Without neighbours a step is its FLOPs over the assumed rate, and the optimizer's bytes."""
    job = replace(JOB, devices=1, batch_size=16)
    (plain, _) = settings(job, H200, 8192)
    compute = flops(SHAPE, HH.times(16)) / 989e12
    optimizer = 30 * SHAPE.parameters / 4800e9
    low, high = SHARE_OF_PEAK
    assert plain.traffic.sent == 0
    assert plain.seconds.fast == pytest.approx(compute / high + optimizer / 0.8)
    assert plain.seconds.slow == pytest.approx(compute / low + optimizer / 0.4)


def test_advice_fits_and_is_the_fastest() -> None:
    """Full 8B fits no single H100, fits eight with shards, and recomputes nothing where it need not."""
    assert advised(settings(replace(JOB, devices=1), H100)) is None
    best = advised(found := settings(JOB, H100))
    assert best is not None and best.shard and not best.activation_checkpointing
    assert best.memory.total <= USABLE * 80e9
    assert all(best.seconds.slow <= one.seconds.slow for one in found if one.fits)
    long = replace(JOB, pair=Work.of(16000, (200, 200)), longest=16384, batch_size=8)
    tight = advised(settings(long, H100))
    assert tight is not None and tight.activation_checkpointing, "what is kept of 16k tokens is 105 GB"


def test_shards_are_not_advised_where_replicas_do() -> None:
    """A model of 64M parameters on two devices: shards would save a hundredth, and are not worth their messages."""
    small = replace(SHAPE, parameters=SHAPE.parameters // 100, body=SHAPE.body // 100, kept=SHAPE.kept // 100)
    found = settings(replace(JOB, shape=small, devices=2, batch_size=32), H100)
    best = advised(found)
    assert best is not None and not best.shard
    assert min(found, key=lambda one: one.seconds.slow).shard, "else nothing was decided"


def test_budget_is_the_largest_that_fits_and_holds_the_longest_row() -> None:
    """Twice the advised budget would not fit or not be needed; none is below the longest row."""
    job = replace(JOB, batch_size=4096)
    for one in settings(job, H100):
        assert one.tokens_per_batch >= job.longest
        double = next(
            other
            for other in settings(job, H100, 2 * one.tokens_per_batch)
            if (other.shard, other.activation_checkpointing) == (one.shard, one.activation_checkpointing)
        )
        assert not one.fits or not double.fits or one.tokens_per_batch == 32768


def test_busiest_device_sets_the_pace() -> None:
    """12 pairs on 8 devices take as long as 16, and one pair on 8 as long as on one."""
    times = [settings(replace(JOB, batch_size=n), H100, 8192)[0].seconds for n in (12, 16)]
    assert times[0] == times[1]
    assert replace(JOB, batch_size=1).pairs_per_device == 1


def test_a_reference_in_the_loop_is_computed_held_and_sent() -> None:
    """Of every setting: more FLOPs, more memory; in parts its layers travel too."""
    for one, more in zip(
        settings(JOB, H100, 8192), settings(replace(JOB, reference_in_loop=True), H100, 8192), strict=True
    ):
        assert more.flops > one.flops and more.memory.total > one.memory.total
        assert (more.traffic.sent > one.traffic.sent) == one.shard


def test_nodes_are_bound_by_the_network() -> None:
    """Nine devices talk over 400 GB/s, eight over 450; a slower wire is a slower step."""
    assert (H100.bandwidth(8), H100.bandwidth(9)) == (450, 400)
    slow = replace(H100, link=10, network=10)
    assert settings(JOB, slow, 8192)[2].seconds.fast > settings(JOB, H100, 8192)[2].seconds.fast


def test_slow_end_is_compute_and_the_network_shown_one_after_the_other() -> None:
    """Nothing overlaps at the slow end: its seconds are the sum of the three parts."""
    one = next(s for s in settings(JOB, H100, 8192) if s.shard and not s.activation_checkpointing)
    compute = flops(SHAPE, HH.times(16)) / (0.25 * 989e12)
    sending, optimizer = one.traffic.sent / (0.4 * 450e9), one.traffic.optimizer / (0.4 * 3350e9)
    assert one.seconds.slow == pytest.approx(compute + sending + optimizer)


def test_page_shows_what_the_cost_model_says() -> None:
    """The table of docs/scaling.md is what `scripts/scaling_table.py` prints."""
    script = runpy.run_path(str(ROOT / "scripts/scaling_table.py"))
    assert script["BEGIN"] + script["table"]() + script["END"] in (ROOT / "docs/scaling.md").read_text()


def test_reference_costs_a_forward_once() -> None:
    """A third of the linear FLOPs of training: between 0.3 and 0.34 of its compute."""
    once = reference_seconds(replace(JOB, devices=1), H200, 128)
    compute = flops(SHAPE, HH.times(128)) / 989e12
    assert 0.3 < once.fast * SHARE_OF_PEAK[1] / compute < 0.34
    assert once.slow / once.fast == pytest.approx(SHARE_OF_PEAK[1] / SHARE_OF_PEAK[0])
