"""TRL's DPOTrainer is an independent implementation of the same step: on the same pairs the losses must agree."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from preftune.recipes import dpo

trl = pytest.importorskip("trl", reason="trl is a development dependency")

STEPS, BATCH, LR = 10, 4, 1e-3


@pytest.mark.filterwarnings("ignore")
def test_ten_steps_of_dpo_equal_trl(tiny_model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    """In float32, over 10 steps on the same data, our losses equal those of TRL's DPOTrainer within 1e-5."""
    theirs = trl_losses(tiny_model_folder, pairs_file, tmp_path)
    cfg = dpo.DpoConfig(
        model=str(tiny_model_folder), data=str(pairs_file), out=str(tmp_path / "run"), dtype="float32", lr=LR,
        schedule="constant", batch_size=BATCH, max_steps=STEPS, shuffle=False, max_length=256, tokens_per_batch=256,
    )  # fmt: skip
    dpo.main(cfg)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [row["metrics"]["loss"] for row in metrics if row["kind"] == "train"]
    assert len(ours) == len(theirs) == STEPS
    assert max(theirs) - min(theirs) > 0.01, "the trajectory must move, or agreement means nothing"
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert our == pytest.approx(their, abs=1e-5), f"step {step}"


def trl_losses(model: Path, pairs: Path, folder: Path) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=BATCH, max_steps=STEPS,
        learning_rate=LR, lr_scheduler_type="constant", logging_steps=1, report_to=[], max_length=256,
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential", gradient_checkpointing=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
