"""What training a reward model reports: the loss; on held-out pairs accuracy and calibration, by margin and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from preftune.engine.clock import Clock
from preftune.engine.parallel import World
from preftune.equations.histogram import histogram
from preftune.equations.stats import Interval, mean_interval
from preftune.evaluation.calibration import Calibration, calibrate, wins
from preftune.parts.meters import Collected, held, joined, speed, summed
from preftune.tensors import PackedBatch

__all__ = ["RewardMeter"]


class RewardMeter:
    """The comparisons of one optimizer step, or of one evaluation; mean rewards are reported less `offset`."""

    def __init__(self, unit: str, offset: float = 0.0) -> None:
        self._unit, self._offset = unit, offset
        self._loss, self._pairs = Collected(unit), Collected("pair")
        self._prompts: list[bytes] = []
        self._held = [0, 0]

    def add(self, batch: PackedBatch, rewards_R: Tensor, values: Tensor, weight: Tensor) -> None:
        """Take in a micro-batch: rewards of its responses, values and weights of its pairs or rankings."""
        per_pair = self._unit == "pair"
        owners = [g.origin for g in batch.groups for _ in range(len(g.pairs) if per_pair else 1)]
        self._loss.add(owners, (values, weight))
        w, l = batch.index.chosen, batch.index.rejected
        length = batch.lengths.to(rewards_R.dtype)
        self._pairs.add([], (rewards_R[w], rewards_R[l], length[w], length[l]))
        self._prompts += [g.prompt.tobytes() for g in batch.groups for _ in g.pairs]

    def refuse_not_finite(self) -> None:
        """Raise NotFinite, naming the rows, when a loss is NaN or infinite."""
        self._loss.refuse_not_finite()

    def extend(self, later: RewardMeter) -> None:
        """Take in what another meter of this rank collected."""
        self._loss.extend(later._loss)
        self._pairs.extend(later._pairs)
        self._prompts += later._prompts

    def join(self, world: World, batches: Sequence[PackedBatch] = ()) -> None:
        """Take in what the other ranks collected in their `batches`."""
        own = [held(batches), [prompt.hex() for prompt in self._prompts]]
        told = joined(world, [self._loss, self._pairs], own)
        self._held = summed([theirs for theirs, _ in told])
        self._prompts = [bytes.fromhex(prompt) for _, prompts in told for prompt in prompts]

    def metrics(self, clock: Clock) -> dict[str, Any]:
        """Every number of a training step that `join` has closed; `clock` has the seconds of its phases."""
        return self._numbers() | speed(clock, self._held, self._unit, self._loss.rows)

    def held_out(self) -> dict[str, Any]:
        """Every number of an evaluation; those with `_low` and `_high` beside them carry 95 % intervals.

        longest_wins          accuracy of preferring the response of more tokens: what length alone explains
        brier                 mean (1 - p)^2, p = sigmoid(margin), the chance given to what was said; 1/4 is ignorance
        ece                   calibration error of max(p, 1 - p), the confidence that the better scored response wins
        accuracy_margin_1..4  accuracy in the quarters of |margin|, the least decided pairs first
        accuracy_chosen_...   accuracy where the chosen response has more, fewer or as many tokens

        A margin of exactly 0 counts one half. Pairs of one prompt are drawn together by the bootstrap.
        """
        values, weight = self._loss.table()
        loss = self._numbers()["loss"]
        numbers = self._numbers() | _named("loss", mean_interval(loss + (values - loss) * weight / weight.mean()))
        order = sorted(range(len(self._prompts)), key=self._prompts.__getitem__)  # the bootstrap draws by place
        r_w, r_l, n_w, n_l = self._pairs.table()[:, order]
        clusters = [self._prompts[i] for i in order]
        return numbers | _pair_report(calibrate(r_w - r_l, n_w - n_l, clusters=clusters))

    def _numbers(self) -> dict[str, Any]:
        values, weight = self._loss.table()
        r_w, r_l, n_w, n_l = self._pairs.table()
        return {
            "loss": float((values * weight).sum() / weight.sum()),
            "accuracy": float(wins(r_w - r_l).mean()),
            "reward_chosen": float(r_w.mean()) - self._offset,
            "reward_rejected": float(r_l.mean()) - self._offset,
            "reward_margin": float((r_w - r_l).mean()),
            "reward_margin_histogram": histogram(r_w - r_l),
            "length_chosen": float(n_w.mean()),
            "length_rejected": float(n_l.mean()),
            "pairs": len(r_w),
        }


def _pair_report(found: Calibration) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name in ("accuracy", "longest_wins", "brier", "ece"):
        numbers |= _named(name, getattr(found, name))
    for part in (*found.by_margin, *found.by_length):
        numbers |= _named(f"accuracy_{part.name}", part.accuracy)
        numbers[f"pairs_{part.name}"] = part.pairs
    return numbers


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
