"""The reference policy: its log-probs computed once and kept on disk, or the model itself; certified at step 0."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from preftune.config.rl import PpoConfig
from preftune.config.stages import DpoConfig
from preftune.engine.reference_cache import ReferenceCache
from preftune.engine.run import Run
from preftune.engine.sharding import own_part, weights_of
from preftune.equations.objective import Objective
from preftune.errors import ArtifactError, ConfigError, ReferenceMismatch
from preftune.models.adapters import adapter_of, copy_beside
from preftune.models.load import LoadedModel
from preftune.models.logprobs import score
from preftune.parts.adapting import to_train
from preftune.parts.common import Batching, open_model
from preftune.parts.fitting import attempt
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup

__all__ = ["LiveReference", "Reference", "anchor", "certify_start"]

# Allowed |log pi - log pi_ref| at step 0, nats per square root of a token: two packings of the same weights differ by
# rounding only, and rounding errors of single tokens are independent.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2}
GROUPS_AT_ONCE, LOOKED_AT = 512, 8192


@dataclass(frozen=True)
class Reference:
    """Cached log pi_ref of every completion token, shared by every loss, beta, epoch and run."""

    cache: ReferenceCache
    same_weights: bool
    """True when the policy starts exactly at this reference."""

    @classmethod
    def of(
        cls, cfg: DpoConfig, policy: LoadedModel, batching: Batching, groups: Sequence[TokenGroup], run: Run
    ) -> Reference:
        """The model of `--reference`, else the exact weights the policy starts from, on these groups.

        What the cache does not hold yet is computed; stopping half-way loses nothing. A reference of its own leaves
        memory when this returns. Raises ConfigError when its vocabulary is not the policy's.
        """
        loaded = policy
        if cfg.reference:
            loaded, batching = open_model(cfg.reference, cfg, run, role="reference")
            _refuse_other_vocabulary(cfg, loaded, policy)
        identity = {
            "weights": loaded.weights_sha256,
            "tokenizer": policy.tokenizer_sha256,
            "dtype": str(loaded.model.dtype),
            "rows": "packed" if batching.packed else "padded",
        }
        cache, world = ReferenceCache(identity), run.world
        missing = _lacking(cache, batching, groups)
        lacking = world.gather(len(missing), "the reference")
        run.note(f"reference log-probs: {len(groups) - sum(lacking)} groups cached, {sum(lacking)} to compute")
        with torch.no_grad(), run.working("reference", len(missing)) as advance:
            for start in range(0, max(lacking), GROUPS_AT_ONCE):
                chunk = [groups[i] for i in missing[start : start + GROUPS_AT_ONCE]]
                _fill(cache, loaded.model, batching, chunk, advance)
                if run.stopping():  # all ranks at the same place
                    cache.flush()
                    advance(0)
            cache.flush()
        world.gather(0, "the reference")  # every rank has written its part
        if world.size > 1 and any(unseen := world.gather(_unseen(cache, groups), "the reference")):
            raise ArtifactError(
                f"{cache.folder}: {sum(map(bool, unseen))} of {world.size} ranks do not see the reference log-probs of "
                "the others; set PREFTUNE_CACHE to a folder on a disk that all machines share"
            )
        return cls(cache, same_weights=loaded.weights_sha256 == policy.weights_sha256)

    def lookup(self, batch: PackedBatch) -> Tensor:
        """[C] log pi_ref of the batch's scored tokens, float32, on the batch's device."""
        if not batch.groups:
            return torch.zeros(0, device=batch.targets.device)
        return self.cache.lookup(batch.groups).to(batch.targets.device)


@dataclass(frozen=True)
class LiveReference:
    """A reference model in memory beside the policy: for losses that read its whole distributions, and to be moved.

    Moving (TR-DPO): after every `every`-th step  ref <- (1 - mix) ref + mix policy,  in float32. After n replacements
    the optimum is pi_0 exp(n r / beta): such a reference anchors each stretch, not the whole run.
    """

    model: nn.Module
    same_weights: bool
    moves: tuple[int, float] | None
    """(every so many steps, by this share of the policy)."""

    @classmethod
    def of(cls, cfg: DpoConfig, policy: LoadedModel, batching: Batching, run: Run) -> LiveReference:
        """A frozen copy of the policy as it starts, or the model of `--reference`."""
        loaded, _ = anchor(cfg, policy, batching, run)
        model = loaded.model
        _refuse_other_vocabulary(cfg, loaded, policy)
        moves = cfg.reference_moves()
        if moves and (moves[1] != 1 or cfg.reference) and (adapter_of(model) or adapter_of(policy.model)):
            raise ConfigError(
                "reference_mix: a share of two adapters is no share of two models (A and B multiply); move the whole "
                "reference, --reference_mix 1, from the weights of --model"
            )
        course = "fixed" if moves is None else f"moved every {moves[0]} steps by {moves[1]:g} of the policy"
        run.note(f"reference in memory beside the policy, {course}")
        same = loaded.weights_sha256 == policy.weights_sha256
        return cls(model, same, moves)

    @torch.no_grad()
    def after_step(self, step: int, policy: nn.Module) -> None:
        """Move towards the policy when it is time."""
        if self.moves is None or step % self.moves[0]:
            return
        mix = self.moves[1]
        for (_, mine), (_, theirs) in zip(weights_of(self.model), weights_of(policy), strict=True):
            if mine is theirs:  # frozen below an adapter, and shared
                continue
            (old, _), (new, _) = own_part(mine), own_part(theirs)
            old.copy_(new if mix == 1 else torch.lerp(old.float(), new.float(), mix))

    def tensors(self) -> dict[str, Tensor]:
        """The weights that a checkpoint must hold: none while the reference stands where it started.

        Called, it lets go of what has been gathered of them, so what is written into their parts counts.
        """
        if self.moves is None:
            return {}
        moving = weights_of(self.model)
        if adapter_of(self.model):
            moving = ((name, parameter) for name, parameter in moving if ".lora_" in name)
        return {f"reference.{name}": parameter for name, parameter in moving}


def anchor(
    cfg: DpoConfig | PpoConfig, policy: LoadedModel, batching: Batching, run: Run
) -> tuple[LoadedModel, Batching]:
    """A frozen model beside the policy: that of `--reference`, else the policy as it starts.

    Parts are not copied: beside a sharded policy the model it starts from is read once more.
    """
    if cfg.reference:
        loaded, batching = open_model(cfg.reference, cfg, run, role="reference")
    elif batching.sharded:
        loaded, batching = open_model(cfg.model, cfg, run, role="reference", read=to_train(cfg, cfg.seed))
    else:
        loaded = replace(policy, model=copy_beside(policy.model))
    loaded.model.requires_grad_(False).eval()
    return loaded, batching


def certify_start(
    logps: ResponseLogps,
    groups: Sequence[TokenGroup],
    objective: Objective,
    reference: Reference | LiveReference,
    dtype: torch.dtype,
    run: Run,
) -> None:
    """At step 0 every log-ratio is 0 and the objective is its own constant, or the run stops with the cause.

    `logps`: of the responses of the first step's `groups`. The slack allowed for the objective is what the allowed
    log-ratios can make of it, by its own slope.
    """
    tolerance = TOLERANCE[dtype]
    excess_R = logps.log_ratio.abs() / logps.length.sqrt()
    owners = [group.origin for group in groups for _ in group.responses]
    worst, where = float(excess_R.max()), owners[int(excess_R.argmax())]
    state = objective.initial_state()
    leaf = replace(logps, log_ratio=logps.log_ratio.detach().requires_grad_())
    value = objective.share(objective.evaluate(leaf, groups, state), objective.totals(groups))
    (slope_R,) = torch.autograd.grad(value, leaf.log_ratio)
    slack = 1e-6 + 2 * tolerance * float((slope_R.abs() * logps.length.sqrt()).sum())
    loss, constant = float(value.detach()), objective.at_start()
    if not reference.same_weights:
        run.note(f"step 0: loss {loss:.6f}; the policy does not start at --reference, so there is no certificate")
    elif worst > tolerance:
        cache = f" or a stale cache ({reference.cache.folder})" if isinstance(reference, Reference) else ""
        raise ReferenceMismatch(
            f"at step 0 a log-ratio is {worst:.2g} nats per root token ({where}), allowed in {dtype}: {tolerance:.0e}. "
            f"Policy and reference are the same weights but not the same function: look for active dropout{cache}"
        )
    elif constant is not None and abs(loss - constant) > slack:
        raise ReferenceMismatch(f"the step-0 loss is {loss:.6f}; this loss starts at {constant:.6f} +- {slack:.1e}")
    else:
        run.note(f"step-0 certificate: loss {loss:.6f}, largest log-ratio {worst:.1e} nats per root token")


def _lacking(cache: ReferenceCache, batching: Batching, groups: Sequence[TokenGroup]) -> array[int]:
    """The positions of the groups that are this rank's to compute; few of the groups are in memory at once."""
    found = array("q")
    for start in range(0, len(groups), LOOKED_AT):
        some = groups[start : start + LOOKED_AT]
        place = {id(group): start + i for i, group in enumerate(some)}
        mine = batching.share(some)
        found.extend(place[id(group)] for group, lacks in zip(mine, cache.lacks(mine), strict=True) if lacks)
    return found


def _unseen(cache: ReferenceCache, groups: Sequence[TokenGroup]) -> int:
    parts = range(0, len(groups), LOOKED_AT)
    return sum(sum(cache.lacks(groups[start : start + LOOKED_AT])) for start in parts)


def _fill(
    cache: ReferenceCache,
    model: nn.Module,
    batching: Batching,
    groups: Sequence[TokenGroup],
    advance: Callable[[int], None],
) -> None:
    """Compute what the cache lacks of these groups; after a lack of memory what it still lacks, in smaller batches."""

    def compute(batches: Sequence[PackedBatch]) -> None:
        for batch in batches:
            logps = score(model, batch)
            if batch.groups:
                cache.append(batch.groups, logps)
                advance(len(batch.groups))

    if batching.sharded:
        batching.fit(cache.missing(groups), compute)
        return
    attempt(lambda: list(batching(cache.missing(groups))), compute, batching.budget, lambda: None)


def _refuse_other_vocabulary(cfg: DpoConfig, loaded: LoadedModel, policy: LoadedModel) -> None:
    if loaded.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"reference {cfg.reference} has another vocabulary than model {cfg.model}: log-probs of different "
            "tokens cannot be compared; choose a reference with the model's tokenizer"
        )
