"""Studies: many short runs on the enumerable world, their table of results, a figure and verdicts in words.

    seeds -> worlds (reference, reward model)      studies/world.py
          -> runs, one JSON line each, on the disk when it is finished      OUT/results.jsonl
          -> figures, tables, verdicts                 OUT/NAME.svg, OUT/study.md

A study is a module with its runs and a row in `studies.table.STUDIES`. Killed at any instant and started again it
continues: lines that are there are kept, and the same command gives the same numbers, in whatever order processes
finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from preftune.config.comparison import StudyConfig
from preftune.engine.card import new_card
from preftune.engine.console import Display
from preftune.engine.files import replace_file
from preftune.engine.lines import growing
from preftune.errors import ArtifactError
from preftune.parts.ending import page
from preftune.records import RunCard, to_json
from preftune.studies.frontier import Arm
from preftune.studies.pool import pooled
from preftune.studies.prepare import prepare
from preftune.studies.settings import Setting
from preftune.studies.table import STUDIES
from preftune.studies.world import begin

__all__ = ["STUDIES", "Job", "StudyConfig", "main"]


@dataclass(frozen=True)
class Job:
    """One run of one seed, as a process is told."""

    folder: Path
    seed: int
    setting: Setting
    study: str
    arm: Arm

    @property
    def identity(self) -> str:
        """What its numbers depend on besides the code: equal where a line that is there may be kept."""
        foreign = {name for kind, name in STUDIES[self.study].courses.items() if kind != self.arm.kind}
        setting = {name: value for name, value in asdict(self.setting).items() if name not in foreign}
        told = json.dumps([setting, asdict(self.arm)], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def line(self) -> str:
        """Run it; the line of the results file."""
        began = time.process_time()
        points = STUDIES[self.study].run(begin(self.folder, self.seed, self.setting), self.arm)
        told = {"study": self.study, "seed": self.seed, "family": self.arm.family, "setting": self.arm.setting}
        seconds = round(time.process_time() - began, 2)
        told |= {"identity": self.identity, "cpu_seconds": seconds, "points": [asdict(point) for point in points]}
        return json.dumps(told)


def main(cfg: StudyConfig) -> RunCard:
    """Run what `OUT/results.jsonl` lacks, then draw and tell. Raises ConfigError, ArtifactError, RunError."""
    out, display, study = Path(cfg.folder()), Display(), STUDIES[cfg.study]
    setting, arms = (study.fast, study.fast_arms or study.arms) if cfg.fast else (study.full, study.arms)
    seeds = range(cfg.seed, cfg.seed + (cfg.seeds or (2 if cfg.fast else 5)))
    jobs = [Job(out / "worlds" / str(s), s, setting, cfg.study, arm) for s in seeds for arm in arms]
    began = time.monotonic()
    with growing(out / "results.jsonl", begins=f'{{"study": "{cfg.study}"') as file:
        done = finished(out / "results.jsonl", file.lines, jobs)
        missing = [job for job in jobs if (job.seed, job.arm.family, job.arm.setting) not in done]
        processes = min(cfg.processes or os.cpu_count() or 1, max(1, len(missing)))
        display.note(f"study {cfg.study}: {len(jobs)} runs of {len(seeds)} seeds, {len(missing)} to do in {out}")
        card = new_card(f"study {cfg.study}", cfg.model_dump())
        display.begin("runs", len(jobs), number := len(done))
        try:
            for number, line in enumerate(computed(missing, processes), start=len(done) + 1):
                file.append([line])
                told = json.loads(line)
                last = told["points"][-1]
                display.step(number, {"seed": told["seed"], **{k: last[k] for k in ("kl", "gap") if k in last}})
        except BaseException as end:
            status: Any = "stopped" if isinstance(end, KeyboardInterrupt) else "failed"
            notes = () if status == "stopped" else (f"failed: {type(end).__name__}: {end}",)
            card = replace(card, status=status, notes=notes)
            leave(out, card, {"runs": len(jobs), "runs_done": number}, display)
            raise
        finally:
            display.end()
    order = {(job.seed, job.arm.family, job.arm.setting): i for i, job in enumerate(jobs)}
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: order[line["seed"], line["family"], line["setting"]])
    summary = study.write(out, cfg.study, lines)
    seconds = round(time.monotonic() - began, 1)
    told = {"seconds": seconds, "runs": len(jobs), "verdicts": summary}
    card = leave(out, replace(card, status="done"), told, display)
    for verdict in summary:
        print(verdict)
    return card


def leave(out: Path, card: RunCard, results: Mapping[str, Any], display: Display) -> RunCard:
    """The end, however it came: run.json and report.html of what there is."""
    card = replace(card, results=dict(results), times=card.times | {"ended": round(time.time(), 3)})
    replace_file(out / "run.json", f"{json.dumps(json.loads(to_json(card)), indent=1)}\n".encode())
    if problem := page(out):
        display.warn(problem)
    return card


def finished(path: Path, lines: Sequence[str], jobs: Sequence[Job]) -> set[tuple[int, str, str]]:
    """(seed, family, setting) of the lines. Raises ArtifactError on one that this study would not have written."""
    known = {(job.seed, job.arm.family, job.arm.setting): job.identity for job in jobs}
    found = set()
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            key = (line["seed"], line["family"], line["setting"])
            same = known.get(key) == line["identity"]
        except (ValueError, KeyError, TypeError) as problem:
            raise ArtifactError(f"{path}:{number}: no line of a study ({problem}); choose another --out") from None
        if not same or key in found:
            raise ArtifactError(
                f"{path}:{number}: seed {key[0]}, {key[1]}, {key[2]} is no run of this study: another size, other "
                "seeds or another version; choose another --out"
            )
        found.add(key)
    return found


def computed(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    """The lines of the jobs as they are finished; a seed's world is made before the first of its jobs."""
    worlds = {job.seed: (job.folder, job.seed, job.setting) for job in jobs}
    if processes > 1:
        later = {seed: [(Job.line, (job,)) for job in jobs if job.seed == seed] for seed in worlds}
        yield from pooled(processes, {seed: (prepare, told) for seed, told in worlds.items()}, later)
        return
    for seed, told in worlds.items():
        prepare(*told)
        yield from (job.line() for job in jobs if job.seed == seed)
