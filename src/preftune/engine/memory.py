"""Keep freed memory in the process: fresh pages cost a CPU step more than arithmetic; tell when there is no more."""

from __future__ import annotations

import contextlib
import ctypes

import torch

__all__ = ["keep_freed_memory", "out_of_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LIMIT = 1 << 30
# As torch's CPU and MPS allocators and cuBLAS word it; CUDA's own allocator has an exception class.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def keep_freed_memory() -> None:
    """Ask glibc not to hand buffers below 1 GiB back to the kernel after every use; elsewhere it does nothing.

    A training step frees and takes the same large buffers again and again. By default each of them is a fresh mapping
    whose pages the kernel zeroes on first touch. Measured: `benchmarks/LOG.md`. It changes no number.
    """
    with contextlib.suppress(AttributeError, OSError):  # no glibc: macOS, musl
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LIMIT)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def out_of_memory(error: BaseException) -> bool:
    """Did an allocator give up, on any device? Smaller work may then succeed."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))
