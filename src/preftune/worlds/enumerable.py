"""A language so small that a policy is a table: 8 letters, 64 prompts, every response enumerable, every law exact.

    prompt     two letters, "ca"
    response   one to five letters, "fab", drawn letter by letter from a random Markov grammar
    score      sum over the response's letters of value(letter), negated where the letter before is the negation
    reward     "sum": the score;  "mean": score / letters, length-neutral;  "sigmoid": 1 / (1 + exp(-score)) in (0, 1)

The negation flips whatever follows, the last letter of the prompt included, so the reward is no sum over letters and
depends on the prompt. Labels come from a known law too (`Labels`), so the policy that a loss must converge to can be
computed and compared with what training arrives at.

Completions are [M, T] token ids filled up with the end of sequence, as `theory.enumerable` lists them; a string of T
letters is cut there, its law needs no end of sequence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

import torch
from torch import Tensor

from preftune.models.fresh import letter_tokenizer, tiny_llama
from preftune.records import Demonstration, RankedResponses, Response

__all__ = [
    "EOS_ID",
    "LETTERS",
    "Comparisons",
    "Labels",
    "World",
    "compare",
    "random_world",
    "write_model",
    "write_rows",
]

LETTERS = ascii_lowercase[:8]
EOS_ID = len(LETTERS)
FOLLOWERS = 4  # letters that usually follow a letter
NOISE = 0.02  # of the grammar's mass spread over all letters: nothing is impossible, most is rare


@dataclass(frozen=True, eq=False, slots=True)
class World:
    """A grammar, a reward and the texts between them; made by `random_world`."""

    transitions: Tensor
    """[8, 9] float64 P(next | letter before), the last column the end; the first letter of a response is no end."""
    values: Tensor
    """[8] float64 the hidden lexicon; 0 for the negation."""
    negation: int
    """Which letter flips the value of the one after it."""
    kind: Literal["sum", "mean", "sigmoid"]
    max_tokens: int
    """T: responses are cut after so many letters."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All 64 prompts, in alphabetical order."""
        return tuple("".join(pair) for pair in product(LETTERS, repeat=2))

    def ids(self, letters: str) -> list[int]:
        """Token ids of letters, as they stand in a completion. Raises ValueError on any other character."""
        return [LETTERS.index(letter) for letter in letters]

    def prompt_ids(self, prompt: str) -> list[int]:
        """What a model is given for a prompt: the mark and two letters, as the tokenizer writes them."""
        return [EOS_ID, *self.ids(prompt)]

    def texts(self, tokens: Tensor) -> list[str]:
        """The text of every completion of `tokens` [M, T]."""
        return ["".join(LETTERS[i] for i in row if i != EOS_ID) for row in tokens.tolist()]

    def letters(self, tokens: Tensor) -> Tensor:
        """[M] float64 how many letters each completion has, the end of sequence not counted."""
        return (tokens != EOS_ID).sum(-1).double()

    def rewards(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, M] float64 r(x, y), for any completions `tokens` [M, T]; 0 for the empty one unless kind is sigmoid."""
        value = torch.cat([self.values, self.values.new_zeros(1)])[tokens]
        scores = torch.stack([(value * self._signs(prompt, tokens)).sum(-1) for prompt in prompts])
        if self.kind == "sum":
            return scores
        return torch.sigmoid(scores) if self.kind == "sigmoid" else scores / self.letters(tokens).clamp(min=1)

    def grammar_logps(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, M] log-probs of completions under the grammar itself, float64: a tabular reference without a model."""
        ended_before = (tokens == EOS_ID).cumsum(-1) - (tokens == EOS_ID).long() > 0
        laws = []
        for prompt in prompts:
            before = self._before(prompt, tokens).clamp(max=EOS_ID - 1)  # rows behind the end are masked below
            step = self.transitions.log()[before, tokens]
            step[:, 0] = self._opening(prompt).log()[tokens[:, 0]]
            laws.append(torch.where(ended_before, 0.0, step).sum(-1))
        return torch.stack(laws)

    def demonstrations(self, prompts: Sequence[str], per_prompt: int, *, seed: int) -> list[Demonstration]:
        """`per_prompt` draws from the grammar for every prompt; equal ones are one row whose weight counts them."""
        g = torch.Generator().manual_seed(seed)
        rows = []
        for prompt in prompts:
            last = torch.multinomial(self._opening(prompt), per_prompt, replacement=True, generator=g)
            written = [last]
            for _ in range(self.max_tokens - 1):
                drawn = torch.multinomial(self.transitions[last.clamp(max=EOS_ID - 1)], 1, generator=g)[:, 0]
                last = torch.where(last == EOS_ID, last, drawn)
                written.append(last)
            for text, count in sorted(Counter(self.texts(torch.stack(written, -1))).items()):
                response = Response(text=text, provenance=f"grammar, seed {seed}")
                rows.append(Demonstration(prompt=prompt, response=response, weight=count))
        return rows

    def preferences(self, prompts: Sequence[str], tokens: Tensor, comparisons: Comparisons) -> list[RankedResponses]:
        """Comparisons as records: one per (prompt, chosen, rejected), its weight the number of times it was said.

        Labels are draws, so both orders of a pair may occur; those who prefer one response and those who prefer the
        other are different annotators, which is how the doctor tells a disagreement from a contradiction.
        A string that the limit cut off is not `finished`. Pairs with the empty response are left out: there is no row
        for an answer without text.
        """
        texts, finished = self.texts(tokens), (tokens[:, -1] == EOS_ID).tolist()
        said = torch.stack([comparisons.prompt, comparisons.chosen, comparisons.rejected], -1)
        distinct, counts = said.unique(dim=0, return_counts=True)
        return [
            RankedResponses(
                prompt=prompts[x],
                responses=tuple(Response(text=texts[y], finished=finished[y]) for y in pair),
                ranks=(1, 2),
                weight=float(count),
                annotator=f"those who prefer {texts[pair[0]]}",
            )
            for (x, *pair), count in zip(distinct.tolist(), counts.tolist(), strict=True)
            if texts[pair[0]] and texts[pair[1]]
        ]

    def _before(self, prompt: str, tokens: Tensor) -> Tensor:
        """[M, T] the token before each token: the prompt's last letter first."""
        last = torch.full((len(tokens), 1), self.ids(prompt)[-1], device=tokens.device)
        return torch.cat([last, tokens[:, :-1]], dim=1)

    def _signs(self, prompt: str, tokens: Tensor) -> Tensor:
        return torch.where(self._before(prompt, tokens) == self.negation, -1.0, 1.0).double()

    def _opening(self, prompt: str) -> Tensor:
        """[9] law of a response's first letter: the grammar's, given that something is said."""
        law = self.transitions[self.ids(prompt)[-1]].clone()
        law[EOS_ID] = 0.0
        return law / law.sum()


def random_world(
    seed: int, *, reward: Literal["sum", "mean", "sigmoid"] = "sum", max_tokens: int = 5, scale: float = 1.0
) -> World:
    """A world as a function of the seed: the same grammar and lexicon for every kind of reward and every limit.

    After each letter come 4 others with random weights and the end with a probability in [0.15, 0.35]; 2 % is spread
    over all letters. Values are normal with deviation `scale`; the negation is a letter that often follows others.
    """
    g = torch.Generator().manual_seed(seed)
    size = len(LETTERS)
    usual = torch.stack([torch.randperm(size, generator=g)[:FOLLOWERS] for _ in range(size)])
    weights = torch.rand(size, FOLLOWERS, generator=g, dtype=torch.float64) + 0.1
    law = torch.zeros(size, size, dtype=torch.float64).scatter(1, usual, weights / weights.sum(-1, keepdim=True))
    law = (1 - NOISE) * law + NOISE / size
    end = 0.15 + 0.2 * torch.rand(size, 1, generator=g, dtype=torch.float64)
    values = scale * torch.randn(size, generator=g, dtype=torch.float64)
    negation = int(law.sum(0).argmax())
    values[negation] = 0.0
    return World(torch.cat([law * (1 - end), end], dim=1), values, negation, reward, max_tokens)


@dataclass(frozen=True, slots=True)
class Labels:
    """Who prefers what: P(first preferred) = (1 - 2 flip) sigmoid(u_1 - u_2) + flip, u = scale r + length_bias letters.

    `Labels()` is Bradley-Terry with the reward itself, and `deterministic` its limit: the larger u always wins,
    equal ones tie. `flip` in [0, 0.5) turns that share of labels around; `length_bias` is worth of one letter.
    Without `flip` and `deterministic`, labels follow Bradley-Terry with `utility` as the reward, so DPO's optimum is
    the optimal policy for `utility`.
    """

    scale: float = 1.0
    flip: float = 0.0
    length_bias: float = 0.0
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.flip < 0.5 and self.scale > 0):
            raise ValueError(f"labels need flip in [0, 0.5) and scale > 0, not {self.flip} and {self.scale}")

    def utility(self, rewards: Tensor, letters: Tensor) -> Tensor:
        """What is compared, [..., M]: scale * reward + length_bias * letters."""
        return self.scale * rewards + self.length_bias * letters

    def probability(self, first: Tensor, second: Tensor) -> Tensor:
        """P(first preferred) for utilities that broadcast: `u[:, None], u[None]` gives the whole matrix."""
        gap = first - second
        clean = torch.heaviside(gap, gap.new_tensor(0.5)) if self.deterministic else torch.sigmoid(gap)
        return (1 - 2 * self.flip) * clean + self.flip


@dataclass(frozen=True, eq=False, slots=True)
class Comparisons:
    """N labelled pairs as positions."""

    prompt: Tensor
    """[N] int64 position into the prompts."""
    chosen: Tensor
    """[N] int64 position into the completions."""
    rejected: Tensor
    """[N] int64 the same."""


def compare(logps: Tensor, utilities: Tensor, labels: Labels, *, per_prompt: int, seed: int) -> Comparisons:
    """Two independent draws y_1, y_2 ~ exp(logps) and a label, `per_prompt` times for every prompt.

    `logps`, `utilities`: [P, M]; the result is a function of them and the seed. Equal draws say nothing and are left
    out, and so are equal utilities where labels are deterministic: a tie has no winner.
    """
    g = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(logps.exp(), 2 * per_prompt, replacement=True, generator=g)
    first, second = drawn.unflatten(-1, (per_prompt, 2)).unbind(-1)
    u_first, u_second = utilities.gather(-1, first), utilities.gather(-1, second)
    preferred = torch.rand(first.shape, generator=g, dtype=torch.float64) < labels.probability(u_first, u_second)
    says = (first != second) & ~(labels.deterministic & (u_first == u_second))
    prompt = torch.arange(len(logps))[:, None].expand_as(first)
    chosen, rejected = torch.where(preferred, first, second), torch.where(preferred, second, first)
    return Comparisons(prompt[says], chosen[says], rejected[says])


def write_model(folder: Path, *, hidden: int = 48, layers: int = 2, seed: int = 0) -> None:
    """A fresh transformer over the world's 9 tokens and its tokenizer, as a Hugging Face folder: 8 letters and a mark.

    The defaults give about 61 thousand parameters in float32. Every token it can write is a letter or the end, so
    its completions are exactly those that can be enumerated.
    """
    model = tiny_llama(EOS_ID + 1, hidden=hidden, layers=layers, positions=16, seed=seed, bos_id=EOS_ID, eos_id=EOS_ID)
    model.save_pretrained(folder)
    letter_tokenizer(len(LETTERS)).save_pretrained(folder)


def write_rows(path: Path, records: Iterable[Demonstration | RankedResponses]) -> None:
    """Records as the JSON lines that `preftune sft` (prompt, completion) and `preftune dpo` (trl) read, with weights.

    Files hold texts, and a text in a file is a finished response.
    """
    lines = []
    for record in records:
        row: dict[str, object] = {"prompt": record.prompt}
        if isinstance(record, Demonstration):
            row["completion"] = record.response.text
        else:
            row |= {"chosen": record.responses[0].text, "rejected": record.responses[1].text}
            row["annotator"] = record.annotator
        lines.append(json.dumps(row | {"weight": record.weight}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
