"""The reward that a DPO run's policy implies, as a scorer: what `policy:RUN[,REFERENCE]` asks.

For losses against a reference   r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)),   exact up to a c(x) where the policy
is the optimum (arXiv 2305.18290 Eq. 5); for others, such as SimPO, the reward of the run's leading loss. The numbers
are those the run itself reports on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from preftune.config.stages import DpoConfig
from preftune.data.answers import answer_groups, readable
from preftune.data.packing import by_group
from preftune.engine.card import read_card
from preftune.engine.parallel import ALONE, World
from preftune.equations.losses import LOSSES
from preftune.equations.objective import Objective, Term
from preftune.errors import ArtifactError, ConfigError
from preftune.judges.scores import Scorer
from preftune.models.attention import install
from preftune.models.load import LoadedModel, load
from preftune.models.logprobs import check_packing
from preftune.parts.common import Batching
from preftune.parts.reference import LiveReference
from preftune.parts.step import Scorer as LogpScorer
from preftune.parts.step import score_all
from preftune.records import Prompt, Response, RunCard

__all__ = ["implicit_reward"]


def implicit_reward(
    run: str | Path,
    reference: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens_per_batch: int = 8192,
    together: World = ALONE,
) -> Scorer:
    """(prompt, response) -> the reward the policy of a `preftune dpo` run implies; larger is better, nats.

    `reference`: folder or hub name; none: the run's own, its `--reference` or else its `--model`, which must still hold
    the weights the run card names. In every call packed rows are compared with each sequence alone on the longest
    question. The ranks of `together` make each call at the same time and share its micro-batches.

    Raises ConfigError when the run is of another stage, has no model yet, or moved its reference, and ArtifactError
    when the reference is gone or another one; when called, as `judges.reward_model.load_scorer`.
    """
    card, cfg = _opened(run)
    objective = Objective(tuple(Term(t.coefficient, LOSSES[t.loss].bind(**t.knobs)) for t in cfg.terms()))
    policy = load(Path(run) / "model", dtype=dtype, device=device)
    frozen = None
    if "reference" in objective.needs:
        anchor = load(reference, dtype=dtype, device=device) if reference else _own_reference(run, card, cfg, policy)
        if anchor.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise ConfigError(f"reference {reference} has another vocabulary than {run}: choose one with its tokenizer")
        frozen = LiveReference(anchor.model.requires_grad_(False), same_weights=False, moves=None)
    elif reference:
        raise ConfigError(f"loss {cfg.loss} of {run} has no reference; write policy:{run}")
    models = [policy.model, *([frozen.model] if frozen else [])]
    packed = all([install(model) is None for model in models])
    pad_id = policy.tokenizer.pad_token_id
    batching = Batching(tokens_per_batch, packed, 0 if pad_id is None else pad_id, torch.device(device))
    scores = LogpScorer(policy.model, objective, frozen)
    positions = min(getattr(m.config.get_text_config(), "max_position_embeddings", None) or math.inf for m in models)

    def score(asked: Sequence[tuple[Prompt, Response]]) -> list[float]:
        known = readable(policy.tokenizer, asked, longest=positions)
        if not any(known):
            return [math.nan] * len(known)
        groups, places = answer_groups(policy.tokenizer, [one for one, can in zip(asked, known, strict=True) if can])
        tokens = [len(group.prompt) + max(map(len, group.responses)) for group in groups]
        longest = groups[tokens.index(max(tokens))]
        for model in models:
            check_packing(model, next(batching([longest])))
        work = lambda batch: objective.reward(score_all(scores, [batch])).tolist()  # noqa: E731
        rewards: list[list[float]] = by_group(
            groups, batching(groups), lambda batches: together.in_turn(batches, work, "the implicit rewards")
        )
        given = iter([rewards[group][i] for group, i in places])
        return [next(given) if can else math.nan for can in known]

    return score


def _opened(run: str | Path) -> tuple[RunCard, DpoConfig]:
    if not (Path(run) / "run.json").is_file():
        raise ConfigError(f"{run} is no run folder; give the --out of a `preftune dpo` run")
    card = read_card(Path(run) / "run.json")
    if card.stage != "dpo":
        raise ConfigError(
            f"{run} is a run of `preftune {card.stage}`; an implicit reward is that of a `preftune dpo` run"
        )
    if not (Path(run) / "model").is_dir():
        raise ConfigError(f"{run} has no model yet, it is {card.status}; let the run end first")
    return card, DpoConfig.model_validate(card.config)


def _own_reference(run: str | Path, card: RunCard, cfg: DpoConfig, policy: LoadedModel) -> LoadedModel:
    """The reference by the name in the card, if it holds the weights in the card."""
    named = f"name the reference: policy:{run},REFERENCE"
    if cfg.reference_moves() or cfg.online_reference == "moving":
        raise ConfigError(f"the reference of {run} moved while it trained, so no one model is it; {named}")
    name, known = cfg.reference or cfg.model, card.hashes
    of_run = ("start", "round-1") if cfg.online else ("reference", "model")  # the first the run had a hash for
    expected = next((known[f"{role}_weights"] for role in of_run if f"{role}_weights" in known), None)
    tried: list[LoadedModel] = []
    for dtype in dict.fromkeys((policy.model.dtype, torch.float32, torch.bfloat16)):  # the card's hash is of one dtype
        try:
            tried.append(load(name, dtype=dtype, device=policy.model.device))
        except ArtifactError as problem:
            raise ArtifactError(f"{run} was trained against {name}: {problem}; {named}") from problem
        if tried[-1].weights_sha256 == expected:
            return tried[0]
    raise ArtifactError(f"{name} does not hold the weights {run} was trained against any more; {named}")
