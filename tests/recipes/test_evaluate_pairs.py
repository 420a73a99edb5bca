"""Held-out pairs of an evaluation: rows that cannot be used are named and counted before a model is asked anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preftune.cli import main as cli
from preftune.engine.card import read_card

GOOD = [{"prompt": f"the {x} sat", "chosen": " here", "rejected": " there"} for x in ("cat", "dog")]
FLAWED = [{**GOOD[0], "chosen": " b" * 600}, {**GOOD[0], "rejected": ""}, {**GOOD[0], "chosen": " x</s> y"}]


@pytest.fixture
def arguments(tiny_model_folder: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [GOOD[0], *FLAWED, GOOD[1]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the cat"}) + "\n")
    here = {"model": f"one={tiny_model_folder}", "reference": f"base={tiny_model_folder}", "out": tmp_path / "run"}
    data = {"prompts": tmp_path / "prompts.jsonl", "pairs": tmp_path / "pairs.jsonl"}
    return {**here, **data, "max_tokens": 4, "dtype": "float32"}


def evaluated(arguments: dict[str, Any], **more: Any) -> int:
    return cli(["evaluate", *(f"--{key}={value}" for key, value in (arguments | more).items())])


def test_pairs_that_cannot_be_used_are_named_before_anything_is_drawn(
    arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too long for a model, empty, spelling an end mark: three rows, each by its line, and what to do about them."""
    assert evaluated(arguments) == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl: 3 of 5 rows are refused, 0 allowed;" in said and said.endswith("--allow_refused 3\n")
    for line, reason in ((2, "positions of"), (3, "rejected: is empty"), (4, "spells the special token '</s>'")):
        (told,) = [text for text in said.splitlines() if f"pairs.jsonl:{line}: " in text]
        assert reason in told
    assert not (tmp_path / "run" / "samples").exists()


def test_refused_pairs_may_be_done_without(arguments: dict[str, Any], tmp_path: Path) -> None:
    """With --allow_refused the sound pairs are measured, and the card counts both kinds."""
    assert evaluated(arguments, allow_refused=3) == 0
    card = read_card(tmp_path / "run" / "run.json")
    assert (card.data["pairs"]["pairs"], card.data["pairs"]["refused"]) == (2, 3)
    assert card.results["models"]["one"]["implicit_accuracy"]["n"] == 2
