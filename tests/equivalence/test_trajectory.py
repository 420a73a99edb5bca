"""One objective, many ways to compute it: every way must give one trajectory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preftune.recipes import dpo, sft

LOSS_TOLERANCE, MEAN_RESIDUAL = 1e-4, 1e-5

SPLITS = {
    "small micro-batches": {"tokens_per_batch": 128},
    "activation checkpointing": {"activation_checkpointing": True},
    "a reference by name": {"reference": "MODEL"},
}


def losses(folder: Path, kind: str = "train") -> np.ndarray:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["metrics"]["loss"] for row in rows if row["kind"] == kind])


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert len(ours) == len(theirs) > 5
    assert np.ptp(ours) > 0.01, "the trajectory must move, or agreement means nothing"
    assert np.abs(ours - theirs).max() < LOSS_TOLERANCE
    assert abs((ours - theirs).mean()) < MEAN_RESIDUAL, "a one-sided drift"


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_dpo(tiny_model_folder, pairs_file, tmp_path_factory.mktemp("whole") / "run", {})


def run_dpo(model: Path, pairs: Path, out: Path, changes: dict) -> Path:
    settings = {"tokens_per_batch": 4096, "max_length": 128, "batch_size": 12, "lr": 2e-3, "dtype": "float32"} | changes
    dpo.main(dpo.DpoConfig(model=str(model), data=str(pairs), out=str(out), **({"epochs": 2} | settings)))
    return out


@pytest.mark.parametrize("how", SPLITS)
def test_any_split_of_the_step_gives_one_trajectory(
    how: str, whole: Path, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Micro-batch size, checkpointing and the way the reference is named never change the losses."""
    changes = {k: str(tiny_model_folder) if v == "MODEL" else v for k, v in SPLITS[how].items()}
    agree(losses(run_dpo(tiny_model_folder, pairs_file, tmp_path / "run", changes)), losses(whole))


def test_padded_rows_give_the_packed_trajectory(
    whole: Path, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where packing is not served, padded rows take the same steps."""
    monkeypatch.setattr("preftune.recipes.common.install", lambda model: "this test asks for padded rows")
    agree(losses(run_dpo(tiny_model_folder, pairs_file, tmp_path / "run", {})), losses(whole))


def test_any_split_of_a_fine_tuning_step_gives_one_trajectory(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The token mean of SFT is over the whole step, not over micro-batches of unequal length."""
    found = []
    for tokens in (128, 4096):
        out = tmp_path / str(tokens)
        sft.main(
            sft.SftConfig(
                model=str(tiny_model_folder), data=str(pairs_file), out=str(out), epochs=2, lr=2e-3, batch_size=12,
                tokens_per_batch=tokens, max_length=128, dtype="float32",
            )
        )  # fmt: skip
        found.append(losses(out))
    agree(*found)


def test_a_row_of_weight_two_counts_as_the_row_given_twice(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Weights are exact: the loss of a step with weights 1 and 2 is the mean over the rows, the latter taken twice."""
    policy = run_dpo(tiny_model_folder, pairs_file, tmp_path / "policy", {"lr": 1e-2}) / "model"  # away from ln 2
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()][:6]

    def first_loss(name: str, chosen_rows: list[dict]) -> float:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen_rows))
        settings = {"batch_size": 6, "max_steps": 1, "reference": str(tiny_model_folder)}
        return float(losses(run_dpo(policy, tmp_path / f"{name}.jsonl", tmp_path / name, settings))[0])

    single = [first_loss(str(i), [row]) for i, row in enumerate(rows)]
    weighted = first_loss("weighted", [row | {"weight": 1 + i % 2} for i, row in enumerate(rows)])
    assert np.ptp(single) > 1e-3
    assert weighted == pytest.approx(np.repeat(single, [1, 2] * 3).mean(), abs=2e-6)
