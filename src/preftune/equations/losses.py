"""The table of pairwise losses: by name, with knobs, gradient weights, rewards, and advice.

A new loss is a function, its gradient weights, and one row here (and one row in the contract suite of the tests).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

import torch
from torch import Tensor

from preftune.equations import pairwise as pw
from preftune.equations import reference_free as rf
from preftune.equations.knobs import Range
from preftune.errors import ConfigError
from preftune.tensors import PairLogps

__all__ = ["LOSSES", "BoundLoss", "Loss"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss: `function`'s keyword arguments are its knobs, their defaults and, by annotation, their ranges."""

    name: str
    function: Callable[..., Tensor]
    """(PairLogps, *, knobs) -> [T] nats."""
    weights: Callable[..., tuple[Tensor, Tensor]]
    """(PairLogps, *, the same knobs) -> (w_c [T], w_r [T])."""
    rewards: Callable[..., tuple[Tensor, Tensor]]
    """(PairLogps, *, those knobs that it depends on) -> (r_w [T], r_l [T]), detached."""
    at_start: Callable[..., float] | None
    """(*, those knobs that it depends on) -> the value at policy == reference; None when it depends on the data."""
    needs_reference: bool = True
    learning_rate: float
    """Peak rate to start from when all weights of a 1B-8B model are trained with AdamW or RMSprop."""

    def knobs(self) -> dict[str, float]:
        """Knob name -> default value."""
        return {name: float(p.default) for name, p in _keywords(self.function).items()}

    def ranges(self) -> dict[str, Range]:
        """Knob name -> the values it may take."""
        hints = get_type_hints(self.function, include_extras=True)
        return {name: hints[name].__metadata__[0] for name in _keywords(self.function)}

    def bind(self, **knobs: float) -> BoundLoss:
        """This loss with its knobs set, the others at their defaults.

        Raises ConfigError on a knob it does not have (an ignored knob would be a wrong experiment) and on a value
        out of range.
        """
        ranges = self.ranges()
        for knob, value in knobs.items():
            if knob not in ranges:
                raise ConfigError(self._unknown(knob))
            if isinstance(value, bool) or not isinstance(value, int | float) or value not in ranges[knob]:
                raise ConfigError(f"loss {self.name}: {knob} must be a number {ranges[knob]}, not {value!r}")
        return BoundLoss(self, self.knobs() | {knob: float(value) for knob, value in knobs.items()})

    def _unknown(self, knob: str) -> str:
        message = f"loss {self.name} has no knob {knob}; its knobs: {', '.join(self.knobs())}"
        owners = [loss.name for loss in LOSSES.values() if knob in loss.knobs()]
        if owners:
            return f"{message}; losses with {knob}: {', '.join(owners)}"
        close = get_close_matches(knob, self.knobs(), n=1)
        return f"{message}; did you mean {close[0]}?" if close else message


@dataclass(frozen=True)
class BoundLoss:
    """A loss with all its knobs set: what a training step calls."""

    loss: Loss
    knobs: Mapping[str, float]

    def values(self, pairs: PairLogps) -> Tensor:
        """[T] nats, differentiable; the caller multiplies by `pairs.weight` and divides by the step's total."""
        return self.loss.function(pairs, **self.knobs)

    @torch.no_grad()
    def weights(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """(w_c [T], w_r [T]), detached: how hard each pair pulls its chosen up and pushes its rejected down."""
        return self.loss.weights(pairs, **self.knobs)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """(r_w [T], r_l [T]), detached."""
        return self.loss.rewards(pairs, **self._needed(self.loss.rewards))

    def at_start(self) -> float | None:
        """The value of every pair at policy == reference; None when it depends on the data."""
        return None if self.loss.at_start is None else self.loss.at_start(**self._needed(self.loss.at_start))

    def _needed(self, function: Callable[..., Any]) -> dict[str, float]:
        return {name: self.knobs[name] for name in _keywords(function)}


def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.items()
    return {name: p for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            name="dpo",
            function=pw.dpo,
            weights=pw.dpo_weights,
            rewards=pw.dpo_rewards,
            at_start=pw.logistic_at_start,
            learning_rate=1e-6,  # arXiv 2305.18290 Appendix B (RMSprop, batch 64)
        ),
        Loss(
            name="cdpo",
            function=pw.cdpo,
            weights=pw.cdpo_weights,
            rewards=pw.dpo_rewards,
            at_start=pw.logistic_at_start,
            learning_rate=5e-7,  # the released online DPO recipe of RLHFlow, label smoothing 0.1
        ),
        Loss(
            name="robust",
            function=pw.robust,
            weights=pw.robust_weights,
            rewards=pw.dpo_rewards,
            at_start=pw.logistic_at_start,
            learning_rate=5e-7,  # as cdpo; the 1e-3 of arXiv 2403.00409 Appendix B is for its GPT-2 experiment
        ),
        Loss(
            name="ipo",
            function=pw.ipo,
            weights=pw.ipo_weights,
            rewards=pw.ipo_rewards,
            at_start=pw.ipo_at_start,
            learning_rate=5e-7,  # arXiv 2402.04792; the 1e-2 of arXiv 2310.12036 Appendix C is for its bandits
        ),
        Loss(
            name="ipo_average",
            function=pw.ipo_average,
            weights=pw.ipo_average_weights,
            rewards=pw.ipo_average_rewards,
            at_start=pw.ipo_at_start,
            learning_rate=5e-7,  # as ipo: the optimizers named above are blind to the loss's scale
        ),
        Loss(
            name="hinge",
            function=pw.hinge,
            weights=pw.hinge_weights,
            rewards=pw.dpo_rewards,
            at_start=pw.hinge_at_start,
            learning_rate=5e-7,  # arXiv 2402.04792, its SLiC runs
        ),
        Loss(
            name="simpo",
            function=rf.simpo,
            weights=rf.simpo_weights,
            rewards=rf.simpo_rewards,
            at_start=None,
            needs_reference=False,
            learning_rate=5e-7,  # the authors' repository: 3e-7 to 1e-6 by model, incoherent text at 1e-5
        ),
    )
}
"""Every pairwise loss by name."""
