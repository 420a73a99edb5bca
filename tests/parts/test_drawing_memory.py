"""Claims about answers for which there is no memory: fewer are drawn at once and they are the same, or one is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from preftune.config.comparison import EvaluateConfig
from preftune.config.loop import SampleConfig
from preftune.config.rl import PpoConfig
from preftune.engine.sharding import whole
from preftune.errors import RunError
from preftune.models.fresh import tiny_llama
from preftune.models.generate import Drawn, draw
from preftune.models.load import LoadedModel
from preftune.parts import contestants, ppo_parts, writers
from preftune.parts.fitting import DrawBudget
from preftune.recipes import evaluate, ppo, sample

EOS = 2
PROMPTS = ["1 3", "1", "1 3 5 4 3", "1 5", "1 3", "1 4 4"]
"""Prompts 0 and 4 are one: the latter is given further answers."""


class Ids:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id = EOS
    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return "".join(f" {i}" for i in ids)


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64, with weights large enough to have opinions."""
    model = tiny_llama(16, hidden=16, layers=1, heads=2, positions=40)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.double()


class Tight:
    """Memory for `cells` of a model's cache, rows times tokens: a forward that needs more raises what torch raises."""

    def __init__(self, model: Any, cells: int) -> None:
        self.cells, self.refused, self.most = cells, list[tuple[int, int]](), 0
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, tokens = kwargs["attention_mask"].shape
        if rows * tokens > self.cells:
            self.refused.append((rows, kwargs["input_ids"].shape[1]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.most = max(self.most, rows)


@pytest.fixture
def tight(model: Any) -> Iterator[Any]:
    made: list[Tight] = []

    def made_tight(cells: int) -> Tight:
        made.append(Tight(model, cells))
        return made[-1]

    yield made_tight
    for one in made:
        one.hook.remove()


def assert_same(found: list[list[Drawn]], wanted: list[list[Drawn]]) -> None:
    """Answer by answer the same tokens and texts; log-probs to the rounding of float64."""
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.prompt, one.ids) == (other.prompt, other.ids)
        assert replace(one.response, logp=None) == replace(other.response, logp=None)
        assert one.logps == pytest.approx(other.logps, abs=1e-12)


@pytest.mark.parametrize("cells", [150, 60, 20], ids=["halves", "a prompt at a time", "an answer at a time"])
def test_what_does_not_fit_is_drawn_in_halves_and_is_the_same(model: Any, tight: Any, cells: int) -> None:
    """No answer is lost, doubled or another one, wherever the cache outgrew the memory: at the prompts or later."""
    settings: dict[str, Any] = {"n": 3, "max_tokens": 15, "seed": 7, "batch_size": 64}
    wanted = draw(model, Ids(), PROMPTS, **settings)
    said: list[str] = []
    memory, budget, told = tight(cells), DrawBudget(said.append, lambda n: f"--batch_size {n}"), list[int]()
    assert_same(draw(model, Ids(), PROMPTS, **settings, budget=budget, progress=told.append), wanted)
    assert told == [len(PROMPTS)]
    assert said[0] == (
        "out of memory while 18 responses were drawn at once: these are drawn anew, and the run goes on, with at most "
        "9 (next time: --batch_size 9)"
    )
    assert len(said) == len(memory.refused) and memory.refused, "each lack of memory lowers the limit, once"
    assert any(fed == 1 for _, fed in memory.refused), "some must give out in the middle of an answer"


def test_no_further_batch_is_larger_than_what_fitted(model: Any, tight: Any) -> None:
    """Of many batches one is refused; a second call with the same budget starts with what it has learned."""
    memory, budget = tight(60), DrawBudget(lambda note: None)
    settings: dict[str, Any] = {"n": 1, "max_tokens": 6, "batch_size": 16, "budget": budget}
    prompts = [f"1 3 5 {i} {j}" for i in (3, 4, 5) for j in (1, 3, 4, 5)] * 4
    draw(model, Ids(), prompts, **settings, seed=0)
    first = len(memory.refused)
    assert 0 < first <= 3 and budget.limit in (8, 4, 2)
    draw(model, Ids(), prompts, **settings, seed=0)
    assert len(memory.refused) == first and memory.most <= 16


def test_the_setting_it_proposes_draws_as_many_at_once(model: Any, tight: Any) -> None:
    """With the proposed `batch_size`, below the answers to one prompt, nothing is refused any more."""
    memory, budget = tight(100), DrawBudget(lambda note: None)
    settings: dict[str, Any] = {"n": 12, "max_tokens": 12, "seed": 1}
    draw(model, Ids(), PROMPTS, **settings, budget=budget, batch_size=24)
    refused, limit = len(memory.refused), budget.limit
    assert refused and limit is not None and limit < 12
    draw(model, Ids(), PROMPTS, **settings, batch_size=limit)
    assert len(memory.refused) == refused and memory.most >= limit


def test_one_answer_that_does_not_fit_is_named_with_a_length_that_does(model: Any, tight: Any) -> None:
    """The prompt by its origin or how it begins, its tokens, and the `max_tokens` that is the last to fit."""
    settings: dict[str, Any] = {"n": 2, "seed": 0, "temperature": 0}
    whole = draw(model, Ids(), ["1 3 5"], **settings, max_tokens=20)
    assert len(whole[0][0].ids) > 9, "this answer must be a long one"
    tight(10)
    named = r": out of memory with one response alone, its prompt 3 tokens and 8 drawn; 8 did fit: set --max_tokens 8$"
    for origins, name in ((["f.jsonl:7"], "f.jsonl:7"), ([], "the prompt '1 3 5'")):
        budget = DrawBudget(lambda note: None)
        with pytest.raises(RunError, match=f"^{re.escape(name)}{named}"):
            draw(model, Ids(), ["1 3 5"], **settings, max_tokens=20, budget=budget, origins=origins)
    ((one, _),) = draw(model, Ids(), ["1 3 5"], **settings, max_tokens=8, budget=DrawBudget(lambda note: None))
    assert one.ids == whole[0][0].ids[:8]
    with pytest.raises(RunError, match=r"its prompt 11 tokens and 0 drawn; leave it out, or shorten it$"):
        draw(model, Ids(), ["1" + " 3" * 10], max_tokens=1, budget=DrawBudget(lambda note: None))


def test_other_errors_and_draws_without_a_budget_are_left_alone(model: Any, tight: Any) -> None:
    """A RuntimeError of another kind passes as it is, and so does a lack of memory where nobody asked for halves."""
    tight(10)
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, Ids(), PROMPTS, max_tokens=9)

    def wrong(module: Any, args: Any) -> None:
        raise RuntimeError("shapes do not match")

    hook = model.register_forward_pre_hook(wrong)
    try:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            draw(model, Ids(), PROMPTS, max_tokens=9, budget=DrawBudget(lambda note: None))
    finally:
        hook.remove()


# --- the stages -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"the {word} {' '.join(words[:i])}"}) + "\n" for i, word in enumerate(words))
    )
    return path


def opens_tight(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, cells: int) -> list[Tight]:
    """Models that `module` opens from now on have memory for so many cells of a cache; training is not narrowed."""
    plain, made = getattr(module, name), list[Tight]()

    def opened(*args: Any, **settings: Any) -> Any:
        found = plain(*args, **settings)
        loaded: LoadedModel = found if isinstance(found, LoadedModel) else found[0]
        memory = Tight(loaded.model, cells)
        memory.hook.remove()
        memory.hook = loaded.model.register_forward_pre_hook(
            lambda module, args, kwargs: memory(module, args, kwargs) if kwargs.get("use_cache") else None,
            with_kwargs=True,
        )
        made.append(memory)
        return found

    monkeypatch.setattr(module, name, opened)
    return made


LOGP = re.compile(r'"logp": (-?[0-9.e-]+)')


def assert_same_files(found: Path, wanted: Path) -> None:
    """Byte for byte, but for the last digits of log-probs in float32."""
    one, other = found.read_text(), wanted.read_text()
    assert LOGP.sub("", one) == LOGP.sub("", other)
    logps = [[float(logp) for logp in LOGP.findall(text)] for text in (one, other)]
    assert logps[0] and logps[0] == pytest.approx(logps[1], abs=1e-5)


def test_a_samples_file_is_that_of_a_larger_memory(
    tiny_model_folder: Path,
    asked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same lines in the same order, each prompt once; continued by a larger n, too. The note names the option."""
    settings: dict[str, Any] = {
        "model": str(tiny_model_folder), "prompts": str(asked), "max_tokens": 12, "device": "cpu", "batch_size": 12,
    }  # fmt: skip
    for n in (3, 5):
        sample.main(SampleConfig(**settings, n=n, out=str(tmp_path / "large.jsonl")))
    made = opens_tight(monkeypatch, writers, "load", 60)
    for n in (3, 5):
        sample.main(SampleConfig(**settings, n=n, out=str(tmp_path / "tight.jsonl")))
        assert made[-1].refused
    assert_same_files(tmp_path / "tight.jsonl", tmp_path / "large.jsonl")
    assert "while 12 responses were drawn at once" in capsys.readouterr().err


def test_an_evaluation_has_the_answers_of_a_larger_memory(
    tiny_model_folder: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token in the run folder, and the card names the option."""
    settings: dict[str, Any] = {
        "model": f"other={tiny_model_folder}", "prompts": str(asked), "n": 4, "max_tokens": 12, "device": "cpu",
        "reference": str(tiny_model_folder),
    }  # fmt: skip
    evaluate.main(EvaluateConfig(**settings, out=str(tmp_path / "large")))
    made = opens_tight(monkeypatch, contestants, "load", 120)
    card = evaluate.main(EvaluateConfig(**settings, out=str(tmp_path / "tight")))
    assert any(one.refused for one in made)
    for file in sorted((tmp_path / "large" / "tokens").iterdir()):
        assert file.read_bytes() == (tmp_path / "tight" / "tokens" / file.name).read_bytes()
        assert_same_files(tmp_path / "tight" / "samples" / file.name, tmp_path / "large" / "samples" / file.name)
    assert any(re.search(r"responses were drawn at once.*next time: --batch_size \d+\)$", note) for note in card.notes)


def ppo_run(model: Path, prompts: Path, out: Path, **more: Any) -> list[str]:
    """The notes of a run of two steps."""
    settings = {
        "reward": "rule:regex:[aeiou]", "batch_size": 4, "n": 2, "max_tokens": 6, "lr": 1e-3, "missing_eos": "none",
        "device": "cpu", "max_steps": 2, **more,
    }  # fmt: skip
    config = PpoConfig(model=str(model), prompts=str(prompts), out=str(out), **settings)
    return list(ppo.main(config).notes)


def numbers(out: Path) -> list[dict[str, Any]]:
    """What a run measured, without what the clock says."""
    rows = [json.loads(line)["metrics"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "per_second" not in k and not k.startswith("share_")} for row in rows]


def test_rollouts_in_halves_give_the_same_run(
    tiny_model_folder: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens alone are learned from, so metrics and weights are those of a larger memory to the last bit."""
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"prompt": "the park"}\n{"prompt": "the answer"}\n')
    held: dict[str, Any] = {"eval_prompts": str(held_out), "eval_every": 1}
    plain = ppo_run(tiny_model_folder, asked, tmp_path / "large", **held)
    made = opens_tight(monkeypatch, ppo_parts, "open_model", 50)
    notes = ppo_run(tiny_model_folder, asked, tmp_path / "tight", **held)
    assert made[0].refused and not any("out of memory" in note for note in plain)
    assert numbers(tmp_path / "tight") == numbers(tmp_path / "large")
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("tight", "large"))
    assert one == other, "the weights must be the same"
    (first, *_) = [note for note in notes if note.startswith("out of memory while 8 responses were drawn at once")]
    tokens = int(re.findall(r"--tokens_per_batch (\d+)", first)[0])
    ppo_run(tiny_model_folder, asked, tmp_path / "next", **held, tokens_per_batch=tokens)
    assert made[-1].most <= 4, "the proposed setting draws no more at once"


def test_a_prompt_of_ppo_that_never_fits_is_named(
    tiny_model_folder: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By file and line, with a --max_tokens that fits; the run card says failed."""
    opens_tight(monkeypatch, ppo_parts, "open_model", 8)
    with pytest.raises(RunError, match=r"prompts.jsonl:\d+: out of memory with one response alone.* --max_tokens \d+$"):
        ppo_run(tiny_model_folder, asked, tmp_path / "run", shuffle=False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_sharded_policy_that_cannot_be_gathered_ends_with_a_setting() -> None:
    """Where there is no memory for the whole policy to draw with, the error says --offload; others are left alone."""
    world: Any = SimpleNamespace(in_step=lambda what: nullcontext())
    for raised, expected in (
        (torch.OutOfMemoryError("CUDA out of memory"), r"while the weights to draw with were gathered: .* --offload"),
        (RuntimeError("shapes do not match"), "^shapes do not match$"),
    ):
        model: Any = torch.nn.Linear(2, 2)
        model.preftune_whole = Mock(side_effect=raised)
        with pytest.raises(RuntimeError if expected[0] == "^" else RunError, match=expected):
            whole(model, world, "the weights to draw with").__enter__()
