"""Processes that write a reference cache and are killed at it: `cache_writer.py FOLDER`, and what they write.

A reference nobody needs a model for: the log-probs are a simple function of the tokens, so every test knows them.
"""

import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preftune.engine import reference_cache
from preftune.engine.reference_cache import ReferenceCache
from preftune.tensors import TokenGroup

IDENTITY = {"weights": "w" * 64, "tokenizer": "t" * 64, "dtype": "torch.float32"}


def group(prompt: list[int], *responses: list[int]) -> TokenGroup:
    ids = [np.array(r, dtype=np.int32) for r in responses]
    pairs = ((0, 1),) if len(ids) > 1 else ()
    return TokenGroup(np.array(prompt, dtype=np.int32), tuple(ids), pairs, origin=f"a.jsonl:{prompt[0]}")


def make_groups(count: int) -> list[TokenGroup]:
    """`count` pairs of different prompts, 2 to 20 tokens a response; fewer are a beginning of more."""
    groups = []
    for number in range(count):
        draw = np.random.default_rng(number)
        groups.append(group([number, 7, 7], *(draw.integers(0, 50, n).tolist() for n in draw.integers(2, 21, size=2))))
    return groups


def logps(groups: list[TokenGroup]) -> Tensor:
    """[C] what the reference says: depends on the whole prompt, on the tokens so far and on the token."""
    parts = []
    for g in groups:
        for response in g.responses:
            parts.append(
                -np.cumsum(np.sqrt(response + 1.0)) / 7 - np.sum(g.prompt * np.arange(1, len(g.prompt) + 1)) / 3
            )
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def fill(root: Path, count: int, backwards: bool = False) -> None:
    """Compute and store what is missing, two groups at a time, each time down to the disk."""
    reference_cache.FLUSH_SECONDS = 0.0
    cache = ReferenceCache(IDENTITY, root)
    todo = cache.missing(make_groups(count)[:: -1 if backwards else 1])
    for start in range(0, len(todo), 2):
        cache.append(todo[start : start + 2], logps(todo[start : start + 2]))
    cache.flush()


def in_child(work: Callable[[], None]) -> int:
    """Start `work` in a process of its own: its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def dies_at_sync(root: Path, count: int, nth: int, synced: bool) -> None:
    """Be killed at the n-th fsync: just after it when `synced`, else before it, the last 7 bytes lost."""
    calls, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if synced:
            real(descriptor)
        if calls == nth:
            status = os.fstat(descriptor)
            if not synced and stat.S_ISREG(status.st_mode):
                os.truncate(descriptor, max(status.st_size - 7, 0))
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync
    fill(root, count)


def killed_midway(root: Path, count: int, index_bytes: float) -> None:
    """Be killed from outside, at some instant after the index has grown to so many bytes."""
    pid = in_child(lambda: fill(root, count))
    while sum(path.stat().st_size for path in root.glob("reference/*/index")) < index_bytes:
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main(folder: Path) -> None:
    count = 40
    assert os.waitpid(in_child(lambda: fill(folder / "whole", count)), 0)[1] == 0
    whole = next(folder.glob("whole/reference/*/index")).stat().st_size
    for i in range(12):
        killed_midway(folder / f"time-{i:02}", count, whole * (i + 0.5) / 12)
    for nth in (1, 2, 3, 4, 9, 10, 21, 22):
        for synced in (False, True):
            root = folder / f"sync-{nth}-{synced}"
            os.waitpid(in_child(lambda r=root, n=nth, s=synced: dies_at_sync(r, count, n, s)), 0)
    both = [in_child(lambda b=b: fill(folder / "shared", count, backwards=b)) for b in (False, True)]
    for pid in both:
        assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
