"""A run killed at any instant and resumed is the run that was never killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")


@pytest.mark.slow
def test_a_run_killed_two_dozen_times_ends_with_the_same_bits(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """SIGKILL at 20 random instants and 4 times inside the save; the final weights' SHA-256 equal the whole run's."""
    driver = [sys.executable, str(DRIVER), str(tiny_model_folder), str(pairs_file), str(tmp_path), "0"]
    done = subprocess.run(driver, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    killed = [kill for kill in result["kills"] if kill["exit"] == -signal.SIGKILL]
    steps = [kill["step"] for kill in result["kills"]]
    assert len(killed) >= 20, f"most lives must end in a kill, or the claim was not tried: {result['kills']}"
    assert sum(kill["inside_save"] for kill in killed) >= 3
    assert len(set(steps)) >= 5, f"the kills must fall on different steps: {steps}"
    assert result["killed"] == result["whole"]


def command(model: Path, pairs: Path, out: Path) -> list[str]:
    settings = {
        "model": model, "data": pairs, "out": out, "epochs": 10, "batch_size": 8, "lr": 1e-3, "max_length": 128,
        "dtype": "float32",
    }  # fmt: skip
    return [sys.executable, "-m", "preftune", "dpo", *(f"--{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(tiny_model_folder, pairs_file, out), check=True, capture_output=True)
    return out


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_the_run_resumes_to_the_same_bits(
    sent: signal.Signals, code: int, whole: Path, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM save a checkpoint and exit 130 and 143; `--resume` ends with the whole run's weights."""
    out = tmp_path / "stopped"
    asked = command(tiny_model_folder, pairs_file, out)
    running = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert running.poll() is None, "the run ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(sent)
    assert running.wait(60) == code
    stopped_at = len(metrics.read_text().splitlines())
    assert stopped_at < len((whole / "metrics.jsonl").read_text().splitlines()), "the signal came too late to be tried"
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == [f"step-{stopped_at}"]
    assert not (out / "model").exists(), "a stopped run has no result yet"

    subprocess.run([*asked, "--resume"], check=True, capture_output=True)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, whole)]
    assert weights[0] == weights[1]
    assert steps_and_losses(out) == steps_and_losses(whole), "no step is missing, doubled or different in the metrics"


def steps_and_losses(run: Path) -> list[tuple[int, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["metrics"]["loss"]) for row in rows]
