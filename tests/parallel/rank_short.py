"""What every rank of the tests of little memory runs: stages in turn, where rank 1 has no memory for more than MOST."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rank_counts import run

from preftune.engine.parallel import leave, world
from preftune.models import generate
from preftune.parts.step import Scorer
from preftune.tensors import PackedBatch

MOST = {"answers": 2, "groups": 1}
"""Drawn at once, and of a micro-batch."""


def short(what: str, size: Callable[..., int], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for which there is no memory where `size` of its arguments is more than MOST."""

    def call(*arguments: Any, **options: Any) -> Any:
        if size(*arguments) > MOST[what]:
            raise MemoryError(f"rank 1 has no memory for so many {what}")
        return function(*arguments, **options)

    return call


def groups_of(scorer: Scorer, batch: PackedBatch) -> int:
    return len(batch.groups)


def answers_of(model: Any, prompts: Any, part: Any, *_: Any) -> int:
    return len(part)


def main(plan: Path) -> None:
    """Run the stages of `plan`, a JSON list of [stage, config]."""
    stages = json.loads(plan.read_text())
    if world().rank == 1:
        drawing = short("answers", answers_of, generate._continue)
        scoring = short("groups", groups_of, Scorer.__call__)
        with patch.object(generate, "_continue", drawing), patch.object(Scorer, "__call__", scoring):
            run(stages)
    else:
        run(stages)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
