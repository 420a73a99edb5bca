"""The sections of which configs are made: keys that several stages share, each section a heading of `--help`.

Whatever can be known to be wrong before a file is opened raises ConfigError here, in one line: the key, what was
found, what is allowed. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo
from pydantic import model_validator as check

from preftune.config.loss_facts import LOSS_FACTS
from preftune.config.loss_terms import NAMED, TermSpec, parse_loss
from preftune.config.settings import Settings, not_one_of, refusal
from preftune.data.demonstrations import DEMONSTRATIONS
from preftune.data.layouts import Layout
from preftune.errors import ConfigError

__all__ = ["Adapting", "Folder", "Machine", "Objective", "Optimization", "Pairing", "Reading", "TrainingConfig"]

_KNOBS = ("beta", "label_smoothing", "tau", "gamma", "alpha")


class Reading(Settings):
    """Model and data"""

    formats: ClassVar[Mapping[str, Layout]] = DEMONSTRATIONS
    """The layouts this stage reads, besides `auto`: every preference layout holds demonstrations too."""

    model: str = Field(min_length=1, description="Hugging Face or run folder, or hub name, of the model to start from")
    data: str = Field(min_length=1, description="file, folder or hub data set to read")
    eval_data: str | None = Field(
        None, min_length=1, description="held-out data; a prompt it shares is never trained on"
    )
    format: str = Field("auto", description="layout of the data")
    max_length: int = Field(1024, ge=2, description="longest prompt + response, tokens")
    truncation: Literal["refuse", "drop", "prompt", "response"] = Field(
        "refuse",
        description="of a longer row: refuse it, drop it, cut its prompt on the left or its response on the right",
    )
    allow_refused: int = Field(0, ge=0, description="refused rows to accept before the run stops, rows")
    seed: int = Field(0, ge=0, lt=2**32, description="of data order, random pairs and rounding")

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """As `Settings.choices`; `format` is one of the layouts."""
        return ("auto", *cls.formats) if key == "format" else super().choices(key)

    @check(mode="after")
    def _format_is_known(self, info: ValidationInfo) -> Self:
        allowed = self.choices("format")
        if self.format not in allowed:
            raise refusal(info, "format", not_one_of("format", self.format, allowed))
        return self

    @check(mode="after")
    def _eval_data_is_held_out(self, info: ValidationInfo) -> Self:
        if self.eval_data == self.data:
            raise refusal(info, "eval_data", f"eval_data is the training data, {self.data}; name a held-out set")
        return self


class Pairing(Settings):
    """From rankings to pairs"""

    pairs: Literal["all", "adjacent", "best_worst", "best_random", "random"] = Field(
        "all", description="which responses of a ranking are compared; ties never are"
    )


class Objective(Settings):
    """Objective"""

    loss: str = Field("dpo", description="what is minimised, nats; or a sum such as 'dpo(beta=0.2) + 0.5*nll'")
    beta: float | None = Field(None, description="strength of the pull to the reference, per nat")
    label_smoothing: float | None = Field(None, description="assumed share of flipped labels")
    tau: float | None = Field(None, description="IPO's regularisation: margins are pulled to 1 / (2 tau) nats")
    gamma: float | None = Field(None, description="target margin of the losses that have one")
    alpha: float | None = Field(None, description="the loss's alpha, see docs/losses.md")
    reference: str | None = Field(
        None, min_length=1, description="folder or hub name of the reference model; none: the weights of --model"
    )
    reference_every: int | None = Field(
        None, ge=1, description="move the reference towards the policy every so many steps (TR-DPO); none: never"
    )
    reference_mix: float | None = Field(
        None, gt=0, le=1, description="share of the policy in a moved reference; 1 replaces it"
    )

    def terms(self) -> tuple[TermSpec, ...]:
        """The terms of the objective with the knobs that were given, in the loss or by their own keys."""
        terms = parse_loss(self.loss)
        given = {name: getattr(self, name) for name in _KNOBS if getattr(self, name) is not None}
        return (replace(terms[0], knobs={**terms[0].knobs, **given}), *terms[1:]) if given else terms

    def reference_moves(self) -> tuple[int, float] | None:
        """(every so many steps, by this share), or None for a fixed reference."""
        named = NAMED.get(self.loss)
        every = self.reference_every or (named.reference_every if named else None)
        mix = self.reference_mix or (named.reference_mix if named else None)
        return None if every is None else (every, 1.0 if mix is None else mix)

    def peak_lr(self) -> float:
        """`lr`, else the advice for the leading loss."""
        given: float | None = getattr(self, "lr", None)
        return LOSS_FACTS[parse_loss(self.loss)[0].loss].learning_rate if given is None else given

    @classmethod
    def choices(cls, key: str) -> tuple[str, ...]:
        """As `Settings.choices`; `loss` is one of the table's, or a named recipe."""
        return (*LOSS_FACTS, *NAMED) if key == "loss" else super().choices(key)

    @classmethod
    def default_text(cls, key: str) -> str:
        """As `Settings.default_text`; what depends on the loss is told for the default loss."""
        facts = LOSS_FACTS["dpo"]
        if key in _KNOBS or key == "lr":
            own = {name: default for name, (default, _) in facts.knobs.items()} | {"lr": facts.learning_rate}
            return (f"default {own[key]:g} for dpo, " if key in own else "") + "by loss: docs/losses.md"
        return super().default_text(key)

    @check(mode="after")
    def _loss_has_these_knobs(self, info: ValidationInfo) -> Self:
        try:
            terms = parse_loss(self.loss)
        except ConfigError as problem:
            raise refusal(info, "loss", str(problem)) from None
        for name in _KNOBS:
            value = getattr(self, name)
            if value is None:
                continue
            if len(terms) > 1 or self.loss in NAMED:
                term = f"{terms[0].loss}({name}={value:g})"
                raise refusal(info, name, f"{name} belongs to one term of loss {self.loss}: write it there, {term}")
            if name in terms[0].knobs:
                raise refusal(info, name, f"{name} is given twice, here and in loss {self.loss}")
            try:
                LOSS_FACTS[terms[0].loss].check(terms[0].loss, name, value)
            except ConfigError as problem:
                raise refusal(info, name, str(problem)) from None
        return self

    @check(mode="after")
    def _reference_is_used(self, info: ValidationInfo) -> Self:
        needs = frozenset[str]().union(*(LOSS_FACTS[term.loss].needs for term in parse_loss(self.loss)))
        for key in ("reference", "reference_every", "reference_mix"):
            if getattr(self, key) is not None and "reference" not in needs:
                raise refusal(info, key, f"loss {self.loss} uses no reference model; leave {key} out")
        if self.reference_mix is not None and self.reference_moves() is None:
            raise refusal(info, "reference_mix", "reference_mix says how far the reference moves; set reference_every")
        return self


class Optimization(Settings):
    """Optimization"""

    optimizer: Literal["adamw", "adamw8bit", "adamw_lean", "rmsprop", "sgd"] = Field(
        "adamw",
        description="update rule; rmsprop is the DPO paper's, adamw8bit has moments of 8 bits, on CUDA, "
        "adamw_lean keeps bfloat16 alone: no masters",
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="course of the learning rate after warm-up; linear and cosine end at 0"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0, optimizer steps")
    max_grad_norm: float = Field(1.0, ge=0, description="longer gradients are scaled to this norm (0: never)")
    weight_decay: float = Field(
        0.0, ge=0, description="of matrices: decoupled in adamw, an L2 term of the gradient in the others"
    )
    batch_size: int = Field(32, ge=1, description="pairs (SFT: responses) per optimizer step, however it is split")
    epochs: int = Field(1, ge=1, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="stop early, after so many optimizer steps; none: never")
    shuffle: bool = Field(True, description="a new order every epoch, a function of seed and epoch")

    @check(mode="after")
    def _warmup_ends(self, info: ValidationInfo) -> Self:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise refusal(
                info, "warmup_steps", f"warmup_steps {self.warmup_steps} must be below max_steps {self.max_steps}"
            )
        return self


class Adapting(Settings):
    """Adapter (train a low-rank change of frozen weights; needs peft)"""

    lora_rank: int = Field(0, ge=0, description="rank of the change in each layer; 0 trains all weights")
    lora_alpha: float | None = Field(
        None, gt=0, description="the change is scaled by lora_alpha / lora_rank; none: twice the rank"
    )
    lora_targets: str = Field(
        "all", min_length=1, description="linear layers of the decoder to change: all, or names such as q_proj,v_proj"
    )
    dora: bool = Field(False, description="DoRA: directions of rank lora_rank, magnitudes of their own")
    quantize: Literal["none", "nf4"] = Field(
        "none", description="QLoRA: the frozen weights in 4 bits, on CUDA, by bitsandbytes"
    )

    def alpha_of_lora(self) -> float:
        """`lora_alpha`, else twice the rank."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    def target_names(self) -> tuple[str, ...]:
        """The names in `lora_targets`; none for all."""
        return () if self.lora_targets == "all" else tuple(filter(None, map(str.strip, self.lora_targets.split(","))))

    @check(mode="after")
    def _adapter_keys_are_used(self, info: ValidationInfo) -> Self:
        for key in ("lora_alpha", "lora_targets", "dora", "quantize"):
            if self.lora_rank == 0 and getattr(self, key) != type(self).model_fields[key].default:
                raise refusal(info, key, f"{key} belongs to an adapter: set lora_rank, or leave it out")
        device = str(getattr(self, "device", "auto"))
        if self.quantize != "none" and device in ("cpu", "mps"):
            raise refusal(info, "quantize", f"quantize {self.quantize} needs a CUDA device, not {device}; leave it out")
        if not self.target_names() and self.lora_targets != "all":
            raise refusal(info, "lora_targets", f"lora_targets {self.lora_targets!r} names no layer")
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
    attention: Literal["auto", "sdpa", "varlen", "flex", "dense"] = Field(
        "auto", description="kernel for packed rows: auto takes varlen or flex on CUDA where they are right, else sdpa"
    )
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = Field(
        "none",
        description="recompute activations, all but matrix products or all: less memory, more time; auto: what fits",
    )
    shard: bool = Field(
        False, description="of several processes each keeps a part of weights, masters and moments (FSDP)"
    )
    offload: bool = Field(
        False,
        description="with shard: parts of weights, gradients, masters and moments stay in the computer's memory, where "
        "the optimizer steps; slower",
    )

    @check(mode="after")
    def _shards_fit(self, info: ValidationInfo) -> Self:
        if self.offload and not self.shard:
            raise refusal(
                info, "offload", "offload is for the parts of sharded weights: set shard too, or leave it out"
            )
        if self.shard and getattr(self, "quantize", "none") != "none":
            text = "4-bit weights are scaled in blocks, which other parts would cut; with shard leave quantize out"
            raise refusal(info, "shard", text)
        if self.shard and getattr(self, "optimizer", "") == "adamw8bit":
            text = "adamw8bit scales its moments in blocks, which other parts would cut; with shard choose adamw"
            raise refusal(info, "shard", text)
        return self


class Folder(Settings):
    """Run folder"""

    out: str = Field(min_length=1, description="folder of the run: run.json, metrics.jsonl, checkpoints/, model/")
    eval_every: int = Field(0, ge=0, description="evaluate every so many optimizer steps (0: only at the end)")
    early_stop: int = Field(0, ge=0, description="stop after so many evaluations without improvement (0: off)")
    save_every: int = Field(0, ge=0, description="checkpoint every so many steps (0: only when stopped)")
    resume: bool = Field(False, description="continue the run in --out from its newest whole checkpoint")


# Bases stand last section first: pydantic collects fields from the last base on.
class TrainingConfig(Folder, Machine, Adapting, Optimization, Reading):
    """What every training stage can be told."""

    if TYPE_CHECKING:  # a key of DPO, a constant of SFT

        @property
        def pairs(self) -> str: ...

    @check(mode="after")
    def _parts_fit(self, info: ValidationInfo) -> Self:
        if self.tokens_per_batch < self.max_length:
            raise refusal(
                info,
                "tokens_per_batch",
                f"tokens_per_batch {self.tokens_per_batch} must be at least max_length {self.max_length}",
            )
        if self.eval_every and not self.eval_data:
            raise refusal(info, "eval_every", "eval_every needs eval_data: there is nothing to evaluate on")
        if self.early_stop and not self.eval_every:
            raise refusal(info, "early_stop", "early_stop counts evaluations: set eval_every (and eval_data) too")
        return self
