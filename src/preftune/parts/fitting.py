"""Work that does not fit in memory is done again in smaller micro-batches: same mathematics, same numbers.

    attempt: all micro-batches of the step, forward and backward
    out of memory at one of them: forget every gradient of the step, half of its tokens as the budget, attempt anew

Replaying the whole step is what makes it exact: a backward that stopped half-way has added to some gradients and not to
others, and only a second copy of all gradients could tell which. It costs part of a step, once for each halving of a
run, because the lowered budget stays. Denominators belong to the step, so no other number depends on the budget.

Answers that are drawn are a function of seed and prompt, so half of them at a time are the same: `DrawBudget`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from preftune.engine.memory import out_of_memory
from preftune.errors import RunError
from preftune.tensors import PackedBatch, TokenGroup

__all__ = ["Budget", "DrawBudget", "attempt", "attempt_in_step", "shorter_answers"]

T = TypeVar("T")


def shorter_rows(row: TokenGroup, fitted: int) -> str:
    """The --max_length with which the row fits: prompt + responses <= that many times the longest of them."""
    length = fitted // len(row.responses)
    known = f"{fitted} tokens did fit: set --max_length {length}" if length > 1 else "set --max_length lower"
    return f"{known}, with --truncation"


def shorter_answers(row: TokenGroup, fitted: int) -> str:
    """The --max_tokens with which a prompt's own answers fit."""
    length = (fitted - len(row.prompt)) // len(row.responses)
    known = f"{fitted} tokens did fit: set --max_tokens {length}" if length > 0 else "set --max_tokens lower"
    return f"{known}, or a lower --n"


@dataclass
class Budget:
    """What memory has been seen to hold: shared by everything that is computed in one run."""

    note: Callable[[str], object] = print
    limit: int | None = None
    """At most so many tokens at once, lower than asked for; None: as asked for."""
    fitted: int = 0
    """The most tokens of a micro-batch that went through."""
    shorter: Callable[[TokenGroup, int], str] = shorter_rows
    """(row, tokens that did fit) -> the setting that makes such rows shorter."""

    def below(self, failed: PackedBatch) -> None:
        """Lower the limit to half of what did not fit. Raises RunError when that is a single row already."""
        tokens = failed.input_ids.numel()
        if len(failed.groups) > 1:
            self.limit = tokens // 2
            self.note(
                f"out of memory at {tokens} tokens: done anew, and the run goes on, with at most {self.limit} at "
                f"once (next time: --tokens_per_batch {self.limit})"
            )
            return
        raise RunError(self.alone(failed))

    def alone(self, failed: PackedBatch) -> str:
        """What to do about a single row that does not fit."""
        (row,) = failed.groups
        return (
            f"{row.origin or 'a row'}: out of memory with this row alone, {failed.input_ids.numel()} tokens with its "
            f"{len(row.responses)} responses. {self.shorter(row, self.fitted)}, or --activation_checkpointing full"
        )


@dataclass
class DrawBudget:
    """How many answers memory has been seen to hold while they are drawn: shared by all draws of one run."""

    note: Callable[[str], object] = print
    setting: Callable[[int], str] | None = None
    """Answers at once -> the setting that asks for so many; None: there is none."""
    limit: int | None = None
    """At most so many at once, fewer than asked for; None: as asked for."""

    def gave_out(self, error: BaseException) -> bool:
        """Is it for lack of memory? Everything else is not answered by fewer answers."""
        return out_of_memory(error)

    def lower(self, answers: int, *, prompt: str, tokens: int, drawn: int) -> None:
        """Halve what did not fit. Raises RunError when that is one answer already, cut off after `drawn` tokens."""
        _release()
        if answers == 1:
            fits = f"{drawn} did fit: set --max_tokens {drawn}" if drawn else "leave it out, or shorten it"
            raise RunError(
                f"{prompt}: out of memory with one response alone, its prompt {tokens} tokens and {drawn} drawn; {fits}"
            )
        self.limit = answers // 2
        hint = f" (next time: {self.setting(self.limit)})" if self.setting else ""
        self.note(
            f"out of memory while {answers} responses were drawn at once: these are drawn anew, and the run goes on, "
            f"with at most {self.limit}{hint}"
        )


def _release() -> None:
    """Give back what a failed attempt has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _InHand(Sequence[PackedBatch]):
    """Micro-batches, of which one is being worked on."""

    batches: Sequence[PackedBatch]
    at: PackedBatch | None = None
    before: list[PackedBatch] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: Any) -> Any:
        return self.batches[i]

    def __iter__(self) -> Iterator[PackedBatch]:
        self.before = []
        for batch in self.batches:
            self.at = batch
            yield batch
            self.before.append(batch)
        self.at = None

    def note_fitted(self, budget: Budget) -> None:
        """What was gone through counts as fitted."""
        budget.fitted = max([budget.fitted, *(batch.input_ids.numel() for batch in self.before)])


def attempt_in_step(batches: Sequence[PackedBatch], work: Callable[[Sequence[PackedBatch]], T], budget: Budget) -> T:
    """What `work` makes of the batches where other processes compute beside it: they cannot be made to start anew.

    Raises RunError, naming row and setting, when memory gives out.
    """
    given = _InHand(batches)
    try:
        result = work(given)
    except (RuntimeError, MemoryError) as error:
        if given.at is None or not out_of_memory(error):
            raise
        given.note_fitted(budget)
        raise RunError(_in_step(given.at, budget)) from error
    given.note_fitted(budget)
    return result


def _in_step(failed: PackedBatch, budget: Budget) -> str:
    tokens, rows = failed.input_ids.numel(), failed.groups
    if len(rows) == 1:
        return f"{budget.alone(failed)}, and go on with --resume"
    longest = max(rows, key=lambda row: len(row.prompt) + sum(map(len, row.responses)), default=None)
    among = f", {len(rows)} rows, the longest of them {longest.origin or 'without a name'}" if longest else ""
    return (
        f"out of memory at {tokens} tokens{among}, and with sharded weights no process can do a step anew by itself; "
        f"set --tokens_per_batch {tokens // 2}, or --activation_checkpointing full, and go on with --resume"
    )


def attempt(
    batches: Callable[[], Sequence[PackedBatch]],
    work: Callable[[Sequence[PackedBatch]], T],
    budget: Budget,
    forget: Callable[[], None],
) -> T:
    """What `work` makes of the batches, cut smaller until it fits; before each new attempt `forget` undoes the last.

    `work` iterates over what it is given and keeps nothing of a failed attempt. Raises RunError, naming row and
    setting, when a single row does not fit.
    """
    while True:
        given = _InHand(batches())
        try:
            result = work(given)
        except (RuntimeError, MemoryError) as error:
            if given.at is None or not out_of_memory(error):
                raise
        else:
            given.note_fitted(budget)
            return result
        # Outside of `except`: the traceback, which holds the activations, is gone.
        forget()
        _release()
        given.note_fitted(budget)
        budget.below(given.at)
