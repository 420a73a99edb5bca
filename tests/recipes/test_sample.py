"""Sampling as a stage: the model's own law in the file, and a file that is continued, never repeated."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli import main
from preftune.config.loop import SampleConfig
from preftune.engine.lines import growing
from preftune.errors import ArtifactError, ConfigError, DataError, UserError
from preftune.models.load import LoadedModel, load
from preftune.recipes.sample import BEGINS
from preftune.recipes.sample import main as run
from preftune.records import Message, SampledResponses, from_json
from preftune.theory.enumerable import enumerate_completions
from preftune.worlds.enumerable import EOS_ID, random_world, write_model

WORLD = random_world(seed=0, max_tokens=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel]:
    """A model of the enumerable world with opinions, and its folder."""
    folder = tmp_path_factory.mktemp("world") / "model"
    write_model(folder, seed=0)
    loaded = load(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            if weight.ndim == 2:
                weight.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    loaded.model.save_pretrained(folder)
    return folder, load(folder, dtype=torch.float32)


def prompts_file(folder: Path, rows: list[Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(path: Path) -> list[SampledResponses]:
    return [from_json(line) for line in path.read_text().splitlines()]


def law(loaded: LoadedModel, prompt: str, temperature: float, top_p: float) -> dict[tuple[str, bool], float]:
    """{(text, finished): probability} at temperature and top_p, from the untempered enumeration, token by token.

    The next-token law after a prefix is a ratio of masses of the enumerated one: no sampler's code is used.
    """
    with torch.no_grad():
        found = enumerate_completions(loaded.model, [WORLD.prompt_ids(prompt)], eos_id=EOS_ID, max_tokens=2)
    mass: Counter[str] = Counter()  # of every text followed by its end, "$", or cut
    texts = WORLD.texts(found.tokens)
    whole = zip(texts, found.finished.tolist(), found.logps[0].exp().tolist(), strict=True)
    for text, finished, probability in whole:
        string = text + "$" * finished
        for end in range(len(string) + 1):
            mass[string[:end]] += probability
    result: dict[tuple[str, bool], float] = {}

    def extend(prefix: str, probability: float) -> None:
        if len(prefix) == 2 or prefix.endswith("$"):
            result[prefix.rstrip("$"), prefix.endswith("$")] = probability
            return
        steps = {
            string: m for string, m in mass.items() if len(string) == len(prefix) + 1 and string.startswith(prefix)
        }
        tempered = {string: m ** (1 / temperature) for string, m in steps.items()}
        total, kept = sum(tempered.values()), {}
        for string, m in sorted(tempered.items(), key=lambda item: -item[1]):
            if sum(kept.values()) / total >= top_p:
                break
            kept[string] = m
        for string, m in kept.items():
            extend(string, probability * m / sum(kept.values()))

    extend("", 1.0)
    return result


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.9), (1.7, 0.85)])
def test_frequencies_in_the_file_are_the_models_exact_law(
    world: tuple[Path, LoadedModel], tmp_path: Path, temperature: float, top_p: float
) -> None:
    """Through the command: chi-square of whole responses, finished apart from cut; `logp` is the law's log."""
    folder, loaded = world
    n, out = 4000, tmp_path / "samples.jsonl"
    prompts = prompts_file(tmp_path, [{"prompt": "ca"}, {"prompt": "bh"}])
    arguments = {"model": folder, "prompts": prompts, "n": n, "max_tokens": 2, "batch_size": 2 * n, "dtype": "float32"}
    arguments |= {"temperature": temperature, "top_p": top_p, "out": out}
    assert main(["sample", *(f"--{key}={value}" for key, value in arguments.items())]) == 0
    rows = records(out)
    assert [row.prompt for row in rows] == ["ca", "bh"]
    for row in rows:
        exact = law(loaded, str(row.prompt), temperature, top_p)
        assert sum(exact.values()) == pytest.approx(1, abs=1e-9)
        counts = Counter((response.text, response.finished) for response in row.responses)
        assert set(counts) <= set(exact) and sum(counts.values()) == n
        for response in row.responses[:500]:
            assert response.logp == pytest.approx(math.log(exact[response.text, response.finished]), abs=1e-4)
        big = {key: p for key, p in exact.items() if n * p >= 5}
        cells = [(counts[key], n * p) for key, p in big.items()]
        rest = n * (1 - sum(big.values()))
        if rest >= 5:
            cells.append((n - sum(counts[key] for key in big), rest))
        freedom = len(cells) - 1
        statistic = sum((o - e) ** 2 / e for o, e in cells)
        assert freedom >= 4 and abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def config(world: tuple[Path, LoadedModel], prompts: Path, **others: Any) -> SampleConfig:
    settings = {
        "model": str(world[0]),
        "prompts": str(prompts),
        "out": str(prompts.parent / "s.jsonl"),
        "max_tokens": 4,
    }
    return SampleConfig(**{**settings, "batch_size": 4, **others})


def test_the_file_is_continued_and_never_repeats(world: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    """The same command adds nothing; a larger n adds the missing numbers, another seed its own, new prompts theirs."""
    prompts = prompts_file(tmp_path, [{"prompt": text} for text in ("ca", "b", "ddd")])
    out = tmp_path / "s.jsonl"
    run(config(world, prompts))
    first = out.read_bytes()
    run(config(world, prompts))
    assert out.read_bytes() == first
    run(config(world, prompts, n=5))
    run(config(world, prompts, n=3))  # five are there
    rows = records(out)
    assert [len(row.responses) for row in rows] == [2, 2, 2, 3, 3, 3] and out.read_bytes().startswith(first)
    assert [row.key.partition("+")[2] for row in rows] == ["", "", "", "2", "2", "2"]
    run(config(world, prompts, n=5, out=str(tmp_path / "five.jsonl")))
    together = [a.text + b.text for row, more in zip(rows[:3], rows[3:], strict=True)
                for a, b in [(row.responses[0], more.responses[2])]]  # fmt: skip
    assert together == [row.responses[0].text + row.responses[4].text for row in records(tmp_path / "five.jsonl")]
    run(config(world, prompts, seed=1))
    run(config(world, prompts_file(tmp_path, [{"prompt": "cb"}, {"prompt": "ca"}])))
    rows = records(out)
    assert [row.prompt for row in rows[6:]] == ["b", "ca", "ddd", "cb"]
    assert len({row.key for row in rows}) == len(rows) == 10


def test_the_card_beside_the_file_tells_model_settings_and_counts(
    world: tuple[Path, LoadedModel], tmp_path: Path
) -> None:
    """Hashes, rows accounted for, tokens and what earlier commands asked of the same file."""
    prompts = prompts_file(tmp_path, [{"prompt": text} for text in ("ca", "b", "ca")])
    run(config(world, prompts))
    card = run(config(world, prompts, seed=1))
    assert card == from_json((tmp_path / "s.jsonl.run.json").read_text())
    assert card.status == "done" and card.hashes["model_weights"] == world[1].weights_sha256
    assert (card.data["prompts"]["used"], card.data["prompts"]["duplicate"]) == (2, 1)
    added = [response for row in records(tmp_path / "s.jsonl")[2:] for response in row.responses]
    told = card.results["added"]
    assert told["responses"] == len(added) == 4 and card.results["lines_found"] == 2
    assert told["finished"] == sum(response.finished for response in added)
    assert told["completion_tokens"] == sum(len(response.text) + response.finished for response in added)
    assert [re.search(r"seed=\d", note)[0] for note in card.notes] == ["seed=0", "seed=1"]  # type: ignore[index]
    words = dict(word.split("=") for word in added[0].provenance.split())
    assert words["model"] == world[1].weights_sha256[:16] and words["seed"] == "1" and words["engine"] == "local"


LAYOUTS: dict[str, tuple[list[Any], list[Any]]] = {
    "prompts": ([{"prompt": "a"}, {"prompt": "b", "source": 1}, {"prompt": "a"}], ["a", "b"]),
    "pairs": (
        [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "a", "chosen": "y", "rejected": "x"}],
        ["a"],
    ),
    "demonstrations": ([{"prompt": "a", "completion": "x"}], ["a"]),
    "unpaired": ([{"prompt": "a", "completion": "x", "label": False}], ["a"]),
    "scores": ([{"prompt": "a", "response": "x", "score": 1}], ["a"]),
    "conversation": ([{"prompt": [{"role": "user", "content": "a"}]}], [(Message(role="user", content="a"),)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_of_every_layout_are_read_once(layout: str, world: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    """A prompt comes once however often it stands in the file, whatever stands beside it."""
    rows, prompts = LAYOUTS[layout]
    world[1].tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = tmp_path / "model"
    world[1].model.save_pretrained(folder)
    world[1].tokenizer.save_pretrained(folder)
    run(config(world, prompts_file(tmp_path, rows), model=str(folder)))
    assert [row.prompt for row in records(tmp_path / "s.jsonl")] == prompts


def test_what_cannot_be_sampled_is_refused_before_anything_is_written(
    world: tuple[Path, LoadedModel], tmp_path: Path
) -> None:
    """Refused rows, a prompt too long for the model, a file of somebody else, a second process: one error each."""
    with pytest.raises(DataError, match="1 rows are refused, 0 allowed, and 1 prompts are left"):
        run(config(world, prompts_file(tmp_path, [{"prompt": "a"}, {"prompt": 3}])))
    prompts = prompts_file(tmp_path, [{"prompt": "a"}, {"prompt": "ab" * 300}])
    with pytest.raises(DataError, match="1 rows are refused, 0 allowed, and 1 prompts are left"):
        run(config(world, prompts))
    assert not (tmp_path / "s.jsonl").exists()
    prompts = prompts_file(tmp_path, [{"prompt": "a"}])
    for foreign in (b'{"mine": 1}\n', b"my notes, no line feed"):
        (tmp_path / "theirs.jsonl").write_bytes(foreign)
        with pytest.raises(ArtifactError, match=r"theirs.jsonl:1: the line does not begin with .* another --out"):
            run(config(world, prompts, out=str(tmp_path / "theirs.jsonl")))
        assert (tmp_path / "theirs.jsonl").read_bytes() == foreign
    (tmp_path / "odd.jsonl").write_text(f"{BEGINS}}}\n")
    with pytest.raises(ArtifactError, match=r"odd\.jsonl:1: no line of samples"):
        run(config(world, prompts, out=str(tmp_path / "odd.jsonl")))
    with (
        growing(tmp_path / "s.jsonl", begins=BEGINS),
        pytest.raises(UserError, match="another process is writing it; wait for it or choose another --out"),
    ):
        run(config(world, prompts))


def test_a_prompt_without_room_is_a_refused_row(
    world: tuple[Path, LoadedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named with its tokens and the model's positions, counted, and left out where that is allowed."""
    prompts = prompts_file(tmp_path, [{"prompt": "a"}, {"prompt": "ab" * 300}, {"prompt": "b"}])
    card = run(config(world, prompts, allow_refused=1))
    assert [row.prompt for row in records(tmp_path / "s.jsonl")] == ["a", "b"]
    assert (card.data["prompts"]["used"], card.data["prompts"]["refused"]) == (2, 1)
    positions = world[1].model.config.max_position_embeddings
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        rf"prompts.jsonl:2: prompt: 601 tokens and max_tokens 4 exceed the {positions} positions of .*; shorten", said
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "responses come from model or from the server of engine; neither is given"),
        ({"model": "m", "engine": "http://h", "engine_model": "x"}, "both are given"),
        ({"engine": "http://h"}, r"engine \(a URL\) and engine_model \(a name\) go together"),
        ({"model": "m", "temperature": -1.0}, "temperature must be greater than or equal to 0"),
        ({"model": "m", "top_p": 0.0}, "top_p must be greater than 0"),
        ({"model": "m", "format": "csv"}, "format must be one of auto, prompt,"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    """One line: the key, what was found, what is allowed."""
    with pytest.raises(ConfigError, match=message):
        SampleConfig(prompts="p", out="o", **given)
