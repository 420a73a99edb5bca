"""Sampling that is killed at any instant and run again leaves the file of a run that was never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from preftune.records import from_json

DRIVER = Path(__file__).with_name("sample_driver.py")


@pytest.mark.slow
def test_samples_of_a_run_killed_two_dozen_times_are_the_same_bytes(tiny_model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at random instants, between write and sync and inside a line; no prompt twice, none lost, equal bytes.

    Three commands into one file: n = 2, then n = 3, which adds number 2, then another seed.
    """
    prompts = tmp_path / "prompts.jsonl"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "park"]
    asked = [" ".join(words[i % 11 : i % 11 + 1 + i % 5]) + f" {i}" for i in range(40)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    driver = [sys.executable, str(DRIVER), str(tiny_model_folder), str(prompts), str(tmp_path), "0"]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    deaths = [death for death in json.loads(done.stdout.splitlines()[-1]) if death["exit"] == -signal.SIGKILL]
    assert len(deaths) >= 18, "most lives must end in a kill, or the claim was not tried"
    assert sum(death["torn"] for death in deaths) >= 3 and len({death["lines"] for death in deaths}) >= 6
    whole, killed = ((tmp_path / name).read_bytes() for name in ("whole.jsonl", "killed.jsonl"))
    assert killed == whole
    records = [from_json(line) for line in killed.decode().splitlines()]
    assert len({record.key for record in records}) == len(records)
    numbers = Counter({text: 0 for text in asked})
    for record in records:
        numbers[record.prompt] += len(record.responses)
    assert numbers == Counter({text: 3 + 3 for text in asked})
    sizes = [len(record.responses) for record in records]
    assert sizes == [2] * 40 + [1] * 40 + [3] * 40
