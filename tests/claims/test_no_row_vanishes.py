"""Flawed rows through the whole command: each is named by file, line and field, and none is trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from preftune.cli import main

LONG = 128


def flawed_rows() -> Any:
    path = Path(__file__).parents[1] / "data" / "flawed_rows.py"
    spec = importlib.util.spec_from_file_location("flawed_rows", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["dpo", "--model", str(model), "--data", str(data), "--out", str(out), "--max_length", str(LONG), *more]


def test_every_flawed_row_is_reported_by_file_line_and_field_and_none_is_trained_on(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than 25 kinds of flaw in one file: exit 2 with the list; trained on without them when that is allowed."""
    data = tmp_path / "train.jsonl"
    by_line, by_kind = flawed_rows().write_all(data)
    kinds = len(by_line) + len(by_kind)
    assert kinds >= 25

    assert main(command(tiny_model_folder, data, tmp_path / "refused")) == 2
    assert not (tmp_path / "refused" / "model").exists()
    listed = (tmp_path / "refused" / "refused-train.txt").read_text().splitlines()
    places = {line.split(": ")[0]: line.split(": ")[1] for line in listed}
    for number, field in by_line.items():
        assert places.get(f"{data}:{number}") == field, f"line {number}"
    for kind in ("identical", "contradictory", "over_length"):
        for number in by_kind[kind]:
            assert f"{data}:{number}" in places, f"{kind}, line {number}"
    message = capsys.readouterr().err
    assert f"{len(listed)} of " in message and str(data) in message

    assert main(command(tiny_model_folder, data, tmp_path / "allowed", "--allow_refused", str(len(listed)))) == 0
    card = json.loads((tmp_path / "allowed" / "run.json").read_text())
    report = card["data"]["train"]
    assert report["rows"] == report["used"] + report["refused"] + report["truncated"] + report["duplicate"]
    assert report["refused"] == len(listed) and report["duplicate"] >= 1
    metrics = map(json.loads, (tmp_path / "allowed" / "metrics.jsonl").read_text().splitlines())
    assert sum(row["metrics"]["pairs"] for row in metrics) == report["used"] == report["pairs"]


def test_a_non_finite_loss_stops_before_the_update_and_names_its_row(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in one pair of step 3: exit 1, the row named, the weights those of step 2, nothing else saved."""
    from preftune.equations.losses import BoundLoss
    from preftune.recipes import dpo

    values, calls, touched = BoundLoss.values, [0], []

    def poisoned(self: BoundLoss, inputs: Any, state: Any = None) -> Any:
        calls[0] += 1
        result = values(self, inputs, state)
        return result * float("nan") if calls[0] == 5 else result  # the dry run and the certificate ask once each

    class Watched(dpo.Loop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            touched.append(self.optimizer)

    monkeypatch.setattr(BoundLoss, "values", poisoned)
    monkeypatch.setattr(dpo, "Loop", Watched)
    arguments = command(tiny_model_folder, pairs_file, tmp_path / "run", "--batch_size", "8", "--lr", "1e-3")
    assert main(arguments) == 1
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["status"] == "failed"
    assert "NotFinite" in card["notes"][-1] and f"{pairs_file}:" in card["notes"][-1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert all(tensor.isfinite().all() for tensor in touched[0].tensors().values())
    assert not (tmp_path / "run" / "model").exists()
