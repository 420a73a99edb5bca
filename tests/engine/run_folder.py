"""Opening a run folder and reading what it holds, for tests."""

import json
from pathlib import Path

from preftune.engine.run import Run
from preftune.records import RunCard, from_json

CONFIG = {"lr": 1e-6, "beta": 0.1, "resume": False}


def opened(folder: Path, resume: bool = False, **config: object) -> Run:
    return Run.open(
        folder, stage="dpo", config=CONFIG | config, resume=resume, may_differ=frozenset({"resume"}), quiet=True
    )


def card_in(folder: Path) -> RunCard:
    return from_json((folder / "run.json").read_text())


def rows(folder: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder: Path, steps: int) -> None:
    with opened(folder) as r:
        r.begin(steps, 0)
        for step in range(1, steps + 1):
            r.after_step(step, {"loss": 1 / step})
        r.finish({"loss": 1 / steps})
