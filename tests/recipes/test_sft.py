"""Claims about the fine-tuning recipe: what it minimises, and on what."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.recipes import sft


def first_step(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    settings = {"batch_size": 64, "max_steps": 1, "max_length": 128, "dtype": "float32", **more}
    sft.main(sft.SftConfig(model=str(model), data=str(data), out=str(out), **settings))
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["metrics"]


def test_the_loss_is_the_token_mean_over_chosen_responses_and_their_end(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """On pairs the chosen side is imitated; prompts are not, and every completion token counts the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(tiny_model_folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    total, tokens = 0.0, 0
    for row in map(json.loads, pairs_file.read_text().splitlines()):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([[*tokenizer(row["prompt"] + row["chosen"]).input_ids, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        count = ids.shape[1] - len(prompt)
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * count
        tokens += count
    found = first_step(tiny_model_folder, pairs_file, tmp_path / "run")
    assert found["completion_tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, abs=1e-5)


def test_held_out_perplexity_comes_with_its_interval(tiny_model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """The loss lies inside its interval, perplexity is exp of all three; training on half lowers it on the others."""
    lines = pairs_file.read_text().splitlines(keepends=True)
    for name, part in (("train", lines[:36]), ("eval", lines[36:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    settings = {"batch_size": 8, "epochs": 4, "lr": 5e-3, "max_length": 128, "eval_every": 5, "dtype": "float32"}
    card = sft.main(
        sft.SftConfig(
            model=str(tiny_model_folder), data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "eval.jsonl"),
            out=str(tmp_path / "run"), **settings,
        )
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [row["metrics"] for row in map(json.loads, lines) if row["kind"] == "eval"]
    assert card.results["loss_low"] < card.results["loss"] < card.results["loss_high"]
    for end in ("", "_low", "_high"):
        assert card.results[f"perplexity{end}"] == pytest.approx(math.exp(card.results[f"loss{end}"]))
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
