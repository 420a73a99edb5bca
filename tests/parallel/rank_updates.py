"""What every rank of the update tests runs: the same gradients on a model in parts and on a whole one, bit for bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune.engine.optim import OPTIMIZERS, Optimizer
from preftune.engine.parallel import leave, world
from preftune.engine.sharding import own_part, shard, weights_of

SHAPES = ((7, 5), (1, 6), (3,), (130, 33))
"""Of rows that no number of ranks divides, and of fewer rows than ranks."""
STEPS = 3


class Weight(nn.Module):
    """Its gradient is `pull`, whatever it is fed."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(shape, seed))
        self.pull = torch.zeros(shape)

    def forward(self, fed: Tensor) -> Tensor:
        return fed + (self.weight.float() * self.pull).sum()


class Model(nn.Module):
    """A unit per weight, and a root that has one of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Weight(shape, seed) for seed, shape in enumerate(SHAPES))
        self.root = Weight((9, 4), len(SHAPES))
        self.dtype = dtype
        self.to(dtype)

    def forward(self) -> Tensor:
        fed = torch.zeros(())
        for layer in (*self.layers, self.root):
            fed = layer(fed)
        return fed

    def pulled(self, step: int, rank: int, size: int) -> None:
        """A gradient of which every rank has other elements, in bfloat16 numbers: its sum is exact."""
        for number, unit in enumerate((*self.layers, self.root)):
            whole: Any = normal(tuple(unit.pull.shape), 100 * step + number).bfloat16().float()
            mine = torch.arange(whole.numel()).view_as(whole) % size == rank
            unit.pull = whole * mine
        self().backward()


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(name: str, dtype: torch.dtype, *, offload: bool) -> Iterator[str]:
    """What of a sharded model's weights, masters and moments is not the whole model's after some steps."""
    here = world()
    whole = Model(dtype)
    parts = deepcopy(whole)
    shard(parts, list(parts.layers), here, torch.device("cpu"), offload=offload)
    common: dict[str, Any] = {"name": name, "weight_decay": 0.1, "seed": 3}
    alone, together = Optimizer(whole, **common), Optimizer(parts, **common, world=here)
    for step in range(1, STEPS + 1):
        whole.pulled(step, 0, 1)
        parts.pulled(step, here.rank, here.size)
        alone.step(step, 0.01)
        together.step(step, 0.01)
    rows, expected = together.rows(), alone.tensors()
    found = together.tensors()
    assert found.keys() == expected.keys() and rows
    for key, tensor in found.items():
        own = expected[key]
        if key in rows:
            own = own[rows[key].first : rows[key].first + rows[key].count]
        # torch's fused AdamW rounds the last elements of a tensor, which fill no vector, otherwise in the last place.
        last_place = 2**-22 if name == "adamw" and tensor.dtype == torch.float32 else 0.0
        if not torch.allclose(tensor, own, rtol=last_place, atol=0.0):
            yield key
    for (key, mine), (_, theirs) in zip(weights_of(parts), weights_of(whole), strict=True):
        part, which = own_part(mine)
        assert which is not None
        if dtype == torch.bfloat16 and not torch.equal(part, theirs[which.first : which.first + which.count].float()):
            yield key


def main(out: Path) -> None:
    """Every update rule, dtype and place; OUT/RANK.json has what differs."""
    differs = {}
    for name, dtype, offload in product(OPTIMIZERS, (torch.bfloat16, torch.float32), (False, True)):
        if name == "adamw8bit" or (name == "adamw_lean" and dtype == torch.float32):  # refused
            continue
        where = "offloaded" if offload else "here"
        differs[f"{name} {str(dtype).removeprefix('torch.')} {where}"] = sorted(trained(name, dtype, offload=offload))
    (out / f"{world().rank}.json").write_text(json.dumps(differs))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
