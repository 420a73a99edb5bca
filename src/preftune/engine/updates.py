"""Update rules: torch's optimizers, an 8-bit one, and one of our own that keeps nothing wider than bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from preftune.errors import ConfigError

__all__ = ["LEAN", "OPTIMIZERS", "lean_adamw_"]

ParamGroups = list[dict[str, Any]]
BETAS, EPS = (0.9, 0.999), 1e-8
LEAN = "adamw_lean"


def _adamw(groups: ParamGroups) -> torch.optim.Optimizer:
    """Decoupled weight decay (arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)


def _adamw8bit(groups: ParamGroups) -> torch.optim.Optimizer:
    """AdamW whose moments are 8-bit numbers scaled per block of 256 (arXiv 2110.02861): 2 bytes a weight, not 8.

    bitsandbytes, on CUDA. Weighed: torchao's has the same states in torch code, but is one more dependency and asks
    for torch.compile to be fast; torch itself has no 8-bit optimizer. Masters stay float32.
    """
    devices = sorted({p.device.type for group in groups for p in group["params"]} - {"cuda"})
    if devices:
        raise ConfigError(f"optimizer adamw8bit needs a CUDA device, found {devices[0]}; choose adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer adamw8bit needs bitsandbytes, which cannot be imported ({error}): pip install 'preftune[quant]'"
        ) from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=0.0, betas=BETAS, eps=EPS)
    return optimizer


def _rmsprop(groups: ParamGroups) -> torch.optim.Optimizer:
    """The DPO paper's choice (arXiv 2305.18290, appendix B). Weight decay is an L2 term in the gradient."""
    return torch.optim.RMSprop(groups, lr=0.0, alpha=0.99, eps=1e-8)


def _sgd(groups: ParamGroups) -> torch.optim.Optimizer:
    """No momentum. Weight decay is an L2 term in the gradient."""
    return torch.optim.SGD(groups, lr=0.0, fused=True)


def _like_weights(*kinds: str) -> Callable[[Tensor], dict[str, Tensor]]:
    """Moments of the weight's own shape and dtype, beside a step counter."""
    return lambda master: {"step": torch.empty(())} | dict.fromkeys(kinds, master)


def _in_8_bits(master: Tensor) -> dict[str, Tensor]:
    """What bitsandbytes (0.50) keeps: below 4096 elements float32 moments, else codes, their meaning and scales."""
    counter = {"step": torch.empty((), dtype=torch.int64)}
    if master.numel() < 4096:
        return counter | dict.fromkeys(("state1", "state2"), master)
    codes = torch.empty(master.shape, dtype=torch.uint8, device="meta")
    meaning, scales = (torch.empty(n, device="meta") for n in (256, -(-master.numel() // 256)))
    parts = {"state": codes, "qmap": meaning, "absmax": scales}
    return counter | {f"{part}{moment}": like for part, like in parts.items() for moment in (1, 2)}


def _in_bf16(master: Tensor) -> dict[str, Tensor]:
    """Moments of the weight's shape in bfloat16."""
    moment = torch.empty(master.shape, dtype=torch.bfloat16, device="meta")
    return {"step": torch.empty(())} | dict.fromkeys(("exp_avg", "exp_avg_sq"), moment)


Kept = Callable[[Tensor], dict[str, Tensor]]

OPTIMIZERS: dict[str, tuple[Callable[[ParamGroups], torch.optim.Optimizer], Kept]] = {
    "adamw": (_adamw, _like_weights("exp_avg", "exp_avg_sq")),
    "adamw8bit": (_adamw8bit, _in_8_bits),
    LEAN: (_adamw, _in_bf16),  # torch's keeps the groups and the state, `lean_adamw_` takes the step
    "rmsprop": (_rmsprop, _like_weights("square_avg")),
    "sgd": (_sgd, lambda master: {}),
}
"""Name -> how torch builds it, and what it keeps for a master once that has taken a step: kind -> shape and dtype."""


def lean_adamw_(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    lr: float,
    weight_decay: float,
    draw: Callable[..., None],
) -> None:
    """A step of AdamW on one tensor: weight and moments to float32, the step there, all three drawn back to bfloat16.

    6 bytes a weight are kept, not 14, beside the gradient. Rounded to nearest neither would move: at beta_2 = 0.999 a
    step changes the second moment by a thousandth, half a unit in its last place. `draw(out, source, what=...)` is
    unbiased, so the average follows float32; what it adds to a weight per step is noise of one unit in the last place.
    """
    if not state:
        kept: dict[str, Any] = {"dtype": torch.bfloat16, "device": weight.device}
        state |= {kind: torch.zeros(weight.shape, **kept) for kind in ("exp_avg", "exp_avg_sq")}
        state["step"] = torch.zeros(())
    state["step"] += 1
    steps = float(state["step"])
    mean = state["exp_avg"].float().lerp_(gradient, 1 - BETAS[0])
    square = state["exp_avg_sq"].float().mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    size = (square / (1 - BETAS[1] ** steps)).sqrt_().add_(EPS)
    stepped = weight.float().mul(1 - lr * weight_decay).addcdiv_(mean, size, value=-lr / (1 - BETAS[0] ** steps))
    draw(weight, stepped)
    draw(state["exp_avg"], mean, what="/exp_avg")
    draw(state["exp_avg_sq"], square, what="/exp_avg_sq")
