"""What a run may be told: one frozen model per stage, checked whole when it is made, without importing torch.

A config is a sum of sections (`config/sections.py`) and keys of its own; the fields' descriptions are the help. Keys
are the same in YAML, on the command line, in Python and in `run.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo
from pydantic import model_validator as check

from preftune.config.comparison import STUDY_CONFIGS, EvaluateConfig, ReportConfig
from preftune.config.loop import ExportConfig, ImportConfig, LabelConfig, Online, Page, SampleConfig
from preftune.config.loss_facts import LOSS_FACTS
from preftune.config.plan import PlanConfig
from preftune.config.rl import PpoConfig, Rollouts, Rules
from preftune.config.sections import (
    Adapting,
    Folder,
    Machine,
    Objective,
    Optimization,
    Pairing,
    Reading,
    TrainingConfig,
)
from preftune.config.settings import Settings, not_one_of, refusal
from preftune.data.demonstrations import DEMONSTRATIONS
from preftune.data.formats import PREFERENCES
from preftune.data.layouts import Layout

__all__ = [
    "CONFIGS",
    "DpoConfig",
    "ExplainConfig",
    "FreshConfig",
    "InspectConfig",
    "LabelConfig",
    "MergeConfig",
    "PlanConfig",
    "PpoConfig",
    "QuickstartConfig",
    "RewardConfig",
    "SampleConfig",
    "SftConfig",
    "sections",
]


class SftConfig(TrainingConfig):
    """Supervised fine-tuning on responses, or on the chosen side of preference pairs."""

    lr: float = Field(2e-5, gt=0, description="peak learning rate")

    @property
    def pairs(self) -> str:
        """Not a key: the best response of a ranking is imitated, whatever would be compared."""
        return "all"


class DpoConfig(Online, Objective, Pairing, TrainingConfig):
    """Direct Preference Optimization on preference pairs, given or, online, made from the policy's own responses."""

    formats: ClassVar[Mapping[str, Layout]] = PREFERENCES

    @classmethod
    def default_text(cls, key: str) -> str:
        """As the sections have it; online, `data` is what `prompts` names."""
        return "required without online" if key == "data" else super().default_text(key)

    def uses_reference(self) -> bool:
        """Whether any term of the objective compares the policy with a reference."""
        return any("reference" in LOSS_FACTS[term.loss].needs for term in self.terms())

    @check(mode="before")
    @classmethod
    def _data_are_prompts(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "data" not in values and str(values.get("online")).lower() == "true":
            return {**values, "data": values.get("prompts") or "-"}
        return values

    @check(mode="after")
    def _adapters_are_not_mixed(self, info: ValidationInfo) -> Self:
        moves = self.reference_moves()
        if self.lora_rank and moves and moves[1] != 1:
            text = "a share of two adapters is no share of two models (A and B multiply): move the reference by 1"
            raise refusal(info, "reference_mix", text)
        return self

    @check(mode="after")
    def _rounds_fit(self, info: ValidationInfo) -> Self:
        if not self.online:
            return self
        used = [LOSS_FACTS[term.loss] for term in self.terms()]
        refused = {
            "data": (self.data != self.prompts, "online reads prompts instead of data; leave data out"),
            "format": (self.format != "auto", "online recognises the layout of its prompts; leave format out"),
            "loss": (
                any(facts.reads != "pairs" for facts in used),
                f"loss {self.loss} does not read pairs, which is what online rounds make; choose a pairwise loss",
            ),
            "pairs": (
                not self.judge_scores and self.pairs not in ("all", "random"),
                f"pairs {self.pairs} ranks by scores, and judge {self.judge} only compares; choose all or random",
            ),
            "online_reference": (
                self.online_reference == "moving" and not self.uses_reference(),
                f"loss {self.loss} uses no reference model; leave online_reference out",
            ),
            "reference": (
                self.reference is not None and self.online_reference == "moving",
                "a moving reference starts at model; leave reference out",
            ),
            "reference_every": (
                self.reference_moves() is not None,
                "online moves the reference between rounds only: see online_reference, and choose another loss",
            ),
            "max_tokens": (
                self.max_tokens >= self.max_length,
                f"max_tokens {self.max_tokens} leaves a prompt no room in max_length {self.max_length}",
            ),
        }
        for key, (wrong, text) in refused.items():
            if wrong:
                raise refusal(info, key, text)
        return self


class RewardConfig(Pairing, TrainingConfig):
    """A reward model on preference pairs or rankings."""

    formats: ClassVar[Mapping[str, Layout]] = {name: PREFERENCES[name] for name in PREFERENCES if name != "unpaired"}

    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    loss: Literal["bt", "plackett_luce"] = Field("bt", description="Bradley-Terry of pairs, or whole rankings")
    margin: float = Field(0, ge=0, description="lead asked of the chosen reward, nats per unit of the score gap")
    centering: float = Field(0, ge=0, description="eta of eta (r_w + r_l)^2, which pulls rewards to mean 0")
    reference_samples: str | None = Field(
        None, min_length=1, description="samples whose mean reward becomes 0; none: all responses of --data"
    )

    @property
    def unit(self) -> str:
        """What has a loss of its own."""
        return "pair" if self.loss == "bt" else "ranking"

    def described(self) -> str:
        """`bt(margin=0, centering=0.01)`."""
        return f"{self.loss}(margin={self.margin:g}, centering={self.centering:g})"

    @check(mode="after")
    def _can_be_merged(self, info: ValidationInfo) -> Self:
        if self.quantize != "none":
            raise refusal(
                info,
                "quantize",
                "a reward model is written merged, which quantized weights cannot be; leave quantize out",
            )
        return self

    @check(mode="after")
    def _margin_is_of_pairs(self, info: ValidationInfo) -> Self:
        if self.margin and self.loss != "bt":
            raise refusal(info, "margin", f"margin is a lead in a pair; loss {self.loss} has none, leave it out")
        return self


class MergeConfig(Settings):
    """An adapter merged into its base model."""

    model: str = Field(min_length=1, description="adapter folder, or its hub name")
    out: str = Field(min_length=1, description="new folder of the plain model")


class InspectConfig(Pairing, Reading):
    """Examine a data set as training would see it, and train nothing."""

    kind: Literal["preferences", "demonstrations"] = Field("preferences", description="what the rows should hold")
    examples: int = Field(3, ge=0, description="rows to show decoded, with their mask, rows")

    @check(mode="after")
    def _fits_the_kind(self, info: ValidationInfo) -> Self:
        allowed = ("auto", *PREFERENCES)
        if self.kind == "preferences" and self.format not in allowed:
            raise refusal(info, "format", f"{not_one_of('format', self.format, allowed)} (or kind: demonstrations)")
        if self.kind == "demonstrations" and self.pairs != "all":
            raise refusal(info, "pairs", "pairs has no meaning for demonstrations; leave it out")
        return self


class QuickstartConfig(Settings):
    """The whole loop on the embedded world of film reviews."""

    out: str = Field("runs/quickstart", min_length=1, description="folder of the run; ends with report.html")
    fast: bool = Field(False, description="a smaller run for a first look, under a minute")
    seed: int = Field(0, ge=0, lt=2**32, description="of the world, the samples, the labels and the training")


class FreshConfig(Settings):
    """A small untrained model and its tokenizer."""

    data: str | None = Field(
        None, min_length=1, description="file, folder or hub data set in any layout: the tokenizer is learnt from it"
    )
    format: str = Field("auto", description="layout of the data")
    tokenizer: str | None = Field(
        None, min_length=1, description="folder or hub name of a tokenizer to take instead of learning one"
    )
    vocabulary: int = Field(2048, ge=258, description="tokens to learn at most, the 256 bytes and two marks included")
    hidden: int = Field(128, ge=2, description="width of the model, a multiple of 2 * heads")
    layers: int = Field(4, ge=1, description="layers")
    heads: int = Field(4, ge=1, description="attention heads")
    positions: int = Field(512, ge=2, description="longest text, tokens")
    seed: int = Field(0, ge=0, lt=2**32, description="of the weights")
    out: str = Field(min_length=1, description="folder to write, which must not exist yet")

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """As `Settings.choices`; `format` is one of the layouts."""
        return ("auto", *DEMONSTRATIONS) if key == "format" else super().choices(key)

    @check(mode="after")
    def _one_tokenizer(self, info: ValidationInfo) -> Self:
        if self.format not in self.choices("format"):
            raise refusal(info, "format", not_one_of("format", self.format, self.choices("format")))
        if (self.data is None) == (self.tokenizer is None):
            found = "neither is given" if self.data is None else "both are given"
            raise refusal(info, "data", f"tokens are learnt from data or taken from tokenizer; {found}")
        for key in ("vocabulary", "format"):
            if self.tokenizer is not None and getattr(self, key) != type(self).model_fields[key].default:
                raise refusal(info, key, f"{key} is of a tokenizer that is learnt; leave it out")
        if self.hidden % (2 * self.heads):
            raise refusal(info, "hidden", f"hidden {self.hidden} must be a multiple of 2 * heads = {2 * self.heads}")
        return self


class ExplainConfig(Settings):
    """The derivation of the loss, executed and drawn."""

    out: str | None = Field(
        None, min_length=1, description="folder of index.html and figures/; none: runs/explain, or no page with --text"
    )
    text: bool = Field(False, description="print every number on the terminal")


CONFIGS: Mapping[str, type[Settings]] = {
    "quickstart": QuickstartConfig,
    "explain": ExplainConfig,
    "inspect": InspectConfig,
    "plan": PlanConfig,
    "fresh": FreshConfig,
    "sft": SftConfig,
    "sample": SampleConfig,
    "label": LabelConfig,
    "label export": ExportConfig,
    "label import": ImportConfig,
    "dpo": DpoConfig,
    "reward": RewardConfig,
    "merge": MergeConfig,
    "ppo": PpoConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    **STUDY_CONFIGS,
}
"""Stage -> what it may be told."""

_SECTIONS: tuple[type[Settings], ...] = (
    Reading,
    Pairing,
    Objective,
    Rollouts,
    Rules,
    Optimization,
    Adapting,
    Machine,
    Folder,
    Online,
    Page,
)


def sections(config: type[Settings]) -> dict[str, list[str]]:
    """Title -> keys, in the order a reader wants: what the config is made of."""
    left = dict.fromkeys(config.model_fields)
    table = {}
    for section in _SECTIONS:
        if issubclass(config, section):
            table[str(section.__doc__)] = list(section.model_fields)
            left = {key: None for key in left if key not in section.model_fields}
    return {**table, "Options of this stage": list(left)} if left else table
