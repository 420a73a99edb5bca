"""Sampling answers: y ~ pi(. | x), token by token, with a key-value cache.

Every answer has random numbers of its own, a function of (seed, prompt's tokens, answer's number), and a token is
the inverse of the cumulative distribution at one of them. So the answers depend neither on the batch size nor on
what else is asked (up to floating-point rounding of the model itself), and the global random numbers are neither
read nor moved. The prompt itself and not its position: a list of prompts may be reordered, extended or continued.
A prompt is computed once for its n answers; a finished answer leaves the batch. What memory does not hold at once is
drawn again in halves, down to a single answer, and is the same.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.errors import ConfigError, NotFinite
from preftune.models.attention import own_attention
from preftune.records import Prompt, Response, from_json, to_json

__all__ = ["Budget", "Drawn", "draw", "encode_prompt", "plan", "sample"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One answer with its tokens: a text read again may be other tokens than those that were drawn."""

    prompt: tuple[int, ...]
    """Ids that the model was asked with."""
    ids: tuple[int, ...]
    """Ids drawn, the stop id included where there was one."""
    logps: tuple[float, ...]
    """Log-prob of each under the sampler, nats."""
    response: Response

    def told(self) -> list[Any]:
        """As JSON values, exact: what one process tells another."""
        return [self.prompt, self.ids, self.logps, to_json(self.response)]

    @classmethod
    def of(cls, told: Sequence[Any]) -> Drawn:
        """The inverse of `told`, after a round trip through JSON too."""
        prompt, ids, logps, response = told
        return cls(tuple(prompt), tuple(ids), tuple(logps), from_json(response))


class Budget(Protocol):
    """What memory turns out to hold, shared by all draws of a run: `parts.fitting.DrawBudget`."""

    limit: int | None
    """At most so many answers at once; None: as many as are asked for."""

    def gave_out(self, error: BaseException) -> bool:
        """Is it for lack of memory?"""
        ...

    def lower(self, answers: int, *, prompt: str, tokens: int, drawn: int) -> None:
        """Set a limit below so many answers. Raises RunError when it is one, to this prompt of so many tokens."""
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """What is drawn at once: answers to prompts, both by their places."""

    rows: Sequence[int]
    which: range
    written: list[list[int]] = field(default_factory=list)
    """Ids of each answer, as far as it got; answers to one prompt stand together."""
    logps: list[list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows) * len(self.which)

    def halves(self) -> list[_Part]:
        """The first prompts and the others; of one prompt the first answers and the others."""
        if len(self.rows) > 1:
            half = len(self.rows) // 2
            return [_Part(rows, self.which) for rows in (self.rows[:half], self.rows[half:])]
        half = len(self.which) // 2
        return [_Part(self.rows, which) for which in (self.which[:half], self.which[half:])]


def sample(model: Any, tokenizer: Any, prompts: Sequence[Prompt], **settings: Any) -> list[list[Response]]:
    """The responses of `draw`, which has the settings and their meaning."""
    return [[drawn.response for drawn in answers] for answers in draw(model, tokenizer, prompts, **settings)]


def draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 64,
    seed: int = 0,
    first: int = 0,
    writer: str = "",
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda prompts: None,
    budget: Budget | None = None,
    origins: Sequence[str] = (),
) -> list[list[Drawn]]:
    """`n` answers to every prompt, in the order of the prompts, each with its log-prob under this very sampler.

    `temperature` divides the logits, 0 takes the most likely token; `top_p` keeps the smallest set of most likely
    tokens whose probability reaches it. `max_tokens` ends an answer, which then is not `finished`. Answers are numbered
    from `first`; where a prompt stands twice in the list, its second place gets the next `n`. `writer` names the
    model in the provenance (none: its path); `batch_size` counts answers; `progress` is told how many prompts were
    just answered. With `budget`, answers for which memory gives out are drawn again in halves, and then no more than
    its limit at once; `origins` are what its messages call the prompts. A text prompt is encoded by the tokenizer, a
    conversation by its chat template. Texts hold no special tokens. `logp` is of the tempered and cut law, so at
    temperature 1 and top_p 1 it is log pi(y | x).
    Raises ConfigError on a value out of range or a prompt that leaves the model no room.
    """
    _check(n=n, temperature=temperature, top_p=top_p, max_tokens=max_tokens, batch_size=batch_size)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    batches = _batches(model, encoded, n, max_tokens, batch_size)
    stops = _stop_ids(model, tokenizer)
    name = quote(writer or model.name_or_path or model.config.model_type, safe="/:.-_")
    settings = f"temperature={temperature:g} top_p={top_p:g} max_tokens={max_tokens} seed={seed} engine=local"
    numbers = _numbers(encoded, first, n)
    answers: list[list[Drawn]] = [[] for _ in prompts]

    def compute(part: _Part) -> None:
        streams = [_stream(seed, encoded[row], numbers[row][i]) for row in part.rows for i in part.which]
        uniforms = np.stack([stream.random(max_tokens) for stream in streams])
        _continue(model, [encoded[row] for row in part.rows], part, uniforms, temperature, top_p, stops)

    def called(row: int) -> dict[str, Any]:
        return {"prompt": origins[row] if origins else _quoted(prompts[row]), "tokens": len(encoded[row])}

    with _evaluation(model):
        for rows in batches:
            for part in _fitting(_Part(rows, range(n)), compute, batch_size, budget, called):
                for position, (ids, logps) in enumerate(zip(part.written, part.logps, strict=True)):
                    row, finished = part.rows[position // len(part.which)], ids[-1] in stops
                    text = _text(tokenizer, encoded[row], ids[:-1] if finished else ids)
                    provenance = f"model={name} {settings} tokens={len(ids)}"
                    response = Response(text=text, finished=finished, provenance=provenance, logp=math.fsum(logps))
                    answers[row].append(Drawn(tuple(encoded[row]), tuple(ids), tuple(logps), response))
            progress(len(rows))
    return answers


def _fitting(
    part: _Part,
    compute: Callable[[_Part], None],
    most: int,
    budget: Budget | None,
    called: Callable[[int], dict[str, Any]],
) -> Iterator[_Part]:
    """The part computed, or its halves in their order where it is more than `most` answers or than the budget.

    `called`: what a message tells of a prompt.
    """
    left = [part]
    while left:
        part = left.pop()
        if len(part) > min(most, (budget and budget.limit) or most):
            left += reversed(part.halves())
            continue
        try:
            compute(part)
        except (RuntimeError, MemoryError) as error:
            if budget is None or not budget.gave_out(error):
                raise
        else:
            yield part
            continue
        # Outside of `except`: the traceback, which holds the cache, is gone.
        budget.lower(len(part), **called(part.rows[0]), drawn=max(map(len, part.written), default=0))
        left.append(part)  # which is too large now


def plan(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, n: int, max_tokens: int, batch_size: int
) -> list[list[int]]:
    """The batches of `sample` as positions in `prompts`, before anything is computed: short prompts first.

    `sample` of one batch's prompts computes it alike, with the numbers of the whole call to the last digit.
    Raises ConfigError when a prompt leaves the model no room.
    """
    return _batches(model, [encode_prompt(tokenizer, prompt) for prompt in prompts], n, max_tokens, batch_size)


def _batches(model: Any, encoded: Sequence[Sequence[int]], n: int, max_tokens: int, batch_size: int) -> list[list[int]]:
    """Prompts of like length together, so that little is padded: each prompt's n answers in one batch."""
    _check_room(model, max(map(len, encoded), default=0), max_tokens)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    at_once = max(1, batch_size // n)
    return [order[start : start + at_once] for start in range(0, len(order), at_once)]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt's ids with what the tokenizer puts in front; what it would put behind (EOS) would end the prompt."""
    if not isinstance(prompt, str):
        messages = [{"role": message.role, "content": message.content} for message in prompt]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    bare, whole = (list(tokenizer(prompt, add_special_tokens=special)["input_ids"]) for special in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    nothing = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return whole[: start + len(bare)] or [nothing]


def _numbers(encoded: Sequence[Sequence[int]], first: int, n: int) -> list[range]:
    """The numbers of the answers at every place of the list: a prompt's second place goes on where its first ended."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for ids in map(tuple, encoded):
        numbers.append(range(first + seen[ids], first + seen[ids] + n))
        seen[ids] += n
    return numbers


def _stream(seed: int, prompt: Sequence[int], number: int) -> np.random.Generator:
    """The random numbers of one answer."""
    content = hashlib.sha256(np.array(prompt, dtype="<i8").tobytes()).digest()
    return np.random.default_rng((seed, int.from_bytes(content[:16], "little"), number))


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Inside, the model runs without dropout and with its own attention; both are as before afterwards."""
    training = model.training
    model.eval()
    try:
        with own_attention(model):
            yield
    finally:
        model.train(training)


@torch.no_grad()
def _continue(
    model: Any,
    prompts: Sequence[Sequence[int]],
    part: _Part,
    uniforms: NDArray[np.float64],
    temperature: float,
    top_p: float,
    stops: frozenset[int],
) -> None:
    """Write into `part` the ids of its answers, a stop id included where one was drawn, and the log-prob of each id.

    `uniforms` is [answers, tokens].
    """
    device, n, written, logps = model.device, len(part.which), part.written, part.logps
    written += [[] for _ in uniforms]
    logps += [[] for _ in uniforms]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask, position = mask.repeat_interleave(n, 0), positions[:, -1:].repeat_interleave(n, 0)

    alive = np.arange(len(uniforms))  # the answer behind every row of the batch
    for t in range(uniforms.shape[1]):
        chosen, chosen_logps = _draw(logits, torch.from_numpy(uniforms[alive, t]).to(device), temperature, top_p)
        tokens, told = chosen.tolist(), chosen_logps.tolist()
        if not all(map(math.isfinite, told)):
            raise NotFinite(
                f"the model's logits are NaN or infinite where token {t + 1} of an answer is drawn: there is no law to "
                "draw from; its weights are broken, or its dtype is too narrow for them"
            )
        for row, token, logp in zip(alive, tokens, told, strict=True):
            written[row].append(token)
            logps[row].append(logp)
        going = [i for i, token in enumerate(tokens) if token not in stops]
        if not going or t + 1 == uniforms.shape[1]:
            break
        if len(going) < len(tokens):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            alive, chosen, mask, position = alive[going], chosen[keep], mask[keep], position[keep]
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), position + 1
        step = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
        logits = model(input_ids=chosen[:, None], **step).logits[:, -1]


def _draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """[B] ids, the inverse of each row's cumulative distribution at its uniform in [0, 1), and their log-probs.

    A log-prob that is not finite says that the row's logits are no law.
    """
    if temperature == 0:  # one token has all the probability
        likeliest_B = logits_BV.argmax(-1)
        logits_B = logits_BV.gather(-1, likeliest_B[:, None])[:, 0].double()
        return likeliest_B, logits_B - logits_B
    probs = torch.softmax(logits_BV.double() / temperature, dim=-1)
    if top_p < 1:
        ranked, index = probs.sort(dim=-1, descending=True, stable=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # drop what begins at or after the mass top_p
        probs = torch.zeros_like(probs).scatter(-1, index, ranked)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniforms_B.double()[:, None] * total, right=True)
    chosen = chosen.clamp(max=probs.shape[-1] - 1)  # NaN is beyond every token
    return chosen[:, 0], (probs.gather(-1, chosen) / total).log()[:, 0]


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokenizer's end of sequence and whatever else the model's generation settings stop at."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [tokenizer.eos_token_id, *ids] if i is not None)


def _text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """What the answer adds to the prompt's text; decoded apart, many tokenizers would lose its leading space."""
    head = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=True)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(ids, skip_special_tokens=True)


def _quoted(prompt: Prompt) -> str:
    """How a prompt that has no other name begins."""
    text = prompt if isinstance(prompt, str) else prompt[-1].content
    return f"the prompt {text if len(text) <= 60 else f'{text[:57]}...'!r}"


def _check_room(model: Any, longest: int, max_tokens: int) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest + max_tokens > room:
        raise ConfigError(
            f"the longest prompt ({longest} tokens) and max_tokens={max_tokens} exceed the model's {room} positions; "
            + (f"lower max_tokens to {room - longest}" if room > longest else "shorten the prompt")
        )


def _check(*, n: int, temperature: float, top_p: float, max_tokens: int, batch_size: int) -> None:
    for name, value in (("n", n), ("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature} must be 0 (most likely token) or larger")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} must be in (0, 1]; 1 keeps every token")
