"""A real pre-trained checkpoint with rough edges goes through every stage: no pad token, an EOS it never saw."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from preftune.cli import main


@pytest.fixture
def stories(shared: Path, tmp_path: Path) -> Path:
    """Pairs made of TinyStories: how a story really goes on, against how another one does."""
    texts = json.loads((shared / "data" / "text" / "tinystories_1000.json").read_text())
    texts = [text if isinstance(text, str) else text["text"] for text in texts]
    sentences = [text.replace("\n", " ").split(". ") for text in texts]
    usable = [s for s in sentences if len(s) >= 3]
    rows = [
        {"prompt": s[0] + ".", "chosen": f" {s[1]}.", "rejected": f" {other[1]}."}
        for s, other in pairwise(usable)
        if s[1] != other[1]
    ]
    for name, part in (("train", rows[:160]), ("held_out", rows[160:260])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return tmp_path


def test_a_real_checkpoint_without_pad_and_with_an_unseen_eos_is_inspected_fine_tuned_and_aligned(
    shared: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """stories260k learns to prefer a story's own next sentence: held-out accuracy with its interval above one half."""
    model = str(shared / "models" / "stories260k")
    data = ["--data", str(stories / "train.jsonl"), "--eval_data", str(stories / "held_out.jsonl")]
    limits = ["--max_length", "256", "--allow_refused", "20", "--truncation", "drop"]

    assert main(["inspect", "--model", model, *data, *limits]) == 0
    assert "ends with </s>" in capsys.readouterr().out
    sft = ["--out", str(stories / "sft"), "--lr", "3e-3", "--batch_size", "8", "--epochs", "4"]
    assert main(["sft", "--model", model, *data, *limits, *sft]) == 0
    dpo = ["--out", str(stories / "dpo"), "--lr", "3e-4", "--batch_size", "16", "--epochs", "3"]
    assert main(["dpo", "--model", str(stories / "sft" / "model"), *data, *limits, *dpo]) == 0

    card = json.loads((stories / "dpo" / "run.json").read_text())
    assert any("step-0 certificate: loss 0.693147" in note for note in card["notes"])
    assert card["results"]["accuracy_low"] > 0.5, card["results"]

    from preftune.models.generate import sample
    from preftune.models.load import load

    trained = load(stories / "sft" / "model", dtype=torch.float32)
    prompts = [json.loads(line)["prompt"] for line in (stories / "held_out.jsonl").read_text().splitlines()[:20]]
    answers = sample(trained.model, trained.tokenizer, prompts, n=1, temperature=1.0, max_tokens=96, seed=0)
    assert sum(answer.finished for [answer] in answers) >= 10, "it has learnt the end mark that it never saw before"
