"""What reinforcement learning may be told; as in `configs`, without importing torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo
from pydantic import model_validator as check

from preftune.config.sections import Adapting, Folder, Machine, Optimization
from preftune.config.settings import Settings, not_one_of, refusal
from preftune.data.prompts import PROMPTS

__all__ = ["PpoConfig", "Rollouts", "Rules"]


class Rollouts(Settings):
    """Models, prompts and sampling"""

    model: str = Field(min_length=1, description="Hugging Face or run folder, or hub name, of the model to start from")
    reward: str = Field(
        min_length=1,
        description="what scores responses: reward:RUN, rule:length, rule:regex:PATTERN, rule:json, rule:reviews, "
        "rule:enumerable:SEED, rule:python:MODULE:F",
    )
    prompts: str = Field(
        min_length=1, description="file, folder or hub data set in any layout; its prompts are answered"
    )
    reference: str | None = Field(
        None, min_length=1, description="folder or hub name of the reference model; none: the weights of --model"
    )
    eval_prompts: str | None = Field(
        None, min_length=1, description="held-out prompts; one it shares is never trained on"
    )
    format: str = Field("auto", description="layout of the prompts")
    allow_refused: int = Field(0, ge=0, description="refused rows to accept before the run stops, rows")
    allow_python: bool = Field(False, description="let reward rule:python import and run the named function")
    n: int = Field(4, ge=1, description="responses per prompt")
    temperature: float = Field(1.0, gt=0, description="divides the logits: when sampling, in every log-prob, in the KL")
    max_tokens: int = Field(128, ge=1, description="longest response, end mark included, tokens")
    missing_eos: Literal["replace", "subtract", "none"] = Field(
        "replace",
        description="a response that max_tokens cut off: its score is missing_eos_value, or less that, or as it is",
    )
    missing_eos_value: float | None = Field(
        None, description="see missing_eos; none: -1 where it replaces, 1 where it is subtracted"
    )
    standardise: bool = Field(
        False, description="shift and scale scores to mean 0, deviation 1 on responses of the reference"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws, the order of prompts and rounding")

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """As `Settings.choices`; `format` is one of the layouts."""
        return ("auto", *PROMPTS) if key == "format" else super().choices(key)

    def eos_value(self) -> float:
        """`missing_eos_value`, else what its rule takes."""
        given = self.missing_eos_value
        return given if given is not None else {"replace": -1.0, "subtract": 1.0, "none": 0.0}[self.missing_eos]


class Rules(Settings):
    """PPO and RLOO"""

    algorithm: Literal["ppo", "rloo"] = Field(
        "ppo", description="clipped steps on tokens with a critic, or one step on responses against their siblings"
    )
    kl_coef: float = Field(0.05, ge=0, description="beta: what a nat of log(policy / reference) costs, score per nat")
    target_kl: float | None = Field(
        None, gt=0, description="adapt kl_coef until KL(policy || reference) is this, nats per response; none: fixed"
    )
    kl_horizon: int = Field(10000, ge=1, description="responses in which kl_coef may change by a fifth")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="stop when KL(policy || reference) is larger and keep the policy before, nats; none: never",
    )
    critic: str | None = Field(
        None,
        min_length=1,
        description="folder or hub name the critic starts from; none: the reward model, else --model",
    )
    critic_lr: float | None = Field(
        None, gt=0, description="peak learning rate of the critic; none: that of the policy"
    )
    ppo_epochs: int = Field(4, ge=1, description="passes over the responses of a step")
    minibatches: int = Field(1, ge=1, description="updates per pass; a prompt's responses stay together")
    clip: float = Field(0.2, gt=0, lt=1, description="the ratio of new to old probability counts up to 1 +- clip")
    value_clip: float = Field(0.2, gt=0, description="a value may move so far from the old one, in units of the score")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="lambda of the advantage: 0 trusts the critic, 1 what came")
    whiten_rewards: bool = Field(False, description="scale token rewards to deviation 1 too, as advantages are")


OF_PPO = ("critic", "critic_lr", "ppo_epochs", "minibatches", "clip", "value_clip", "gamma", "lam", "whiten_rewards")


# Bases stand last section first: pydantic collects fields from the last base on.
class PpoConfig(Folder, Machine, Adapting, Optimization, Rules, Rollouts):
    """Reinforcement learning from a reward, on the policy's own responses to prompts."""

    lr: float = Field(3e-6, gt=0, description="peak learning rate")
    batch_size: int = Field(128, ge=1, description="prompts per step, each with n responses")
    epochs: int = Field(1, ge=1, description="passes over the prompts")

    @check(mode="after")
    def _recomputation_is_said(self, info: ValidationInfo) -> Self:
        if self.activation_checkpointing == "auto":
            text = "ppo holds several models, whose memory is not foreseen; choose none, selective or full"
            raise refusal(info, "activation_checkpointing", text)
        return self

    @check(mode="after")
    def _prompts_fit(self, info: ValidationInfo) -> Self:
        if self.format not in self.choices("format"):
            raise refusal(info, "format", not_one_of("format", self.format, self.choices("format")))
        if self.eval_prompts == self.prompts:
            raise refusal(info, "eval_prompts", f"eval_prompts are the training prompts, {self.prompts}; hold some out")
        if self.eval_every and not self.eval_prompts:
            raise refusal(info, "eval_every", "eval_every needs eval_prompts: there is nothing to evaluate on")
        if self.early_stop and not self.eval_every:
            raise refusal(info, "early_stop", "early_stop counts evaluations: set eval_every (and eval_prompts) too")
        return self

    @check(mode="after")
    def _rules_fit(self, info: ValidationInfo) -> Self:
        responses = self.batch_size * self.n
        wrong: list[tuple[str, bool, str]] = [
            (
                "n",
                self.algorithm == "rloo" and self.n < 2,
                "rloo compares the responses to one prompt: n must be at least 2, not 1",
            ),
            (
                "minibatches",
                self.minibatches > self.batch_size,
                f"minibatches {self.minibatches} cannot be cut from batch_size {self.batch_size} prompts",
            ),
            (
                "target_kl",
                self.target_kl is not None and self.kl_coef == 0,
                "target_kl multiplies kl_coef, and 0 stays 0; give a kl_coef above 0",
            ),
            (
                "kl_horizon",
                self.target_kl is None and self._given("kl_horizon"),
                "kl_horizon is of an adaptive kl_coef; give target_kl, or leave it out",
            ),
            (
                "kl_horizon",
                self.target_kl is not None and 0.2 * responses >= self.kl_horizon,
                f"kl_horizon {self.kl_horizon} must be above a fifth of a step's {responses} responses, "
                "batch_size * n, or kl_coef could reach 0 at once",
            ),
            (
                "max_kl",
                self.max_kl is not None and self.target_kl is not None and self.max_kl <= self.target_kl,
                f"max_kl {self.max_kl} must be above target_kl {self.target_kl}, or the run stops on its way there",
            ),
            (
                "missing_eos_value",
                self.missing_eos_value is not None
                and (self.missing_eos == "none" or (self.missing_eos == "subtract" and self.missing_eos_value < 0)),
                f"missing_eos_value {self.missing_eos_value} has no meaning for missing_eos {self.missing_eos}: "
                "replace takes any number, subtract one >= 0, none takes none",
            ),
        ]
        for key in OF_PPO if self.algorithm == "rloo" else ():
            if self._given(key):
                raise refusal(info, key, f"{key} belongs to ppo; rloo has no critic and takes one step: leave it out")
        for key, is_wrong, text in wrong:
            if is_wrong:
                raise refusal(info, key, text)
        return self

    def _given(self, key: str) -> bool:
        """Whether the key says something: a config read back from a run card names every key."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)
