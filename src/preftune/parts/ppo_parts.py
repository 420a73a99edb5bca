"""The parts of RLHF before the first step: prompts read, and the models that stand beside the policy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.config.rl import PpoConfig
from preftune.data.prompts import distinct_prompts
from preftune.data.sources import open_source
from preftune.engine.optim import Optimizer
from preftune.engine.parallel import ALONE, World
from preftune.engine.run import Run
from preftune.engine.sharding import own_part, weights_of
from preftune.errors import ConfigError, DataError, RunError
from preftune.judges.scores import Scorer
from preftune.models.folder import of_run
from preftune.models.generate import encode_prompt
from preftune.models.load import LoadedModel
from preftune.models.reward_head import load_reward_model
from preftune.models.value_head import critic_of, with_value_head
from preftune.parts.adapting import to_train
from preftune.parts.common import Batching, open_model
from preftune.parts.fitting import Budget, DrawBudget, shorter_answers
from preftune.parts.policy_step import Learner
from preftune.parts.reference import anchor
from preftune.parts.rollouts import Models, Sampling, answered
from preftune.parts.room import Reader, with_room
from preftune.parts.scoring import open_scorer
from preftune.records import Prompt
from preftune.tensors import TokenGroup

__all__ = [
    "Asked",
    "Within",
    "critic_learner",
    "draw_seed",
    "open_models",
    "open_reward",
    "read_prompts",
    "reference_scores",
    "sampling_of",
]

Asked = list[tuple[TokenGroup, Prompt]]
"""Prompts as tokens, without responses yet, and as they were read."""


def open_models(cfg: PpoConfig, run: Run) -> tuple[LoadedModel, Models, Batching]:
    """The policy, with reference and critic beside it; rows are packed where all of them take packed rows.

    Raises ConfigError when one of them has another vocabulary than the policy.
    """
    policy, batching = open_model(cfg.model, cfg, run, read=to_train(cfg, cfg.seed))
    other, theirs = anchor(cfg, policy, batching, run)
    rows = [len(m.model.get_input_embeddings().weight) for m in (other, policy)]
    if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise ConfigError(
            f"reference {cfg.reference} has another vocabulary than model {cfg.model}: log-probs of different "
            "tokens cannot be compared; choose a reference with the model's tokenizer"
        )
    packed, critic = batching.packed and theirs.packed, None
    if cfg.algorithm == "ppo":
        critic, theirs = _critic(cfg, policy, batching, run)
        packed = packed and theirs.packed
    batching = replace(batching, packed=packed, budget=Budget(run.own_note, shorter=shorter_answers))
    return policy, Models(policy.model, other.model, critic, policy.tokenizer), batching


def _critic(cfg: PpoConfig, policy: LoadedModel, batching: Batching, run: Run) -> tuple[Any, Batching]:
    """A copy of the model of `--critic`, else of the reward model, else of the policy, with a value head."""
    kind, _, rest = cfg.reward.partition(":")
    named = cfg.critic or (rest if kind == "reward" else None)

    def of_policy(why: str = "") -> tuple[Any, Batching]:
        run.note(f"critic: a copy of the policy, value 0 everywhere{why}")
        if not batching.sharded:
            return critic_of(policy.model), batching
        again, theirs = open_model(cfg.model, cfg, run, role="critic", read=_valued(to_train(cfg, cfg.seed)))
        return again.model, theirs

    if named is None:
        return of_policy()
    folder = str(of_run(Path(named)))
    read = to_train(cfg, cfg.seed, partial(load_reward_model, seed=cfg.seed))
    loaded, theirs = open_model(folder, cfg, run, role="critic", read=_valued(read))
    if policy.tokenizer.get_vocab().items() <= loaded.tokenizer.get_vocab().items():
        run.note(f"critic: a copy of {folder}, value 0 everywhere")
        return loaded.model, theirs
    if cfg.critic:
        raise ConfigError(
            f"critic {cfg.critic} does not know the vocabulary of model {cfg.model}: it reads the policy's tokens; "
            "choose one with the model's tokenizer, or leave critic out"
        )
    return of_policy(", because the reward model has another vocabulary")


def _valued(read: Callable[..., LoadedModel]) -> Callable[..., LoadedModel]:
    """`read`, with a value head in place of the model's."""

    def prepared(name: str | Path, **options: Any) -> LoadedModel:
        loaded = read(name, **options)
        return replace(loaded, model=with_value_head(loaded.model))

    return prepared


def open_reward(cfg: PpoConfig, policy: LoadedModel, batching: Batching, run: Run) -> Scorer:
    """What scores responses, on the policy's device and in its dtype; its weights go into the run's card."""
    score = open_scorer(
        cfg.reward, device=batching.device, dtype=policy.model.dtype, tokens_per_batch=cfg.tokens_per_batch,
        allow_code=cfg.allow_python, role="reward",
    )  # fmt: skip
    run.record(hashes=_reward_hashes(cfg))
    return score


def _reward_hashes(cfg: PpoConfig) -> dict[str, str]:
    """SHA-256 of the weights that score, where the reward is learned: a resumed run must find the same."""
    kind, _, rest = cfg.reward.partition(":")
    if kind not in ("reward", "policy"):
        return {}
    digest = hashlib.sha256()
    for path in sorted(of_run(Path(rest.partition(",")[0])).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"reward_weights": digest.hexdigest()}


def read_prompts(
    path: str, role: str, cfg: PpoConfig, run: Run, policy: Reader, held_out: Asked | None = None
) -> Asked:
    """The prompts of a file, each once and none of the held-out ones, all accounted for in the run card.

    One that leaves no room for a response is refused with its row. Raises DataError on more refused rows than
    `allow_refused`, or when no prompt is left.
    """
    source = open_source(path, kind="prompts", format=cfg.format)
    found = with_room(distinct_prompts(iter(source)), [policy], cfg.max_tokens)
    without = {prompt for _, prompt in held_out or ()}
    kept = [(prompt, origin) for prompt, origin in found.prompts if prompt not in without]
    shared, refused = len(found.prompts) - len(kept), len(found.refusals)
    facts = {"path": path, "format": source.format, "sha256": source.sha256, "held_out": shared, "truncated": 0}
    facts |= {"rows": len(found.prompts) + found.duplicates + refused, "used": len(kept), "refused": refused}
    run.record(data={role: facts | {"duplicate": found.duplicates}})
    run.note(
        f"{role} prompts {path}: {source.format}, {len(kept)} prompts, {found.duplicates} duplicates, "
        f"{refused} refused, {shared} held out"
    )
    for refusal in found.refusals:
        run.warn(str(refusal))
    if refused > cfg.allow_refused or not kept:
        raise DataError(
            f"{path}: {refused} rows are refused, {cfg.allow_refused} allowed, and {len(kept)} prompts are left; "
            f"mend the rows named above, or do without them: --allow_refused {refused}"
        )
    return [(TokenGroup(_ids(encode_prompt(policy.tokenizer, prompt)), (), origin=at), prompt) for prompt, at in kept]


@dataclass(frozen=True)
class Within:
    """The last policy measured within the KL budget, and so the result when the next one is not; empty without one."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, policy: nn.Module, max_kl: float | None) -> Within:
        named = weights_of(policy) if max_kl is not None else ()
        return cls({f"within/{name}": weight.detach().clone() for name, weight in named if weight.requires_grad})

    @torch.no_grad()
    def keep(self, policy: nn.Module) -> None:
        for mine, weight in zip(self.tensors.values(), _trained(policy), strict=bool(self.tensors)):
            own_part(mine)[0].copy_(own_part(weight)[0])

    @torch.no_grad()
    def restore(self, policy: nn.Module) -> None:
        for mine, weight in zip(self.tensors.values(), _trained(policy), strict=True):
            own_part(weight)[0].copy_(own_part(mine)[0])


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (weight for _, weight in weights_of(model) if weight.requires_grad)


def critic_learner(cfg: PpoConfig, models: Models, world: World = ALONE) -> Learner | None:
    """The critic with an optimizer like the policy's; None for RLOO."""
    if models.critic is None:
        return None
    optimizer = Optimizer(
        models.critic,
        name=cfg.optimizer,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        seed=cfg.seed,
        world=world,
    )
    return Learner(models.critic, optimizer)


def sampling_of(cfg: PpoConfig, asked: Asked, run: Run) -> Sampling:
    """As many responses at once as fit `tokens_per_batch`, at least one."""
    longest = max(len(group.prompt) for group, _ in asked) + cfg.max_tokens
    return Sampling(
        n=cfg.n,
        temperature=cfg.temperature,
        max_tokens=cfg.max_tokens,
        at_once=max(1, cfg.tokens_per_batch // longest),
        budget=DrawBudget(run.own_note, lambda responses: f"--tokens_per_batch {responses * longest}"),
        missing_eos=cfg.missing_eos,
        missing_eos_value=cfg.eos_value(),
    )


def draw_seed(cfg: PpoConfig, step: int) -> int:
    """Of the responses of a step, so that a resumed run draws what an uninterrupted one draws; 0 is no step's."""
    return (cfg.seed << 32) + step


def reference_scores(
    cfg: PpoConfig, models: Models, prompts: Sequence[Prompt], reward: Scorer, sampling: Sampling, run: Run
) -> list[float]:
    """Scores of the reference's responses to some prompts: the scale of `--standardise`."""
    _, scores = answered(
        models.reference, models.tokenizer, prompts, reward, sampling, run.world, seed=draw_seed(cfg, 0)
    )
    found = [score for row in scores for score in row if math.isfinite(score)]
    if len(set(found)) < 2:
        raise RunError(f"{len(found)} scores of the reference's responses set no scale; leave standardise out")
    run.note(f"scores are standardised: mean 0, deviation 1 on {len(found)} responses of the reference")
    return found


def _ids(ids: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(ids, dtype=np.int32)
