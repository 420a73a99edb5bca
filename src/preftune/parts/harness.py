"""Standard benchmarks by lm-evaluation-harness, an optional extra: its own tasks, prompts and metrics, our models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

from preftune.engine.memory import out_of_memory
from preftune.equations.stats import Interval
from preftune.errors import ConfigError, RunError

__all__ = ["harness", "run_tasks"]

Z = NormalDist().inv_cdf(0.975)


def harness() -> Any:
    """The module `lm_eval`. Raises ConfigError, saying what to install, where it is not there."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as problem:
        raise ConfigError(
            f"lm_eval runs lm-evaluation-harness, which is not installed ({problem}): pip install 'preftune[eval]'"
        ) from None
    return lm_eval


def run_tasks(
    folder: str | Path, tasks: str, *, dtype: str, device: str, batch_size: int, seed: int
) -> dict[str, dict[str, Interval]]:
    """{task: {metric: value}} of the model in `folder`; intervals are +- 1.96 of the harness's own standard error.

    `tasks`: names with commas between; an entry that is a folder is where task files of one's own are looked for.
    Values without a standard error have an infinite interval; `n` is the number of documents. Raises ConfigError on a
    task that the harness does not know or cannot load, RunError on one without memory; most tasks download their data.
    """
    lm_eval = harness()
    entries = [entry.strip() for entry in tasks.split(",") if entry.strip()]
    own = [entry for entry in entries if Path(entry).is_dir()]
    names = [entry for entry in entries if entry not in own]
    if not names:
        raise ConfigError(f"lm_eval names no task but only folders, {tasks}; add the names of tasks in them")
    manager = lm_eval.tasks.TaskManager(include_path=own or None)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; see `lm-eval ls tasks`")
    model = lm_eval.models.huggingface.HFLM(
        pretrained=str(folder), dtype=dtype, device=device, batch_size=batch_size, trust_remote_code=False
    )
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=1000, random_seed=seed,
            numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as problem:
        raise ConfigError(f"lm-evaluation-harness cannot run {', '.join(names)}: {problem}") from None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        fewer = f"set --batch_size {batch_size // 2}" if batch_size > 1 else "set --dtype bfloat16, or leave it out"
        raise RunError(
            f"out of memory while lm-evaluation-harness ran {', '.join(names)}, {batch_size} rows at once; {fewer}"
        ) from error
    return {task: _intervals(numbers, found["n-samples"].get(task, {})) for task, numbers in found["results"].items()}


def _intervals(numbers: Mapping[str, Any], documents: Mapping[str, int]) -> dict[str, Interval]:
    """`acc,none` with its `acc_stderr,none` -> an interval called `acc`, or `acc,FILTER`."""
    found = {}
    for key, value in numbers.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{kept}")
        half = Z * error if isinstance(error, (int, float)) else float("inf")
        name = metric if kept == "none" else key
        found[name] = Interval(float(value), value - half, value + half, int(documents.get("effective", 0)))
    return found
