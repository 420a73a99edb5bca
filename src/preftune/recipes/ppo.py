"""RLHF: a policy learns from the reward of its own responses, by PPO or RLOO, held near a reference by the KL.

    prompts, models, reward                                               parts/ppo_parts.py, scoring.py
    prompts -> responses of the policy -> scores, log-probs, values       parts/rollouts.py
    -> token rewards, advantages -> steps of policy and critic            parts/policy_step.py, equations/
    checkpoints, metrics.jsonl, run.json, model/                          parts/common.py, engine/

Four objects, each its own: the policy that answers and learns, the reference it is held to, the critic that predicts
what is still to come (PPO), and the reward: a model, a rule, or the truth of an embedded world. A step is one rollout:
`batch_size` prompts with n responses each, and the updates made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from preftune.config.rl import PpoConfig
from preftune.data.packing import StepPlan
from preftune.engine.clock import Clock
from preftune.engine.run import Run
from preftune.equations.histogram import histogram
from preftune.equations.policy_gradient import adaptive_kl
from preftune.equations.stats import mean_interval, share
from preftune.errors import RunError
from preftune.judges.scores import Scorer
from preftune.models.logprobs import TOLERANCE
from preftune.parts.common import MAY_DIFFER, Batching, Loop
from preftune.parts.ending import opened
from preftune.parts.outlook import outlook_of_rollouts, pace
from preftune.parts.policy_meter import rollout_metrics
from preftune.parts.policy_step import Learner, PpoKnobs, ppo_update, rloo_update
from preftune.parts.ppo_parts import (
    Asked,
    Within,
    critic_learner,
    draw_seed,
    open_models,
    open_reward,
    read_prompts,
    reference_scores,
    sampling_of,
)
from preftune.parts.rollouts import Models, Rollout, Sampling, roll_out
from preftune.parts.room import Reader
from preftune.records import RunCard

__all__ = ["PpoConfig", "main"]


def main(cfg: PpoConfig) -> RunCard:
    """Train `cfg.model` on the reward of its own responses to `cfg.prompts`; the result is `out/model`.

    Raises ConfigError, DataError, ArtifactError for input that is refused, and RunError when the run itself fails.
    """
    with opened(cfg.out, stage="ppo", config=cfg.model_dump(), resume=cfg.resume, may_differ=MAY_DIFFER) as run:
        policy, models, batching = open_models(cfg, run)
        reward = open_reward(cfg, policy, batching, run)
        who = Reader.of(cfg.model, policy.tokenizer, policy.model, models.reference, models.critic)
        held_out = read_prompts(cfg.eval_prompts, "eval", cfg, run, who) if cfg.eval_prompts else []
        asked = read_prompts(cfg.prompts, "train", cfg, run, who, held_out)
        prompt_of = {id(group): prompt for group, prompt in asked}
        sampling = sampling_of(cfg, asked + held_out, run)

        plan = StepPlan([group for group, _ in asked], batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle)
        sample = [prompt_of[id(group)] for group in plan.groups_of(0, 0)]
        scale = reference_scores(cfg, models, sample, reward, sampling, run) if cfg.standardise else None
        critic, within = critic_learner(cfg, models, run.world), Within.of(policy.model, cfg.max_kl)
        loop = Loop(
            cfg, run, plan, policy, peak_lr=cfg.lr, memory={"kl_coef": cfg.kl_coef, "spent": False},
            tensors=lambda: within.tensors, further={"critic": critic.optimizer} if critic else {},
        )  # fmt: skip
        if loop.memory["spent"]:
            loop.end()
        first, left = loop.step + 1, loop.total_steps - loop.step
        outlook_of_rollouts(cfg, run, models, batching, sampling, [group for group, _ in asked], steps=left)
        learner, clock = Learner(policy.model, loop.optimizer), Clock()
        for step, groups, lr in loop.steps():
            coef = loop.memory["kl_coef"]
            rollout = roll_out(
                models, [prompt_of[id(group)] for group in groups], reward, batching, sampling,
                seed=draw_seed(cfg, step), scale=scale, origins=[group.origin for group in groups],
            )  # fmt: skip
            if step == first:
                batching.check(policy.model, rollout.groups)
                warn_of_silence(rollout, run)
            clock.lap("rollout")
            metrics = rollout_metrics(rollout, coef)
            if cfg.max_kl is not None and rollout.kl > cfg.max_kl:
                run.note(
                    f"step {step}: KL {rollout.kl:.4g} is above max_kl {cfg.max_kl:g}; the policy before it is kept"
                )
                within.restore(policy.model)
                loop.memory = {**loop.memory, "spent": True}
                loop.end()
            else:
                within.keep(policy.model)
                metrics |= updated(cfg, learner, critic, rollout, batching, coef, lr, step)
                if cfg.target_kl is not None:
                    loop.memory = {**loop.memory, "kl_coef": next_coefficient(cfg, coef, rollout)}
            clock.lap("update")
            tokens, left = int(rollout.mask.sum()), loop.total_steps - step
            run.after_step(step, metrics | {"lr": lr} | pace(clock, tokens, run, left=left, first=step == first))
            if held_out and loop.due(cfg.eval_every):
                loop.evaluated(evaluate(cfg, models, held_out, reward, batching, sampling, scale))
                clock = Clock()
        return loop.finish(
            results=lambda: evaluate(cfg, models, held_out, reward, batching, sampling, scale) if held_out else {},
            method=f"Reinforcement learning by {cfg.algorithm.upper()} on reward `{cfg.reward}`, beta {cfg.kl_coef:g}.",
        )


def updated(
    cfg: PpoConfig,
    policy: Learner,
    critic: Learner | None,
    rollout: Rollout,
    batching: Batching,
    coef: float,
    lr: float,
    step: int,
) -> dict[str, float]:
    """One update. Raises RunError when its first ratio is not 1: then rollout and update disagree on log-probs."""
    if critic is None:
        metrics = rloo_update(policy, rollout, batching, kl_coef=coef, lr=lr, update=step)
    else:
        knobs = PpoKnobs(
            epochs=cfg.ppo_epochs, minibatches=cfg.minibatches, clip=cfg.clip, value_clip=cfg.value_clip,
            gamma=cfg.gamma, lam=cfg.lam, whiten_rewards=cfg.whiten_rewards,
        )  # fmt: skip
        critic_lr = lr / cfg.lr * (cfg.critic_lr or cfg.lr)
        metrics = ppo_update(
            policy, critic, rollout, batching, knobs, kl_coef=coef, lr=lr, critic_lr=critic_lr, seed=cfg.seed,
            update=step,
        )  # fmt: skip
    if not metrics["first_approx_kl"] <= TOLERANCE[policy.model.dtype] ** 2 / 2:
        raise RunError(
            f"step {step}: before the first update the policy is {metrics['first_approx_kl']:.2g} nats per token from "
            "its own rollout, where it must be 0: its log-probs are no function of its weights and tokens alone"
        )
    return metrics


def warn_of_silence(rollout: Rollout, run: Run) -> None:
    """Scores that are all alike teach nothing; responses that never end are the usual cause."""
    if bool((rollout.scores == rollout.scores[0]).all()):
        ended = int(rollout.finished.sum())
        run.warn(
            f"all {len(rollout.scores)} responses of the first step have score {float(rollout.scores[0]):g}, "
            f"{ended} of them ended: as long as that is so there is nothing to learn; "
            "look at --max_tokens, --missing_eos and --reward"
        )


def evaluate(
    cfg: PpoConfig,
    models: Models,
    held_out: Asked,
    reward: Scorer,
    batching: Batching,
    sampling: Sampling,
    scale: Sequence[float] | None,
) -> dict[str, Any]:
    """Reward and KL of one response to each held-out prompt, with 95 % intervals; the same random numbers every time.

    `loss` is -(reward - kl_coef KL), which early stopping reads: a reward bought with too much KL is no improvement.
    """
    rollout = roll_out(
        replace(models, critic=None), [prompt for _, prompt in held_out], reward, batching, replace(sampling, n=1),
        seed=draw_seed(cfg, 0), scale=scale, origins=[group.origin for group, _ in held_out],
    )  # fmt: skip
    scores, kl = rollout.scores.double().cpu().numpy(), rollout.divergence.sum(-1).double().cpu().numpy()
    finished = share(rollout.finished.double().cpu().numpy())
    intervals = {"reward": mean_interval(scores), "kl": mean_interval(kl), "finished": finished}
    intervals |= {"loss": mean_interval(cfg.kl_coef * kl - scores)}
    numbers = {name: interval.estimate for name, interval in intervals.items()}
    numbers |= {f"{name}_low": interval.low for name, interval in intervals.items()}
    numbers |= {f"{name}_high": interval.high for name, interval in intervals.items()}
    lengths = rollout.mask.sum(-1).double().cpu().numpy()
    shape = {"length": float(lengths.mean()), "length_histogram": histogram(lengths, least=1.0)}
    return {**numbers, **shape, "responses": len(scores), "unscored": rollout.unscored}


def next_coefficient(cfg: PpoConfig, coef: float, rollout: Rollout) -> float:
    assert cfg.target_kl is not None
    samples = len(rollout.scores)
    return adaptive_kl(coef, rollout.kl, target=cfg.target_kl, horizon=cfg.kl_horizon, samples=samples)
