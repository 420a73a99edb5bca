"""Claims about held-out sets larger than memory: they are measured in parts, with the numbers of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.config.stages import CONFIGS
from preftune.parts import common
from preftune.recipes import dpo, reward, sft
from preftune.tensors import TokenGroup

STAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpo": (dpo, {}),
    "a loss of the whole set": (dpo, {"loss": "bco_pair"}),
    "sft": (sft, {}),
    "reward": (reward, {}),
}


def evaluated(stage: str, model: Path, pairs: Path, out: Path) -> dict[str, Any]:
    """The numbers of the evaluation after one step."""
    recipe, more = STAGES[stage]
    config = CONFIGS[recipe.__name__.rpartition(".")[2]]
    lines = pairs.read_text().splitlines(keepends=True)
    files = {name: out.with_suffix(f".{name}.jsonl") for name in ("data", "eval_data")}
    for path, rows in zip(files.values(), (lines[:8], lines[8:]), strict=True):
        path.write_text("".join(rows))
    recipe.main(
        config(
            model=str(model), out=str(out), max_steps=1, batch_size=4, max_length=128, dtype="float32", device="cpu",
            **{name: str(path) for name, path in files.items()}, **more,
        )
    )  # fmt: skip
    (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    return dict(row["metrics"])


@pytest.mark.parametrize("stage", STAGES)
def test_no_more_than_a_part_is_in_memory_and_the_numbers_are_those_of_the_whole(
    stage: str, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven groups at once are made batches, and every number is that of all at once up to rounding."""
    whole = evaluated(stage, tiny_model_folder, pairs_file, tmp_path / "whole")
    at_once: list[int] = []
    plain = common.micro_batches

    def counted(groups: list[TokenGroup], **options: Any) -> Any:
        at_once.append(len(groups))
        return plain(groups, **options)

    monkeypatch.setattr(common, "AT_ONCE", 7)
    monkeypatch.setattr(common, "CHECKED", 4)
    monkeypatch.setattr(common, "micro_batches", counted)
    monkeypatch.setattr("preftune.parts.reference.GROUPS_AT_ONCE", 7)
    parts = evaluated(stage, tiny_model_folder, pairs_file, tmp_path / "parts")
    assert max(at_once) <= 7 and at_once.count(7) >= 5, "40 held-out rows"
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
