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
def stochastic_round_(out: Tensor, source: Tensor, *, seed: int, step: int, name: str, first: int = 0) -> None:
    """Write into `out` one of the two bf16 neighbours of every value x of `source`, so that the mean is x.

    `source` float32, `out` bfloat16, or float32 to hold the same values: same shape, same device, contiguous. With
    lo <= x <= hi the neighbours, hi is drawn with probability (x - lo) / (hi - lo): a value on the bf16 grid stays as
    it is, an infinity and a NaN too. The random bits of element i depend on (seed, step, name, first + i) and on
    nothing else, so a resumed run repeats them, and so do the parts of a tensor that several processes share: `first`
    is where a part begins. The CPU's bits differ from an accelerator's. No global random state is read or advanced.
    """
    assert out.dtype in (torch.bfloat16, torch.float32) and source.dtype == torch.float32, (out.dtype, source.dtype)
    assert out.shape == source.shape and out.is_contiguous() and source.is_contiguous(), (out.shape, source.shape)
    on_cpu = source.device.type == "cpu"
    chunk = CPU_CHUNK if on_cpu else DEVICE_CHUNK
    fill = _pcg_bits(seed, step, name, first) if on_cpu else _hashed_bits(_hash(f"{seed}/{step}/{name}"), first)
    workspace = torch.empty(min(chunk, source.numel()), dtype=torch.int32, device=source.device)
    for rounded, values in zip(out.view(-1).split(chunk), source.view(-1).split(chunk), strict=True):
        bits = workspace[: len(values)]
        fill(bits)
        # A float32 is a bf16 followed by 16 bits of fraction: adding 16 uniform bits carries into the bf16 with
        # exactly that fraction as probability. Integer order is magnitude order, so the sign needs no care.
        bits.add_(values.view(torch.int32))
        if out.dtype == torch.bfloat16:
            rounded.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
        else:
            rounded.view(torch.int32).copy_(bits.bitwise_and_(-1 << 16))
        if not values.sum().isfinite():  # rare, and much cheaper to ask than to mask every chunk
            rounded.masked_fill_(values.isnan(), torch.nan)  # the payload of a NaN may have carried into the sign


def _pcg_bits(seed: int, step: int, name: str, first: int) -> FillBits:
    """By position on the CPU: PCG64 jumps to any of its 64-bit words, and a word holds the bits of four weights."""
    generator = np.random.PCG64(np.random.SeedSequence((seed % 2**64, step, _hash(name))))
    position, drawn = first, 0

    def fill(bits: Tensor) -> None:
        nonlocal position, drawn
        word, skip = divmod(position, 4)
        generator.advance((word - drawn) % 2**128)  # the period: one word back where two chunks share it
        raw = generator.random_raw(-(-(skip + len(bits)) // 4))
        drawn = word + len(raw)
        bits.copy_(torch.from_numpy(raw.view(np.uint16)[skip : skip + len(bits)]))
        position += len(bits)

    return fill


def _hashed_bits(key: int, first: int) -> FillBits:
    """Counter-based on an accelerator, in torch's own integer arithmetic: SplitMix64 (doi 10.1145/2714064.2660195).

    Output k of the generator that starts at `key` is a hash of key + (k + 1) gamma, and holds four weights' bits.
    (torch's generators give an element other bits when the tensor around it has another size.)
    """
    position = first

    def fill(bits: Tensor) -> None:
        nonlocal position
        word, skip = divmod(position, 4)
        k = torch.arange(word + 1, word + 1 - (-(skip + len(bits)) // 4), device=bits.device)
        z = k.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z ^= (z >> shift) & ((1 << (64 - shift)) - 1)  # torch's shift copies the sign
            z *= _signed(factor)
        bits.copy_(z.view(torch.int16)[skip : skip + len(bits)]).bitwise_and_(0xFFFF)
        position += len(bits)

    return fill


def _signed(word: int) -> int:
    """The 64 bits as torch writes them: products and sums are the same."""
    return word - (1 << 64) if word >> 63 else word


def _hash(text: str) -> int:
    """64 bits that depend on the whole text (Python's own hash differs from process to process)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
