"""What the stages between sampling and training may be told; as in `configs`, without importing torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo
from pydantic import model_validator as check

from preftune.config.settings import Settings, not_one_of, refusal
from preftune.data.prompts import PROMPTS

__all__ = ["ExportConfig", "ImportConfig", "LabelConfig", "Online", "Page", "SampleConfig"]


SCORING = ("rule:", "reward:", "policy:")
"""How the name of a judge begins that has a score for each response."""


class SampleConfig(Settings):
    """Responses of a model to prompts."""

    model: str | None = Field(
        None,
        min_length=1,
        description="Hugging Face or run folder, or hub name, of the model that answers; or give engine",
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
        min_length=1, description="file to write or continue: a line of JSON per prompt; run card and report beside it"
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


class Page(Settings):
    """The labelling page (without judge)"""

    db: str | None = Field(
        None, min_length=1, description="where labels are kept: a file such as labels.db, or postgresql+psycopg://..."
    )
    guidelines: str | None = Field(None, min_length=1, description="Markdown file shown beside the task")
    overlap: int = Field(1, ge=1, description="labels wanted per item, each by another annotator")
    gold: str | None = Field(
        None, min_length=1, description="preference data with known answers, to check annotators; never exported"
    )
    gold_rate: float = Field(0.1, ge=0, le=1, description="share of tasks that are gold items")
    random_share: float = Field(
        0.2, ge=0, le=1, description="share of tasks drawn at random; the others go where scores are closest"
    )
    annotator: str = Field("me", min_length=1, description="name under which labels are stored, without accounts")
    host: str = Field(
        "127.0.0.1", min_length=1, description="address to listen on; only this machine can reach the default"
    )
    port: int = Field(8517, ge=0, le=65535, description="to listen on; 0 takes a free one")
    url: str | None = Field(
        None, min_length=1, description="address by which the page is opened where it is another, such as https://name"
    )
    open: bool = Field(True, description="open the browser where there is a display")
    accounts: bool = Field(False, description="let invited people in, instead of whoever has the printed link")
    invite: str | None = Field(None, min_length=1, description="print an invitation link for this name and end")
    tls_cert: str | None = Field(None, min_length=1, description="PEM file of the server's certificate")
    tls_key: str | None = Field(None, min_length=1, description="PEM file of its private key")
    insecure: bool = Field(
        False, description="allow another host without accounts or TLS: anyone between can read along"
    )


class LabelConfig(Page):
    """Preferences between sampled responses, by people on a page or by judges."""

    samples: str = Field("", description="what `preftune sample` wrote; for judges also preference data to label anew")
    judge: str | None = Field(
        None,
        min_length=1,
        description="who decides: rule:length, rule:regex:PATTERN, rule:json, rule:reviews, rule:enumerable:SEED, "
        "rule:python:MODULE:F, simulated:KIND:KNOB=X, reward:RUN, policy:RUN, llm:URL#MODEL; several: ' ; ' between",
    )
    out: str = Field("", description="folder of judgements.jsonl, pairs.jsonl, rankings.jsonl, label.json")
    orders: Literal["auto", "random", "both"] = Field(
        "auto",
        description="show a comparison once, in random order, or in both, where only a consistent winner wins; "
        "auto: both for llm, random for the others",
    )
    labels: Literal["larger", "bradley_terry"] = Field(
        "larger",
        description="of two scores the larger wins, or the first with probability "
        "sigmoid(difference / label_temperature), drawn; equal scores tie",
    )
    label_temperature: float = Field(
        1.0, gt=0, description="of bradley_terry labels, in the unit of the scores: larger means more mistakes"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the order shown, of drawn labels, of simulated annotators")
    criteria: str | None = Field(None, min_length=1, description="text file: what an llm judge should prefer")
    allow_python: bool = Field(False, description="let rule:python import and run the named function")

    @classmethod
    def default_text(cls, key: str) -> str:
        """As `Settings.default_text`; what only judges or only the page need is told."""
        needed = {"samples": "required with judge", "out": "required with judge", "db": "required without judge"}
        return needed.get(key) or super().default_text(key)

    @check(mode="after")
    def _page_or_judges(self, info: ValidationInfo) -> Self:
        of_judges = ("judge", "out", "orders", "labels", "label_temperature", "criteria", "allow_python")
        foreign = tuple(Page.model_fields) if self.judge is not None else of_judges
        for key in foreign:
            if key in self.model_fields_set:
                what = f"{key} belongs to the labelling page" if self.judge is not None else f"{key} needs judge"
                raise refusal(info, key, f"{what}; give either judge, or db for a page")
        for key in ("samples", "out") if self.judge is not None else ("db",):
            if not getattr(self, key):
                raise refusal(
                    info, key, f"missing {key}: give --{key} VALUE" + ("" if self.judge else ", or a --judge")
                )
        return self

    @check(mode="after")
    def _only_scores_are_drawn_from(self, info: ValidationInfo) -> Self:
        if self.labels == "larger" and self.label_temperature != 1.0:
            raise refusal(info, "label_temperature", "label_temperature is of labels bradley_terry; set labels too")
        for judge in (str(self.judge).split(" ; ")) if self.labels != "larger" else ():
            if not judge.strip().startswith(SCORING):
                raise refusal(
                    info, "labels", f"labels {self.labels} need scores, and judge {judge.strip()} only compares"
                )
        return self


class ExportConfig(Settings):
    """Labels of a store as files to train on."""

    db: str = Field(min_length=1, description="the store: a file, or postgresql+psycopg://...")
    kind: Literal["pairs", "unpaired", "rankings", "judgements", "history"] = Field(
        "pairs", description="what to write; history is everything, and can be imported again"
    )
    out: str = Field(min_length=1, description="JSON Lines file to write")


class ImportConfig(Settings):
    """Labels made elsewhere into a store."""

    db: str = Field(min_length=1, description="the store: a file, new or not, or postgresql+psycopg://...")
    data: str = Field(
        min_length=1, description="an exported history, preference data, or an export of Label Studio or Argilla"
    )
    prompt: str = Field("", description="column of the prompt in another tool's export; empty: the usual names")
    responses: str = Field("", description="its columns of responses, with commas between; empty: the usual names")
    question: str = Field("", description="Argilla's question that ranks or chooses; empty: the usual names")


class Online(Settings):
    """Online (rounds of sampling, judging and training)"""

    online: bool = Field(False, description="learn from the policy's own responses instead of data")
    prompts: str | None = Field(
        None,
        min_length=1,
        description="file, folder or hub data set in any layout; its prompts are answered each round",
    )
    judge: str | None = Field(
        None,
        min_length=1,
        description="who decides, by the names of `preftune label`; rule:, reward: and policy: score",
    )
    rounds: int = Field(3, ge=1, description="of sampling, judging and training; epochs and max_steps are of one round")
    n: int = Field(4, ge=2, description="responses per prompt and round")
    temperature: float = Field(1.0, gt=0, description="divides the logits of the sampler")
    max_tokens: int = Field(256, ge=1, description="longest response, end mark included, tokens")
    labels: Literal["larger", "bradley_terry"] = Field(
        "larger", description="of two scores the larger wins, or the first with probability sigmoid(difference)"
    )
    min_gap: float = Field(0.0, ge=0, description="scores that are closer are not compared")
    online_reference: Literal["fixed", "moving"] = Field(
        "fixed", description="every round's: where the run began, or the policy as that round began"
    )
    max_kl: float | None = Field(
        None, gt=0, description="stop when KL(policy || start) on own samples is larger, nats; none: never"
    )
    allow_python: bool = Field(False, description="let judge rule:python import and run the named function")

    @property
    def judge_scores(self) -> bool:
        """Whether the judge has a score for each response, rather than a verdict on two."""
        return (self.judge or "").startswith(SCORING)

    @check(mode="after")
    def _online_keys_are_used(self, info: ValidationInfo) -> Self:
        given = [key for key, field in Online.model_fields.items() if getattr(self, key) != field.default]
        if not self.online:
            for key in given:
                raise refusal(
                    info, key, f"{key} belongs to rounds of sampling and training: set online, or leave it out"
                )
            return self
        for key in ("prompts", "judge"):
            if getattr(self, key) is None:
                raise refusal(info, key, f"online needs {key}: give --{key} VALUE")
        if " ; " in str(self.judge):
            raise refusal(info, "judge", f"online asks one judge, not several: found {self.judge}")
        for key in ("labels", "min_gap"):
            if key in given and not self.judge_scores:
                raise refusal(info, key, f"{key} is about scores, and judge {self.judge} only compares; leave it out")
        return self
