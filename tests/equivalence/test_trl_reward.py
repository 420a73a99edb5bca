"""TRL's RewardTrainer is an independent implementation of the same step, and reads what we write."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from preftune.models.load import save
from preftune.models.reward_head import load_reward_model
from preftune.recipes import reward

trl = pytest.importorskip("trl", reason="trl is a development dependency")

STEPS, BATCH, LR = 10, 4, 1e-3


@pytest.fixture(scope="module")
def seeded(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny language model with a seeded head, in the layout that both sides start from."""
    loaded = load_reward_model(tiny_model_folder, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("seeded") / "model"
    save(loaded.model, loaded.tokenizer, folder, state=None, card="")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("margin", "centering"), [(0.0, 0.0), (0.5, 0.1)])
def test_ten_steps_of_a_reward_model_equal_trl(
    margin: float, centering: float, seeded: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """In float32, over 10 steps from the same head, our losses equal those of TRL's RewardTrainer within 1e-4."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"score_chosen": 1.0 + i % 3, "score_rejected": 1.0}
    data = tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = trl_losses(seeded, rows, margin, centering, tmp_path)
    cfg = reward.RewardConfig(
        model=str(seeded), data=str(data), out=str(tmp_path / "run"), dtype="float32", lr=LR, schedule="constant",
        batch_size=BATCH, max_steps=STEPS, shuffle=False, max_length=256, tokens_per_batch=256, margin=margin,
        centering=centering,
    )  # fmt: skip
    reward.main(cfg)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [row["metrics"]["loss"] for row in metrics if row["kind"] == "train"]
    assert len(ours) == len(theirs) == STEPS
    assert max(theirs) - min(theirs) > 0.01, "the trajectory must move, or agreement means nothing"
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert our == pytest.approx(their, abs=1e-4), f"step {step}"


def trl_losses(model: Path, rows: list[dict], margin: float, centering: float, folder: Path) -> list[float]:  # type: ignore[type-arg]
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    config = trl.RewardConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=BATCH, max_steps=STEPS,
        learning_rate=LR, lr_scheduler_type="constant", logging_steps=1, report_to=[], max_length=256,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, train_sampling_strategy="sequential",
        center_rewards_coefficient=centering or None,
    )  # fmt: skip
    sides = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    if margin:
        gaps = [margin * (row["score_chosen"] - row["score_rejected"]) for row in rows]
        sides = [side | {"margin": gap} for side, gap in zip(sides, gaps, strict=True)]
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    classifier.get_input_embeddings().padding_idx = None  # else the pad token, here BOS, would not be trained
    trainer = trl.RewardTrainer(
        model=classifier,
        args=config,
        train_dataset=Dataset.from_list(sides),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
