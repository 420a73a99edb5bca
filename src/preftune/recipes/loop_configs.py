"""What the stages between sampling and training may be told; as in `configs`, without importing torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo
from pydantic import model_validator as check

from preftune.data.prompts import PROMPTS
from preftune.recipes.settings import Settings, not_one_of, refusal

__all__ = ["LabelConfig", "SampleConfig"]


class SampleConfig(Settings):
    """Responses of a model to prompts."""

    model: str | None = Field(
        None, min_length=1, description="Hugging Face folder or hub name of the model that answers; or give engine"
    )
    prompts: str = Field(
        min_length=1, description="file, folder or hub data set in any layout; each prompt is asked once"
    )
    format: str = Field("auto", description="layout of the prompts")
    allow_refused: int = Field(0, ge=0, description="refused rows to accept before the run stops, rows")
    n: int = Field(2, ge=1, description="responses per prompt; a larger n adds to those a file holds")
    temperature: float = Field(1.0, ge=0, description="divides the logits; 0 takes the most likely token")
    top_p: float = Field(1.0, gt=0, le=1, description="draw from the fewest most likely tokens of this probability")
    max_tokens: int = Field(256, ge=1, description="longest response, end mark included, tokens")
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws; another seed adds further responses")
    out: str = Field(
        min_length=1, description="file to write or continue: a line of JSON per prompt, run card beside it"
    )
    batch_size: int = Field(64, ge=1, description="responses computed at once; moves nothing but the last digits")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto is bfloat16 on CUDA, else float32"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N; auto prefers CUDA"
    )
    engine: str | None = Field(
        None, min_length=1, description="URL of an OpenAI-compatible server that answers instead of model"
    )
    engine_model: str | None = Field(None, min_length=1, description="name by which the server knows its model")
    concurrency: int = Field(8, ge=1, description="requests to the engine under way at once")

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """As `Settings.choices`; `format` is one of the layouts."""
        return ("auto", *PROMPTS) if key == "format" else super().choices(key)

    @check(mode="after")
    def _one_writer(self, info: ValidationInfo) -> Self:
        if self.format not in self.choices("format"):
            raise refusal(info, "format", not_one_of("format", self.format, self.choices("format")))
        if (self.model is None) == (self.engine is None):
            found = "neither is given" if self.model is None else "both are given"
            raise refusal(info, "model", f"responses come from model or from the server of engine; {found}")
        if (self.engine is None) != (self.engine_model is None):
            raise refusal(info, "engine_model", "engine (a URL) and engine_model (a name) go together; one is missing")
        return self


class LabelConfig(Settings):
    """Preferences between sampled responses, by judges."""

    samples: str = Field(min_length=1, description="what `preftune sample` wrote, or preference data to label anew")
    judge: str | None = Field(
        None,
        min_length=1,
        description="who decides: rule:length, rule:regex:PATTERN, rule:json, rule:reviews, rule:python:MODULE:F, "
        "simulated:KIND:KNOB=X, reward:RUN, llm:URL#MODEL; several with ' ; ' between them",
    )
    out: str = Field(min_length=1, description="folder of judgements.jsonl, pairs.jsonl, rankings.jsonl, label.json")
    orders: Literal["auto", "random", "both"] = Field(
        "auto",
        description="show a comparison once, in random order, or in both, where only a consistent winner wins; "
        "auto: both for llm, random for the others",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the order shown and of simulated annotators")
    criteria: str | None = Field(None, min_length=1, description="text file: what an llm judge should prefer")
    allow_python: bool = Field(False, description="let rule:python import and run the named function")
