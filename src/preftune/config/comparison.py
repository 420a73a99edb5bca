"""What the stages that compare models may be told; as in `configs`, without importing torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo
from pydantic import model_validator as check

from preftune.config.settings import Settings, not_one_of, refusal
from preftune.data.prompts import PROMPTS

__all__ = [
    "STUDY_CONFIGS", "EvaluateConfig", "ReportConfig", "StudyConfig", "is_served", "named_models", "served_model",
]  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def named_models(text: str) -> dict[str, str]:
    """`NAME=FOLDER,FOLDER,...` -> {name: folder}; one without a name is called after its folder.

    Raises ValueError on an empty entry, a name that could be no file's, and a name given twice.
    """
    named: list[tuple[str, str]] = []
    for entry in text.split(","):
        name, equals, folder = entry.strip().partition("=")
        if not equals:
            name, folder = _called(name), name
        if not folder or not _NAME.fullmatch(name):
            raise ValueError(f"{entry.strip()!r} is neither FOLDER nor NAME=FOLDER with a NAME of letters and digits")
        named.append((name, folder))
    if twice := [name for name, times in Counter(name for name, _ in named).items() if times > 1]:
        raise ValueError(f"two models are called {twice[0]}; tell them apart with NAME=FOLDER")
    return dict(named)


def is_served(place: str) -> bool:
    """Whether a model is named by the URL of a server."""
    return place.startswith(("http://", "https://"))


def served_model(place: str) -> tuple[str, str]:
    """`URL#MODEL` -> (URL, MODEL). Raises ValueError without a model."""
    url, _, model = place.partition("#")
    if not model:
        raise ValueError(f"which model of the server {place}? Write NAME=URL#MODEL")
    return url, model


def _called(folder: str) -> str:
    """The last part of a path, that above it for `.../model`; of a server's model the last part of its name."""
    path = Path(served_model(folder)[1] if is_served(folder) else folder)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


class EvaluateConfig(Settings):
    """One or several models and a reference on the same prompts."""

    model: str = Field(
        min_length=1,
        description="what to evaluate, FOLDER or NAME=FOLDER, several with commas: sft=runs/sft,dpo=runs/dpo; a folder "
        "is a run or a model; NAME=URL#MODEL is a model behind a server, without KL",
    )
    reference: str = Field(
        min_length=1, description="the model all others are compared with, FOLDER or NAME=FOLDER, a run or a model"
    )
    prompts: str = Field(min_length=1, description="file, folder or hub data set in any layout; prompts are asked once")
    format: str = Field("auto", description="layout of the prompts")
    allow_refused: int = Field(0, ge=0, description="refused rows to accept, of prompts and of pairs each, rows")
    max_prompts: int | None = Field(None, ge=1, description="take the first so many prompts; none: all")
    n: int = Field(1, ge=1, description="responses per prompt and model")
    temperature: float = Field(1.0, ge=0, description="divides the logits of every model; 0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the fewest most likely tokens of this probability")
    max_tokens: int = Field(256, ge=1, description="longest response, end mark included, tokens")
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws, the order shown to judges and the resampling")
    reward: str | None = Field(
        None,
        min_length=1,
        description="what scores responses: reward:RUN, policy:RUN, rule:length, rule:regex:PATTERN, rule:json, "
        "rule:reviews, rule:enumerable:SEED, rule:python:MODULE:F",
    )
    truth: str | None = Field(
        None, min_length=1, description="a second scorer, taken as the truth that reward is held against"
    )
    judge: str | None = Field(
        None, min_length=1, description="who compares responses, as in preftune label; none: reward, the larger wins"
    )
    orders: Literal["auto", "random", "both"] = Field(
        "auto", description="show a comparison once, in random order, or in both; auto: both for llm judges"
    )
    criteria: str | None = Field(None, min_length=1, description="text file: what an llm judge should prefer")
    allow_python: bool = Field(False, description="let rule:python import and run the named function")
    against: Literal["reference", "all"] = Field(
        "reference", description="win rates against the reference only, or of all pairs of models"
    )
    pairs: str | None = Field(
        None, min_length=1, description="held-out preference data: calibration of reward, implicit rewards, drift"
    )
    lm_eval: str | None = Field(
        None,
        min_length=1,
        description="tasks of lm-evaluation-harness with commas, and folders of tasks of one's own; "
        "needs the extra preftune[eval]",
    )
    batch_size: int = Field(64, ge=1, description="responses sampled at once; moves nothing but the last digits")
    tokens_per_batch: int = Field(8192, ge=2, description="tokens scored at once; bounds memory, tokens")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto is bfloat16 on CUDA, else float32"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N; auto prefers CUDA"
    )
    concurrency: int = Field(8, ge=1, description="requests to a server's model under way at once")
    out: str = Field(
        min_length=1, description="folder: run.json, evaluation.jsonl, judgements.jsonl, samples/, tokens/"
    )
    resume: bool = Field(False, description="continue the run in --out; samples that are there are kept")

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """As `Settings.choices`; `format` is one of the layouts."""
        return ("auto", *PROMPTS) if key == "format" else super().choices(key)

    def contestants(self) -> dict[str, str]:
        """{name: folder} of the reference, which comes first, and the models."""
        return {**named_models(self.reference), **named_models(self.model)}

    @check(mode="after")
    def _models_have_names(self, info: ValidationInfo) -> Self:
        for key in ("reference", "model"):
            try:
                named = named_models(getattr(self, key))
            except ValueError as problem:
                raise refusal(info, key, f"{key}: {problem}") from None
            if key == "reference" and len(named) > 1:
                raise refusal(info, key, "reference is one model; name the others in model")
            for place in filter(is_served, named.values()):
                if key == "reference":
                    raise refusal(info, key, f"reference {place} is a server, which tells no law: name a folder")
                served_model(place)
        if both := named_models(self.reference).keys() & named_models(self.model).keys():
            raise refusal(
                info, "model", f"model and reference are both called {min(both)}; tell them apart with NAME=FOLDER"
            )
        return self

    @check(mode="after")
    def _something_is_measured(self, info: ValidationInfo) -> Self:
        if self.format not in self.choices("format"):
            raise refusal(info, "format", not_one_of("format", self.format, self.choices("format")))
        for key in ("orders", "criteria"):
            if key in self.model_fields_set and self.judge is None:
                raise refusal(info, key, f"{key} is a matter of judge, and none is given")
        served = any(map(is_served, named_models(self.model).values()))
        if not served and self.concurrency != 8:
            raise refusal(info, "concurrency", "concurrency is of a server's model, and none of the models is one")
        if served and self.lm_eval is not None:
            raise refusal(info, "lm_eval", "lm_eval loads models itself and cannot run one behind a server")
        if self.truth is not None and self.reward is None:
            raise refusal(info, "truth", "truth is what reward is held against; give reward too")
        return self


class ReportConfig(Settings):
    """One page about one or several runs."""

    arguments: ClassVar[tuple[str, str] | None] = ("runs", "RUN")

    runs: tuple[str, ...] = Field(
        description="folders of runs, or sample files, to show; several in one option with commas"
    )
    out: str | None = Field(
        None,
        min_length=1,
        description="HTML file to write; none: report.html in the run's folder, of several runs here",
    )

    @check(mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("runs"), str):
            return {**values, "runs": tuple(filter(None, map(str.strip, values["runs"].split(","))))}
        return values

    @check(mode="after")
    def _runs_are_different(self, info: ValidationInfo) -> Self:
        if not self.runs or not all(self.runs):
            raise refusal(info, "runs", "runs holds no name, or an empty one; name folders of runs")
        if twice := [run for run, times in Counter(map(Path, self.runs)).items() if times > 1]:
            raise refusal(info, "runs", f"{twice[0]} is given twice; name each run once")
        return self


class StudyConfig(Settings):
    """Many short runs on the enumerable world, and what they say of a claim."""

    study: ClassVar[str]

    out: str | None = Field(
        None, min_length=1, description="folder of results.jsonl, study.md and figures; none: runs/study-NAME"
    )
    seeds: int | None = Field(None, ge=1, description="repetitions, each with a world of its own; none: 5, with fast 2")
    seed: int = Field(0, ge=0, lt=2**20, description="first seed; the others follow it")
    fast: bool = Field(False, description="a small world and short runs for a first look, under two minutes")
    processes: int | None = Field(None, ge=1, description="runs at once, one thread each; none: as many as cores")

    def folder(self) -> str:
        """`out`, else the study's own."""
        return self.out or f"runs/study-{self.study}"


def _of(name: str) -> type[Settings]:
    class OneStudy(StudyConfig):
        study = name

    return OneStudy


STUDY_CONFIGS: Mapping[str, type[Settings]] = {
    f"study {name}": _of(name)
    for name in (
        "frontier",
        "tuning",
        "data",
        "anchor",
        "shift",
        "length",
        "gradient",
        "cost",
        "weight",
        "start",
        "ceiling",
    )
}
"""Stage -> what it may be told."""
