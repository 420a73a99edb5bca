"""A trained reward model as a scorer: what the judge `reward:RUN` asks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from preftune.data.answers import answer_groups, readable
from preftune.data.packing import by_group, micro_batches
from preftune.engine.parallel import ALONE, World
from preftune.judges.scores import Scorer
from preftune.models.attention import install
from preftune.models.reward_head import check_ends, check_rewards, load_reward_model, reward
from preftune.records import Prompt, Response
from preftune.tensors import PackedBatch, TokenGroup

__all__ = ["load_scorer"]


def load_scorer(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens_per_batch: int = 8192,
    together: World = ALONE,
) -> Scorer:
    """(prompt, response) -> reward, mean 0 on the reference samples of the run; larger is better, in nats of odds.

    `folder` is a run of `preftune reward` or a model folder in the layout of `models.reward_head`. Texts are rendered
    as in training; a reward does not depend on what else is asked, and an answer that is empty, spells the end of
    sequence or is longer with its prompt than the model has positions has none: NaN. In every call packed rows are
    compared with each sequence alone on the longest question.
    The ranks of `together` make each call at the same time and share its micro-batches.
    Raises ArtifactError when it is no reward model; when called, DataError for a prompt that cannot be rendered.
    """
    loaded = load_reward_model(folder, dtype=dtype, device=device, trained=True)
    model, tokenizer = loaded.model, loaded.tokenizer
    packed = install(model) is None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def batching(groups: Sequence[TokenGroup]) -> Iterator[PackedBatch]:
        cut = micro_batches(
            groups, tokens_per_batch=tokens_per_batch, packed=packed, pad_id=tokenizer.pad_token_id, feed_last=True
        )
        return (batch.to(device) for batch in cut)

    @torch.no_grad()
    def score(asked: Sequence[tuple[Prompt, Response]]) -> list[float]:
        known = readable(tokenizer, asked, longest=positions)
        if not any(known):
            return [math.nan] * len(known)
        groups, places = answer_groups(tokenizer, [one for one, can in zip(asked, known, strict=True) if can])
        check_ends(model, groups)
        tokens = [len(group.prompt) + max(map(len, group.responses)) for group in groups]
        check_rewards(model, next(batching([groups[tokens.index(max(tokens))]])))
        work = lambda batch: reward(model, batch, centred=True).tolist()  # noqa: E731
        rewards: list[list[float]] = by_group(
            groups, batching(groups), lambda batches: together.in_turn(batches, work, "the rewards")
        )
        given = iter([rewards[group][i] for group, i in places])
        return [next(given) if can else math.nan for can in known]

    return score
