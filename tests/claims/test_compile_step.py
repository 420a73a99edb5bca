"""Claims about `benchmarks/compile_step.py`, with compilers that compile nothing: its paths, and what it refuses."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Function = Callable[..., Any]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark as a module, forgotten again with what it imports beside it; nothing is compiled."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    module = importlib.import_module("compile_step")
    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)
    yield module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def run(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, compiler: Function, *options: str) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    command = ["compile_step.py", "--shape", "tiny", "--rounds", "2", "--dtype", "float32", *options]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()


@pytest.mark.skipif(
    not hasattr(LlamaDecoderLayer.forward, "__wrapped__"), reason="compiles the decoder layer of transformers 5.23"
)
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context")  # torch 2.15, of what checkpoints save: not counted
@pytest.mark.parametrize("recomputed", ["none", "selective"])
def test_every_way_takes_its_own_path_and_the_plain_numbers(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recomputed: str
) -> None:
    """Each way calls what it compiled and nothing of the other, the plain step neither; values and gradients agree."""
    called: list[str] = []

    def compiler(function: Function, dynamic: bool) -> Function:
        def compiled(*args: Any, **keywords: Any) -> Any:
            called.append(function.__name__)
            return function(*args, **keywords)

        return compiled

    seen: list[set[str]] = []
    cost = benchmark.cost

    def spied(step: Function, device: torch.device) -> float:
        called.clear()
        seconds: float = cost(step, device)
        seen.append(set(called))
        return seconds

    monkeypatch.setattr(benchmark, "cost", spied)
    run(benchmark, monkeypatch, compiler, "--activation_checkpointing", recomputed)
    ways = json.loads(capsys.readouterr().out)["ways"]
    of = [set(), {"forward"}, {"forward", "<lambda>", "apply_rotary_pos_emb"}]
    assert seen == [*of, *of[::-1], *of]  # first steps, a round, and one the other way round
    assert all(max(ways[how]["off"]) < 1e-6 for how in ("layer", "pieces"))
    assert ways["plain"]["held_mb"] > 0 and ways["layer"]["ratio"] > 0


def test_wrong_numbers_end_the_benchmark(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that changes a norm by a ten-thousandth is found out."""

    def compiler(function: Function, dynamic: bool) -> Function:
        if function.__name__ != "forward":
            return function
        return lambda *args, **keywords: function(*args, **keywords) * 1.0001

    with pytest.raises(SystemExit, match="compiled numbers are not the plain ones"):
        run(benchmark, monkeypatch, compiler, "--how", "pieces")


def test_a_ratio_compares_steps_of_one_round(benchmark: ModuleType) -> None:
    """A slow spell that doubles a whole round leaves the ratio as it is; compiling is paid back by what steps save."""
    found = benchmark.told({"first": 21.0}, [0.9, 1.8], [1.0, 2.0], 1.0)
    assert found["ratio"] == pytest.approx(0.9) and found["error"] == pytest.approx(0)
    assert found["compiling"] == 20 and found["pays_after_steps"] == pytest.approx(20 / (0.1 * 1.5))
    assert benchmark.told({"first": 21.0}, [1.1, 2.2], [1.0, 2.0], 1.0)["pays_after_steps"] is None
