"""A critic: the value of every state, read where a completion token is predicted, from weights of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.data.packing import pack, pad
from preftune.errors import ArtifactError
from preftune.models.attention import install, own_attention
from preftune.models.load import load
from preftune.models.reward_head import load_reward_model
from preftune.models.value_head import critic_of, token_values
from preftune.tensors import TokenGroup


def groups() -> list[TokenGroup]:
    draw = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return draw.integers(3, 300, n).astype(np.int32)

    return [TokenGroup(ids(5), (ids(4), ids(7))), TokenGroup(ids(3), (ids(1),))]


@pytest.fixture
def policy(tiny_model_folder: Path) -> Any:
    model = load(tiny_model_folder, dtype=torch.float32).model
    assert install(model) is None
    return model


def with_a_head(critic: Any) -> Tensor:
    """Give the critic some head and bias; returns them as one vector."""
    head = critic.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, head.in_features)[None])
        head.bias.fill_(0.25)
    return torch.cat([head.weight[0], head.bias]).detach()


def test_every_value_is_zero_at_first(policy: Any) -> None:
    """Head and bias start at 0, so the first advantages are the rewards; no random number is drawn for it."""
    before = torch.get_rng_state()
    values = token_values(critic_of(policy), pack(groups()))
    assert values.shape == (12,) and bool((values == 0).all())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_a_value_is_the_head_on_the_state_before_the_token(policy: Any, rows: str) -> None:
    """By transformers' own forward of the prompt and y_<t alone, a sequence at a time: the token itself is not seen."""
    critic = critic_of(policy)
    head = with_a_head(critic)
    batch = pack(groups()) if rows == "packed" else pad(groups(), pad_id=7)
    expected = []
    with torch.no_grad(), own_attention(policy):
        for group in groups():
            for response in group.responses:
                for t in range(len(response)):
                    seen = torch.from_numpy(np.concatenate((group.prompt, response[:t])).astype(np.int64))
                    state = policy.model(input_ids=seen[None]).last_hidden_state[0, -1]
                    expected.append(state @ head[:-1] + head[-1])
        assert torch.allclose(token_values(critic, batch), torch.stack(expected), atol=1e-5)


def test_critic_and_policy_share_no_weight(policy: Any) -> None:
    """The gradient of the values reaches every layer of the critic and nothing of the policy it was copied from."""
    critic = critic_of(policy)
    with_a_head(critic)
    token_values(critic, pack(groups())).square().sum().backward()
    assert all(weight.grad is None for weight in policy.parameters())
    assert [name for name, weight in critic.named_parameters() if weight.grad is None] == []
    assert not {w.data_ptr() for w in policy.parameters()} & {w.data_ptr() for w in critic.parameters()}


def test_a_critic_may_start_from_a_reward_model(tiny_model_folder: Path) -> None:
    """Its scalar head is replaced by the zero one, its layers stay; a frozen model's copy learns nevertheless."""
    model = load_reward_model(tiny_model_folder, dtype=torch.float32).model.requires_grad_(False)
    assert install(model) is None
    critic = critic_of(model)
    assert bool((token_values(critic, pack(groups())) == 0).all())
    assert torch.equal(critic.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert bool((model.score.weight != 0).any()), "the reward model itself keeps its head"
    assert all(weight.requires_grad for weight in critic.parameters())


def test_a_model_without_a_linear_head_is_refused(policy: Any) -> None:
    policy.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ArtifactError, match="no linear head to replace"):
        critic_of(policy)
