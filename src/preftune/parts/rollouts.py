"""A rollout: prompts -> responses of the current policy -> scores, log-probs and values, everything an update reads.

    draw          y ~ pi(. | x) at the temperature, the drawn token ids kept as they are           models/generate.py
    scored        r(x, text) of the text up to the end of sequence; NaN: there is no score               a Scorer
    assemble      no end of sequence -> the rule; no score -> the response is left out; for the others
                  log pi, log pi_ref and KL(pi || pi_ref) per token, V(s_t)         models/logprobs.py, value_head.py

`roll_out` does all three. Whoever has scores of its own (an exact world) calls `draw` and `assemble`. Everything is a
function of the weights, the prompts and the seed; no random number state is read or moved.

Legend of shapes: R scored responses, L tokens of the longest, C completion tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from preftune.engine.parallel import World
from preftune.engine.sharding import whole
from preftune.equations.policy_gradient import standardised, with_missing_eos
from preftune.errors import NotFinite, RunError
from preftune.judges.scores import Scorer
from preftune.models.generate import Drawn, draw
from preftune.models.logprobs import score_tokens
from preftune.models.value_head import token_values
from preftune.parts.common import Batching
from preftune.parts.fitting import DrawBudget
from preftune.records import Prompt, Response
from preftune.tensors import Ids, PackedBatch, TokenGroup

__all__ = ["Models", "Rollout", "Sampling", "answered", "assemble", "roll_out", "rows_of", "scored"]


@dataclass(frozen=True)
class Models:
    """Who answers, who anchors, who predicts rewards: three separate models over one vocabulary, dropout off in all."""

    policy: Any
    reference: Any
    """Frozen; never the policy object itself."""
    critic: Any
    """`models.value_head.critic_of` something; None for RLOO, which needs none."""
    tokenizer: Any


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn; the temperature is that of every log-prob and KL too."""

    n: int = 4
    """Responses per prompt."""
    temperature: float = 1.0
    max_tokens: int = 128
    at_once: int = 64
    """Responses computed at once; moves nothing but the last digits."""
    budget: DrawBudget = field(default_factory=DrawBudget)
    """How many memory has been seen to hold, where that is less."""
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    """What becomes of the score of a response that the limit cut off: `equations.policy_gradient.with_missing_eos`."""
    missing_eos_value: float = -1.0


@dataclass(frozen=True, eq=False)
class Rollout:
    """R scored responses of the current policy, rows ordered by group and response; tensors detached, nats."""

    groups: tuple[TokenGroup, ...]
    """Prompts with their scored responses, token for token as drawn; a prompt without any is left out."""
    mask: Tensor
    """[R, L] bool, true on completion tokens."""
    logps: Tensor
    """[R, L] log pi under the weights that drew them, by the path the update takes: the ratio starts at 1."""
    ref_logps: Tensor
    """[R, L] log pi_ref."""
    divergence: Tensor
    """[R, L] KL(pi(. | s_t) || pi_ref(. | s_t)): summed over t, the Rao-Blackwellised KL of a response."""
    values: Tensor | None
    """[R, L] V(s_t); None without critic."""
    scores: Tensor
    """[R] float32, finite, after the rule for a missing end of sequence."""
    finished: Tensor
    """[R] bool."""
    unscored: int
    """Responses that were drawn and left out because they have no score."""
    temperature: float
    """Of the law that was sampled, and of every log-prob here; updates read it, so it cannot differ there."""

    @property
    def kl(self) -> float:
        """KL(pi || pi_ref) of whole responses, nats, estimated from these."""
        return float(self.divergence.sum(-1).double().mean())


def roll_out(
    models: Models,
    prompts: Sequence[Prompt],
    score: Scorer,
    batching: Batching,
    sampling: Sampling,
    *,
    seed: int,
    scale: Sequence[float] | None = None,
    origins: Sequence[str] | None = None,
) -> Rollout:
    """Draw, score, measure. `scale`: scores of reference responses, by which scores are standardised; none: not.
    `origins`: what messages call the prompts.

    Raises RunError when no response has a score, NotFinite on a log-prob or a value that is none.
    """
    drawn, scores = answered(
        models.policy, models.tokenizer, prompts, score, sampling, batching.world, seed=seed, origins=origins
    )
    return assemble(models, drawn, scores, batching, sampling, scale=scale, origins=origins)


def answered(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    score: Scorer,
    sampling: Sampling,
    world: World,
    *,
    seed: int,
    origins: Sequence[str] | None = None,
) -> tuple[list[list[Drawn]], list[list[float]]]:
    """Responses and scores, [prompt][response]; each prompt is answered and scored by one rank and known to all."""
    mine = world.share(range(len(prompts)), lambda i: 1)
    asked = [prompts[i] for i in mine]
    with whole(model, world, "the weights to draw with"):  # each rank draws another number of tokens
        drawn = draw(
            model, tokenizer, asked, n=sampling.n, temperature=sampling.temperature,
            max_tokens=sampling.max_tokens, seed=seed, batch_size=sampling.at_once, budget=sampling.budget,
            origins=[origins[i] for i in mine] if origins else (),
        )  # fmt: skip
    scores = scored(score, asked, drawn)
    if world.size == 1:
        return drawn, scores
    rows = [[i, [one.told() for one in row], found] for i, row, found in zip(mine, drawn, scores, strict=True)]
    joined = sorted(row for part in world.gather(rows, "the rollout") for row in part)
    return [[Drawn.of(told) for told in row] for _, row, _ in joined], [found for *_, found in joined]


def scored(score: Scorer, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Drawn]]) -> list[list[float]]:
    """The scorer's numbers, [prompt][response], of the texts up to the end of sequence and nothing else; NaN: none.

    Raises RunError when the scorer answers something else than it was asked.
    """
    said = [(prompt, one.response) for prompt, row in zip(prompts, drawn, strict=True) for one in row]
    found = score([(prompt, Response(text=r.text, finished=r.finished)) for prompt, r in said])
    if len(found) != len(said):
        raise RunError(f"the reward gave {len(found)} scores for {len(said)} responses; one each is needed")
    values = iter(found)
    return [[float(next(values)) for _ in row] for row in drawn]


def assemble(
    models: Models,
    drawn: Sequence[Sequence[Drawn]],
    scores: Sequence[Sequence[float]],
    batching: Batching,
    sampling: Sampling,
    *,
    scale: Sequence[float] | None = None,
    origins: Sequence[str] | None = None,
) -> Rollout:
    """The rollout of responses with their scores, [prompt][response]; those without a finite one are left out."""
    flat = torch.tensor([value for row in scores for value in row], dtype=torch.float64)
    finished = torch.tensor([one.response.finished for row in drawn for one in row])
    if scale is not None:
        flat = standardised(flat, torch.tensor(scale, dtype=torch.float64))
    flat = with_missing_eos(flat, finished, rule=sampling.missing_eos, value=sampling.missing_eos_value)
    kept = flat.isfinite()
    if not kept.any():
        raise RunError(
            f"none of {len(flat)} responses has a score; look at what the reward makes of this policy's texts"
        )
    keep = iter(kept.tolist())
    rows = [[one for one in row if next(keep)] for row in drawn]
    origins = origins or [f"rollout prompt {i}" for i in range(1, len(rows) + 1)]
    groups = tuple(
        TokenGroup(_ids(row[0].prompt), tuple(_ids(one.ids) for one in row), origin=origin)
        for origin, row in zip(origins, rows, strict=True)
        if row
    )
    mask, table = _measured(models, groups, batching, sampling.temperature)
    logps, ref_logps, divergence, values = table
    return Rollout(
        groups, mask, logps, ref_logps, divergence, None if models.critic is None else values,
        flat[kept].to(logps), finished[kept].to(batching.device), int((~kept).sum()), sampling.temperature,
    )  # fmt: skip


def rows_of(batches: Iterable[PackedBatch], groups: Sequence[TokenGroup]) -> list[Tensor]:
    """For every batch, the rows [r] of a rollout of `groups` that its responses are, in the batch's order."""
    first, start = {}, 0
    for group in groups:
        first[id(group)] = start
        start += len(group.responses)
    return [
        torch.tensor(
            [first[id(group)] + i for group in batch.groups for i in range(len(group.responses))], dtype=torch.int64
        )
        for batch in batches
    ]


@torch.no_grad()
def _measured(
    models: Models, groups: Sequence[TokenGroup], batching: Batching, temperature: float
) -> tuple[Tensor, Tensor]:
    """[R, L] mask, and [4, R, L]: log pi, log pi_ref, KL, V. The path of an update, so that its first ratio is 1."""
    lengths = torch.tensor([len(response) for group in groups for response in group.responses])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    table = torch.zeros(4, *mask.shape, dtype=torch.promote_types(models.policy.dtype, torch.float32))

    def measured(batches: Sequence[PackedBatch]) -> None:
        for batch, rows in zip(batches, rows_of(batches, groups), strict=True):
            # Roles are exchanged: `divergence` is the KL of its reference from its policy, here of pi from pi_ref.
            both = score_tokens(
                models.reference, batch, reference_model=models.policy, divergence=True, temperature=temperature
            )
            assert both.reference is not None and both.divergence is not None
            values = torch.zeros_like(both.logps) if models.critic is None else token_values(models.critic, batch)
            found = torch.stack([both.reference, both.logps, both.divergence, values]).to(table)
            table[:, rows] = table[:, rows].masked_scatter(mask[rows].expand(4, -1, -1), found)

    batching.fit(batching.share(groups), measured)
    batching.world.add_up([table], "the log-probs of the rollout")  # a row is one rank's, and 0 on the others
    if not bool(table.isfinite().all()):
        raise NotFinite("a log-prob or a value of the rollout is NaN or infinite; lower the learning rate")
    return mask.to(batching.device), table.to(batching.device)


def _ids(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int32)
