"""What tests of a lack of memory share: the error torch raises, and a backward pass that runs into it."""

from __future__ import annotations

from typing import Any

import torch

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def short_backward(x: torch.Tensor, limit: int) -> torch.Tensor:
    """`x`, of [rows, tokens, ...], whose backward finds no memory above `limit` tokens."""
    found: torch.Tensor = _Short.apply(x, limit)  # type: ignore[no-untyped-call]
    return found


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: int) -> torch.Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        if grads[0].shape[1] > ctx.limit:
            raise NO_MEMORY
        return grads[0], None
