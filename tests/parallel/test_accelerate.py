"""`accelerate launch` is a launcher like torchrun: what docs/scaling.md says to type, typed; nothing of it is imported.

Real processes of the real command line over gloo; the oracle is the same run in one process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from ranks import LIMIT, rows, train_rows

from preftune.cli import main as cli

DOCS = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")


def accelerate(options: list[str], home: Path) -> str:
    """What `accelerate launch OPTIONS` prints, without a default configuration of whoever runs the tests."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    ended = subprocess.run(
        command, env=os.environ | {"HF_HOME": str(home)}, capture_output=True, text=True, timeout=LIMIT
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_accelerate_launch_gives_the_trajectory_of_one_process(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """The options of the command in the docs start all processes, on a CPU too: loss to 1e-4 at every step."""
    (said,) = re.findall(r"^accelerate launch (.+) -m preftune dpo ", DOCS.read_text(), re.MULTILINE)
    assert "--num_processes 8" in said
    launch = said.replace("--num_processes 8", "--num_processes 2").split()
    settings = "--batch_size 12 --max_steps 3 --max_length 128 --lr 1e-4 --dtype float32 --device cpu"
    dpo = ["dpo", "--model", str(tiny_model_folder), "--data", str(pairs_file), *settings.split()]
    accelerate([*launch, "-m", "preftune", *dpo, "--out", str(tmp_path / "two")], tmp_path)
    card = json.loads((tmp_path / "two" / "run.json").read_text())
    assert card["status"] == "done" and "2 processes share the work; rank 0 writes" in card["notes"]
    assert cli([*dpo, "--out", str(tmp_path / "one")]) == 0
    assert len(train_rows(tmp_path / "two")) == 3
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two.keys() == one.keys() and abs(two["loss"] - one["loss"]) < 1e-4
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


def test_with_cpu_accelerate_starts_one_process(tmp_path: Path) -> None:
    """The reason why the command says `--multi_gpu` and not `--cpu`, which ignores `--num_processes`."""
    assert accelerate(["--cpu", "--num_processes", "2", "-m", "platform"], tmp_path).count("\n") == 1
