"""What a process on a CPU keeps changes no number: freed memory saves pages, and few kernels save memory."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preftune.engine.memory import keep_freed_memory, keep_kernels

STEPS = """
import hashlib, json, resource, sys
import torch
from preftune.engine.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.SiLU(), torch.nn.Linear(2048, 512))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(12):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loss = model(torch.randn(512, 512)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
bits = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"weights": hashlib.sha256(bits).hexdigest(), "loss": loss.item(), "pages": pages}))
"""


def steps(how: str) -> dict[str, Any]:
    """Of twelve steps in a process of their own: last loss, hash of the weights, pages taken after the fourth."""
    found = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep freed memory")
def test_the_bits_are_those_of_the_plain_path_and_pages_are_taken_once() -> None:
    """Weights and loss after twelve steps, to the bit; the buffers of later steps are those of earlier ones.

    Pages that the kernel takes back from an idle process are faults too, so the quieter one of two runs counts.
    """
    plain = steps("plain")
    kept = min((steps("kept") for _ in range(2)), key=lambda run: run["pages"])
    assert (kept["weights"], kept["loss"]) == (plain["weights"], plain["loss"])
    assert kept["pages"] < plain["pages"] / 4


@pytest.mark.parametrize(("allowed", "set_to"), [(1 << 31, [1 << 30]), (1 << 25, [1 << 25]), (0, [])])
def test_a_libc_that_refuses_a_limit_is_asked_for_a_smaller_one(
    allowed: int, set_to: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it refuses all, its own rule stays: setting the threshold of trimming alone would switch it off."""
    taken: dict[int, list[int]] = {-3: [], -1: []}

    def mallopt(parameter: int, value: int) -> int:
        if parameter == -3 and value > allowed:
            return 0
        taken[parameter].append(value)
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert taken == {-3: set_to, -1: [2**31 - 1] * len(set_to)}


SHAPES = """
import ctypes, hashlib, sys
import torch
from preftune.engine.memory import settle_on_cpu
if sys.argv[1] == "settled":
    settle_on_cpu(1024)
torch.set_num_threads(1)

class Heap(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
torch.manual_seed(0)
left, right = torch.randn(512, 256).bfloat16(), torch.randn(256, 256).bfloat16()
torch.mm(left, right)
before, numbers = mallinfo().field7, hashlib.sha256()
for rows in range(8, 408):
    numbers.update(torch.mm(left[:rows], right).view(torch.int16).numpy().tobytes())
print(numbers.hexdigest(), mallinfo().field7 - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc 2.33 and later count the heap")
def test_kernels_of_past_shapes_are_let_go() -> None:
    """bf16 products of 400 shapes: torch alone keeps their kernels, 0.5 MB each; a settled process keeps a few."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no oneDNN kernels for bfloat16")
    command = [sys.executable, "-c", SHAPES]
    untold = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    (plain, held), (settled, kept) = (
        subprocess.run([*command, how], env=untold, capture_output=True, text=True, check=True).stdout.split()
        for how in ("plain", "settled")
    )
    assert settled == plain
    assert int(kept) < int(held) / 3


def test_what_the_environment_says_of_kernels_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capacity that somebody chose stays; the other one is set by the tokens computed at once."""
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "77")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    keep_kernels(6400)
    assert os.environ["LRU_CACHE_CAPACITY"] == "77"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "264"
