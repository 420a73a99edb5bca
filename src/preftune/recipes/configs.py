"""What a run may be told: one frozen model per stage, checked whole when it is made, without importing torch.

A config is a sum of sections; a section is also a heading of `--help`, and its fields' descriptions are the help.
Keys are the same in YAML, on the command line, in Python and in `run.json`. Whatever can be known to be wrong
before a file is opened raises ConfigError here, in one line: the key, what was found, what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo
from pydantic import model_validator as check
from pydantic_core import ErrorDetails

from preftune.errors import ConfigError

__all__ = [
    "CONFIGS",
    "LOSS_FACTS",
    "DpoConfig",
    "Folder",
    "InspectConfig",
    "LossFacts",
    "Machine",
    "Objective",
    "Optimization",
    "QuickstartConfig",
    "Reading",
    "Settings",
    "SftConfig",
    "TrainingConfig",
    "default_text",
    "did_you_mean",
    "sections",
]


@dataclass(frozen=True)
class LossFacts:
    """What a config must know about a loss without importing it; a test keeps it equal to `equations.losses`."""

    learning_rate: float
    knobs: Mapping[str, float]
    """Name -> default."""
    needs_reference: bool = True


LOSS_FACTS: Mapping[str, LossFacts] = {
    "dpo": LossFacts(1e-6, {"beta": 0.1}),
    "cdpo": LossFacts(5e-7, {"beta": 0.1, "label_smoothing": 0.1}),
    "robust": LossFacts(5e-7, {"beta": 0.1, "label_smoothing": 0.1}),
    "ipo": LossFacts(5e-7, {"tau": 0.1}),
    "ipo_average": LossFacts(5e-7, {"tau": 1.0}),
    "hinge": LossFacts(5e-7, {"beta": 0.05}),
    "simpo": LossFacts(5e-7, {"beta": 2.0, "gamma": 1.0}, needs_reference=False),
}

# What other tools call our keys: a habit deserves an answer, not only a typo.
_ELSEWHERE = {
    "bf16": "dtype",
    "dataset": "data",
    "dataset_name": "data",
    "early_stopping_patience": "early_stop",
    "eval_dataset": "eval_data",
    "eval_steps": "eval_every",
    "fp16": "dtype",
    "gradient_accumulation_steps": "batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "learning_rate": "lr",
    "loss_type": "loss",
    "lr_scheduler_type": "schedule",
    "max_seq_length": "max_length",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "ref_model": "reference",
    "resume_from_checkpoint": "resume",
    "save_steps": "save_every",
    "simpo_gamma": "gamma",
    "torch_dtype": "dtype",
    "truncation_mode": "truncation",
    "warmup_ratio": "warmup_steps",
}

# The start of pydantic's error types -> what was allowed, in our words.
_ALLOWED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
}


class Settings(BaseModel):
    """A frozen set of keys; an unknown one is an error, and every error is one ConfigError of one line.

    The validation context may map keys to the place they came from, which then opens the message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @check(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        for key, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation is not bool:  # pydantic reads true as 1
                raise _refusal(info, key, f"{key} is not a switch: found {str(value).lower()}")
        try:
            return handler(values)
        except ValidationError as problem:
            raise _explain(cls, problem, info) from None


class Reading(Settings):
    """Model and data"""

    model: str = Field(min_length=1, description="Hugging Face folder or hub name of the model to start from")
    data: str = Field(min_length=1, description="file, folder or hub data set to read")
    eval_data: str | None = Field(
        None, min_length=1, description="held-out data; a prompt it shares is never trained on"
    )
    format: Literal["auto"] = Field("auto", description="layout of the data")
    pairs: Literal["all", "adjacent", "best_worst", "best_random"] = Field(
        "all", description="what a ranking of more than two responses becomes; ties give no pair"
    )
    max_length: int = Field(1024, ge=2, description="longest prompt + response, tokens")
    truncation: Literal["refuse", "drop", "prompt", "response"] = Field(
        "refuse",
        description="of a longer row: refuse it, drop it, cut its prompt on the left or its response on the right",
    )
    allow_refused: int = Field(0, ge=0, description="refused rows to accept before the run stops, rows")
    seed: int = Field(0, ge=0, lt=2**32, description="of data order, random pairs and rounding")

    @check(mode="after")
    def _eval_data_is_held_out(self, info: ValidationInfo) -> Self:
        if self.eval_data == self.data:
            raise _refusal(info, "eval_data", f"eval_data is the training data, {self.data}; name a held-out set")
        return self


class Objective(Settings):
    """Objective"""

    loss: Literal["dpo", "cdpo", "robust", "ipo", "ipo_average", "hinge", "simpo"] = Field(
        "dpo", description="what is minimised, nats"
    )
    beta: float | None = Field(None, gt=0, description="strength of the pull to the reference, per nat")
    label_smoothing: float | None = Field(None, ge=0, lt=0.5, description="assumed share of flipped labels")
    tau: float | None = Field(None, gt=0, description="IPO's regularisation: margins are pulled to 1 / (2 tau) nats")
    gamma: float | None = Field(None, ge=0, description="SimPO's target margin")
    reference: str | None = Field(None, min_length=1, description="folder or hub name of the reference model")

    def loss_knobs(self) -> dict[str, float]:
        """The knobs of the chosen loss, the loss's own default where none was given."""
        given = {name: getattr(self, name) for name in _KNOBS}
        return {name: default if given[name] is None else given[name] for name, default in self._facts.knobs.items()}

    @property
    def _facts(self) -> LossFacts:
        return LOSS_FACTS[self.loss]

    @check(mode="after")
    def _loss_has_these_knobs(self, info: ValidationInfo) -> Self:
        for name in _KNOBS:
            if getattr(self, name) is not None and name not in self._facts.knobs:
                raise _refusal(
                    info, name, f"loss {self.loss} has no knob {name}; its knobs: {', '.join(self._facts.knobs)}"
                )
        if self.reference is not None and not self._facts.needs_reference:
            raise _refusal(info, "reference", f"loss {self.loss} uses no reference model; leave reference out")
        return self


class Optimization(Settings):
    """Optimization"""

    optimizer: Literal["adamw", "rmsprop", "sgd"] = Field(
        "adamw", description="update rule; rmsprop is the DPO paper's"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="course of the learning rate after warm-up; linear and cosine end at 0"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0, optimizer steps")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are scaled to this norm")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, per unit of learning rate")
    batch_size: int = Field(32, ge=1, description="pairs (SFT: responses) per optimizer step, however it is split")
    epochs: int = Field(1, ge=1, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop early after this many optimizer steps")
    shuffle: bool = Field(True, description="a new order every epoch, a function of seed and epoch")

    @check(mode="after")
    def _warmup_ends(self, info: ValidationInfo) -> Self:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise _refusal(
                info, "warmup_steps", f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}"
            )
        return self


class Machine(Settings):
    """Memory and speed (none of these changes the objective)"""

    tokens_per_batch: int = Field(8192, ge=2, description="tokens computed at once; bounds memory, tokens")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the compute weights (masters are float32); auto is bfloat16 on CUDA, else float32"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N; auto prefers CUDA"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")


class Folder(Settings):
    """Run folder"""

    out: str = Field(min_length=1, description="folder of the run: run.json, metrics.jsonl, checkpoints/, model/")
    eval_every: int = Field(0, ge=0, description="evaluate every so many optimizer steps (0: only at the end)")
    early_stop: int = Field(0, ge=0, description="stop after so many evaluations without improvement (0: off)")
    save_every: int = Field(
        0, ge=0, description="checkpoint every so many steps (0: only when stopped, and at the end)"
    )
    resume: bool = Field(False, description="continue the run in --out from its newest whole checkpoint")


# Bases stand last section first: pydantic collects fields from the last base on.
class TrainingConfig(Folder, Machine, Optimization, Reading):
    """What every training stage can be told."""

    @check(mode="after")
    def _parts_fit(self, info: ValidationInfo) -> Self:
        if self.tokens_per_batch < self.max_length:
            raise _refusal(
                info,
                "tokens_per_batch",
                f"tokens_per_batch {self.tokens_per_batch} must be at least max_length {self.max_length}",
            )
        if self.eval_every and not self.eval_data:
            raise _refusal(info, "eval_every", "eval_every needs eval_data: there is nothing to evaluate on")
        if self.early_stop and not self.eval_every:
            raise _refusal(info, "early_stop", "early_stop counts evaluations: set eval_every (and eval_data) too")
        return self


class SftConfig(TrainingConfig):
    """Supervised fine-tuning on responses, or on the chosen side of preference pairs."""

    lr: float = Field(2e-5, gt=0, description="peak learning rate")


class DpoConfig(Objective, TrainingConfig):
    """Direct Preference Optimization on preference pairs."""


class InspectConfig(Reading):
    """Examine a data set as training would see it, and train nothing."""

    kind: Literal["preferences", "demonstrations"] = Field("preferences", description="what the rows should hold")
    examples: int = Field(3, ge=0, description="rows to show decoded, with their mask, rows")


class QuickstartConfig(Settings):
    """The whole loop on the embedded world of film reviews."""

    out: str = Field("runs/quickstart", min_length=1, description="folder of the run; ends with report.html")
    fast: bool = Field(False, description="a smaller run for a first look, under a minute")
    seed: int = Field(0, ge=0, lt=2**32, description="of the world, the samples, the labels and the training")


CONFIGS: Mapping[str, type[Settings]] = {
    "quickstart": QuickstartConfig,
    "inspect": InspectConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
}
"""Stage -> what it may be told."""

_SECTIONS: tuple[type[Settings], ...] = (Reading, Objective, Optimization, Machine, Folder)
_DEFAULT_OF_NONE = {"eval_data": "none", "reference": "the weights of --model", "max_steps": "no limit"}
_KNOBS = ("beta", "label_smoothing", "tau", "gamma")


def sections(config: type[Settings]) -> dict[str, list[str]]:
    """Title -> keys, in the order a reader wants: what the config is made of."""
    left = dict.fromkeys(config.model_fields)
    table = {}
    for section in _SECTIONS:
        if issubclass(config, section):
            table[str(section.__doc__)] = list(section.model_fields)
            left = {key: None for key in left if key not in section.model_fields}
    return {**table, "Options of this stage": list(left)} if left else table


def default_text(config: type[Settings], key: str) -> str:
    """What holds when `key` is not given, in words; where it depends on the loss, by loss."""
    field = config.model_fields[key]
    if field.is_required():
        return "required"
    if field.default is not None:
        return f"default {str(field.default).lower() if isinstance(field.default, bool) else field.default}"
    if issubclass(config, Objective) and (key in _KNOBS or key == "lr"):
        by_value: dict[float, list[str]] = {}
        for loss, facts in LOSS_FACTS.items():
            if key == "lr" or key in facts.knobs:
                by_value.setdefault(facts.learning_rate if key == "lr" else facts.knobs[key], []).append(loss)
        return "default by loss: " + "; ".join(f"{value:g} {', '.join(losses)}" for value, losses in by_value.items())
    return f"default {_DEFAULT_OF_NONE[key]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean lr?` for a slip or another tool's name of a known word, else nothing."""
    names = {name: name for name in known}
    names |= {theirs: ours for theirs, ours in _ELSEWHERE.items() if ours in names}
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def _refusal(info: ValidationInfo, key: str, text: str) -> ConfigError:
    """`text` about `key`, opened by the place the key came from where the caller told it (`dpo.yaml:3: `)."""
    origins: Mapping[str, str] = info.context or {}
    return ConfigError(f"{origins[key]}: {text}" if key in origins else text)


def _explain(cls: type[Settings], problem: ValidationError, info: ValidationInfo) -> ConfigError:
    """The most telling problem in one line: an unknown key first, for it often explains a missing one."""
    found = problem.errors()
    unknown = [error for error in found if error["type"] == "extra_forbidden"]
    missing = [str(error["loc"][0]) for error in found if error["type"] == "missing"]
    if missing and not unknown:
        return ConfigError(f"missing {', '.join(missing)}: give --{missing[0]} VALUE, or the key in the YAML file")
    first = (unknown or found)[0]
    key = str(first["loc"][0])
    return _refusal(info, key, _sentence(cls, key, first))


def _sentence(cls: type[Settings], key: str, error: ErrorDetails) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        hint = did_you_mean(key, cls.model_fields) or f"; known: {', '.join(cls.model_fields)}"
        return f"unknown key {key}{hint}"
    if kind == "literal_error":
        allowed = [option.strip("'") for option in str(error["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        return f"{key} must be one of {', '.join(allowed)}, not {value!r}{did_you_mean(str(value), allowed)}"
    if kind == "string_pattern_mismatch":
        return f"{key} must be {str(cls.model_fields[key].description).split(';')[0]}, not {value!r}"
    in_our_words = next((words for start, words in _ALLOWED.items() if kind.startswith(start)), None)
    return f"{key} must be {in_our_words or error['msg'].removeprefix('Input should be ')}, not {value!r}"
