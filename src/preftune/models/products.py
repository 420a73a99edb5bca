"""float32 matrix products on a CPU by oneDNN, where they are seen to be float32 inside and the model is large enough.

torch takes oneDNN instead of the BLAS it was built with once a lower precision is allowed. A processor with units for
bfloat16 matrices may then use them, others compute in float32 all the same: it is measured here, not believed. Twice
as fast on an AMD EPYC; slower on matrices of a few dozen columns (`benchmarks/LOG.md`).
"""

from __future__ import annotations

import torch

__all__ = ["ALLOWED", "WIDTH", "product_error", "use_onednn"]

WIDTH = 256
"""Hidden size from which it pays."""
ALLOWED = 2e-6
"""Relative error of a product of 512 terms: float32 gives 3e-7, TF32 3e-4, bfloat16 3e-3."""


def use_onednn(width: int) -> str:
    """Let torch take oneDNN for float32 products from now on; a note, "" where nothing was changed.

    Nothing is for a model narrower than WIDTH, where it is done already, where CUDA would be told too, and where the
    error is above ALLOWED: the decision is the same whenever a run is repeated on a machine.
    """
    if width < WIDTH or torch.cuda.is_available() or torch.get_float32_matmul_precision() != "highest":
        return ""
    torch.set_float32_matmul_precision("medium")
    error = product_error()
    if not error <= ALLOWED:
        torch.set_float32_matmul_precision("highest")
        return ""
    return f"float32 products by oneDNN, exact to {error:.0e} here"


def product_error() -> float:
    """Relative error (root mean square) of a float32 product against float64, of fixed numbers."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(512, 512, generator=draw) for _ in range(2))
    true = one.double() @ other.double()
    return float(((one @ other).double() - true).norm() / true.norm())
