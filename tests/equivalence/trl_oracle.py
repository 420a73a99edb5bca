"""TRL's own loss code, run on log-probs that a test chooses: its real trainers, over a language model that is a table.

Trainers are built as a user builds them, from TRL's configurations, on a tiny model; their collators make the batches
and their `compute_loss` the value and gradient. Only the model they are asked to score with is ours: `Table`, in which
every token of the batch has an id, and so a log-probability, of its own. Our side reads the same table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl_settings import Match, Trainer

from preftune.equations.losses import LOSSES
from preftune.tensors import LabelledLogps, ListLogps, PairIndex, PairLogps, ResponseLogps

__all__ = ["ROWS", "Oracle", "Row", "fused", "labelled", "lists", "ours", "pairs", "rows", "rows_of", "tables"]

ELSE, PAD = 0, 1
"""Token ids: what would have been said instead of a token, and TRL's padding. Tokens of the batch count from 2."""


@dataclass(frozen=True)
class Row:
    """One comparison as token ids; `strays` are two responses to other prompts, for KTO's z0."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    strays: tuple[list[int], list[int]]


def rows(lengths: Sequence[tuple[int, int]], prompts: Sequence[int]) -> tuple[Row, ...]:
    """Rows of these (chosen, rejected) and prompt lengths; no token id is used twice."""
    fresh = count(PAD + 1)

    def take(n: int) -> list[int]:
        return [next(fresh) for _ in range(n)]

    return tuple(
        Row(take(p), take(w), take(l), (take(l), take(w + 1))) for p, (w, l) in zip(prompts, lengths, strict=True)
    )


LENGTHS = ((3, 5), (4, 2), (1, 6), (5, 5), (7, 3))
ROWS = rows(LENGTHS, (2, 1, 3, 2, 4))
BARE_ROWS = rows(LENGTHS, (1, 1, 1, 1, 1))


def rows_of(match: Match) -> tuple[Row, ...]:
    """What a row of the table is compared on."""
    return BARE_ROWS if match.bare else ROWS


def tables(seed: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(policy, reference): a log-probability for every token id of the rows, -3 to -0.05 nats."""
    ids = 1 + max(max(stray) for row in ROWS + BARE_ROWS for stray in row.strays)
    draw = torch.rand((2, ids), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy, reference = (-0.05 - 2.95 * draw).to(dtype)
    return policy, reference


# --- theirs ----------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A language model that gives token v the log-probability `logps[v]` wherever it stands, and `ELSE` the rest."""

    def __init__(self, logps: Tensor) -> None:
        super().__init__()
        self.logps = logps

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, fused_lm_head: bool = False, **_: Any) -> Any:
        """Logits whose log-softmax at the next token is the table's, with derivative 1; TRL's fused form on demand."""
        next_ids = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], PAD)], 1)[..., None]
        logp = self.logps[next_ids]
        impossible = logp.new_full((*input_ids.shape, len(self.logps)), -1e4)
        other = torch.log1p(-logp.exp())
        logits = impossible.scatter(-1, torch.full_like(next_ids, ELSE), other).scatter(-1, next_ids, logp)
        if not fused_lm_head:
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=logits)
        assert labels is not None
        return fused(logits, labels)


def fused(logits: Tensor, labels: Tensor) -> Any:
    """What TRL's models return when called with `fused_lm_head=True`: one number per next token, 0 where no label."""
    from trl.trainer.utils import FusedCausalLMOutput

    all_logps, target, mask = logits[:, :-1].log_softmax(-1), labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    return FusedCausalLMOutput(
        log_probs=all_logps.gather(-1, target[..., None])[..., 0] * mask,
        entropy=-(all_logps.exp() * all_logps).sum(-1).detach() * mask,
        log_sum_sq_probs=(2 * all_logps).logsumexp(-1).detach() * mask,
        mean_logits=logits[:, :-1].mean(-1).detach() * mask,
        is_top1=(all_logps.argmax(-1) == target) & mask,
    )


class Oracle:
    """TRL's trainers by their settings, built once each."""

    def __init__(self, model_folder: Path) -> None:
        self.folder = model_folder
        self.built: dict[str, Any] = {}

    def __call__(
        self, trainer: Trainer, batch: Sequence[Row], policy: Tensor, reference: Tensor, **settings: object
    ) -> tuple[Tensor, Tensor]:
        """(loss of this micro-batch, its gradient by the policy's table)."""
        leaf = policy.clone().requires_grad_()
        judge = self.trainer(trainer, **settings)
        judge.ref_model = Table(reference)
        if trainer == "OnlineDPO":
            judge._generate = lambda *_: _generated(batch)
            loss = judge.training_step(Table(leaf), {"prompt": [""] * len(batch)})
        else:
            loss = judge.compute_loss(Table(leaf), judge.data_collator(_features(trainer, batch)))
            loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    def match(self, match: Match, policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """TRL's side of a row of the table: value and gradient, `factor` included, mean over micro-batches."""
        batch = rows_of(match)
        micro_batches = [[row] for row in batch] if match.alone else [batch]
        found = [self(match.trainer, one, policy, reference, **match.settings) for one in micro_batches]
        values, gradients = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
        return match.factor * values, match.factor * gradients

    def trainer(self, kind: Trainer, **settings: object) -> Any:
        key = f"{kind} {settings}"
        if key not in self.built:
            self.built[key] = self._build(kind, settings)
        return self.built[key]

    def _build(self, kind: Trainer, settings: Mapping[str, object]) -> Any:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        trainer_class, config_class = _classes(kind)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        tokenizer.pad_token_id = PAD
        config = config_class(
            output_dir=str(self.folder.parent / "trl"), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
            gradient_checkpointing=False, **settings,
        )  # fmt: skip
        row = {"prompt": "a", "chosen": " b", "rejected": " c"}
        unpaired = [{"prompt": "a", "completion": end, "label": end == " b"} for end in (" b", " c")]
        extra: dict[str, Any] = {}
        if kind in ("DPO", "KTO", "OnlineDPO"):
            extra["ref_model"] = AutoModelForCausalLM.from_pretrained(self.folder)
        if kind == "OnlineDPO":
            extra["reward_funcs"] = _first_half_wins
        return trainer_class(
            model=AutoModelForCausalLM.from_pretrained(self.folder), args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_list(unpaired if kind == "KTO" else [row]), **extra,
        )  # fmt: skip


def _classes(kind: Trainer) -> tuple[Any, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from trl.experimental import cpo, online_dpo, orpo

    home = {"DPO": trl, "KTO": trl, "CPO": cpo, "ORPO": orpo, "OnlineDPO": online_dpo}[kind]
    return getattr(home, f"{kind}Trainer"), getattr(home, f"{kind}Config")


def _features(trainer: Trainer, batch: Sequence[Row]) -> list[dict[str, object]]:
    """The rows as each trainer's own tokenisation would leave them to its collator."""
    if trainer == "DPO":
        return [{"prompt_ids": r.prompt, "chosen_ids": r.chosen, "rejected_ids": r.rejected} for r in batch]
    if trainer == "KTO":
        return [
            {"prompt_ids": r.prompt, "completion_ids": ids, "KL_completion_ids": stray, "label": ids is r.chosen}
            for r in batch
            for ids, stray in zip((r.chosen, r.rejected), r.strays, strict=True)
        ]
    features = []
    for row in batch:
        feature: dict[str, object] = {"prompt_input_ids": row.prompt, "prompt_attention_mask": [1] * len(row.prompt)}
        for side, ids in (("chosen", row.chosen), ("rejected", row.rejected)):
            feature[f"{side}_input_ids"] = row.prompt + ids
            feature[f"{side}_attention_mask"] = [1] * len(row.prompt + ids)
            feature[f"{side}_labels"] = [-100] * len(row.prompt) + ids
        features.append(feature)
    return features


def _generated(batch: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """Two completions of every prompt, all chosen ones first, as TRL's sampling would return them."""
    prompts, answers = [r.prompt for r in batch] * 2, [r.chosen for r in batch] + [r.rejected for r in batch]
    widest, longest = max(map(len, prompts)), max(map(len, answers))
    return (
        torch.tensor([[PAD] * (widest - len(p)) + p for p in prompts]),
        torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts]),
        torch.tensor([a + [PAD] * (longest - len(a)) for a in answers]),
        torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers]),
        None,
    )


def _first_half_wins(prompts: list[str], **_: object) -> list[float]:
    return [1.0] * (len(prompts) // 2) + [0.0] * (len(prompts) // 2)


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(name: str, batch: Sequence[Row], policy: Tensor, reference: Tensor, **knobs: float) -> tuple[Tensor, Tensor]:
    """(mean over the rows of our loss, its gradient by the policy's table)."""
    leaf = policy.clone().requires_grad_()
    read = {PairLogps: pairs, ListLogps: lists, LabelledLogps: labelled}[LOSSES[name].reads]
    loss = LOSSES[name].bind(**knobs).values(read(batch, leaf, reference)).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def pairs(batch: Sequence[Row], policy: Tensor, reference: Tensor) -> PairLogps:
    """The rows as a pairwise loss reads them, all optional fields but scores and divergences included."""
    side = torch.arange(len(batch)) * 2
    return _responses(batch, policy, reference).pairs(PairIndex(side, side + 1, torch.ones(len(batch))))


def lists(batch: Sequence[Row], policy: Tensor, reference: Tensor) -> ListLogps:
    """The rows as rankings of two: ranks 1, 2 and scores 1, 0."""
    both = _responses(batch, policy, reference)
    policy_GK, ratio_GK, length_GK = (x.reshape(-1, 2) for x in (both.policy, both.log_ratio, both.length))
    rank = torch.tensor([[1, 2]]).expand(len(batch), 2)
    return ListLogps(policy_GK, ratio_GK, length_GK, rank, (2 - rank).to(policy), torch.ones(len(batch)))


def labelled(batch: Sequence[Row], policy: Tensor, reference: Tensor) -> LabelledLogps:
    """The rows as two labelled responses each, and their strays as mismatched ones."""
    both = _responses(batch, policy, reference)
    desirable = torch.arange(2 * len(batch)) % 2 == 0
    mismatched = torch.stack([(policy - reference)[stray].sum() for row in batch for stray in row.strays])
    return LabelledLogps(both.policy, both.log_ratio, both.length, desirable, torch.ones(2 * len(batch)), mismatched)


def _responses(batch: Sequence[Row], policy: Tensor, reference: Tensor) -> ResponseLogps:
    answers = [ids for row in batch for ids in (row.chosen, row.rejected)]
    ids_C = torch.tensor([token for answer in answers for token in answer])
    logps_C = policy[ids_C]
    collision_C = (logps_C.exp() ** 2 + (1 - logps_C.exp()) ** 2).log()
    lengths_R = torch.tensor([len(answer) for answer in answers])
    return ResponseLogps.from_tokens(
        logps_C, lengths_R, reference[ids_C], alignment_C=logps_C - collision_C, keep_tokens=True
    )
