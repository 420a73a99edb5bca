"""A weighted sum of losses over one optimizer step: what training minimises.

    J = sum over terms i of  c_i * (sum over rows of weight * value_i) / (sum over rows of weight)

Each term has its own rows (pairs, rankings or labelled responses) and so its own denominator, that of the *whole* step:
the sums over micro-batches add up to the same J however the step was split. RPO is DPO plus a likelihood term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from preftune.equations.contract import BoundLoss, Inputs, Need
from preftune.tensors import ListLogps, PairIndex, PairLogps, ResponseLogps, TokenGroup, total_weight

__all__ = ["Objective", "State", "Term", "TermValues"]

State = Mapping[str, Mapping[str, float]]
"""Loss name -> what it remembers from step to step; plain numbers, so that a checkpoint holds them exactly."""


@dataclass(frozen=True)
class Term:
    """`coefficient` times a loss."""

    coefficient: float
    loss: BoundLoss

    @property
    def name(self) -> str:
        return self.loss.loss.name

    def inputs(self, logps: ResponseLogps, groups: Sequence[TokenGroup]) -> Inputs:
        """The rows this loss reads, from the log-probs of the groups' responses."""
        if self.loss.loss.reads is PairLogps:
            return logps.pairs(PairIndex.of(groups).to(logps.policy.device))
        return logps.lists(groups) if self.loss.loss.reads is ListLogps else logps.labelled(groups)

    def owners(self, groups: Sequence[TokenGroup]) -> list[int]:
        """For every row, which group it belongs to."""
        if self.loss.loss.reads is PairLogps:
            return [i for i, group in enumerate(groups) for _ in group.pairs]
        if self.loss.loss.reads is ListLogps:
            return [i for i, group in enumerate(groups) if group.ranks]
        return [i for i, group in enumerate(groups) for _ in group.labels or [*group.pairs, *group.pairs]]

    def total(self, groups: Sequence[TokenGroup]) -> float:
        """Sum of the weights of all rows: the denominator."""
        if self.loss.loss.reads is PairLogps:
            return total_weight(groups)
        return float(sum(groups[i].weight for i in self.owners(groups)))


@dataclass(frozen=True)
class TermValues:
    """What one term made of its rows."""

    term: Term
    inputs: Inputs
    values: Tensor
    """One per row, nats, differentiable, without coefficient and weight."""

    def share(self, total: float) -> Tensor:
        """The part of J that these rows are, for a step whose weights sum to `total`; zero without rows."""
        if not len(self.values):
            return self.values.sum()
        return self.term.coefficient * (self.values * self.inputs.weight).sum() / total


@dataclass(frozen=True)
class Objective:
    """The terms of J; the first one is the leading one, whose rewards are reported."""

    terms: tuple[Term, ...]

    @cached_property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(term.loss.loss.needs for term in self.terms))

    @cached_property
    def coupled(self) -> bool:
        """Some row's value depends on other rows of the step: all of them must be known before any gradient is."""
        return any(term.loss.loss.coupled or term.loss.loss.update for term in self.terms)

    def initial_state(self) -> dict[str, dict[str, float]]:
        """What the losses remember before the first step; only of those that remember anything."""
        return {term.name: term.loss.loss.state() for term in self.terms if term.loss.loss.state()}

    def updated(self, logps: ResponseLogps, groups: Sequence[TokenGroup], state: State) -> State:
        """The state after a step that consists of these groups."""
        return {
            term.name: term.loss.updated(term.inputs(logps, groups), state[term.name])
            for term in self.terms
            if term.name in state
        }

    def totals(self, groups: Sequence[TokenGroup]) -> list[float]:
        """The denominator of each term for a step that consists of these groups."""
        return [term.total(groups) for term in self.terms]

    def evaluate(self, logps: ResponseLogps, groups: Sequence[TokenGroup], state: State) -> list[TermValues]:
        """Every term on its rows; `logps` are those of the groups' responses, in order."""
        found = []
        for term in self.terms:
            inputs = term.inputs(logps, groups)
            found.append(TermValues(term, inputs, term.loss.values(inputs, state.get(term.name))))
        return found

    def share(self, found: Sequence[TermValues], totals: Sequence[float]) -> Tensor:
        """The part of J that these rows are: a scalar to call `backward` on."""
        return torch.stack([part.share(total) for part, total in zip(found, totals, strict=True)]).sum()

    def at_start(self) -> float | None:
        """J where policy and reference agree; None when some term's value there depends on the data."""
        values = [term.loss.at_start() for term in self.terms]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return sum(term.coefficient * value for term, value in zip(self.terms, known, strict=True))

    def reward(self, responses: ResponseLogps) -> Tensor:
        """[R] the reward that the leading loss ascribes to each response, detached."""
        return self.terms[0].loss.reward(responses)
