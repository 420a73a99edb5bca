"""What a training step reports: numbers over the whole optimizer step, with intervals and quantiles where due.

A meter collects what each micro-batch computed and reads the device once at the end. Nothing is averaged per
micro-batch, so no number depends on how the step was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.engine.clock import Clock
from preftune.engine.parallel import World
from preftune.equations.histogram import histogram
from preftune.equations.kl import forward_kl
from preftune.equations.objective import Objective, State, TermValues
from preftune.equations.stats import mean_interval, quantiles, wilson
from preftune.errors import NotFinite
from preftune.tensors import LabelledLogps, ListLogps, PackedBatch, PairIndex, PairLogps, ResponseLogps, TokenGroup

__all__ = [
    "QUANTILES",
    "Collected",
    "PreferenceMeter",
    "TokenMeter",
    "held",
    "joined",
    "speed",
    "summed",
    "token_weights",
]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of what `NAME_quantiles` in metrics.jsonl holds: one list per record, four significant digits."""

_UNITS = {PairLogps: "pair", ListLogps: "ranking", LabelledLogps: "label"}


def token_weights(batch: PackedBatch) -> Tensor:
    """[C] weight of each scored token: its row's."""
    weights_R = torch.tensor([g.weight for g in batch.groups for _ in g.responses], device=batch.lengths.device)
    return weights_R.repeat_interleave(batch.lengths)


class PreferenceMeter:
    """The rows of one optimizer step, or of one evaluation, and what every term of the objective made of them."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._terms = [Collected(_UNITS[term.loss.loss.reads]) for term in objective.terms]
        self._pairs, self._labelled, self._drift = Collected("pair"), Collected("label"), Collected("response")
        self._responses = 0
        self._held = [0, 0]

    def add(
        self, groups: Sequence[TokenGroup], logps: ResponseLogps, found: Sequence[TermValues], state: State
    ) -> None:
        """Take in the groups of a micro-batch, or of a whole step; no value leaves the device yet."""
        reward_R = self._objective.reward(logps)
        for collected, part in zip(self._terms, found, strict=True):
            weights = part.term.loss.weights(part.inputs, state.get(part.term.name))
            pull = (weights[0] + weights[1]) / 2 if isinstance(weights, tuple) else _row_mean(weights.abs())
            owners = part.term.owners(groups)
            collected.add([groups[i].origin for i in owners], (part.values, part.inputs.weight, pull))
            collected.group_of += [self._responses + i for i in owners]
        self._responses += len(groups)
        own_R = torch.tensor([i < g.own for g in groups for i in range(len(g.responses))], device=reward_R.device)
        self._drift.add([], (forward_kl(logps.log_ratio)[own_R],))
        index = PairIndex.of(groups).to(reward_R.device)
        pairs = logps.pairs(index)
        self._pairs.add([], (
            reward_R[index.chosen], reward_R[index.rejected], pairs.chosen, pairs.rejected,
            pairs.chosen_log_ratio, pairs.rejected_log_ratio, pairs.chosen_length, pairs.rejected_length,
        ))  # fmt: skip
        stated = [i for i, label in enumerate(label for g in groups for label in _labels(g)) if label is not None]
        good = torch.tensor([label for g in groups for label in g.labels], dtype=torch.bool, device=reward_R.device)
        at = torch.tensor(stated, dtype=torch.int64, device=reward_R.device)
        self._labelled.add([], (reward_R[at], good, logps.policy[at], logps.log_ratio[at], logps.length[at]))

    def refuse_not_finite(self) -> None:
        """Raise NotFinite, naming the rows, when a loss is NaN or infinite."""
        for collected in self._terms:
            collected.refuse_not_finite()

    def join(self, world: World, batches: Sequence[PackedBatch], *, rows: bool = True) -> None:
        """Take in what the other ranks collected in their `batches`: afterwards every rank has the whole step.

        `rows` False: it has the rows already, and only what the batches held is told.
        """
        columns = (*self._terms, self._pairs, self._labelled, self._drift) if rows else ()
        told = joined(world, columns, [self._responses, *held(batches)], groups=self._responses)
        responses, *self._held = summed(told)
        self._responses = responses if rows else self._responses

    def metrics(self, clock: Clock) -> dict[str, Any]:
        """Every number of a training step that `join` has closed; `clock` has the seconds of its phases."""
        return self._numbers() | speed(clock, self._held, "pair", len(self._terms[0].owners))

    def held_out(self) -> dict[str, Any]:
        """Every number of an evaluation; loss and margin carry 95 % intervals, over prompts and over pairs."""
        numbers = self._numbers()
        loss = mean_interval(self._loss_of_groups())
        numbers |= {"loss_low": loss.low, "loss_high": loss.high}
        if self._pairs.rows:
            reward_w, reward_l = self._pairs.table()[:2]
            margin = mean_interval(reward_w - reward_l)
            numbers |= {"reward_margin_low": margin.low, "reward_margin_high": margin.high}
            numbers |= _quantiles("reward_margin", reward_w - reward_l)
        return numbers

    def _numbers(self) -> dict[str, Any]:
        means = {}
        for term, collected in zip(self._objective.terms, self._terms, strict=True):
            values, weight, _ = collected.table()
            means[term.name] = float((values * weight).sum() / weight.sum())
        loss = sum(term.coefficient * means[term.name] for term in self._objective.terms)
        numbers: dict[str, Any] = {"loss": loss}
        if len(means) > 1:
            numbers |= {f"loss_{name}": mean for name, mean in means.items()}
        numbers["gradient_weight"] = float(self._terms[0].table()[2].mean())
        numbers["kl_from_data"] = float(self._drift.table()[0].mean())
        if self._pairs.rows:
            numbers |= _pair_numbers(self._pairs.table())
        if self._labelled.rows:
            numbers |= _label_numbers(self._labelled.table())
        return numbers

    def _loss_of_groups(self) -> NDArray[np.float64]:
        """One number per group, whose mean is the loss and whose spread is the loss's: a ratio of sums, linearised."""
        total = np.zeros(self._responses)
        for term, collected in zip(self._objective.terms, self._terms, strict=True):
            values, weight, _ = collected.table()
            mean = (values * weight).sum() / weight.sum()
            surplus = np.bincount(collected.group_of, (values - mean) * weight, self._responses)
            total += term.coefficient * (mean + surplus / (weight.sum() / self._responses))
        return total


def _pair_numbers(table: NDArray[np.float64]) -> dict[str, Any]:
    r_w, r_l, logp_w, logp_l, ratio_w, ratio_l, n_w, n_l = table
    margin = r_w - r_l
    accuracy = wilson(float((margin > 0).sum() + 0.5 * (margin == 0).sum()), len(margin))  # a tie is half a win
    p05, p50, p95 = quantiles(margin, (0.05, 0.5, 0.95))
    return {
        "accuracy": accuracy.estimate, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high,
        "reward_chosen": float(r_w.mean()), "reward_rejected": float(r_l.mean()),
        "reward_margin": float(margin.mean()),
        "reward_margin_p05": p05, "reward_margin_p50": p50, "reward_margin_p95": p95,
        "logp_chosen": float(logp_w.mean()), "logp_rejected": float(logp_l.mean()),
        "logp_chosen_change": float(ratio_w.mean()), "logp_rejected_change": float(ratio_l.mean()),
        "reward_margin_histogram": histogram(margin),
        "length_chosen": float(n_w.mean()), "length_rejected": float(n_l.mean()),
        **_quantiles("logp_chosen_change", ratio_w), **_quantiles("logp_rejected_change", ratio_l),
        "pairs": len(margin),
    }  # fmt: skip


def _quantiles(name: str, values: NDArray[np.float64]) -> dict[str, list[float]]:
    """Where the values lie, for a report; short, for it is written at every step."""
    return {f"{name}_quantiles": [float(f"{q:.4g}") for q in quantiles(values, QUANTILES)]}


def _label_numbers(table: NDArray[np.float64]) -> dict[str, Any]:
    """Of responses that carry a label themselves; a mean over none is left out."""
    numbers: dict[str, Any] = {"labels": table.shape[1]}
    for name, side in (("desirable", table[1] > 0), ("undesirable", table[1] == 0)):
        numbers[f"labels_{name}"] = int(side.sum())
        if side.any():
            reward, _, logp, ratio, length = table[:, side]
            interval = mean_interval(reward)
            numbers |= {
                f"reward_{name}": float(reward.mean()),
                f"reward_{name}_low": interval.low, f"reward_{name}_high": interval.high,
                f"logp_{name}": float(logp.mean()), f"logp_{name}_change": float(ratio.mean()),
                f"length_{name}": float(length.mean()),
            }  # fmt: skip
    return numbers


def _labels(group: TokenGroup) -> tuple[bool | None, ...]:
    """The label of every response, None where it has none."""
    return group.labels + (None,) * (len(group.responses) - len(group.labels))


def _row_mean(weights: Tensor) -> Tensor:
    return weights if weights.ndim == 1 else weights.mean(1)


class TokenMeter:
    """The demonstrations of one optimizer step, or of one evaluation."""

    def __init__(self) -> None:
        self._collected = Collected("response")
        self._held = [0, 0]

    def add(self, batch: PackedBatch, values_C: Tensor) -> None:
        """Take in one micro-batch: negative log-likelihoods of its scored tokens, nats."""
        n_R = batch.lengths.to(values_C.dtype)
        owner_C = torch.repeat_interleave(torch.arange(len(n_R), device=values_C.device), batch.lengths)
        sums_R = torch.zeros_like(n_R).index_add(0, owner_C, values_C.detach())
        weight_R = torch.tensor([g.weight for g in batch.groups for _ in g.responses], device=values_C.device)
        owners = [group.origin for group in batch.groups for _ in group.responses]
        self._collected.add(owners, (sums_R, weight_R, n_R))

    def extend(self, later: TokenMeter) -> None:
        """Take in what another meter of this rank collected."""
        self._collected.extend(later._collected)

    def refuse_not_finite(self) -> None:
        """Raise NotFinite, naming the rows, when a loss is NaN or infinite."""
        self._collected.refuse_not_finite()

    def join(self, world: World, batches: Sequence[PackedBatch] = ()) -> None:
        """Take in what the other ranks collected in their `batches`."""
        self._held = summed(joined(world, [self._collected], held(batches)))

    def metrics(self, clock: Clock) -> dict[str, Any]:
        """Every number of a training step that `join` has closed; `clock` has the seconds of its phases."""
        return self._numbers() | speed(clock, self._held, "response", len(self._collected.owners))

    def held_out(self) -> dict[str, Any]:
        """Every number of an evaluation; the loss, a ratio of sums, carries a 95 % interval over responses."""
        numbers = self._numbers()
        total, _, length = self._collected.table()
        linearised = numbers["loss"] + (total - numbers["loss"] * length) / length.mean()
        interval = mean_interval(linearised)
        ends = {"low": interval.low, "high": interval.high}
        perplexity = {f"perplexity_{end}": float(np.exp(value)) for end, value in ends.items()}  # exp is monotone
        return numbers | {f"loss_{end}": value for end, value in ends.items()} | perplexity

    def _numbers(self) -> dict[str, Any]:
        total, weight, length = self._collected.table()
        loss = float((total * weight).sum() / (length * weight).sum())
        numbers = {"loss": loss, "perplexity": float(np.exp(loss)), "length": float(length.mean())}
        return numbers | {"responses": len(total), "completion_tokens": int(length.sum())}


class Collected:
    """Rows of numbers on the device, and where they came from."""

    def __init__(self, unit: str) -> None:
        self.owners: list[str] = []
        self.group_of: list[int] = []
        self.rows = 0
        self._unit = unit
        self._parts: list[Tensor] = []

    def add(self, owners: list[str], columns: tuple[Tensor, ...]) -> None:
        """Columns [n] each, and the row each number belongs to; no value leaves the device yet."""
        self._parts.append(torch.stack([column.detach().float() for column in columns]))
        self.owners += owners
        self.rows += len(columns[0])

    def extend(self, later: Collected) -> None:
        """Rows that follow these."""
        self.owners += later.owners
        self.rows += later.rows
        self._parts += later._parts

    def told(self) -> list[Any]:
        """The rows as JSON values: owners, groups, how many columns, numbers."""
        columns = self._parts[0].shape[0] if self._parts else 0
        mine = torch.cat(self._parts, dim=1).cpu() if self._parts else torch.zeros(0, 0)
        return [self.owners, self.group_of, columns, mine.T.tolist()]

    def hear(self, parts: Sequence[Any], starts: Sequence[int]) -> None:
        """Become the rows that all ranks `told`, rank after rank; by its start a rank's `group_of` moves on."""
        columns = max(count for _, _, count, _ in parts)
        table = torch.tensor([row for part in parts for row in part[3]]).reshape(-1, columns)
        self.owners = [owner for owners, *_ in parts for owner in owners]
        self.group_of = [group + start for (_, of, *_), start in zip(parts, starts, strict=True) for group in of]
        self._parts, self.rows = [table.T], len(table)

    def table(self) -> NDArray[np.float64]:
        """[columns, rows], the one read of the device."""
        return torch.cat(self._parts, dim=1).double().cpu().numpy()

    def refuse_not_finite(self) -> None:
        """Raise NotFinite, naming the rows, when the first column holds a NaN or an infinity."""
        values = self.table()[0]
        if np.isfinite(values).all():
            return
        bad = [owner for owner, value in zip(self.owners, values, strict=True) if not np.isfinite(value)]
        named = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
        raise NotFinite(
            f"the loss is not finite for {len(bad)} {self._unit}(s): {named}; the weights were not touched. "
            "Lower --lr, or look at these rows with `preftune inspect`"
        )


def joined(world: World, columns: Sequence[Collected], own: Any, *, groups: int = 0) -> list[Any]:
    """What every rank gives as its `own`; each of `columns` becomes that of all ranks. One message, whatever it holds.

    `groups`: how many of this rank `group_of` counts.
    """
    if world.size == 1:
        return [own]
    told = world.gather([own, groups, [column.told() for column in columns]], "the numbers of the step")
    starts = [sum(count for _, count, _ in told[:rank]) for rank in range(world.size)]
    for i, column in enumerate(columns):
        column.hear([parts[i] for _, _, parts in told], starts)
    return [theirs for theirs, _, _ in told]


def held(batches: Sequence[PackedBatch]) -> list[int]:
    """Tokens in these batches, and places for tokens."""
    return [sum(b.real_tokens for b in batches), sum(b.input_ids.numel() for b in batches)]


def summed(rows: Sequence[Sequence[int]]) -> list[int]:
    """Column by column."""
    return list(map(sum, zip(*rows, strict=True)))


def speed(clock: Clock, held: Sequence[int], unit: str, rows: int) -> dict[str, float]:
    """Tokens and rows per second, padding, and the shares of the phases, of what was computed in one step.

    `held` and `rows` are those of all ranks; seconds and shares are this rank's.
    """
    seconds, shares = clock.read()
    tokens, slots = held
    return {
        "unique_tokens": tokens,
        "padding_fraction": 1 - tokens / slots,
        "tokens_per_second": tokens / seconds,
        f"{unit}s_per_second": rows / seconds,
        **{f"share_{name}": share for name, share in shares.items()},
    }
