"""Every completion of a prompt through a causal LM: the policy as an exact law instead of samples.

With V symbols besides the end of sequence and at most T tokens a prompt has

    M = sum_{t=0..T} V^t         completions: 37,449 for 8 symbols and 5 tokens

the strings of t < T symbols followed by the end of sequence, and the V^T strings of T symbols that the limit cuts off.
That is the law of `models.generate.sample` with `max_tokens` T, finished and unfinished answers alike, and it sums
to 1. Where a completion is said to end at the limit in any case, a cut string is that completion and the end of
sequence behind it has probability 1: the same numbers. Prefixes are fed level by level behind a key-value cache, so
each of the V^(T-1) + ... + 1 of them costs one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune.errors import ConfigError
from preftune.models.attention import own_attention

__all__ = ["Completions", "count_completions", "enumerate_completions"]

BUDGET = 100_000  # completions of one prompt: as float64 laws and tokens, a few megabytes
TOKENS_AT_ONCE = 65_536  # held in the cache, which bounds its memory whatever the number of prefixes


@dataclass(frozen=True, eq=False, slots=True)
class Completions:
    """All M completions of up to T tokens, in one order for every prompt, and their law under one model.

    Shorter ones first; those of one length in the order of their token ids. The functions of `preftune.theory` read
    `logps` as it is, with rewards [M] or [P, M] in the same order.
    """

    logps: Tensor
    """[P, M] log pi(completion | prompt), nats, float64; exp sums to 1 over M."""
    tokens: Tensor
    """[M, T] int64 ids, filled up with the end of sequence."""
    lengths: Tensor
    """[M] int64 completion tokens, the end of sequence included where it was written."""
    finished: Tensor
    """[M] bool: false for the strings that the limit cut off, which hold no end of sequence."""
    symbols: int
    """V: ids besides the end of sequence."""
    eos_id: int

    def position(self, ids: Sequence[int]) -> int:
        """Where a completion stands, its end of sequence given or not. Raises ConfigError when it is none of these."""
        limit = self.tokens.shape[1]
        ended = len(ids) <= limit and list(ids[-1:]) == [self.eos_id]
        string = ids[:-1] if ended else ids
        digits = [i - (i > self.eos_id) for i in string if i != self.eos_id]
        if not len(string) == len(digits) <= limit or not all(0 <= digit < self.symbols for digit in digits):
            raise ConfigError(f"{list(ids)} is no completion of at most {limit} tokens that ends at {self.eos_id}")
        number = sum(digit * self.symbols**place for place, digit in enumerate(reversed(digits)))
        return count_completions(self.symbols, len(digits) - 1) + number


def count_completions(symbols: int, max_tokens: int) -> int:
    """sum_{t=0..T} V^t: completions of at most `max_tokens` tokens over `symbols` symbols and an end of sequence."""
    return sum(symbols**t for t in range(max_tokens + 1))


def enumerate_completions(
    model: Any, prompts: Sequence[Sequence[int]], *, eos_id: int, max_tokens: int, temperature: float = 1.0
) -> Completions:
    """log pi of every completion of every prompt (token ids) under any causal LM, exactly.

    The symbols are all the model's ids but `eos_id`. `temperature` divides the logits of every token, as a sampler
    does: a policy renormalised per token, not pi^(1/temperature) over responses. Arithmetic is float64 from the
    logits on. Differentiable when gradients are enabled, dropout is off, and the model attends as it came.
    Raises ConfigError, naming the count, beyond 100,000 completions, and on a prompt that is empty, leaves the model
    no room or holds an id it does not know.
    """
    vocabulary = len(model.get_input_embeddings().weight)
    _check(model, prompts, vocabulary, eos_id, max_tokens, temperature)
    symbols = torch.tensor([i for i in range(vocabulary) if i != eos_id], device=model.device)
    training = model.training
    model.eval()
    try:
        with own_attention(model):
            after = (_next_logits(model, prompt, symbols, max_tokens) for prompt in prompts)
            laws = [_law(logits, symbols, eos_id, temperature) for logits in after]
    finally:
        model.train(training)

    by_length = [_strings(symbols, t) for t in range(max_tokens + 1)]
    tokens = torch.cat([_filled(strings, max_tokens, eos_id) for strings in by_length])
    written = torch.cat([torch.full((len(strings),), strings.shape[1]) for strings in by_length]).to(model.device)
    finished = written < max_tokens
    return Completions(torch.stack(laws), tokens, written + finished, finished, len(symbols), eos_id)


def _strings(symbols: Tensor, length: int) -> Tensor:
    """[V^length, length] all strings of that many symbols, in the order of their ids."""
    number = torch.arange(len(symbols) ** length, device=symbols.device)
    digits = [number // len(symbols) ** place % len(symbols) for place in reversed(range(length))]
    return symbols[torch.stack(digits, -1)] if digits else symbols.new_empty(1, 0)


def _filled(strings: Tensor, width: int, eos_id: int) -> Tensor:
    return torch.nn.functional.pad(strings, (0, width - strings.shape[1]), value=eos_id)


def _next_logits(model: Any, prompt: Sequence[int], symbols: Tensor, levels: int) -> list[Tensor]:
    """For t = 0 .. levels - 1 the logits after the prompt and every string of t symbols, [V^t, vocabulary]."""
    rows = len(symbols) ** (levels - 1)
    asked = torch.tensor([list(prompt)], device=symbols.device)
    if levels > 1 and rows * (len(prompt) + levels - 1) > TOKENS_AT_ONCE:
        first = model(input_ids=asked, use_cache=False).logits[:, -1]
        parts = [_next_logits(model, [*prompt, symbol], symbols, levels - 1) for symbol in symbols.tolist()]
        return [first, *map(torch.cat, zip(*parts, strict=True))]
    out = model(input_ids=asked, use_cache=levels > 1)
    logits = [out.logits[:, -1]]
    for _ in range(levels - 1):
        cache = out.past_key_values
        cache.batch_repeat_interleave(len(symbols))
        out = model(input_ids=symbols.repeat(len(logits[-1]))[:, None], past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
    return logits


def _law(logits: Sequence[Tensor], symbols: Tensor, eos_id: int, temperature: float) -> Tensor:
    """[M] log-probs of all completions from the logits after all prefixes, by the chain rule, level by level."""
    law = []
    prefix_logps = logits[0].new_zeros(1, dtype=torch.float64)
    for level in logits:
        step = torch.log_softmax(level.double() / temperature, -1)
        law.append(prefix_logps + step[:, eos_id])
        prefix_logps = (prefix_logps[:, None] + step[:, symbols]).flatten()
    return torch.cat([*law, prefix_logps])


def _check(
    model: Any, prompts: Sequence[Sequence[int]], vocabulary: int, eos_id: int, max_tokens: int, temperature: float
) -> None:
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} must be larger than 0")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ConfigError("every prompt needs at least one token, for the first symbol is predicted from something")
    for i in (eos_id, *(i for prompt in prompts for i in prompt)):
        if not 0 <= i < vocabulary:
            raise ConfigError(f"token id {i} is outside the model's vocabulary of {vocabulary}")
    count = count_completions(vocabulary - 1, max_tokens)
    if count > BUDGET:
        raise ConfigError(
            f"{vocabulary - 1} symbols and at most {max_tokens} tokens make {_spelled(count)} completions of a prompt; "
            f"at most {BUDGET:,} are enumerated: take a smaller vocabulary or max_tokens (8 symbols, 5 tokens: 37,449)"
        )
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if room is not None and longest + max_tokens - 1 > room:
        raise ConfigError(f"a prompt of {longest} tokens and {max_tokens - 1} more exceed the model's {room} positions")


def _spelled(count: int) -> str:
    return f"{count:,}" if count < 10**12 else f"10^{math.log10(count):.1f}"
