"""Sampling as a stage: prompts in, n responses to each out, one line of JSON per prompt, in a file to be continued.

    prompts -> tasks -> batches -> responses -> lines, on the disk before the next batch
    at the end, however it comes: the run card OUT.run.json and the page OUT.html             parts/ending.py, reports/

Killed at any instant and run again, the file ends as it would have: whole lines stay, a torn one is cut, and a batch
that is there in part is computed once more as the same batch. A line's key names the prompt's content, the model and
the sampler's settings, and responses are numbered under it: a larger n adds the numbers that are missing (`KEY+2`: from
number 2 on), another seed, setting or model adds lines under other keys, and new prompts are simply new. Several
processes take the batches in turn, and rank 0 writes them in the order that one process would.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from preftune.config.loop import SampleConfig
from preftune.data.prompts import distinct_prompts
from preftune.data.sources import open_source
from preftune.engine.card import jsonable, new_card, read_card
from preftune.engine.console import Display
from preftune.engine.files import replace_file
from preftune.engine.lines import growing
from preftune.engine.parallel import World, world
from preftune.engine.run import Stopped
from preftune.errors import ConfigError, DataError
from preftune.parts.ending import page, stoppable
from preftune.parts.room import reader, with_room
from preftune.parts.sampled import Held, held_numbers, looks, read_back
from preftune.parts.writers import Local, Remote, Task, Writer
from preftune.records import Prompt, Response, RunCard, SampledResponses, to_json

__all__ = ["SampleConfig", "main"]

BEGINS = '{"type": "SampledResponses"'
Places = Sequence[tuple[Prompt, str]]
"""(prompt, origin)"""


def main(cfg: SampleConfig) -> RunCard:
    """Append to `cfg.out` what it lacks of n responses to every prompt; run card and page stand beside it."""
    out, ranks = Path(cfg.out), world()
    if cfg.engine and ranks.size > 1:
        raise ConfigError("a server is asked by one process: start without torchrun, and raise --concurrency instead")
    display = Display(rank=ranks.rank)
    prompts, facts = read(cfg, display)
    with (
        nullcontext() if ranks.rank else growing(out, begins=BEGINS) as file,
        nullcontext() if ranks.size > 1 else stoppable(),
    ):
        lines = read_back(out, file.lines if file else ())
        found, held = len(lines), known_to_all(held_numbers(lines), ranks)
        writer: Writer = Remote(cfg) if cfg.engine else Local(cfg, display, ranks)
        contents = [content_of(cfg, writer, prompt) for prompt, _ in prompts]
        tasks = tasks_for(cfg.n, prompts, contents, held)
        done = frozenset(task.key for task in tasks if task.first in held[task.content])
        card = replace(new_card("sample", cfg.model_dump()), hashes=dict(writer.identity), data={"prompts": facts})
        if file:
            keep(out, card)
        counts, began = Counter[str](), time.monotonic()
        status: Literal["done", "stopped", "failed"] = "failed"
        try:
            display.begin("prompts", len(tasks), len(done))
            for batch in writer.write(tasks, done):
                rows = [Held(task.content, task.first, record_of(task, responses)) for task, responses in batch]
                if file:
                    file.append([to_json(row.record) for row in rows])
                lines += rows
                counts.update(tally(rows))
                display.step(len(done) + counts["lines"], progress(counts, began))
            status = "done"
        except (KeyboardInterrupt, Stopped):
            status = "stopped"
            raise
        finally:
            display.end()
            added = counts | progress(counts, began) | {"seconds": round(time.monotonic() - began, 3)}
            results = {"prompts": len(prompts), "lines_found": found, "added": added}
            times = card.times | {"ended": round(time.time(), 3)}
            card = replace(card, status=status, times=times, results=results)
            if file:
                card = keep(out, replace(card, results=jsonable(looks(lines, set(contents)) | results)))
                for problem in filter(None, (card.results.get("cut_off"), page(out) if lines else "")):
                    display.warn(problem)
    display.note(f"sample done: {counts['lines']} lines with {counts['responses']} responses added to {out}")
    return card


def read(cfg: SampleConfig, display: Display) -> tuple[Places, dict[str, Any]]:
    """Every prompt once, and the account of the rows for the run card. Raises DataError on too many refused rows."""
    source = open_source(cfg.prompts, kind="prompts", format=cfg.format)
    found = distinct_prompts(iter(source))
    if cfg.model:
        found = with_room(found, [reader(cfg.model)], cfg.max_tokens)
    used, refused = len(found.prompts), len(found.refusals)
    facts = {"path": cfg.prompts, "format": source.format, "sha256": source.sha256, "truncated": 0}
    facts |= {"rows": used + found.duplicates + refused, "used": used, "refused": refused}
    facts |= {"duplicate": found.duplicates, "refusals": [str(refusal) for refusal in found.refusals]}
    display.note(
        f"{cfg.prompts}: {source.format}, {len(found.prompts)} prompts, {found.duplicates} duplicates, "
        f"{len(found.refusals)} refused"
    )
    for refusal in found.refusals:
        display.warn(str(refusal))
    if len(found.refusals) > cfg.allow_refused or not found.prompts:
        raise DataError(
            f"{cfg.prompts}: {len(found.refusals)} rows are refused, {cfg.allow_refused} allowed, and "
            f"{len(found.prompts)} prompts are left; mend the rows named above, or do without them: "
            f"--allow_refused {len(found.refusals)}"
        )
    return found.prompts, facts


def known_to_all(held: defaultdict[str, dict[int, int]], ranks: World) -> defaultdict[str, dict[int, int]]:
    """What rank 0, which alone has the file, holds."""
    told = ranks.of_first({content: list(there.items()) for content, there in held.items()}, "the samples found")
    return defaultdict(dict, {content: dict(there) for content, there in told.items()})


def content_of(cfg: SampleConfig, writer: Writer, prompt: Prompt) -> str:
    """What the responses to a prompt are numbered under: a hash of prompt, model and sampler."""
    settings = {"temperature": cfg.temperature, "top_p": cfg.top_p, "max_tokens": cfg.max_tokens, "seed": cfg.seed}
    asked = prompt if isinstance(prompt, str) else [[message.role, message.content] for message in prompt]
    identity = json.dumps([asked, settings, dict(writer.identity)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def tasks_for(n: int, prompts: Places, contents: Sequence[str], held: Mapping[str, Mapping[int, int]]) -> list[Task]:
    """What the file lacks or holds as this very command would write it: equal before and after any part of the run."""
    tasks = []
    for (prompt, origin), content in zip(prompts, contents, strict=True):
        there = held.get(content, {})
        number = sum(there.values())
        if number < n:
            tasks.append(Task(prompt, origin, content, number))
        elif number == n:
            tasks.append(Task(prompt, origin, content, max(there)))
    return tasks


def record_of(task: Task, responses: Sequence[Response]) -> SampledResponses:
    return SampledResponses(prompt=task.prompt, responses=tuple(responses), origin=task.origin, key=task.key)


def tally(batch: Sequence[Held]) -> Counter[str]:
    """Lines, responses, finished ones and tokens of a batch; tokens as far as the provenance tells them."""
    responses = [response for row in batch for response in row.record.responses]
    return Counter(
        lines=len(batch),
        responses=len(responses),
        finished=sum(response.finished for response in responses),
        completion_tokens=sum(int(response.facts.get("tokens", 0)) for response in responses),
    )


def progress(counts: Counter[str], began: float) -> dict[str, float]:
    """How many responses this command has added so far, how many of them ended, and tokens per second."""
    told: dict[str, float] = {"responses": counts["responses"], "finished": counts["finished"]}
    if counts["completion_tokens"]:
        told["tokens_per_second"] = round(counts["completion_tokens"] / (time.monotonic() - began), 1)
    return told


def keep(out: Path, card: RunCard) -> RunCard:
    """Write the card beside the samples; what earlier runs asked of the same file stays in its notes."""
    path = out.with_name(f"{out.name}.run.json")
    asked = {key: card.config[key] for key in ("n", "temperature", "top_p", "max_tokens", "seed")}
    told = " ".join(f"{key}={value}" for key, value in ({**asked, **card.hashes}).items())
    earlier = read_card(path).notes if path.exists() else ()
    card = replace(card, notes=tuple(dict.fromkeys([*earlier, told])))
    text = json.dumps(json.loads(to_json(card)), indent=1, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode())
    return card
