"""Small checkpoints that tell their step, shared by the tests of saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune.engine.checkpoint import Checkpoint, Checkpoints


def tensors_of(step: int) -> dict[str, Tensor]:
    """Tensors that tell their step, of several dtypes and shapes."""
    generator = torch.Generator().manual_seed(step)
    return {
        "weights/a": torch.randn(7, 3, generator=generator).bfloat16(),
        "masters/a": torch.randn(7, 3, generator=generator),
        "step/a": torch.tensor(float(step)),
    }


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "name": "gr\u00fcn", "list": [1, 2.5, None], "tiny": 5e-324, "third": 1 / 3}


def save(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, tensors_of(step), state_of(step))
    return checkpoints


def assert_is(found: Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step and found.state == state_of(step)
    expected = tensors_of(step)
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
