"""What is logged about a policy that learns from its own responses: the rollout as it is, the update as it went."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor

from preftune.engine.parallel import ALONE, World
from preftune.equations.histogram import histogram
from preftune.parts.rollouts import Rollout

__all__ = ["Means", "rollout_metrics"]


def rollout_metrics(rollout: Rollout, kl_coef: float) -> dict[str, Any]:
    """What the rollout itself says: the reward and what it cost, per response, nats and tokens."""
    mask, scores = rollout.mask, rollout.scores.double()
    return {
        "reward": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "kl": rollout.kl,
        "kl_k1": float((rollout.logps - rollout.ref_logps).sum(-1).double().mean()),
        "kl_coef": kl_coef,
        "objective": float(scores.mean()) - kl_coef * rollout.kl,
        "entropy": -float(rollout.logps[mask].double().mean()),
        "length": float(mask.sum(-1).double().mean()),
        "length_histogram": histogram(mask.sum(-1).cpu().numpy(), least=1.0),
        "finished": float(rollout.finished.double().mean()),
        "responses": len(scores),
        "unscored": rollout.unscored,
    }


class Means:
    """Weighted means of numbers that stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    def add(self, weight: float, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + weight * value
            self._weights[name] += weight

    def take(self, later: Means) -> None:
        """Add what another one has seen."""
        for name, total in later._sums.items():
            self._sums[name] = self._sums[name] + total
            self._weights[name] += later._weights[name]

    def means(self, world: World = ALONE) -> dict[str, float]:
        """Over what all ranks have seen."""
        mine = {name: [float(total), self._weights[name]] for name, total in self._sums.items()}
        parts = world.gather(mine, "the numbers of the step")
        found = {name: [part[name] for part in parts if name in part] for part in parts for name in part}
        return {name: sum(t for t, _ in seen) / sum(w for _, w in seen) for name, seen in found.items()}
