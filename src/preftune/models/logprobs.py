"""A model and a batch -> the log-probability of every completion token, and the check that packing changed none.

Legend of shapes: N tokens in a packed row, R responses, S longest of them, C scored tokens, L tokens of one response,
V vocabulary, d hidden size.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.errors import RunError
from preftune.models.attention import KEYWORD, decoder, layout_for, own_attention
from preftune.models.distributions import token_alignment, token_divergence
from preftune.models.head import token_logprobs
from preftune.models.last_layer import leave_out_unread
from preftune.models.layers import computed
from preftune.tensors import Ids, PackedBatch

__all__ = [
    "TOLERANCE",
    "TokenScores",
    "check_packing",
    "hidden_states",
    "score",
    "score_tokens",
    "token_logprobs",
]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Allowed root mean square of log-prob differences, nats per token: a few times what rounding alone makes of them."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """What the completion tokens of a batch are worth to a policy, [C] each, nats, ordered as its scored tokens."""

    logps: Tensor
    """log pi(token | everything before it in its own sequence); differentiable when gradients are enabled."""
    reference: Tensor | None
    """The same of the reference, detached; None when no reference model was given."""
    divergence: Tensor | None
    """KL(pi_ref || pi) of the whole next-token distributions, differentiable by the policy; None unless asked for."""
    alignment: Tensor | None
    """log pi(token) - log sum_v pi(v)^2, detached; None unless asked for."""


def score(model: Any, batch: PackedBatch) -> Tensor:
    """[C] log pi(token | everything before it in its own sequence), nats, float32 (float64 for a float64 model).

    Ordered as the batch's scored tokens; differentiable when gradients are enabled. Only the hidden states that
    predict a completion token meet the vocabulary. Raises RunError when the model does not read the batch's plan.
    """
    return score_tokens(model, batch).logps


def score_tokens(
    model: Any,
    batch: PackedBatch,
    *,
    reference_model: Any = None,
    divergence: bool = False,
    alignment: bool = False,
    temperature: float = 1.0,
) -> TokenScores:
    """`score` and what else is asked of the same tokens, from one forward of the policy and one of the reference.

    `temperature` > 0 divides the logits of both, as a sampler does: every number is then of the tempered laws.
    The reference is run without gradients and must, as the policy, have been prepared by `attention.install` when the
    batch is packed. Raises RunError on a divergence without a reference model or between two vocabularies.
    """
    if divergence and reference_model is None:
        raise RunError(
            "a divergence needs the reference's whole distributions: pass reference_model, not its log-probs"
        )

    def scores() -> TokenScores:
        reference = reference_C = None
        if reference_model is not None:  # first: its layers' work is gone before the policy's is held
            with torch.no_grad():
                reference = computed(reference_model, lambda: _head_inputs(reference_model, batch, temperature))
                reference_C = reference.logps(batch.targets)
        policy = _head_inputs(model, batch, temperature)
        return TokenScores(
            policy.logps(batch.targets),
            reference_C,
            policy.divergence(reference) if divergence and reference is not None else None,
            policy.alignment(batch.targets) if alignment else None,
        )

    return computed(model, scores)


def check_packing(model: Any, batch: PackedBatch, *, tolerance: float | None = None) -> float:
    """Root mean square of `score` minus the log-probs of every sequence alone, by the model's own forward; nats.

    The other side has the model's own attention and its own vocabulary projection, one sequence at a time: it shares
    neither rows nor padding nor our head. `tolerance` defaults to TOLERANCE of the model's dtype. Raises RunError,
    naming the row that differs most, when it is exceeded: then the model lets tokens of a row meet, or treats its
    logits, in a way that preftune does not know, and training on these log-probs would be silently wrong.
    """
    if tolerance is None:
        tolerance = TOLERANCE[model.dtype]
    responses = [(g, r, response) for g in batch.groups for r, response in enumerate(g.responses)]
    with torch.no_grad(), own_attention(model):
        alone = [_alone(model, group.prompt, response) for group, _, response in responses]
    with torch.no_grad():
        difference_C = score(model, batch).double() - torch.cat(alone).double()
    rms = float(difference_C.square().mean().sqrt())
    if not rms <= tolerance:  # not >, so that NaN is refused too
        worst = int(difference_C.abs().argmax())
        group, r, _ = responses[int(torch.repeat_interleave(batch.lengths)[worst])]
        raise RunError(
            f"{type(model).__name__}: log-probs of {'padded' if batch.plan is None else 'packed'} rows differ from "
            f"each sequence alone by {rms:.2g} nats per token, at most {tolerance:g} allowed "
            f"(most: {float(difference_C[worst]):+.2g}, response {r + 1} of {group.origin or 'a group'}); "
            "this architecture cannot be trained as configured: report it with its config.json"
        )
    return rms


def _alone(model: Any, prompt: Ids, response: Ids) -> Tensor:
    """[L] log-probs of one response, by nothing but the model's forward and torch."""
    fed = torch.from_numpy(np.concatenate((prompt, response[:-1])).astype(np.int64))[None].to(model.device)
    accepted = inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": len(response)} if "logits_to_keep" in accepted else {}
    logits_LV = model(input_ids=fed, use_cache=False, **keep).logits[0, -len(response) :]
    if logits_LV.dtype != torch.float64:
        logits_LV = logits_LV.float()
    targets = torch.from_numpy(response.astype(np.int64)).to(model.device)
    return torch.log_softmax(logits_LV, -1).gather(1, targets[:, None])[:, 0]


def _logit_transform(model: Any) -> tuple[float | None, float]:
    """(softcap, scale) between projection and softmax, as the architectures name them; `check_packing` is the judge."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    return getattr(config, "final_logit_softcapping", None), scale / divisor


@dataclass(frozen=True, eq=False, slots=True)
class _HeadInputs:
    """The hidden states that predict scored tokens, and all that lies between them and a softmax."""

    hidden: Tensor
    """[C, d]."""
    weight: Tensor
    """[V, d]."""
    bias: Tensor | None
    softcap: float | None
    scale: float

    def logps(self, targets_C: Tensor) -> Tensor:
        return token_logprobs(self.hidden, self.weight, targets_C, **self._options())

    def alignment(self, targets_C: Tensor) -> Tensor:
        return token_alignment(self.hidden, self.weight, targets_C, **self._options())

    def divergence(self, reference: _HeadInputs) -> Tensor:
        if len(self.weight) != len(reference.weight):
            raise RunError(
                f"a divergence compares distributions over one vocabulary: the policy has {len(self.weight)} entries, "
                f"the reference {len(reference.weight)}; use a reference of the policy's vocabulary"
            )
        theirs = {f"ref_{name}": value for name, value in reference._options().items()}
        return token_divergence(
            self.hidden, self.weight, reference.hidden, reference.weight, **self._options(), **theirs
        )

    def _options(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}


def hidden_states(model: Any, batch: PackedBatch, at: Tensor) -> Tensor:
    """[len(at), d] final hidden states at positions `at` of the flattened input: one forward below the head.

    Raises RunError when the model does not read the batch's plan.
    """
    if batch.plan is None:
        with own_attention(model):
            out = decoder(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    else:
        leave_out_unread(model)
        layout = layout_for(model, batch.plan)
        layout.read = at
        packed = {KEYWORD: layout}
        out = decoder(model)(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packed)
        if not layout.calls:
            raise RunError(
                f"{type(model).__name__} ignored who sees whom in a packed row; "
                "pass it padded rows, or call models.attention.install, which says why it cannot pack"
            )
    states: Tensor = out.last_hidden_state.flatten(0, 1).index_select(0, at)
    return states


def _head_inputs(model: Any, batch: PackedBatch, temperature: float) -> _HeadInputs:
    hidden_Cd = hidden_states(model, batch, batch.predict_at)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RunError(f"{type(model).__name__} has no linear vocabulary projection but {type(head).__name__}")
    softcap, scale = _logit_transform(model)
    # c tanh(z / c) / T is a cap of c / T on logits of z / T.
    softcap = None if softcap is None else softcap / temperature
    return _HeadInputs(hidden_Cd, head.weight, head.bias, softcap, scale / temperature)
