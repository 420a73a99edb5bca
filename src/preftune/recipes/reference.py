"""The reference policy: its token log-probs are computed once, kept on disk, and certified at step 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preftune.engine.reference_cache import ReferenceCache
from preftune.engine.run import Run
from preftune.equations.losses import BoundLoss
from preftune.errors import ConfigError, ReferenceMismatch
from preftune.models.load import LoadedModel
from preftune.models.logprobs import score
from preftune.recipes.common import Batching, open_model
from preftune.recipes.configs import DpoConfig
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup, total_weight

__all__ = ["Reference", "certify_start"]

# Allowed |log pi - log pi_ref| at step 0, nats per square root of a token: two packings of the same weights differ by
# rounding only, and rounding errors of single tokens are independent.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2}
GROUPS_AT_ONCE = 512


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
            if loaded.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
                raise ConfigError(
                    f"reference {cfg.reference} has another vocabulary than model {cfg.model}: log-probs of different "
                    "tokens cannot be compared; choose a reference with the model's tokenizer"
                )
        identity = {
            "weights": loaded.weights_sha256,
            "tokenizer": policy.tokenizer_sha256,
            "dtype": str(next(loaded.model.parameters()).dtype),
            "rows": "packed" if batching.packed else "padded",
        }
        cache = ReferenceCache(identity)
        missing = cache.missing(groups)
        run.note(f"reference log-probs: {len(groups) - len(missing)} groups cached, {len(missing)} to compute")
        with torch.no_grad(), run.working("reference", len(missing)) as advance:
            for start in range(0, len(missing), GROUPS_AT_ONCE):
                for batch in batching(missing[start : start + GROUPS_AT_ONCE]):
                    cache.append(batch.groups, score(loaded.model, batch))
                    advance(len(batch.groups))
            cache.flush()
        return cls(cache, same_weights=loaded.weights_sha256 == policy.weights_sha256)

    def lookup(self, batch: PackedBatch) -> Tensor:
        """[C] log pi_ref of the batch's scored tokens, float32, on the batch's device."""
        return self.cache.lookup(batch.groups).to(batch.targets.device)


def certify_start(
    policy: nn.Module,
    batching: Batching,
    groups: Sequence[TokenGroup],
    objective: BoundLoss,
    reference: Reference,
    run: Run,
) -> None:
    """At step 0 every log-ratio is 0 and the loss is the loss's own constant, or the run stops with the cause."""
    dtype = next(policy.parameters()).dtype
    tolerance = TOLERANCE[dtype]
    worst, where, total, slack = 0.0, "", 0.0, 1e-6
    with torch.no_grad():
        for batch in batching(groups):
            logps = ResponseLogps.from_tokens(score(policy, batch), batch.lengths, reference.lookup(batch))
            excess_R = logps.log_ratio.abs() / logps.length.sqrt()
            if float(excess_R.max()) >= worst:
                owners = [group.origin for group in batch.groups for _ in group.responses]
                worst, where = float(excess_R.max()), owners[int(excess_R.argmax())]
            pairs = logps.pairs(batch.index)
            slope_w, slope_l = objective.weights(pairs)
            root_T = torch.maximum(pairs.chosen_length, pairs.rejected_length).sqrt()
            total += float((objective.values(pairs) * pairs.weight).sum())
            slack += 2 * tolerance * float(((slope_w.abs() + slope_l.abs()) * root_T * pairs.weight).sum())
    loss, slack = total / total_weight(groups), slack / total_weight(groups)
    constant = objective.at_start()
    if not reference.same_weights:
        run.note(f"step 0: loss {loss:.6f}; the policy does not start at --reference, so there is no certificate")
    elif worst > tolerance:
        raise ReferenceMismatch(
            f"at step 0 a log-ratio is {worst:.2g} nats per root token ({where}), allowed in {dtype}: {tolerance:.0e}. "
            "Policy and reference are the same weights but not the same function: look for active dropout or a stale "
            f"cache ({reference.cache.folder})"
        )
    elif constant is not None and abs(loss - constant) > slack:
        raise ReferenceMismatch(f"the step-0 loss is {loss:.6f}; this loss starts at {constant:.6f} +- {slack:.1e}")
    else:
        run.note(f"step-0 certificate: loss {loss:.6f}, largest log-ratio {worst:.1e} nats per root token")
