"""Weights in parts: each rank keeps some rows of every weight, and a layer is whole only while it is computed (FSDP2).

    one unit per decoder layer     gathered before its forward, again before its backward, freed after each
    the rest, the root             embedding, last norm and head: gathered once, freed after the backward

The gradient of a micro-batch is summed over the ranks in float32 as soon as a layer has it, and each rank keeps its
rows of the sum; so masters and moments are rows too. Rank r of n has the rows [r c, (r + 1) c) of a weight, where c
is a n-th of them, rounded up: one contiguous range, for which `Rows` stands.

Where the model computes in bfloat16, a trained part is kept in float32 that holds bfloat16 values: FSDP2 gives a
gradient the dtype of what it keeps, and sums of gradients need float32. What is gathered is bfloat16. A frozen part,
below an adapter or of a reference, stays in bfloat16, and nothing is summed for it.

With `offload` the parts lie in the computer's memory, whatever computes: they are copied to the device before a layer
is gathered, their gradients back after its backward. The optimizer works where the parts are, and so steps there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preftune.engine.memory import out_of_memory
from preftune.engine.parallel import World
from preftune.errors import RunError

__all__ = ["Rows", "free", "gathered", "own_part", "shard", "weights_of", "whole"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `first` to `first + count` of the `of` rows of a weight: positions in its first dimension."""

    first: int
    count: int
    of: int


def shard(
    model: Any, layers: Sequence[nn.Module], world: World, device: torch.device, *, offload: bool = False
) -> None:
    """Leave this rank its part of every weight of `model`, on `device` or offloaded; the model computes as before.

    All ranks hold the same weights when they call this, and afterwards run the same number of forwards and backwards,
    or they wait for each other. `model.preftune_whole(work)` calls `work()` while the root is whole; `model(...)` does
    the same. Where no backward follows, the root stays gathered until `free`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    computed_in: torch.dtype = model.dtype
    policy = MixedPrecisionPolicy()
    if computed_in == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
    # Pinned memory is what a CUDA device copies from and to while it computes.
    kept = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(device.type, (world.size,))
    # torch's caches keep the mesh for good. Kept by the mesh, the group would outlive `leave`, and a thread of it that
    # holds a tensor when the interpreter goes takes the process down. The mesh finds its group by name.
    getattr(mesh, "_pg_registry", {}).clear()
    for unit in (*layers, model):
        for parameter in unit.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        sharded: Any = fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=kept)
        sharded.set_gradient_divide_factor(1.0)  # a sum: denominators belong to the step
        sharded.set_force_sum_reduction_for_comms(True)  # any other factor is no plain sum, which gloo does not know
    # What a model computes in, and on, is what everybody asks it for, not what it keeps, and where.
    model.__class__ = type(type(model).__name__, (type(model),), {"dtype": computed_in, "device": device})
    model.preftune_whole = _call
    register_fsdp_forward_method(model, "preftune_whole")


def weights_of(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every weight, once however many modules share it; of a sharded model the parts."""
    free(model)
    return iter(model.named_parameters())


def free(model: Any) -> None:
    """Let go of what a sharded model has gathered: what is written into its parts counts from now on."""
    if hasattr(model, "preftune_whole"):
        model.reshard()


@contextmanager
def whole(model: Any, world: World, what: str) -> Iterator[None]:
    """Inside, every weight of a sharded model is gathered and stays so: a forward needs no other rank.

    For `what`: work in which each rank has another number of forwards. All ranks enter together. A model that is not
    sharded is whole anyway. Raises RunError when there is no memory for a whole one.
    """
    if not hasattr(model, "preftune_whole"):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        with world.in_step(what), torch.no_grad():
            model.preftune_whole(lambda: None)  # before its units, or one of them would take itself for the root
            for unit in units:
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"out of memory while {what} were gathered: each process needs room for the whole model beside its parts; "
            "set --offload, which keeps the parts in the computer's memory, and go on with --resume, or, where that is "
            "set, take devices with more memory"
        ) from error
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def own_part(parameter: Any) -> tuple[Tensor, Rows | None]:
    """The numbers of a parameter that are on this rank, sharing its memory, and which rows of it; None: all."""
    if not hasattr(parameter, "device_mesh"):
        return parameter.detach(), None
    with torch.no_grad():
        part: Tensor = parameter.to_local().detach()
    mesh, of = parameter.device_mesh, parameter.shape[0]
    return part, Rows(min(mesh.get_local_rank() * -(-of // mesh.size()), of), len(part), of)


@torch.no_grad()
def gathered(model: Any, world: World, *, trained: bool = False) -> dict[str, Tensor]:
    """The whole state of a sharded model on the CPU, in the dtype it computes in, for rank 0; the others get nothing.

    One weight after the other is gathered, and those that share memory (a tied head) share it in the result; with
    `trained` only what is not frozen. Every rank calls this.
    """
    parts = {name: parameter for name, parameter in weights_of(model) if parameter.requires_grad or not trained}
    once = {id(parameter): name for name, parameter in parts.items()}
    shared = {name: once[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in once}
    state = {name: held for name, held in model.state_dict().items() if name in shared or not trained}
    found: dict[str, Tensor] = {}
    for name, held in state.items():
        if shared.get(name, name) != name:
            continue
        if name in parts:
            part: Any = parts[name]  # from the computer's memory first to the device, which gathers faster
            held = part.to(part.device_mesh.device_type, model.dtype).full_tensor()
        if world.rank == 0:
            found[name] = held.cpu()
    return {name: found[shared.get(name, name)] for name in state} if world.rank == 0 else {}


def _call(work: Callable[[], Any]) -> Any:
    return work()
