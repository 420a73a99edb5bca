"""What a loss is: a function, its gradient weights, its reward, and what they read, in one frozen row.

    function(inputs, *, knobs, state) -> values     [T] pairs, [G] rankings or [U] responses, nats, differentiable
    weights (inputs, *, the same)     -> pairs: (w_c [T], w_r [T]) = (-dL/d log pi(y_w), +dL/d log pi(y_l));
                                         rankings and labelled responses: -dL/d log pi, one per response
    reward  (responses, *, knobs it depends on) -> [R] the reward the loss ascribes to a response, detached
    update  (inputs, *, knobs, state) -> the state after this optimizer step, from *all* rows of the step

A loss never reads a row's weight and never averages: the caller does both, over the whole optimizer step. Rows do not
mix unless the loss says `coupled`; then the caller hands it all rows of an optimizer step at once, so that not even
these losses depend on how the step was split. Keyword arguments are exactly the knobs, but for those marked `State`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor

from preftune.equations.knobs import Range
from preftune.errors import ConfigError
from preftune.tensors import LabelledLogps, ListLogps, PairLogps, ResponseLogps

__all__ = ["BoundLoss", "Inputs", "Loss", "Need", "Weights"]

Inputs = PairLogps | ListLogps | LabelledLogps
Weights = tuple[Tensor, Tensor] | Tensor
Need = Literal["reference", "scores", "tokens", "divergence", "alignment", "mismatched"]
"""What a loss reads besides log-probs of the policy: log-ratios; the source's scores; log-ratios of single tokens;
sums of KL(pi_ref || pi) per token; WPO's alignment; log-ratios of mismatched responses."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss: `function`'s keyword arguments are its knobs, their defaults and, by annotation, their ranges."""

    name: str
    function: Callable[..., Tensor]
    weights: Callable[..., Weights]
    reward: Callable[..., Tensor]
    at_start: Callable[..., float | None] | None
    """(*, those knobs that it depends on) -> the value at policy == reference; None when it depends on the data."""
    reads: type[PairLogps] | type[ListLogps] | type[LabelledLogps] = PairLogps
    needs: frozenset[Need] = frozenset({"reference"})
    coupled: bool = False
    """The value of one row depends on the other rows of the optimizer step."""
    update: Callable[..., Mapping[str, float]] | None = None
    learning_rate: float
    """Peak rate to start from when all weights of a 1B-8B model are trained with AdamW or RMSprop."""

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.needs

    def knobs(self) -> dict[str, float]:
        """Knob name -> default value."""
        return {name: float(p.default) for name, p in _keywords(self.function).items() if name in self.ranges()}

    def ranges(self) -> dict[str, Range]:
        """Knob name -> the values it may take."""
        marks = {name: mark for name, (mark, *_) in _marks(self.function).items()}
        return {name: mark for name, mark in marks.items() if isinstance(mark, Range)}

    def state(self) -> dict[str, float]:
        """Name -> initial value of every number the loss remembers from step to step."""
        return {name: float(p.default) for name, p in _keywords(self.function).items() if name not in self.ranges()}

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
        message = f"loss {self.name} has no knob {knob}; its knobs: {', '.join(self.knobs()) or 'none'}"
        close = get_close_matches(knob, self.knobs(), n=1)
        return f"{message}; did you mean {close[0]}?" if close else message


@dataclass(frozen=True)
class BoundLoss:
    """A loss with all its knobs set: what a training step calls. `state` defaults to where the loss starts."""

    loss: Loss
    knobs: Mapping[str, float]

    def values(self, inputs: Inputs, state: Mapping[str, float] | None = None) -> Tensor:
        """One value per row, nats, differentiable; the caller multiplies by the rows' weight and divides by its sum."""
        return self.loss.function(inputs, **self.knobs, **(self.loss.state() if state is None else state))

    @torch.no_grad()
    def weights(self, inputs: Inputs, state: Mapping[str, float] | None = None) -> Any:
        """How hard each row pulls its responses up (and its rejected one down), detached; see `Weights`."""
        return self.loss.weights(inputs, **self.knobs, **(self.loss.state() if state is None else state))

    @torch.no_grad()
    def updated(self, inputs: Inputs, state: Mapping[str, float]) -> dict[str, float]:
        """The state after an optimizer step of these rows; `state` itself where the loss remembers nothing."""
        if self.loss.update is None:
            return dict(state)
        return dict(self.loss.update(inputs, **self.knobs, **state))

    def reward(self, responses: ResponseLogps) -> Tensor:
        """[R] the reward the loss ascribes to each response, detached."""
        return self.loss.reward(responses, **self._needed(self.loss.reward)).detach()

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """(r_w [T], r_l [T]), detached."""
        chosen = ResponseLogps(pairs.chosen, pairs.chosen_log_ratio, pairs.chosen_length)
        rejected = ResponseLogps(pairs.rejected, pairs.rejected_log_ratio, pairs.rejected_length)
        return self.reward(chosen), self.reward(rejected)

    def at_start(self) -> float | None:
        """The value of every row at policy == reference; None when it depends on the data."""
        return None if self.loss.at_start is None else self.loss.at_start(**self._needed(self.loss.at_start))

    def _needed(self, function: Callable[..., Any]) -> dict[str, float]:
        return {name: self.knobs[name] for name in _keywords(function)}


@cache
def _keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.items()
    return {name: p for name, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@cache
def _marks(function: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(function, include_extras=True)
    return {name: hints[name].__metadata__ for name in _keywords(function)}
