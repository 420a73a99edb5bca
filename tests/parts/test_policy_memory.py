"""Claims about reinforcement learning that does not fit in memory: it goes on in smaller micro-batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from little_memory import NO_MEMORY, short_backward

from preftune.config.rl import PpoConfig
from preftune.errors import RunError
from preftune.parts import ppo_parts
from preftune.parts.fitting import Budget
from preftune.parts.policy_step import PpoKnobs, ppo_update, rloo_update
from preftune.parts.rollouts import Rollout, roll_out
from preftune.parts.scoring import open_scorer
from preftune.recipes import ppo
from rl_world import PROMPTS, SCORE, Learners, learners, model_folder, perturbed, sampling, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("world"))


def apart(folder: Path) -> tuple[Learners, list[str]]:
    """Policy, reference and critic that differ, and what is said of their memory."""
    it, said = learners(folder), list[str]()
    perturbed(it.models.policy, 0.05)
    perturbed(it.critic.model, 0.05, seed=2)
    return replace(it, batching=replace(it.batching, budget=Budget(said.append))), said


def rolled(it: Learners, **more: Any) -> Rollout:
    return roll_out(it.models, PROMPTS, open_scorer(SCORE), it.batching, sampling(6), seed=0, **more)


def updated(it: Learners, rollout: Rollout, algorithm: str) -> torch.Tensor:
    """The weights of policy and critic after an update; PPO's takes four steps."""
    if algorithm == "ppo":
        rates: dict[str, Any] = {"kl_coef": 0.3, "lr": 1e-2, "critic_lr": 1e-2}
        ppo_update(it.policy, it.critic, rollout, it.batching, PpoKnobs(), **rates, seed=0, update=1)
    else:
        rloo_update(it.policy, rollout, it.batching, kl_coef=0.3, lr=1e-2, update=1)
    return torch.cat([weights(it.policy.model), weights(it.critic.model)])


def tight(it: Learners, limit: int, *, backward: bool) -> None:
    """From now on there is memory for `limit` tokens: in the policy's backward pass, or when it only measures."""

    def layer(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if backward and torch.is_grad_enabled():
            return short_backward(output, limit)
        if not backward and not torch.is_grad_enabled() and output.shape[1] > limit and output.shape[0] == 1:
            raise NO_MEMORY
        return output

    it.policy.model.get_input_embeddings().register_forward_hook(layer)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_an_update_that_does_not_fit_is_done_anew(algorithm: str, folder: Path) -> None:
    """Memory gives out at the end of a backward pass: the weights are those of smaller micro-batches, to the bit."""
    it, said = apart(folder)
    rollout = rolled(it)
    tokens = sum(batch.input_ids.numel() for batch in it.batching(rollout.groups))
    tight(it, tokens - 1, backward=True)
    found = updated(it, rollout, algorithm)
    assert len(said) == 1 and f"out of memory at {tokens} tokens: done anew" in said[0]
    other, unsaid = apart(folder)
    expected = updated(
        replace(other, batching=replace(other.batching, tokens_per_batch=tokens // 2)), rollout, algorithm
    )
    assert not unsaid and torch.equal(found, expected)


def test_a_rollout_is_measured_in_smaller_parts(folder: Path) -> None:
    """Log-probs, divergences and values are those of the smaller micro-batches, to the bit."""
    (it, said), (other, _) = apart(folder), apart(folder)
    tokens = sum(batch.input_ids.numel() for batch in it.batching(rolled(it).groups))
    tight(it, tokens - 1, backward=False)
    found = rolled(it)
    assert said and "done anew" in said[0]
    expected = rolled(replace(other, batching=replace(other.batching, tokens_per_batch=tokens // 2)))
    for name in ("logps", "ref_logps", "divergence", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_prompt_that_never_fits_is_named(folder: Path) -> None:
    """One prompt with its responses is the least; what to set is said."""
    it, _ = apart(folder)
    rollout = rolled(it)
    tight(it, 3, backward=True)
    with pytest.raises(RunError, match="rollout prompt 1: out of memory with this row alone"):
        updated(it, rollout, "ppo")


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_run_names_the_row_of_the_prompt_and_the_length_of_answers(
    algorithm: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """file:line, and settings that `preftune ppo` has: --max_tokens, --n, --activation_checkpointing."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    plain = ppo_parts.open_model

    def opened(*args: Any, **settings: Any) -> Any:
        loaded, batching = plain(*args, **settings)
        loaded.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: short_backward(output, 3) if torch.is_grad_enabled() else output
        )
        return loaded, batching

    monkeypatch.setattr(ppo_parts, "open_model", opened)
    named = (
        r"prompts.jsonl:1: out of memory with this row alone, \d+ tokens with its 6 responses. \d+ tokens did fit: set "
        r"--max_tokens \d+, or a lower --n, or --activation_checkpointing full$"
    )
    with pytest.raises(RunError, match=named):
        ppo.main(
            PpoConfig(
                model=str(folder), prompts=str(tmp_path / "prompts.jsonl"), reward=SCORE, out=str(tmp_path / "run"),
                algorithm=algorithm, n=6, max_tokens=3, batch_size=2, max_steps=1, shuffle=False, device="cpu",
                dtype="float32", missing_eos="none",
            )
        )  # fmt: skip
