"""Who answers prompts: the model on this machine, or a server's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from preftune.config.loop import SampleConfig
from preftune.engine.console import Display
from preftune.engine.memory import settle_on_cpu
from preftune.engine.parallel import ALONE, World
from preftune.models.generate import plan, sample
from preftune.models.load import load
from preftune.models.remote import Request, complete_in_order, endpoint
from preftune.parts.fitting import DrawBudget
from preftune.records import Prompt, Response, from_json, to_json

__all__ = ["Local", "Remote", "Task", "Writer", "Written"]


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the file: the responses to a prompt from number `first` up to n."""

    prompt: Prompt
    origin: str
    content: str
    """Hash of prompt, model and sampler: what responses are numbered under."""
    first: int

    @property
    def key(self) -> str:
        """What the line is known by: `content`, and where it begins unless at 0."""
        return f"{self.content}+{self.first}" if self.first else self.content


Written = list[tuple[Task, list[Response]]]


class Writer(Protocol):
    """Who answers; `identity` is what makes it somebody else."""

    identity: Mapping[str, str]

    def write(self, tasks: Sequence[Task], done: frozenset[str]) -> Iterator[Written]:
        """The responses to every task whose key is not `done`, a batch at a time, always in the same order."""
        ...


class Local:
    """The model on this machine, by `models.generate`."""

    def __init__(self, cfg: SampleConfig, display: Display, world: World = ALONE) -> None:
        device = torch.device(world.device(cfg.device))
        automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
        if device.type == "cpu":
            settle_on_cpu()
        dtype = {"auto": automatic, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
        self.cfg, self.world, self.loaded = cfg, world, load(str(cfg.model), dtype=dtype, device=device)
        self.identity: Mapping[str, str] = {
            "model_weights": self.loaded.weights_sha256,
            "model_tokenizer": self.loaded.tokenizer_sha256,
        }
        self.budget = DrawBudget(display.own, lambda answers: f"--batch_size {answers}")
        display.note(f"{cfg.model}: {str(dtype).removeprefix('torch.')} on {device}")

    def write(self, tasks: Sequence[Task], done: frozenset[str]) -> Iterator[Written]:
        """Batches depend on all tasks, done or not: a batch done in part is computed whole, to the same last digit.

        Every rank takes its turn at the batches and is told what the others wrote.
        """
        model, tokenizer, world = self.loaded.model, self.loaded.tokenizer, self.world
        asked = [task.prompt for task in tasks]
        batches = [
            rows
            for rows in plan(model, tokenizer, asked, n=self.cfg.n, **self._size())
            if any(tasks[row].key not in done for row in rows)
        ]
        for start in range(0, len(batches), world.size):
            mine: list[tuple[int, list[Response]]] = []
            for rows in batches[start : start + world.size][world.rank : world.rank + 1]:
                mine += [(row, found) for row, found in self._answers(tasks, rows) if tasks[row].key not in done]
            if world.size == 1:
                yield [(tasks[row], found) for row, found in mine]
                continue
            told = world.gather([[row, [to_json(each) for each in found]] for row, found in mine], "the batch")
            for part in filter(None, told):
                yield [(tasks[row], [from_json(each) for each in found]) for row, found in part]

    def _size(self) -> dict[str, int]:
        return {"max_tokens": self.cfg.max_tokens, "batch_size": self.cfg.batch_size}

    def _answers(self, tasks: Sequence[Task], rows: Sequence[int]) -> Iterator[tuple[int, list[Response]]]:
        """The responses to one batch; those that go on from the same number together."""
        cfg = self.cfg
        for first in sorted({tasks[row].first for row in rows}):
            part = [row for row in rows if tasks[row].first == first]
            answers = sample(
                self.loaded.model, self.loaded.tokenizer, [tasks[row].prompt for row in part], n=cfg.n - first,
                first=first, seed=cfg.seed, temperature=cfg.temperature, top_p=cfg.top_p,
                writer=self.loaded.weights_sha256[:16], budget=self.budget,
                origins=[tasks[row].origin for row in part], **self._size(),
            )  # fmt: skip
            yield from zip(part, answers, strict=True)


class Remote:
    """A server's model, by `models.remote`. Whether it repeats itself under one seed is the server's affair."""

    def __init__(self, cfg: SampleConfig) -> None:
        self.cfg = cfg
        self.identity: Mapping[str, str] = {"engine": endpoint(str(cfg.engine)), "engine_model": str(cfg.engine_model)}

    def write(self, tasks: Sequence[Task], done: frozenset[str]) -> Iterator[Written]:
        """One at a time, in the order of the prompts; a seed of its own for every task, or servers draw alike."""
        cfg, left = self.cfg, [task for task in tasks if task.key not in done]
        requests = [
            Request(
                prompt=task.prompt, n=cfg.n - task.first, temperature=cfg.temperature, top_p=cfg.top_p,
                max_tokens=cfg.max_tokens, seed=int(hashlib.sha256(task.key.encode()).hexdigest()[:7], 16),
                logprobs=True,
            )
            for task in left
        ]  # fmt: skip
        answers = complete_in_order(
            self.identity["engine"], self.identity["engine_model"], requests, concurrency=cfg.concurrency,
            origins=[task.origin for task in left],
        )  # fmt: skip
        for task, responses in zip(left, answers, strict=True):
            yield [(task, responses)]
