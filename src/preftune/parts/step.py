"""The gradient of one optimizer step: the same, however the step was split into micro-batches.

Most objectives are sums over rows, and a micro-batch adds its share. A coupled one (a statistic of the batch, a sorted
batch, a number remembered from earlier steps) needs every log-prob of the step before it has any gradient. Then:

    pass 1, without gradient:   log-probs of all responses -> J and dJ / d log pi of every response
    pass 2, one micro-batch at a time:   log-probs again -> backward with those numbers

which is exact, costs one more forward, holds the activations of one micro-batch only, and is skipped when the step is
a single micro-batch. Several processes are one more way to split: each has the step's totals and, of a coupled
objective, the log-probs of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor, nn

from preftune.engine.clock import Clock
from preftune.engine.memory import out_of_memory
from preftune.engine.parallel import ALONE, World
from preftune.equations.objective import Objective, State
from preftune.errors import RunError
from preftune.models.logprobs import score_tokens
from preftune.parts.common import Batching
from preftune.parts.meters import PreferenceMeter
from preftune.parts.reference import LiveReference, Reference
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup

__all__ = ["Scorer", "accumulate", "score_all", "score_together"]


@dataclass(frozen=True)
class Scorer:
    """A micro-batch -> what the objective may read of its responses [R], float32 nats."""

    policy: nn.Module
    objective: Objective
    reference: Reference | LiveReference | None

    def __call__(self, batch: PackedBatch) -> ResponseLogps:
        needs = self.objective.needs
        live = self.reference if isinstance(self.reference, LiveReference) else None
        tokens = score_tokens(
            self.policy,
            batch,
            reference_model=live.model if live else None,
            divergence="divergence" in needs,
            alignment="alignment" in needs,
        )
        cached = self.reference.lookup(batch) if isinstance(self.reference, Reference) else None
        return ResponseLogps.from_tokens(
            tokens.logps,
            batch.lengths,
            cached if live is None else tokens.reference,
            divergence_C=tokens.divergence,
            alignment_C=tokens.alignment,
            keep_tokens="tokens" in needs,
        )


def accumulate(
    score: Scorer,
    batches: Sequence[PackedBatch],
    state: State,
    meter: PreferenceMeter,
    clock: Clock,
    *,
    step: Sequence[TokenGroup] | None = None,
    world: World = ALONE,
) -> State:
    """Add the gradient of the step to the policy's parameters; returns what the losses remember after it.

    `batches` are this rank's share of the groups of the `step`; none: they are the whole step.
    """
    objective = score.objective
    groups = [group for batch in batches for group in batch.groups]
    totals = objective.totals(groups if step is None else step)
    if objective.coupled and (len(batches) > 1 or world.size > 1):
        return _in_two_passes(score, batches, groups if step is None else step, state, meter, clock, world)
    for batch in batches:
        logps = score(batch)
        if not batch.groups:  # this rank has no row left, but the others need its part of the weights
            logps.policy.sum().backward()
            continue
        state = objective.updated(logps, batch.groups, state)
        found = objective.evaluate(logps, batch.groups, state)
        share = objective.share(found, totals)
        clock.lap("forward")
        share.backward()
        clock.lap("backward")
        meter.add(batch.groups, logps, found, state)
    meter.join(world, batches)
    return state


def _in_two_passes(
    score: Scorer,
    batches: Sequence[PackedBatch],
    groups: Sequence[TokenGroup],
    state: State,
    meter: PreferenceMeter,
    clock: Clock,
    world: World,
) -> State:
    objective = score.objective
    joined, groups, starts = _joined(score, batches, groups, world)
    whole = _leaves(joined)
    state = objective.updated(whole, groups, state)
    found = objective.evaluate(whole, groups, state)
    objective.share(found, objective.totals(groups)).backward()
    meter.add(groups, whole, found, state)
    meter.join(world, batches, rows=False)
    clock.lap("forward")
    try:
        _second_pass(score, batches, whole, starts, clock)
    except (RuntimeError, MemoryError) as error:
        if world.size == 1 or not out_of_memory(error):
            raise
        raise RunError(  # the other ranks have gone on, so this one cannot start the step anew
            "out of memory in the second pass of a loss that couples the rows of a step, with several processes; "
            f"set --tokens_per_batch to half, {max(batch.input_ids.numel() for batch in batches) // 2}"
        ) from error
    return state


def _second_pass(
    score: Scorer, batches: Sequence[PackedBatch], whole: ResponseLogps, starts: dict[str, int], clock: Clock
) -> None:
    """Log-probs again, one micro-batch at a time, and backward with the gradients of `whole`."""
    for batch in batches:
        outputs, gradients, ends = [], [], dict(starts)
        for name, part in _columns(score(batch)):
            unit = "tokens" if name == "token_log_ratio" else "responses"
            ends[unit] = starts[unit] + len(part)
            gradient = getattr(whole, name).grad
            if part.requires_grad and gradient is not None:
                outputs.append(part)
                gradients.append(gradient[starts[unit] : ends[unit]])
        starts |= ends
        torch.autograd.backward(outputs, gradients)
        clock.lap("backward")


def score_all(score: Scorer, batches: Iterable[PackedBatch]) -> ResponseLogps:
    """Every response of the batches, in order, without gradient."""
    with torch.no_grad():
        return _after_another([score(batch) for batch in batches])


def score_together(
    score: Scorer, batching: Batching, groups: Sequence[TokenGroup]
) -> tuple[ResponseLogps, list[TokenGroup]]:
    """Every response of the groups without gradient, each scored by one rank and known to all; in which order."""
    found, ordered = [], list[TokenGroup]()
    for part in batching.parts(groups):
        some = list(part)  # built once: they are told apart by identity
        work = partial(_joined, score, groups=some, world=batching.world)
        logps, own, _ = batching.fit(batching.share(some), work)
        found.append(logps)
        ordered += own
    return _after_another(found), ordered


def _joined(
    score: Scorer, batches: Sequence[PackedBatch], groups: Sequence[TokenGroup], world: World
) -> tuple[ResponseLogps, list[TokenGroup], dict[str, int]]:
    """The responses of all ranks, their groups in that order, and where this rank's responses and tokens start."""
    own = [group for batch in batches for group in batch.groups]
    if world.size == 1:
        return score_all(score, batches), own, {"responses": 0, "tokens": 0}
    place = {id(group): i for i, group in enumerate(groups)}
    columns = {name: column.tolist() for name, column in _columns(score_all(score, batches))} if batches else {}
    parts = world.gather([columns, [place[id(group)] for group in own]], "the log-probs of the step")
    like = next(score.policy.parameters())
    dtype, held = torch.promote_types(like.dtype, torch.float32), [columns for columns, order in parts if order]
    joined = {
        name: torch.tensor([x for part in held for x in part[name]], dtype=dtype, device=like.device)
        for name in held[0]
    }  # fmt: skip
    before = [groups[i] for _, order in parts[: world.rank] for i in order]
    starts = {"responses": sum(len(group.responses) for group in before)}
    starts["tokens"] = sum(len(response) for group in before for response in group.responses)
    return ResponseLogps(**joined), [groups[i] for _, order in parts for i in order], starts


def _after_another(parts: Sequence[ResponseLogps]) -> ResponseLogps:
    """The responses of all parts."""
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name, _ in _columns(parts[0])}
    return replace(parts[0], **joined)


def _columns(logps: ResponseLogps) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every column that is there."""
    for field in fields(logps):
        column = getattr(logps, field.name)
        if column is not None:
            yield field.name, column


def _leaves(logps: ResponseLogps) -> ResponseLogps:
    """The same numbers, each column ready to be differentiated by."""
    return replace(logps, **{name: column.detach().requires_grad_() for name, column in _columns(logps)})
