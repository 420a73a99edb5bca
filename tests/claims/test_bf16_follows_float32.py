"""bf16 training must take float32's trajectory, at the learning rates that DPO uses.

The claim of `engine/rounding.py`, on a whole DPO run: with round-to-nearest a bf16 model is frozen at these rates.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from preftune.recipes import dpo

LR, STEPS, ALLOWED = 1e-6, 10, 3e-3


@pytest.fixture(scope="module")
def model_on_the_grid(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights are bf16 numbers, as released checkpoints are; wide enough that small steps add up."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("grid")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pairs, the same in every step, with responses long enough for their log-probs to move."""
    rng = random.Random(1)

    def text(n: int) -> str:
        return " " + " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(n))

    path = tmp_path_factory.mktemp("long") / "pairs.jsonl"
    rows = [{"prompt": text(10), "chosen": text(30), "rejected": text(30)} for _ in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(model: Path, pairs: Path, out: Path, dtype: str) -> np.ndarray:
    dpo.main(
        dpo.DpoConfig(
            model=str(model), data=str(pairs), out=str(out), dtype=dtype, lr=LR, schedule="constant", batch_size=4,
            epochs=STEPS, max_length=512,
        )
    )  # fmt: skip
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return np.array([row["metrics"]["loss"] for row in rows])


@pytest.fixture(scope="module")
def exact(model_on_the_grid: Path, long_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    found = losses(model_on_the_grid, long_pairs, tmp_path_factory.mktemp("exact") / "run", "float32")
    assert len(found) == STEPS
    assert np.ptp(found) > 3 * ALLOWED, f"float32 itself must move for the claim to mean anything: {found}"
    return found


def test_bf16_with_stochastic_rounding_follows_float32(
    exact: np.ndarray, model_on_the_grid: Path, long_pairs: Path, tmp_path: Path
) -> None:
    """Over 10 steps at lr 1e-6 no loss differs by more than 3e-3 from float32's."""
    rounded = losses(model_on_the_grid, long_pairs, tmp_path / "run", "bfloat16")
    assert np.abs(rounded - exact).max() < ALLOWED, f"{rounded} against {exact}"


def test_bf16_with_round_to_nearest_does_not(
    exact: np.ndarray, model_on_the_grid: Path, long_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run with nearest rounding of the compute copy misses the same bound: the claim can fail."""
    monkeypatch.setattr("preftune.engine.optim.stochastic_round_", lambda out, source, **_: out.copy_(source))
    nearest = losses(model_on_the_grid, long_pairs, tmp_path / "run", "bfloat16")
    assert np.abs(nearest - exact).max() > ALLOWED, f"{nearest} against {exact}"
