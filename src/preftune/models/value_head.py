"""A critic: V(s_t) = v . h(s_t) + c, the value of every state in which a completion token is predicted.

The critic is a language model or a reward model whose head is replaced by one number, so that it reads packed rows
as a policy does. Head and bias start at zero, so V is 0 everywhere at first and the first advantages are the rewards.
It shares nothing with the policy: the gradient of a value never moves a probability.

Legend of shapes: C completion tokens, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from preftune.errors import ArtifactError
from preftune.models.adapters import adapter_of, copy_beside
from preftune.models.layers import computed
from preftune.models.logprobs import hidden_states
from preftune.tensors import PackedBatch

__all__ = ["critic_of", "token_values", "with_value_head"]


def critic_of(model: Any) -> Any:
    """A trainable copy of `model`, a causal LM or a classifier of one label, whose head is a zero value head.

    Beside an adapter the copy trains an adapter of its own and shares the frozen weights; else it is independent of
    `model`. It has its dtype and device, and no random number is drawn. Prepare `model` with
    `attention.install` first, or the copy afterwards. Raises ArtifactError when no linear head is found.
    """
    return with_value_head(copy_beside(model))


def with_value_head(critic: Any) -> Any:
    """`critic_of`, of the model itself."""
    if adapter_of(critic) is None:
        critic.requires_grad_(True)
    old = _head(critic)
    head = nn.utils.skip_init(nn.Linear, old.in_features, 1, device=old.weight.device, dtype=old.weight.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if isinstance(getattr(critic, "score", None), nn.Linear):
        critic.score = head
    else:
        critic.set_output_embeddings(head)
        critic.config.tie_word_embeddings = False
    return critic


def token_values(critic: Any, batch: PackedBatch) -> Tensor:
    """[C] V(s_t) at the states that predict the batch's scored tokens, in the unit of the score; differentiable.

    float32 (float64 from a float64 critic), ordered as the scored tokens: V(s_t) has seen the prompt and y_<t, not y_t.
    """

    def values() -> Tensor:
        hidden_Cd = hidden_states(critic, batch, batch.predict_at)
        head = _head(critic)
        wide = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        return (hidden_Cd.to(wide) * head.weight[0].to(wide)).sum(-1) + head.bias.to(wide)

    return computed(critic, values)


def _head(model: Any) -> nn.Linear:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ArtifactError(f"{type(model).__name__} has no linear head to replace by a value head")
    return head
