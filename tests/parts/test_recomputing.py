"""Claims about what is recomputed where nobody says: what is held is foreseen, and the first that fits is taken."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from preftune.config.rl import PpoConfig
from preftune.data.packing import pack
from preftune.engine.memory import free_memory, keep_freed_memory
from preftune.errors import ConfigError
from preftune.models.attention import install
from preftune.models.checkpointing import Recomputed, recompute_activations
from preftune.models.cost import Shape, Work, memory
from preftune.models.logprobs import hidden_states
from preftune.parts import recomputing
from preftune.parts.recomputing import LEAST, choose
from preftune.recipes import dpo
from preftune.records import RunCard
from preftune.tensors import TokenGroup

CONFIG = LlamaConfig(
    vocab_size=300, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024,
)  # fmt: skip


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "o", "s", "h", "mapped", "u", "f", "used", "free", "k")]


def in_use() -> int:
    """Bytes that the process has taken from glibc and not given back."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        pytest.skip("needs glibc >= 2.33, which tells what is in use")
    ask.restype = _Heap
    gc.collect()
    heap = ask()
    return int(heap.used + heap.mapped)


def test_what_autograd_holds_is_foreseen_for_each_of_them() -> None:
    """By the allocator, after a forward of 1200 tokens: to a fifth, the last norm and the layer in hand aside."""
    torch.manual_seed(0)
    keep_freed_memory()
    shape, tokens = Shape.of(CONFIG, torch.float32), 1200
    draw = np.random.default_rng(0)
    batch = pack([TokenGroup(draw.integers(3, 300, 300, dtype=np.int32), (np.array([5], np.int32),))] * (tokens // 300))
    held = {}
    whats: tuple[Recomputed, ...] = ("none", "selective", "full")
    for what in whats:
        model = AutoModelForCausalLM.from_config(CONFIG)
        assert install(model) is None
        recompute_activations(model, what)
        hidden_states(model, batch, batch.predict_at).sum().backward()  # what is made once
        before = in_use()
        states = hidden_states(model, batch, batch.predict_at)
        held[what] = (in_use() - before) / tokens
        del states
        in_hand = 0 if what == "none" else shape.kept / shape.layers
        expected = shape.kept_with(what) - in_hand + 3 * shape.hidden * shape.size
        assert held[what] == pytest.approx(expected, rel=0.2), what
    assert held["none"] > 1.5 * held["selective"] > 3 * held["full"]


def line(what: Recomputed, tokens: int) -> float:
    """1000, 500 or 100 bytes a token."""
    return {"none": 1000, "selective": 500, "full": 100}[what] * tokens


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (12_000_000, ("none", 8192)),
        (8_000_000, ("none", 4096)),
        (3_000_000, ("none", 2048)),
        (2_500_000, ("selective", 2048)),
        (1_300_000, ("full", 8192)),
        (300_000, ("full", 2048)),
        (1000, ("full", 2048)),
    ],
)
def test_first_that_fits_is_taken(free: float, expected: tuple[str, int]) -> None:
    """Of 70 % of what is free; fewer tokens before more recomputation, and never fewer than fill a device."""
    assert choose(free, 8192, 512, line) == expected


def test_no_micro_batch_is_shorter_than_the_longest_row() -> None:
    assert choose(8_000_000, 8192, 5000, line) == ("selective", 8192)
    assert choose(1.0, 1000, 900, line) == ("full", 1000), "what was asked for, where that is less"
    assert LEAST == 2048


def run(folder: Path, pairs: Path, out: Path, **keys: Any) -> RunCard:
    return dpo.main(
        dpo.DpoConfig(
            model=str(folder), data=str(pairs), out=str(out), dtype="float32", batch_size=4, max_length=128,
            max_steps=2, **keys,
        )
    )  # fmt: skip


def test_auto_says_what_it_took_and_changes_no_number(
    tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plenty of memory recomputes nothing, none recomputes everything: the same losses to the bit."""
    told, foreseen = {}, []

    def choosing(*args: Any) -> Any:
        foreseen.append(args[3]("none", 8192))
        return choose(*args)

    monkeypatch.setattr(recomputing, "choose", choosing)
    for name, free in (("plenty", 10**12), ("tight", 1000), ("unknown", None)):
        monkeypatch.setattr(recomputing, "free_memory", lambda device, free=free: free)
        card = run(tiny_model_folder, pairs_file, tmp_path / name, activation_checkpointing="auto")
        (told[name],) = [note for note in card.notes if note.startswith("activation_checkpointing auto: ")]
    rows_of_128 = Work(8192, 8192, 8192 * 128 / 2)
    parts = memory(Shape.of(tiny_model_folder, torch.float32), rows_of_128, device="cpu")
    assert foreseen[0] == parts.total - parts.weights > parts.activations > 0, "the weights are there already"
    assert told["plenty"].startswith("activation_checkpointing auto: none, at most 8192 tokens at once: about ")
    assert told["plenty"].endswith(", 1e+03 GB are free")
    assert told["tight"].startswith("activation_checkpointing auto: full, at most 2048 tokens at once: about ")
    assert "none, because the memory of this model or device cannot be foreseen" in told["unknown"]
    lines = [
        [
            line.split('"loss":')[1].split(",")[0]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in told
    ]
    assert len(lines[0]) == 2 and lines[0] == lines[1] == lines[2]


def test_ppo_asks_to_be_told() -> None:
    with pytest.raises(ConfigError, match="ppo holds several models, whose memory is not foreseen; choose none"):
        PpoConfig(model="m", reward="rule:length", prompts="p", out="o", activation_checkpointing="auto")


def test_free_memory_is_linux_estimate_or_the_containers_limit(tmp_path: Path) -> None:
    """In bytes; None for a device or a system that does not say."""
    cpu = torch.device("cpu")
    assert free_memory(cpu, tmp_path) is None and free_memory(torch.device("mps")) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemFree: 3 kB\nMemAvailable:     5 kB\n")
    assert free_memory(cpu, tmp_path) == 5120
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for limit, free in (("max", 5120), ("4096", 3096), ("100000", 5120)):
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text("1000")
        assert free_memory(cpu, tmp_path) == free
