"""Claims about `benchmarks/gpu_step.py`: it measures what the product does, and a run that ends early keeps rows."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from preftune.engine import memory
from preftune.models import backends
from preftune.parts import recomputing

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module, forgotten again with what it imports beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("gpu_step")
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def run(gpu: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    """The rows that the file holds afterwards."""
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", "--tiny", "--out", str(out), *options])
    gpu.main()
    facts = json.loads(out.read_text())
    assert facts["versions"]["torch"] == torch.__version__ and facts["hardware"].startswith("CPU")
    return list(facts["results"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_every_row_has_its_numbers_and_says_how(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates are pairs over seconds of what was measured, the first step aside; each contender tells what it did."""
    rows = run(gpu, tmp_path / "f.json", monkeypatch, "--peer", "padded", "--profiles", "hh", "long", "--steps", "2")
    assert [row["contender"] for row in rows] == ["preftune", "padded-tuned", "padded-default"] * 2
    for row in rows:
        measured = row["seconds"][1:]
        assert len(measured) == 2 and row["pairs_per_second"] == pytest.approx(4 / sum(measured), rel=0.02)
    ours, tuned, default = (row["how"] for row in rows[:3])
    assert ours["attention"] == "sdpa: fused kernels need CUDA, not cpu"
    assert (ours["checkpointing"], ours["tokens_at_once"], ours["reference"]) == ("none", 8192, "cached")
    assert ours["head"].startswith("100% of ") and ours["packing_rms_nats"] < 0.1
    assert ours["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert (tuned["checkpointing"], tuned["reference"]) == ("none", "cached")
    assert (default["checkpointing"], default["reference"]) == ("full", "in the loop")
    pairs = gpu.drawn(*gpu.PROFILES["hh"][:2], 6, 512, 16)[2:]
    flops = gpu.limit_flops([tuple(map(len, pair)) for pair in pairs], gpu.SHAPES["tiny"])
    assert rows[0]["limit_tflops"] * 1e12 == pytest.approx(flops / sum(rows[0]["seconds"][1:]), rel=0.02)


def test_attention_and_recomputation_are_the_products_own_choice(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that `choose_backend` names computes the step, and little memory makes the planner recompute."""
    used: list[str] = []
    dense = backends.BACKENDS["dense"]
    monkeypatch.setitem(backends.BACKENDS, "dense", lambda *args: used.append("dense") or dense(*args))
    monkeypatch.setattr(backends, "choose_backend", lambda model: ("dense", "told to"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    chosen: list[Any] = []
    choose = recomputing.choose
    monkeypatch.setattr(recomputing, "choose", lambda *args: (chosen.append(choose(*args)) or chosen[-1][0], 16))
    monkeypatch.setattr(gpu, "trl", gpu.preftune)
    rows = run(gpu, tmp_path / "f.json", monkeypatch, "--profiles", "hh", "--steps", "1")
    how = rows[0]["how"]
    assert how["attention"] == "dense: told to" and used
    assert chosen[0] == ("full", 2048) and how["checkpointing"] == "full"
    assert how["tokens_at_once"] == 16 and len(how["micro_batches"]) == 2, "no more at once than was chosen"


def test_a_run_that_is_ended_keeps_its_rows(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured stands in the file, what was not reached says so; and no contender starts after its time."""

    def ended(job: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "padded", ended)
    options = ("--peer", "padded", "--profiles", "hh", "--steps", "1")
    with pytest.raises(KeyboardInterrupt):
        run(gpu, tmp_path / "f.json", monkeypatch, *options)
    rows = json.loads((tmp_path / "f.json").read_text())["results"]
    assert rows[0]["pairs_per_second"] > 0
    assert [row.get("not_run") for row in rows] == [None, "not reached", "not reached"]
    late = run(gpu, tmp_path / "late.json", monkeypatch, *options, "--minutes", "-1")
    assert {row["not_run"] for row in late} == {"-1 minutes were over"}


def job(gpu: ModuleType, seconds: float) -> Any:
    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")
    return gpu.Job(model, [[]] * 5, argparse.Namespace(seconds=seconds), 8, True, "")


def test_a_peer_takes_as_many_pairs_at_once_as_fit(gpu: ModuleType) -> None:
    """8, 4, 2: half of what did not fit; where one pair does not fit, that is the answer."""
    asked: list[int] = []

    def work(per_pass: int, most: int = 2) -> list[float]:
        asked.append(per_pass)
        if per_pass > most:
            raise torch.OutOfMemoryError
        return [1.0]

    assert job(gpu, 1).fitted(work) == ([1.0], 2) and asked == [8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        job(gpu, 1).fitted(lambda per_pass: work(per_pass, most=0))


def test_a_contender_that_takes_long_is_measured_on_fewer_steps(gpu: ModuleType) -> None:
    """But on one, after the one that warms up."""
    assert len(job(gpu, 1e9).timed(lambda pairs: None)) == 5
    assert len(job(gpu, -1).timed(lambda pairs: None)) == 2


@pytest.mark.filterwarnings("ignore")
def test_trl_runs_beside_it(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it comes and tuned, on the same pairs."""
    pytest.importorskip("trl")
    rows = run(gpu, tmp_path / "f.json", monkeypatch, "--profiles", "hh", "--steps", "1")
    assert [row["contender"] for row in rows] == ["preftune", "trl-tuned", "trl-default"]
    assert all(len(row["seconds"]) == 2 for row in rows)
    assert [row["how"]["checkpointing"] for row in rows] == ["none", "none", "full"]
