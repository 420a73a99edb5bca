"""What every rank of the trajectory tests runs: stages in turn, and what each rank ends with: hash and bytes."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule

from preftune.config.stages import CONFIGS
from preftune.engine import parallel
from preftune.engine.reference_cache import ReferenceCache
from preftune.engine.sharding import own_part, weights_of
from preftune.parts.common import Loop


def main(plan: Path) -> None:
    """Run the stages of `plan`, a JSON list of [stage, config], whose folders `noted` writes into.

    Beside it, threads-of-RANK.json names the threads that are left when the rank has parted from the others.
    """
    computed: list[str] = []
    Loop.finish = noted(Loop.finish, computed)  # type: ignore[method-assign]
    ReferenceCache.append = noting(ReferenceCache.append, computed)  # type: ignore[method-assign]
    for stage, config in json.loads(plan.read_text()):
        importlib.import_module(f"preftune.recipes.{stage}").main(CONFIGS[stage](**config))
    rank = parallel.world().rank
    parallel.leave()
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    plan.with_name(f"threads-of-{rank}.json").write_text(json.dumps(threads))


def parameter_groups(unit: Any) -> list[Any]:
    """What FSDP2 gathers together; torch 2.10 knows one such group per unit."""
    state = unit._get_fsdp_state()
    return list(state._fsdp_param_groups) if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]


def noting(append: Callable[..., None], computed: list[str]) -> Callable[..., None]:
    """`ReferenceCache.append` that also adds to `computed` the rows whose log-probs this rank has made."""

    def told(cache: ReferenceCache, groups: Any, logps: Any) -> None:
        computed.extend(group.origin for group in groups)
        append(cache, groups, logps)

    return told


def noted(finish: Callable[..., Any], computed: list[str]) -> Callable[..., Any]:
    """`Loop.finish` that also writes what this rank holds: OUT/weights-of-RANK.txt, the hash of its weights, and
    OUT/held-by-RANK.json, the bytes of weights, masters and moments, and OUT/kept-by-RANK.json, where each unit keeps
    its parts; and OUT/reference-by-RANK.json, the rows of this stage whose reference it computed."""

    def told(loop: Loop, **further: Any) -> Any:
        card = finish(loop, **further)  # first: looking at the parts would let go of what is gathered
        parts = [own_part(weight)[0] for _, weight in weights_of(loop.model.model)]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.float().numpy().tobytes())
        kept = [t for name, t in loop.optimizer.tensors().items() if not name.startswith("weights/")]
        folder, rank = loop.run.folder, loop.run.world.rank
        (folder / f"weights-of-{rank}.txt").write_text(digest.hexdigest())
        (folder / f"held-by-{rank}.json").write_text(json.dumps(sum(t.nbytes for t in (*parts, *kept))))
        units = [module for module in loop.model.model.modules() if isinstance(module, FSDPModule)]
        policies = [repr(group.offload_policy) for unit in units for group in parameter_groups(unit)]
        (folder / f"kept-by-{rank}.json").write_text(json.dumps(policies))
        (folder / f"reference-by-{rank}.json").write_text(json.dumps(computed))
        computed.clear()
        return card

    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]))
