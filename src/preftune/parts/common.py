"""What a training recipe does around its loop: model in, which step is next, checkpoints, model out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from preftune.config.rl import PpoConfig
from preftune.config.sections import Machine, TrainingConfig
from preftune.data.columns import column
from preftune.data.packing import StepPlan, fed_tokens, idle, micro_batches
from preftune.engine.checkpoint import Checkpoints, rng_state, set_rng_state
from preftune.engine.memory import settle_on_cpu
from preftune.engine.optim import Optimizer
from preftune.engine.parallel import ALONE, World
from preftune.engine.run import Run
from preftune.engine.schedule import learning_rate
from preftune.engine.sharding import Rows, gathered, own_part, shard
from preftune.errors import ConfigError
from preftune.models.attention import install, use_backend
from preftune.models.backends import choose_backend
from preftune.models.checkpointing import Recomputed, recompute_activations
from preftune.models.cost import Shape, Work, flops
from preftune.models.layers import decoder_layers
from preftune.models.load import LoadedModel, load, save, saved_as_adapter
from preftune.models.logprobs import check_packing
from preftune.models.norms import lighten_norms
from preftune.parts.ending import finish
from preftune.parts.fitting import Budget, attempt, attempt_in_step
from preftune.parts.model_card import model_card
from preftune.parts.recomputing import recomputation
from preftune.records import RunCard
from preftune.tensors import PackedBatch, TokenGroup

__all__ = ["MAY_DIFFER", "Batching", "Loop", "open_model"]

# Settings that do not change the trajectory: a resumed run may change them.
MAY_DIFFER = frozenset({"resume", "out", "save_every", "allow_refused", "shard", "offload"})
CHECKED, AT_ONCE = 8, 8192

T = TypeVar("T")


@dataclass(frozen=True)
class Batching:
    """How groups become micro-batches on one model: packed rows, or padded ones where packing is not served."""

    tokens_per_batch: int
    packed: bool
    pad_id: int
    device: torch.device
    feed_last: bool = False
    """Whether responses are fed whole, for what reads their last token."""
    world: World = ALONE
    budget: Budget = field(default_factory=Budget)
    """What memory has been seen to hold, where that is less."""
    recomputed: Recomputed = "none"
    """What of a layer is computed again in the backward pass."""
    shape: Shape | None = None
    """Of the model, where several ranks share the work."""
    sharded: bool = False
    """Whether all ranks must compute at once: each keeps a part of the model."""

    def share(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """This rank's part of the groups, in their order; the parts of all ranks cost the same, to a group.

        In FLOPs, for a token that is scored meets the vocabulary and one in a long row attends to more; where they are
        not counted, in fed tokens.
        """
        return self.world.share(groups, self._cost)

    def parts(self, groups: Sequence[TokenGroup]) -> Iterator[Sequence[TokenGroup]]:
        """The groups, AT_ONCE at a time: of more than a step's, no more are built and no more are batches at once."""
        for start in range(0, len(groups), AT_ONCE):
            yield groups[start : start + AT_ONCE]

    def in_parts(self, groups: Sequence[TokenGroup], work: Callable[[Sequence[PackedBatch]], T]) -> Iterator[T]:
        """What `work` makes of this rank's share of each of the `parts`."""
        for some in self.parts(groups):
            yield self.fit(self.share(some), work)

    def _cost(self, group: TokenGroup) -> float:
        if not self.packed:
            return sum(len(group.prompt) + len(response) for response in group.responses)
        fed = fed_tokens(group, feed_last=self.feed_last)
        if self.shape is None:
            return fed
        work = Work.of(len(group.prompt), [len(response) for response in group.responses])
        return flops(self.shape, Work(fed, 0 if self.feed_last else work.scored, work.attended))

    def __call__(self, groups: Sequence[TokenGroup]) -> Iterator[PackedBatch]:
        for batch in micro_batches(
            groups,
            tokens_per_batch=min(self.tokens_per_batch, self.budget.limit or self.tokens_per_batch),
            packed=self.packed,
            pad_id=self.pad_id,
            feed_last=self.feed_last,
        ):
            yield batch.to(self.device)

    def fit(
        self,
        groups: Sequence[TokenGroup],
        work: Callable[[Sequence[PackedBatch]], T],
        forget: Callable[[], None] = lambda: None,
    ) -> T:
        """What `work` makes of the micro-batches of these groups; smaller ones when memory gives out, see `fitting`.

        With a sharded model every rank has as many batches as the one that has most, the last of them idle ones.
        """
        if self.sharded:
            batches = list(self(groups))
            most = self.world.largest(len(batches), "the micro-batches")
            batches += [idle(packed=self.packed, feed_last=self.feed_last).to(self.device)] * (most - len(batches))
            with self.world.in_step("the parts of the weights"):
                return attempt_in_step(batches, work, self.budget)
        return attempt(lambda: list(self(groups)), work, self.budget, forget)

    def check(
        self,
        model: Any,
        groups: Sequence[TokenGroup],
        *,
        check: Callable[[Any, PackedBatch], float] = check_packing,
    ) -> None:
        """Our log-probs equal those of each sequence alone, on the longest group and the first few, or the run stops.

        `check` compares something else than log-probs.
        The longest is among them because a sliding window shows only in sequences that outgrow it. Raises ConfigError
        when it outgrows the model's positions, RunError when log-probs differ.
        """
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        lengths = column(groups, "prompt") + column(groups, "longest")
        longest, tokens = groups[int(lengths.argmax())], int(lengths.max())
        if positions is not None and tokens > positions:
            raise ConfigError(
                f"{longest.origin} is {tokens} tokens long and the model has {positions} positions; "
                f"set --max_length {positions} and say with --truncation what becomes of longer rows"
            )
        self.fit([longest, *groups[:CHECKED]], lambda batches: [check(model, batch) for batch in batches])


def open_model(
    name: str, cfg: Machine, run: Run, *, role: str = "model", read: Callable[..., LoadedModel] = load
) -> tuple[LoadedModel, Batching]:
    """`read` a model on the configured device and dtype, and decide between packed and padded rows."""
    device = torch.device(run.world.device(cfg.device))
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[automatic if cfg.dtype == "auto" else cfg.dtype]
    if device.type == "cpu":
        settle_on_cpu(cfg.tokens_per_batch)
    sharded = cfg.shard and run.world.size > 1
    loaded = read(name, dtype=dtype, device="cpu" if sharded else device)
    run.record(hashes={f"{role}_weights": loaded.weights_sha256, f"{role}_tokenizer": loaded.tokenizer_sha256})
    reason = install(loaded.model)
    rows = "packed rows" if reason is None else f"padded rows, because {reason}"
    for note in (*loaded.notes, f"{name}: {str(dtype).removeprefix('torch.')} on {device}, {rows}"):
        run.note(note)
    what, tokens = cfg.activation_checkpointing, cfg.tokens_per_batch
    if what == "auto":
        what, tokens = recomputation(cfg, loaded.model, device, run, packed=reason is None, role=role)
    recompute_activations(loaded.model, what)
    lighten_norms(loaded.model)
    if sharded:
        if role not in ("model", "critic"):
            loaded.model.requires_grad_(False)  # nothing is learned by it, and a frozen part is half as large
        shard(loaded.model, decoder_layers(loaded.model), run.world, device, offload=cfg.offload)
        where = " in the computer's memory" if cfg.offload else ""
        run.note(f"each of {run.world.size} processes keeps a part of the weights of {name}{where}")
    elif cfg.shard:
        run.note("shard: one process keeps all weights" + (" and offloads nothing" if cfg.offload else ""))
    if reason is None:
        attention, why = choose_backend(loaded.model, cfg.attention)
        use_backend(loaded.model, attention)
        if (attention, cfg.attention) != ("sdpa", "auto") or device.type == "cuda":
            run.note(f"attention: {attention} ({why})")
    elif cfg.attention != "auto":
        raise ConfigError(f"attention {cfg.attention} is for packed rows; {name} takes padded ones: set auto")
    pad_id = loaded.tokenizer.pad_token_id
    pad_id = 0 if pad_id is None else pad_id
    return loaded, Batching(
        tokens,
        reason is None,
        pad_id,
        device,
        world=run.world,
        budget=Budget(run.own_note),
        recomputed=what,
        shape=Shape.counted(loaded.model) if run.world.size > 1 else None,
        sharded=sharded,
    )


class Loop:
    """The bookkeeping of a training loop: which step, which groups, which learning rate, when to save, when to stop.

    The data order is a function of (seed, epoch) and the position in the epoch; both follow from one step count, so a
    checkpoint is that count, the optimizer's tensors, the random number states, the counters of early stopping, and
    whatever else the recipe hands over: `memory`, plain numbers that it replaces, `tensors`, which change in place and
    may be sharded, and `further` optimizers, of models that learn beside this one.
    """

    def __init__(
        self,
        cfg: TrainingConfig | PpoConfig,
        run: Run,
        plan: StepPlan,
        model: LoadedModel,
        *,
        peak_lr: float,
        memory: Mapping[str, Any] = MappingProxyType({}),
        tensors: Callable[[], Mapping[str, Tensor]] = dict,
        further: Mapping[str, Optimizer] = MappingProxyType({}),
    ) -> None:
        self.cfg, self.run, self.plan, self.model, self.peak_lr = cfg, run, plan, model, peak_lr
        self.memory, self._tensors, self._further = memory, tensors, further
        self.optimizer = Optimizer(
            model.model,
            name=cfg.optimizer,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
            seed=cfg.seed,
            world=run.world,
        )
        whole = cfg.epochs * plan.steps_per_epoch
        self.total_steps = min(cfg.max_steps or whole, whole)
        self.step = 0
        self._patience: dict[str, Any] = {"best": None, "step": 0, "waited": 0}
        savers = run.world if self.optimizer.rows() else ALONE
        self._checkpoints = Checkpoints(run.folder / "checkpoints", world=savers)
        self._best = Checkpoints(run.folder / "best", keep=1, world=savers)
        size = sum(o.checkpoint_bytes for o in (self.optimizer, *further.values()))
        size += sum(tensor.nbytes for tensor in self._beside()[0].values())
        size = sum(savers.gather(size, "the checkpoints"))
        self._checkpoints.check_space((self._checkpoints.keep + 1) * size)
        if cfg.resume:
            self._restore(self._checkpoints)
        run.world.same([facts["sha256"] for facts in run.card.data.values()], "hash of the data")
        self._agree()

    def steps(self) -> Iterator[tuple[int, list[TokenGroup], float]]:
        """(step counted from 1, its groups, its learning rate) until the end, a stop signal, or no more improvement."""
        cfg, run = self.cfg, self.run
        run.begin(self.total_steps, self.step)
        saved = self.step
        while self.step < self.total_steps and not self._out_of_patience and not run.stopping():
            epoch, position = divmod(self.step, self.plan.steps_per_epoch)
            self.step += 1
            lr = learning_rate(
                self.step,
                peak=self.peak_lr,
                schedule=cfg.schedule,
                warmup_steps=cfg.warmup_steps,
                total_steps=self.total_steps,
            )
            yield self.step, self.plan.groups_of(epoch, position), lr
            if self.due(cfg.save_every):
                self._save(self._checkpoints)
                saved = self.step
        if saved != self.step:
            self._save(self._checkpoints)

    def forget(self) -> None:
        """Forget the gradients of the step in hand, also those of a backward that did not come to its end."""
        self.model.model.zero_grad()
        self.optimizer.zero_grad()

    def end(self) -> None:
        """Take no further step: what there is is the result."""
        self.total_steps = self.step

    def due(self, every: int) -> bool:
        """Is the step in hand a multiple of `every`? 0 means never."""
        return every > 0 and self.step % every == 0

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Record an evaluation; with `early_stop`, keep the best weights and count evaluations without improvement."""
        self.run.evaluated(self.step, metrics)
        if not self.cfg.early_stop:
            return
        if self._patience["best"] is None or metrics["loss"] < self._patience["best"]:
            self._patience = {"best": metrics["loss"], "step": self.step, "waited": 0}
            self._save(self._best)
        else:
            self._patience["waited"] += 1

    def finish(self, *, results: Callable[[], dict[str, Any]], method: str) -> RunCard:
        """Write the model folder and close the run card; a stopped run keeps its checkpoint instead."""
        if self.run.stop_signal is not None and self.step < self.total_steps:
            return self.run.finish({"steps": self.step})
        if self.cfg.early_stop and self._patience["step"] not in (0, self.step):
            self.run.note(f"best held-out loss at step {self._patience['step']}: its weights are the result")
            self._restore(self._best)
        numbers = results()
        if numbers:
            self.run.evaluated(self.step, numbers)
        told = {name: number for name, number in numbers.items() if not isinstance(number, list)}  # no quantiles
        self.run.record(results={"steps": self.step, **told})
        model, state = self.model.model, None
        if self.optimizer.rows():
            state = gathered(model, self.run.world, trained=saved_as_adapter(model))
        if self.run.world.rank:
            return self.run.finish({})
        card = model_card(self.run.card, base_model=self.cfg.model, method=method)
        save(model, self.model.tokenizer, self.run.folder / "model", state=state, card=card)
        return finish(self.run, {})

    @property
    def _out_of_patience(self) -> bool:
        return self.cfg.early_stop > 0 and self._patience["waited"] >= self.cfg.early_stop

    def _agree(self) -> None:
        """Raise RunError where the ranks do not hold the same weights."""
        if self.run.world.size > 1:
            prints = [optimizer.fingerprint() for optimizer in (self.optimizer, *self._further.values())]
            self.run.world.same(prints, f"hash of the weights after step {self.step}")

    def _beside(self) -> tuple[dict[str, Tensor], dict[str, Rows]]:
        """What of the recipe's tensors is on this rank, sharing their memory, and which rows, the optimizer's too."""
        parts = {name: own_part(tensor) for name, tensor in self._tensors().items()}
        rows = {name: rows for name, (_, rows) in parts.items() if rows}
        for name, other in self._further.items():
            rows |= {f"{name}/{key}": part for key, part in other.rows().items()}
        return {name: part for name, (part, _) in parts.items()}, self.optimizer.rows() | rows

    def _save(self, where: Checkpoints) -> None:
        """Rank 0 writes what is the same on all ranks, and they make sure of that; each writes its part of a model."""
        self._agree()
        beside, rows = self._beside()
        if self.run.world.rank and not rows:
            return
        state = {"step": self.step, "rng": rng_state(), "patience": self._patience, "memory": dict(self.memory)}
        further = {f"{name}/{key}": t for name, other in self._further.items() for key, t in other.tensors().items()}
        where.save(self.step, {**self.optimizer.tensors(), **beside, **further}, state, rows)

    def _restore(self, where: Checkpoints) -> None:
        beside, rows = self._beside()
        checkpoint = where.latest(self.run.note, rows)
        self.run.world.same(checkpoint and checkpoint.step, "step of the newest whole checkpoint")
        if checkpoint is None:
            return
        own = dict(checkpoint.tensors)
        for name, other in self._further.items():
            theirs = [key for key in own if key.startswith(f"{name}/")]
            other.load({key.removeprefix(f"{name}/"): own.pop(key) for key in theirs})
        self.optimizer.load({name: t for name, t in own.items() if name not in beside})
        for name, tensor in beside.items():
            tensor.copy_(checkpoint.tensors[name])
        set_rng_state(checkpoint.state["rng"])
        self.step, self._patience = checkpoint.state["step"], checkpoint.state["patience"]
        self.memory = checkpoint.state["memory"]
        self.run.note(f"continuing from the checkpoint of step {self.step}")
