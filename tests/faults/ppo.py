"""RLHF that runs, improves its reward and is wrong: rollouts, updates, the critic, what a checkpoint holds."""

from __future__ import annotations

from fault import Fault

_ROLLOUTS = "src/preftune/parts/rollouts.py"
_STEP = "src/preftune/parts/policy_step.py"
_CRITIC = "src/preftune/models/value_head.py"
_PPO = "src/preftune/recipes/ppo.py"


def _rollouts(test: str) -> str:
    return f"tests/parts/test_rollouts.py -k {test}"


def _step(test: str) -> str:
    return f"tests/parts/test_policy_step.py -k {test}"


def _critic(test: str) -> str:
    return f"tests/models/test_value_head.py -k {test}"


def _ppo(test: str) -> str:
    return f"tests/recipes/test_ppo.py -k {test}"


FAULTS = [
    Fault(
        "ppo: rounding counts as a clipped value",
        "src/preftune/equations/policy_gradient.py",
        "(worse & (moved.abs() > clip))",
        "worse",
        "tests/equations/test_policy_gradient.py -k rounding",
    ),
    Fault(
        "rollout: a response without a score gets 0",
        _ROLLOUTS,
        "    kept = flat.isfinite()\n",
        "    flat = flat.nan_to_num(0.0)\n    kept = flat.isfinite()\n",
        _rollouts("without_a_score"),
    ),
    Fault(
        "rollout: policy and reference exchanged",
        _ROLLOUTS,
        "torch.stack([both.reference, both.logps, both.divergence, values])",
        "torch.stack([both.logps, both.reference, both.divergence, values])",
        _rollouts("log_probs_are_those_of_the_sampler"),
    ),
    Fault(
        "rollout: log-probs without the temperature",
        _ROLLOUTS,
        "divergence=True, temperature=temperature",
        "divergence=True",
        _rollouts("log_probs_are_those_of_the_sampler"),
    ),
    Fault(
        "rollout: the missing end is punished before scores are standardised",
        _ROLLOUTS,
        "flat = standardised(flat, torch.tensor(scale, dtype=torch.float64))",
        "flat = standardised(torch.where(finished, flat, -1.0), torch.tensor(scale, dtype=torch.float64))\n"
        "        finished = torch.ones_like(finished)",
        _rollouts("standardised"),
    ),
    Fault(
        "PPO: every micro-batch is its own mean",
        _STEP,
        "value_loss.sum()) / tokens).backward()",
        "value_loss.sum()) / len(old)).backward()",
        _step("micro_batches"),
    ),
    Fault(
        "PPO: the critic learns whitened returns",
        _STEP,
        "returns, advantages = raw + rollout.values, whiten(raw, mask)",
        "returns, advantages = whiten(raw, mask) + rollout.values, whiten(raw, mask)",
        _step("ppo_moves_every_weight"),
    ),
    Fault(
        "PPO: advantages are not whitened",
        _STEP,
        "returns, advantages = raw + rollout.values, whiten(raw, mask)",
        "returns, advantages = raw + rollout.values, raw",
        _step("ppo_moves_every_weight"),
    ),
    Fault(
        "PPO: every pass in the same order",
        _STEP,
        "np.random.default_rng([seed, update, epoch])",
        "np.random.default_rng([seed])",
        _step("minibatches_of_its_own"),
    ),
    Fault(
        "RLOO: a prompt with one response is its own advantage",
        _STEP,
        "groups = [group for group in rollout.groups if len(group.responses) >= 2]",
        "groups = list(rollout.groups)",
        _step("leaves_out"),
    ),
    Fault(
        "critic: the value of the state behind the token",
        _CRITIC,
        "hidden_states(critic, batch, batch.predict_at)",
        "hidden_states(critic, batch, (batch.predict_at + 1).clamp(max=batch.input_ids.numel() - 1))",
        _critic("state_before"),
    ),
    Fault(
        "critic: not a copy",
        _CRITIC,
        "with_value_head(copy_beside(model))",
        "with_value_head(model)",
        _critic("share_no_weight"),
    ),
    Fault(
        "ppo: the critic is not in the checkpoint",
        _PPO,
        'further={"critic": critic.optimizer} if critic else {},',
        "further={},",
        _ppo("'breaks_off and ppo'"),
    ),
    Fault(
        "ppo: the adapted coefficient is forgotten",
        _PPO,
        'coef = loop.memory["kl_coef"]',
        "coef = cfg.kl_coef",
        _ppo("'breaks_off and rloo'"),
    ),
    Fault(
        "ppo: one more update beyond the KL budget",
        _PPO,
        "                loop.end()\n            else:\n",
        "                loop.end()\n            if True:\n",
        _ppo("kl_budget"),
    ),
]
