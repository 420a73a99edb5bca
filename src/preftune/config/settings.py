"""What every config is: a frozen set of keys whose every error is one line, and that can explain itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails

from preftune.errors import ConfigError

__all__ = ["Settings", "did_you_mean", "not_one_of", "refusal"]

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
    """A frozen set of keys; an unknown one is an error, and every error is a ConfigError of one line.

    The validation context may map keys to the place they came from, which then opens the message.
    """

    arguments: ClassVar[tuple[str, str] | None] = None
    """(key, its name in the usage line) that takes the arguments without an option's name; most stages take none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        for key, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation is not bool:  # pydantic reads true as 1
                raise refusal(info, key, f"{key} is not a switch: found {str(value).lower()}")
        try:
            return handler(values)
        except ValidationError as problem:
            raise _explain(cls, problem, info) from None

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """The values `key` may take where they are a list of names, else none."""
        annotation = cls.model_fields[key].annotation
        return get_args(annotation) if get_origin(annotation) is Literal else ()

    @classmethod
    def default_text(cls, key: str) -> str:
        """What holds when `key` is not given, in words."""
        field = cls.model_fields[key]
        if field.is_required():
            return "required"
        plain = isinstance(field.default, str | int | float) and not isinstance(field.default, bool)
        return f"default {field.default if plain else str(field.default).lower()}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean lr?` for a slip or another tool's name of a known word, else nothing."""
    names = {name: name for name in known}
    names |= {theirs: ours for theirs, ours in _ELSEWHERE.items() if ours in names}
    close = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {names[close[0]]}?" if close else ""


def refusal(info: ValidationInfo, key: str, text: str) -> ConfigError:
    """`text` about `key`, opened by the place the key came from where the caller told it (`dpo.yaml:3: `)."""
    origins: Mapping[str, str] = info.context or {}
    return ConfigError(f"{origins[key]}: {text}" if key in origins else text)


def not_one_of(key: str, value: object, allowed: Sequence[str]) -> str:
    """The sentence about a name that is none of the allowed ones."""
    return f"{key} must be one of {', '.join(allowed)}, not {value!r}{did_you_mean(str(value), allowed)}"


def _explain(cls: type[Settings], problem: ValidationError, info: ValidationInfo) -> ConfigError:
    """The most telling problem in one line: an unknown key first, for it often explains a missing one."""
    found = problem.errors()
    unknown = [error for error in found if error["type"] == "extra_forbidden"]
    missing = [str(error["loc"][0]) for error in found if error["type"] == "missing"]
    if missing and not unknown:
        return ConfigError(f"missing {', '.join(missing)}: give --{missing[0]} VALUE, or the key in the YAML file")
    first = (unknown or found)[0]
    key = str(first["loc"][0])
    return refusal(info, key, _sentence(cls, key, first))


def _sentence(cls: type[Settings], key: str, error: ErrorDetails) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        hint = did_you_mean(key, cls.model_fields) or f"; known: {', '.join(cls.model_fields)}"
        return f"unknown key {key}{hint}"
    if kind == "literal_error":
        return not_one_of(key, value, cls.choices(key))
    if kind == "string_pattern_mismatch":
        return f"{key} must be {str(cls.model_fields[key].description).split(';')[0]}, not {value!r}"
    in_our_words = next((words for start, words in _ALLOWED.items() if kind.startswith(start)), None)
    return f"{key} must be {in_our_words or error['msg'].removeprefix('Input should be ')}, not {value!r}"
