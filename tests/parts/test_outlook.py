"""The note before a run says what the cost model says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.models.cost import Shape, Work, flops
from preftune.parts import outlook
from preftune.parts.planning import SHARE_OF_PEAK, Range, spoken
from preftune.recipes import dpo, reward, sft
from preftune.records import RunCard

RATE = 1e6
"""FLOP per second of the machine of these tests."""
RUNS: dict[str, tuple[Callable[..., RunCard], dict[str, Any]]] = {
    "dpo": (lambda **keys: dpo.main(dpo.DpoConfig(**keys)), {}),
    "dpo, a reference in the loop": (lambda **keys: dpo.main(dpo.DpoConfig(**keys)), {"reference_every": 2}),
    "dpo, auto": (lambda **keys: dpo.main(dpo.DpoConfig(**keys)), {"activation_checkpointing": "auto"}),
    "sft": (lambda **keys: sft.main(sft.SftConfig(**keys)), {}),
    "reward": (lambda **keys: reward.main(reward.RewardConfig(**keys)), {}),
}


@pytest.mark.parametrize("stage", RUNS)
def test_card_tells_flops_memory_and_time_of_a_step(
    stage: str, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOPs of the mean step by `flops`; seconds of it, and of all steps, at the assumed shares of the rate."""
    monkeypatch.setattr(outlook, "product_rate", lambda device, dtype: RATE)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:8]))
    run, more = RUNS[stage]
    card = run(
        model=str(tiny_model_folder), data=str(data), out=str(tmp_path / "run"), dtype="float32", batch_size=4,
        max_length=128, epochs=3, **more,
    )  # fmt: skip
    shape = Shape.of(tiny_model_folder, torch.float32)
    if stage == "reward":
        shape = replace(shape, vocabulary=1)
    total = Work.total(works(tiny_model_folder, data, stage))
    expected = flops(shape, total.times(0.5), reference_in_loop="loop" in stage)
    (note,) = [text for text in card.notes if text.startswith("a step of mean lengths")]
    assert f"on each device: {expected / 1e12:.3g} TFLOP; at its fullest" in note
    low, high = SHARE_OF_PEAK
    seconds = Range(expected / high / RATE, expected / low / RATE)
    assert f"{spoken(seconds)} a step, {spoken(seconds, 6)} for 6 steps, if it reaches 25% to 70% of" in note


def works(model: Path, data: Path, stage: str) -> list[Work]:
    """Of every row, by the tokenizer alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = len(tokenizer(row["prompt"]).input_ids)
        sides = ("chosen",) if stage == "sft" else ("chosen", "rejected")
        sizes = [len(tokenizer(row["prompt"] + row[side]).input_ids) + 1 - prompt for side in sides]
        work = Work.of(prompt, sizes)
        found.append(replace(work, fed=prompt + sum(sizes), scored=2.0) if stage == "reward" else work)
    return found


def test_the_rate_is_that_of_this_machine() -> None:
    """Between a millionth and a millionfold of what any processor does, so that no unit is lost."""
    assert 1e7 < outlook.product_rate(torch.device("cpu"), torch.float32) < 1e13
