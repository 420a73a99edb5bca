"""float32 -> bfloat16 by stochastic rounding: E[rounded(x)] = x.

A bf16 weight of size 0.02 has neighbours 1.2e-4 away. An optimizer step at DPO's learning rates moves it by about
1e-6: rounding to nearest gives the old weight back, step after step, and the network stays frozen. Rounding up with
the probability of the distance instead, the small step arrives on average, and the many weights of a layer average.
Source of the technique: arXiv 2010.06192.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["stochastic_round_"]

CPU_CHUNK = 1 << 18  # weights at a time: the workspaces stay in the processor's cache
DEVICE_CHUNK = 1 << 24  # on an accelerator a launch must be worth its while

FillBits = Callable[[Tensor], None]


@torch.no_grad()
def stochastic_round_(out: Tensor, source: Tensor, *, seed: int, step: int, name: str) -> None:
    """Write into `out` one of the two bf16 neighbours of every value x of `source`, so that the mean is x.

    `out` bfloat16 and `source` float32: same shape, same device, contiguous. With lo <= x <= hi the neighbours, hi is
    drawn with probability (x - lo) / (hi - lo): a value on the bf16 grid stays as it is, an infinity and a NaN too.
    The random bits of element i depend on (seed, step, name, i) and on nothing else, so a resumed run repeats
    them; the CPU's bits differ from an accelerator's. No global random state is read or advanced.
    """
    assert out.dtype == torch.bfloat16 and source.dtype == torch.float32, (out.dtype, source.dtype)
    assert out.shape == source.shape and out.is_contiguous() and source.is_contiguous(), (out.shape, source.shape)
    on_cpu = source.device.type == "cpu"
    chunk = CPU_CHUNK if on_cpu else DEVICE_CHUNK
    fill = _philox_bits(seed, step, name) if on_cpu else _generator_bits(source.device, seed, step, name)
    workspace = torch.empty(min(chunk, source.numel()), dtype=torch.int32, device=source.device)
    for rounded, values in zip(out.view(-1).split(chunk), source.view(-1).split(chunk), strict=True):
        bits = workspace[: len(values)]
        fill(bits)
        # A float32 is a bf16 followed by 16 bits of fraction: adding 16 uniform bits carries into the bf16 with
        # exactly that fraction as probability. Integer order is magnitude order, so the sign needs no care.
        bits.add_(values.view(torch.int32)).bitwise_right_shift_(16)
        rounded.view(torch.int16).copy_(bits)
        if not values.sum().isfinite():  # rare, and much cheaper to ask than to mask every chunk
            rounded.masked_fill_(values.isnan(), torch.nan)  # the payload of a NaN may have carried into the sign


def _philox_bits(seed: int, step: int, name: str) -> FillBits:
    """Counter-based on the CPU: Philox 4x64 with key (seed, name) and counter (position, 0, step, 0)."""
    key = np.array([seed % 2**64, _hash(name)], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, 0, step, 0], dtype=np.uint64))

    def fill(bits: Tensor) -> None:
        raw = philox.random_raw(-(-len(bits) // 4)).view(np.uint16)  # four weights a draw
        bits.copy_(torch.from_numpy(raw[: len(bits)]))

    return fill


def _generator_bits(device: torch.device, seed: int, step: int, name: str) -> FillBits:
    """The same on an accelerator, from its own generator (counter-based there), seeded by (seed, step, name)."""
    generator = torch.Generator(device).manual_seed(_hash(f"{seed}/{step}/{name}") >> 1)

    def fill(bits: Tensor) -> None:
        bits.random_(0, 1 << 16, generator=generator)

    return fill


def _hash(text: str) -> int:
    """64 bits that depend on the whole text (Python's own hash differs from process to process)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
