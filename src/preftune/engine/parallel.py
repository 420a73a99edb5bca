"""Several processes that train as one: the same data and plan in all, a share of the work in each, sums of the results.

    torchrun --nproc-per-node 8 -m preftune dpo ...        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

Every process (rank) knows the whole step; `share` deals it out by cost, `add_up` sums the float32 gradients, `gather`
puts together what was measured. Each gives every rank the same bits, so models that start equal stay equal.
Without these variables there is one rank and every function is the identity: there is no second code path.

No rank waits for ever: one that fails, is lost or does not come is named, and all end (`engine/watch.py`).
"""

from __future__ import annotations

import atexit
import functools
import gc
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from preftune.engine.watch import DEAD_AFTER, Watch
from preftune.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALONE", "World", "failed", "launched", "leave", "named", "world"]

T = TypeVar("T")
V = TypeVar("V")

TIME_LIMIT = 1800.0
"""Seconds that a rank waits for the others at one place; PREFTUNE_TIMEOUT sets another."""
BUCKET = 1 << 24  # numbers summed in one message


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the processes of this machine: which accelerator is its own."""
    watch: Watch | None = None

    def share(self, items: Sequence[T], cost: Callable[[T], float]) -> list[T]:
        """What this rank does of `items`, in their order: the shares of all ranks are a partition, equal in cost.

        The costliest first, each to whoever has least: no share exceeds the mean by more than one item. A function of
        the costs alone, so no rank needs to ask another. With fewer items than ranks some share is empty.
        """
        if self.size == 1:
            return list(items)
        costs = [cost(item) for item in items]
        loads = [(0.0, rank) for rank in range(self.size)]
        mine = []
        for i in sorted(range(len(items)), key=lambda i: (-costs[i], i)):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + costs[i], rank))
            if rank == self.rank:
                mine.append(i)
        return [items[i] for i in sorted(mine)]

    def add_up(self, tensors: Sequence[Tensor], what: str) -> None:
        """Replace each tensor by its sum over the ranks, in its own dtype: same shapes everywhere, same bits after."""
        if self.size == 1 or not tensors:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            alone = bucket[0] if len(bucket) == 1 and bucket[0].is_contiguous() else None  # a large one needs no copy
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]) if alone is None else alone
            with self._together(what):
                dist.all_reduce(flat)
                _finish(flat)
            if alone is None:
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def gather(self, value: Any, what: str) -> list[Any]:
        """The values of all ranks by rank; JSON values, floats (NaN too) exact, tuples come back as lists."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._together(what):
            dist.all_gather(sizes, torch.tensor([len(text)]))
            padded = torch.frombuffer(bytearray(text.ljust(max(int(n) for n in sizes))), dtype=torch.uint8)
            found = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(found, padded)
        return [json.loads(each.numpy().tobytes()) for each in found]

    def in_turn(
        self,
        items: Iterable[T],
        work: Callable[[T], V],
        what: str,
        *,
        tell: Callable[[V], Any] | None = None,
        hear: Callable[[Any], V] | None = None,
    ) -> Iterator[V]:
        """`work` of every item, in their order: the ranks take the items in turn and tell each other after each round.

        `tell` makes JSON values of a result that is none, `hear` the result again; one rank does neither. Items are the
        same for any number of ranks, so a result has the same bits; they are taken when it is their turn. All ranks go
        through to the end, or none.
        """
        if self.size == 1:
            yield from map(work, items)
            return
        left = iter(items)
        while some := list(islice(left, self.size)):
            mine = [work(item) for item in some[self.rank : self.rank + 1]]
            for told in self.gather([tell(one) for one in mine] if tell else mine, what):
                yield from map(hear, told) if hear else told

    def of_first(self, value: Any, what: str) -> Any:
        """Rank 0's value on every rank, as JSON values; the others' own count for nothing."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        text = b"" if self.rank else json.dumps(value).encode()
        size = torch.tensor([len(text)])
        with self._together(what):
            dist.broadcast(size, 0)
            told = torch.frombuffer(bytearray(text or bytes(int(size))), dtype=torch.uint8)
            dist.broadcast(told, 0)
        return json.loads(told.numpy().tobytes())

    def largest(self, value: int, what: str) -> int:
        """The largest of the ranks' values."""
        return max(self.gather(value, what))

    def same(self, value: Any, what: str) -> None:
        """Raise RunError, naming the rank, where `value` differs between ranks."""
        for rank, other in enumerate(found := self.gather(value, what)):
            if other != found[0]:
                raise RunError(
                    f"{what}: rank {rank} has {other!r}, rank 0 has {found[0]!r}; every rank needs the same command, "
                    "the same files (--out and PREFTUNE_CACHE on a disk that all of them see) and the same hardware"
                )

    def device(self, name: str) -> str:
        """`auto` and `cuda` as this rank's own device. Raises ConfigError when there is none for it."""
        if self.size == 1 and name != "auto":
            return name
        import torch

        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if self.size == 1 or name == "cpu":
            return name
        if name != "cuda":
            raise ConfigError(f"device {name} cannot be that of {self.size} processes; say --device cuda or cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.local_rank} of this machine has no accelerator: {torch.cuda.device_count()} are "
                "there; start as many processes as accelerators, or say --device cpu"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def in_step(self, what: str) -> Iterator[None]:
        """Inside, the ranks compute what needs all of them at every moment; whoever leaves them is named.

        An error of this rank's own passes.
        """
        from torch.distributed import DistError

        assert self.watch is not None
        with self.watch.waiting(what):
            try:
                yield
            except RuntimeError as error:
                if not isinstance(error, DistError) and "gloo" not in str(error):
                    raise
                raise RunError(self.watch.who_is_gone(what, error)) from error

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Inside, every rank is expected; whoever does not come is named."""
        assert self.watch is not None
        with self.watch.waiting(what):
            try:
                yield
            except RuntimeError as error:  # a connection broke: somebody is gone
                raise RunError(self.watch.who_is_gone(what, error)) from error


ALONE = World()
"""One process."""


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, size, local rank) as a launcher set them, (0, 1, 0) without one. Raises ConfigError on half of them."""
    if int(environment.get("WORLD_SIZE") or 1) == 1:
        return 0, 1, 0
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but {', '.join(missing)} is not set; start with "
            "`torchrun -m preftune ...`, which sets them all, or unset WORLD_SIZE"
        )
    rank, size, local_rank = (int(environment[name]) for name in needed[:3])
    if not 0 <= rank < size:
        raise ConfigError(f"RANK {rank} is not one of {size} ranks, 0 to {size - 1}")
    return rank, size, local_rank


@functools.cache
def world() -> World:
    """This process's place, joined at the first call: gloo on the CPU, NCCL on CUDA. Raises ConfigError."""
    rank, size, local_rank = launched()
    if size == 1:
        return ALONE
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available() and local_rank < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(local_rank)
    limit = time_limit()
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timedelta(seconds=limit))))
    watch = Watch(store.clone(), rank, size, limit)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=PrefixStore("preftune/group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=limit + 2 * DEAD_AFTER),  # the watch, which knows names, comes first
    )
    watch.start()
    atexit.register(watch.stop)  # a thread inside the store when the interpreter goes would take it down
    return World(rank, size, local_rank, watch)


def time_limit() -> float:
    """TIME_LIMIT, or what PREFTUNE_TIMEOUT says. Raises ConfigError."""
    said = os.environ.get("PREFTUNE_TIMEOUT")
    try:
        limit = TIME_LIMIT if said is None else float(said)
    except ValueError:
        limit = 0.0
    if not 1 <= limit < 1e9:
        raise ConfigError(f"PREFTUNE_TIMEOUT is {said!r}; it is a number of seconds, at least 1")
    return limit


def failed(message: str) -> bool:
    """Tell the other ranks that this one fails; is it this rank's place to tell the user? Rank 0's, or the first's."""
    if launched()[1] == 1:
        return True
    watch = world().watch if world.cache_info().currsize else None
    if watch is None:  # before they met: all have the same command and so the same error
        return launched()[0] == 0
    return watch.report(message) or watch.rank == 0


def named() -> str:
    """`rank 3: ` before what another rank than 0 has to say."""
    rank = launched()[0]
    return f"rank {rank}: " if rank else ""


def leave() -> None:
    """Part in good order, every rank's work done."""
    if world.cache_info().currsize and (watch := world().watch):
        import torch.distributed as dist

        watch.stop()
        dist.destroy_process_group()
        world.cache_clear()
        gc.collect()  # what is left of a sharded model holds the group, whose threads end with it


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to BUCKET numbers together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        kin = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not kin or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def _finish(tensor: Tensor) -> None:
    """A collective on CUDA is only queued: wait for it, so that waiting is seen where it happens."""
    if tensor.is_cuda:
        import torch

        torch.cuda.current_stream().synchronize()
