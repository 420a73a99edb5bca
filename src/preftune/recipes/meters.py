"""What a training step reports: numbers over the whole optimizer step, with intervals and quantiles where due.

A meter collects what each micro-batch computed and reads the device once at the end. Nothing is averaged per
micro-batch, so no number depends on how the step was split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.engine.clock import Clock
from preftune.equations.kl import forward_kl
from preftune.equations.losses import BoundLoss
from preftune.equations.stats import mean_interval, quantiles, wilson
from preftune.errors import NotFinite
from preftune.tensors import PackedBatch, PairLogps, ResponseLogps

__all__ = ["PairMeter", "TokenMeter", "token_weights"]


def token_weights(batch: PackedBatch) -> Tensor:
    """[C] weight of each scored token: its row's."""
    weights_R = torch.tensor([g.weight for g in batch.groups for _ in g.responses], device=batch.lengths.device)
    return weights_R.repeat_interleave(batch.lengths)


class PairMeter:
    """The pairs of one optimizer step, or of one evaluation."""

    def __init__(self, objective: BoundLoss) -> None:
        self._objective = objective
        self._collected = _Collected("pair")
        self._drift: list[Tensor] = []

    def add(self, batch: PackedBatch, logps: ResponseLogps, pairs: PairLogps, values_T: Tensor) -> None:
        """Take in one micro-batch; no value leaves the device yet."""
        reward_w, reward_l = self._objective.rewards(pairs)
        weight_w, weight_l = self._objective.weights(pairs)
        owners = [group.origin for group in batch.groups for _ in group.pairs]
        columns = (
            values_T, pairs.weight, reward_w, reward_l, weight_w, weight_l, pairs.chosen, pairs.rejected,
            pairs.chosen_log_ratio, pairs.rejected_log_ratio, pairs.chosen_length, pairs.rejected_length,
        )  # fmt: skip
        self._collected.add(batch, owners, columns)
        self._drift.append(forward_kl(logps.log_ratio))

    def refuse_not_finite(self) -> None:
        """Raise NotFinite, naming the rows, when a loss is NaN or infinite."""
        self._collected.refuse_not_finite()

    def metrics(self, clock: Clock) -> dict[str, Any]:
        """Every number of a training step; `clock` has the seconds of its phases."""
        return self._numbers() | self._collected.speed(clock)

    def held_out(self) -> dict[str, Any]:
        """Every number of an evaluation; loss and margin carry 95 % intervals over pairs."""
        table = self._collected.table()
        loss, margin = mean_interval(table[0]), mean_interval(table[2] - table[3])
        return self._numbers() | {
            "loss_low": loss.low, "loss_high": loss.high,
            "reward_margin_low": margin.low, "reward_margin_high": margin.high,
        }  # fmt: skip

    def _numbers(self) -> dict[str, Any]:
        (loss, weight, r_w, r_l, c_w, c_l, logp_w, logp_l, ratio_w, ratio_l, n_w, n_l) = self._collected.table()
        margin = r_w - r_l
        accuracy = wilson(float((margin > 0).sum() + 0.5 * (margin == 0).sum()), len(margin))  # a tie is half a win
        p05, p50, p95 = quantiles(margin, (0.05, 0.5, 0.95))
        return {
            "loss": float((loss * weight).sum() / weight.sum()),
            "accuracy": accuracy.estimate, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
            "reward_chosen": float(r_w.mean()), "reward_rejected": float(r_l.mean()),
            "reward_margin": float(margin.mean()),
            "reward_margin_p05": p05, "reward_margin_p50": p50, "reward_margin_p95": p95,
            "logp_chosen": float(logp_w.mean()), "logp_rejected": float(logp_l.mean()),
            "logp_chosen_change": float(ratio_w.mean()), "logp_rejected_change": float(ratio_l.mean()),
            "gradient_weight": float((c_w + c_l).mean() / 2),
            "kl_from_data": float(torch.cat(self._drift).mean()),
            "length_chosen": float(n_w.mean()), "length_rejected": float(n_l.mean()),
            "pairs": len(margin),
        }  # fmt: skip


class TokenMeter:
    """The demonstrations of one optimizer step, or of one evaluation."""

    def __init__(self) -> None:
        self._collected = _Collected("response")

    def add(self, batch: PackedBatch, values_C: Tensor) -> None:
        """Take in one micro-batch: negative log-likelihoods of its scored tokens, nats."""
        n_R = batch.lengths.to(values_C.dtype)
        owner_C = torch.repeat_interleave(torch.arange(len(n_R), device=values_C.device), batch.lengths)
        sums_R = torch.zeros_like(n_R).index_add(0, owner_C, values_C.detach())
        weight_R = torch.tensor([g.weight for g in batch.groups for _ in g.responses], device=values_C.device)
        owners = [group.origin for group in batch.groups for _ in group.responses]
        self._collected.add(batch, owners, (sums_R, weight_R, n_R))

    def refuse_not_finite(self) -> None:
        """Raise NotFinite, naming the rows, when a loss is NaN or infinite."""
        self._collected.refuse_not_finite()

    def metrics(self, clock: Clock) -> dict[str, Any]:
        """Every number of a training step; `clock` has the seconds of its phases."""
        return self._numbers() | self._collected.speed(clock)

    def held_out(self) -> dict[str, Any]:
        """Every number of an evaluation; the loss, a ratio of sums, carries a 95 % interval over responses."""
        numbers = self._numbers()
        total, _, length = self._collected.table()
        linearised = numbers["loss"] + (total - numbers["loss"] * length) / length.mean()
        interval = mean_interval(linearised)
        return numbers | {"loss_low": interval.low, "loss_high": interval.high}

    def _numbers(self) -> dict[str, Any]:
        total, weight, length = self._collected.table()
        loss = float((total * weight).sum() / (length * weight).sum())
        numbers = {"loss": loss, "perplexity": float(np.exp(loss)), "length": float(length.mean())}
        return numbers | {"responses": len(total), "completion_tokens": int(length.sum())}


class _Collected:
    """Rows of numbers on the device, the batches they came from, and how much was computed for them."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._rows: list[Tensor] = []
        self._owners: list[str] = []
        self._tokens = self._slots = 0

    def add(self, batch: PackedBatch, owners: list[str], columns: tuple[Tensor, ...]) -> None:
        self._rows.append(torch.stack([column.detach().float() for column in columns]))
        self._owners += owners
        self._tokens += batch.real_tokens
        self._slots += batch.input_ids.numel()

    def table(self) -> NDArray[np.float64]:
        """[columns, rows], the one read of the device."""
        return torch.cat(self._rows, dim=1).double().cpu().numpy()

    def refuse_not_finite(self) -> None:
        values = self.table()[0]
        if np.isfinite(values).all():
            return
        bad = [owner for owner, value in zip(self._owners, values, strict=True) if not np.isfinite(value)]
        named = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
        raise NotFinite(
            f"the loss is not finite for {len(bad)} {self._unit}(s): {named}; the weights were not touched. "
            "Lower --lr, or look at these rows with `preftune inspect`"
        )

    def speed(self, clock: Clock) -> dict[str, float]:
        seconds, shares = clock.read()
        return {
            "unique_tokens": self._tokens,
            "padding_fraction": 1 - self._tokens / self._slots,
            "tokens_per_second": self._tokens / seconds,
            f"{self._unit}s_per_second": len(self._owners) / seconds,
            **{f"share_{name}": share for name, share in shares.items()},
        }
