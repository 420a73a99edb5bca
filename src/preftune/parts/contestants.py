"""Models on the same prompts: opened, asked, and their answers kept as texts and as tokens, to be continued.

samples/NAME.jsonl   a line per prompt, as `preftune sample` writes them: texts with provenance and log-prob
tokens/NAME.jsonl    the same as the ids that were drawn; a text read again may be other tokens

Several processes take the batches in turn; what one has drawn all know, and rank 0 writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preftune.config.comparison import EvaluateConfig, is_served
from preftune.data.packing import micro_batches
from preftune.data.prompts import distinct_prompts
from preftune.data.sources import open_source
from preftune.engine.lines import growing
from preftune.engine.memory import settle_on_cpu
from preftune.engine.parallel import World
from preftune.engine.run import Run
from preftune.errors import ArtifactError, DataError
from preftune.models.attention import install
from preftune.models.folder import of_run
from preftune.models.generate import draw, plan
from preftune.models.load import LoadedModel, load
from preftune.parts.fitting import DrawBudget
from preftune.parts.room import Reader, reader, with_room
from preftune.records import Prompt, SampledResponses, from_json, to_json
from preftune.tensors import PackedBatch, TokenGroup

__all__ = [
    "SAMPLES",
    "Answers",
    "Contestant",
    "ask",
    "machine",
    "model_folder",
    "open_contestant",
    "read_prompts",
    "readers",
]

SAMPLES, TOKENS = '{"type": "SampledResponses"', '{"prompt":'


@dataclass(frozen=True, eq=False, slots=True)
class Contestant:
    """A model under its name, and how groups become batches on it."""

    name: str
    loaded: LoadedModel
    packed: bool
    device: torch.device
    tokens_per_batch: int
    world: World
    """Who else has the same model and shares its work."""

    def batching(self, *, packed: bool) -> Any:
        """Groups -> batches on the device; rows are packed where both models that read them can."""

        def batches(groups: Sequence[TokenGroup]) -> Iterator[PackedBatch]:
            for batch in micro_batches(groups, tokens_per_batch=self.tokens_per_batch, packed=packed):
                yield batch.to(self.device)

        return batches


@dataclass(frozen=True, eq=False, slots=True)
class Answers:
    """What one model answered to one prompt, as texts and as tokens, in one order."""

    sampled: SampledResponses
    group: TokenGroup | None
    """None of a server's answers: what it drew is not told."""

    @property
    def drawn(self) -> TokenGroup:
        """The tokens of a model that was opened here."""
        assert self.group is not None
        return self.group


def read_prompts(cfg: EvaluateConfig, run: Run) -> list[tuple[Prompt, str]]:
    """(prompt, origin), each prompt once. Raises DataError on too many refused rows, or when none is left."""
    source = open_source(cfg.prompts, kind="prompts", format=cfg.format)
    found = distinct_prompts(iter(source))
    different = len(found.prompts)
    first = replace(found, prompts=found.prompts[: cfg.max_prompts])
    found = with_room(first, readers(cfg), cfg.max_tokens)
    prompts = list(found.prompts)
    facts = {"path": cfg.prompts, "format": source.format, "sha256": source.sha256, "prompts": different}
    facts |= {"asked": len(prompts), "duplicates": found.duplicates, "refused": len(found.refusals)}
    run.world.same(source.sha256, "hash of the prompts")
    run.record(data={"prompts": facts})
    run.note(
        f"{cfg.prompts}: {source.format}, {different} prompts, {found.duplicates} duplicates, "
        f"{len(found.refusals)} refused; {len(prompts)} are asked"
    )
    for refusal in found.refusals:
        run.warn(str(refusal))
    if len(found.refusals) > cfg.allow_refused or not prompts:
        raise DataError(
            f"{cfg.prompts}: {len(found.refusals)} rows are refused, {cfg.allow_refused} allowed, and {len(prompts)} "
            f"prompts are left; mend the rows named above, or do without them: --allow_refused {len(found.refusals)}"
        )
    return prompts


def readers(cfg: EvaluateConfig) -> list[Reader]:
    """Who reads texts here: every model but those behind a server."""
    return [reader(model_folder(place)) for place in cfg.contestants().values() if not is_served(place)]


def model_folder(name: str) -> str:
    """That of a run, `RUN/model`; any other name stays as it is."""
    return str(of_run(Path(name)))


def machine(cfg: EvaluateConfig, ranks: World) -> tuple[torch.device, torch.dtype]:
    """Where models compute and in which dtype."""
    device = torch.device(ranks.device(cfg.device))
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, {"auto": automatic, "float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]


def open_contestant(name: str, folder: str, cfg: EvaluateConfig, run: Run) -> Contestant:
    """The model of a run or of a model folder, on the configured device and dtype. Raises ArtifactError."""
    where = model_folder(folder)
    device, dtype = machine(cfg, run.world)
    if device.type == "cpu":
        settle_on_cpu(cfg.tokens_per_batch)
    loaded = load(where, dtype=dtype, device=device)
    run.record(hashes={f"{name}_weights": loaded.weights_sha256, f"{name}_tokenizer": loaded.tokenizer_sha256})
    run.note(f"{name}: {where}, {str(dtype).removeprefix('torch.')} on {device}")
    run.world.same(loaded.weights_sha256, f"hash of {name}")
    return Contestant(name, loaded, install(loaded.model) is None, device, cfg.tokens_per_batch, run.world)


def ask(contestant: Contestant, prompts: Sequence[tuple[Prompt, str]], cfg: EvaluateConfig, run: Run) -> list[Answers]:
    """`cfg.n` answers to every prompt, in their order; what the run folder already holds is not drawn again.

    A batch is made of all prompts, there or not, and drawn by one rank: neither moves a bit of an answer.
    """
    name, ranks = contestant.name, run.world
    texts_file, tokens_file = (run.folder / kind / f"{name}.jsonl" for kind in ("samples", "tokens"))
    size: dict[str, Any] = {"n": cfg.n, "max_tokens": cfg.max_tokens, "batch_size": cfg.batch_size}
    budget = DrawBudget(run.own_note, lambda answers: f"--batch_size {answers}")
    keys = {prompt: _key(contestant, prompt, cfg) for prompt, _ in prompts}
    with ExitStack() as held:
        both = [(tokens_file, TOKENS), (texts_file, SAMPLES)] if not ranks.rank else []
        files = [held.enter_context(growing(file, begins=begins)) for file, begins in both]
        tokens, texts = ranks.of_first([file.lines for file in files], f"the answers of {name} that are there")
        found = _found(tokens, texts, keys, texts_file)
        asked = [prompt for prompt, _ in prompts]
        batches = plan(contestant.loaded.model, contestant.loaded.tokenizer, asked, **size)
        lacking = [rows for rows in batches if not all(asked[row] in found for row in rows)]

        def answered(rows: Sequence[int]) -> list[list[str]]:
            drawn = _drawn(contestant, [prompts[row] for row in rows], keys, cfg, size | {"budget": budget})
            return [line for row, line in zip(rows, drawn, strict=True) if asked[row] not in found]

        with run.working(f"{name}: prompts answered", len(prompts)) as advance:
            if there := len(prompts) - sum(map(len, lacking)):
                advance(there)
            for rows, lines in zip(lacking, ranks.in_turn(lacking, answered, f"the answers of {name}"), strict=True):
                tokens, texts = zip(*lines, strict=True)
                for file, more in zip(files, (tokens, texts), strict=False):  # rank 0 alone has files
                    file.append(more)
                found |= _found(tokens, texts, keys, texts_file)
                run.stopping()
                advance(len(rows))
    return [found[prompt] for prompt in asked]


def _drawn(
    contestant: Contestant,
    prompts: Sequence[tuple[Prompt, str]],
    keys: Mapping[Prompt, str],
    cfg: EvaluateConfig,
    size: Mapping[str, Any],
) -> Iterator[list[str]]:
    """The lines of both files, tokens and texts, for every prompt of a batch."""
    answers = draw(
        contestant.loaded.model, contestant.loaded.tokenizer, [prompt for prompt, _ in prompts],
        seed=_seed(cfg.seed, contestant.name), writer=contestant.name, temperature=cfg.temperature, top_p=cfg.top_p,
        origins=[origin for _, origin in prompts], **size,
    )  # fmt: skip
    for (prompt, origin), one in zip(prompts, answers, strict=True):
        responses = tuple(answer.response for answer in one)
        sampled = SampledResponses(prompt=prompt, origin=origin, key=keys[prompt], responses=responses)
        ids = {"prompt": one[0].prompt, "responses": [answer.ids for answer in one], "origin": origin}
        yield [json.dumps(ids), to_json(sampled)]


def _seed(seed: int, name: str) -> int:
    """One of its own for every model: with common random numbers like models would answer alike, and win rates tie."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


def _key(contestant: Contestant, prompt: Prompt, cfg: EvaluateConfig) -> str:
    """Hash of what a line of samples depends on: prompt, model, sampler."""
    asked = prompt if isinstance(prompt, str) else [[message.role, message.content] for message in prompt]
    sampler = [cfg.n, cfg.temperature, cfg.top_p, cfg.max_tokens, _seed(cfg.seed, contestant.name)]
    identity = [asked, sampler, contestant.loaded.weights_sha256, contestant.loaded.tokenizer_sha256]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _found(
    tokens: Sequence[str], texts: Sequence[str], keys: Mapping[Prompt, str], path: Path
) -> dict[Prompt, Answers]:
    """What both files hold, by their lines: tokens are written first, so there may be some without texts.

    Raises ArtifactError on a line that is none, or of another model, sampler or prompt.
    """
    found: dict[Prompt, Answers] = {}
    of_prompt: dict[str, Any] = {}
    for line in tokens:
        row = json.loads(line)
        of_prompt[row["origin"]] = row
    for number, line in enumerate(texts, 1):
        try:
            sampled: SampledResponses = from_json(line)
            row = of_prompt[sampled.origin]
            group = _group(row["prompt"], row["responses"], sampled.origin)
        except (ValueError, TypeError, KeyError) as problem:
            raise ArtifactError(f"{path}:{number}: no line of samples ({problem}); choose another --out") from None
        if sampled.key != keys.get(sampled.prompt):
            raise ArtifactError(f"{path}:{number}: sampled from another model or otherwise; choose another --out")
        found[sampled.prompt] = Answers(sampled, group)
    return found


def _group(prompt: Sequence[int], responses: Sequence[Sequence[int]], origin: str) -> TokenGroup:
    rows = tuple(np.array(response, dtype=np.int32) for response in responses)
    return TokenGroup(np.array(prompt, dtype=np.int32), rows, origin=origin)
