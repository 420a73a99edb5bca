"""What a process on a CPU keeps: freed pages, dearer anew than arithmetic, and few kernels; what memory is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch

__all__ = ["free_memory", "keep_freed_memory", "keep_kernels", "out_of_memory", "settle_on_cpu"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LIMITS = 1 << 30, 1 << 25  # the second is the largest that mallopt(3) promises to take
# As torch's CPU and MPS allocators and cuBLAS word it; CUDA's own allocator has an exception class.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def settle_on_cpu(tokens: int = 8192) -> None:
    """Before the first product of a process that computes up to so many tokens at once on a CPU; changes no number."""
    keep_freed_memory()
    keep_kernels(tokens)


def keep_freed_memory() -> None:
    """Ask glibc not to hand buffers below 1 GiB, or what it allows, back to the kernel after every use; no other libc.

    A training step frees and takes the same large buffers again and again. By default each of them is a fresh mapping
    whose pages the kernel zeroes on first touch. Measured: `benchmarks/LOG.md`. It changes no number.
    """
    with contextlib.suppress(AttributeError, OSError):  # no glibc: macOS, musl
        mallopt = ctypes.CDLL(None).mallopt
        if any(mallopt(_MMAP_THRESHOLD, limit) for limit in _LIMITS):
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def keep_kernels(tokens: int) -> None:
    """Let oneDNN keep the kernels of about one micro-batch of so many tokens; what the environment says goes first.

    oneDNN makes code for every shape, 0.4 MB of it, and keeps that of the last 1024; packed rows have other shapes
    every step. Each layer wants what the layer before it had: packed conversations of 8192 tokens have 300 shapes.
    torch's layer above oneDNN (ideep) keeps 1024 too and asks oneDNN all the same, so there one is enough.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(64 + tokens // 32))
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


def out_of_memory(error: BaseException) -> bool:
    """Did an allocator give up, on any device? Smaller work may then succeed."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes this process may still take on the device; None where nobody says.

    CUDA: what the driver has, and what torch holds without use. CPU: Linux's estimate, or less by a container's limit.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type != "cpu":
        return None
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # no group of its own, or "max"
        group = root / "sys/fs/cgroup"
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free
