"""A claim about the step of fine-tuning: a mean over all tokens of the step, not over those of a micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.recipes import sft


def first_step(model: Path, data: Path, out: Path, tokens: int) -> dict[str, Any]:
    more: dict[str, Any] = {"batch_size": 64, "max_steps": 1, "max_length": 128, "dtype": "float32"}
    sft.main(sft.SftConfig(model=str(model), data=str(data), out=str(out), tokens_per_batch=tokens, **more))
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["metrics"]


def test_a_step_of_many_micro_batches_is_the_step_of_one(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Loss and gradient of a step cut into micro-batches of unequal length are those of the undivided step."""
    whole = first_step(tiny_model_folder, pairs_file, tmp_path / "whole", 8192)
    split = first_step(tiny_model_folder, pairs_file, tmp_path / "split", 128)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
