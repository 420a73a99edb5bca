"""Judging, evaluation and online DPO by several processes: the files of one process, and no piece of work done twice.

Real processes over gloo on one machine; the oracle is the same stage in one process, which other tests prove right.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_counts import WORK, counted, run
from ranks import ends, rows, start
from safetensors.torch import load_file

from preftune.models.load import load
from preftune.records import Response, SampledResponses, to_json
from preftune.worlds.enumerable import LETTERS, write_model

DRIVER = str(Path(__file__).with_name("rank_counts.py"))
SMALL = {"max_steps": 1, "batch_size": 8, "max_length": 128, "tokens_per_batch": 256, "device": "cpu"}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "park", "with", "dog", "good", "answer", "film")
CLOCK = {"report.html", "run.json", "metrics.jsonl", ".lock"}
"""Files that tell when and by how many processes; their numbers are compared one by one."""


@pytest.fixture(scope="module")
def inputs(tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reference, a policy some way off it, a reward model and a DPO run to judge by, prompts, pairs and samples."""
    folder = tmp_path_factory.mktemp("inputs")
    loaded = load(tiny_model_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(folder / "policy")
    given = {"model": str(tiny_model_folder), "data": str(pairs_file), "lr": 1e-3}
    for stage in ("reward", "dpo"):
        run([[stage, {**SMALL, **given, "out": str(folder / stage)}]])
    asked = [f"the {one} {other}" for one in WORDS[:6] for other in WORDS[:4]]
    (folder / "asked.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    texts = [
        tuple(Response(text=f" {word} {other}") for word in WORDS[i : i + 3]) for i, other in enumerate(WORDS[:12])
    ]
    sampled = [
        SampledResponses(prompt=f"{prompt} {i}", responses=some) for prompt in asked[:6] for i, some in enumerate(texts)
    ]
    (folder / "samples.jsonl").write_text("".join(to_json(row) + "\n" for row in sampled))
    _write_world(folder)
    return {path.name: str(path) for path in folder.iterdir()} | {
        "model": str(tiny_model_folder), "pairs": str(pairs_file)
    }  # fmt: skip


def _write_world(folder: Path) -> None:
    """A model whose answers end, which online DPO needs, and a reward model for its letters."""
    write_model(folder / "world", hidden=16, layers=1)
    asked = [one + other for one in LETTERS[:5] for other in LETTERS[:5]]
    (folder / "letters.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    pairs = [{"prompt": prompt, "chosen": prompt[::-1] + "a", "rejected": "b"} for prompt in asked]
    (folder / "letter-pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    told = {"model": str(folder / "world"), "data": str(folder / "letter-pairs.jsonl"), "lr": 1e-2}
    run([["reward", {**SMALL, **told, "out": str(folder / "of_letters")}]])


def stages(inputs: dict[str, str], out: Path, *, shard: bool = True) -> list[Any]:
    """216 comparisons in four parts by every kind of judge; five batches of answers; two rounds of two batches each."""
    reward = f"reward:{inputs['reward']}"
    label = {
        "samples": inputs["samples.jsonl"], "out": str(out / "label"),
        "judge": f"{reward} ; policy:{inputs['dpo']} ; rule:length ; simulated:bradley_terry",
    }  # fmt: skip
    evaluate = {
        "model": inputs["policy"], "reference": inputs["model"], "prompts": inputs["asked.jsonl"], "max_prompts": 9,
        "out": str(out / "evaluate"), "n": 3, "max_tokens": 6, "batch_size": 6, "tokens_per_batch": 64,
        "reward": reward, "truth": f"policy:{inputs['dpo']}", "pairs": inputs["pairs"], "judge": reward,
        "device": "cpu",
    }  # fmt: skip
    online = {
        **SMALL, "online": True, "model": inputs["world"], "prompts": inputs["letters.jsonl"], "max_length": 12,
        "out": str(out / "online"), "judge": f"reward:{inputs['of_letters']}", "labels": "bradley_terry", "rounds": 2,
        "n": 4, "max_tokens": 6, "lr": 1e-4, "dtype": "float32", "shard": shard,
    }  # fmt: skip
    return [["label", label], ["evaluate", evaluate], ["dpo", online]]


@pytest.fixture(scope="module")
def alone(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage by one process, and how much work that was."""
    out = tmp_path_factory.mktemp("alone")
    with counted() as found:
        run(stages(inputs, out))
    (out / "counts-0.json").write_text(json.dumps(found))
    return out


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage by several processes; two train online in parts, four hold whole weights each."""
    out = tmp_path_factory.mktemp(f"shared{request.param}")
    (out / "plan.json").write_text(json.dumps(stages(inputs, out, shard=request.param == 2)))
    found = ends(start([DRIVER, str(out / "plan.json")], request.param))
    assert [code for code, _ in found] == [0] * request.param, "\n".join(told for _, told in found)
    assert [told for _, told in found[1:]] == [""] * (request.param - 1), "only rank 0 speaks"
    return out


def files(folder: Path, *, but: str = "nothing") -> dict[str, bytes]:
    """Name -> content of all that a stage wrote, without what the clock says."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in CLOCK]
    return {name: path.read_bytes() for path in found if not (name := str(path.relative_to(folder))).startswith(but)}


def results(folder: Path) -> dict[str, Any]:
    card = json.loads((folder / "run.json").read_text())
    assert card["status"] == "done"
    return dict(card["results"])


def test_judgements_are_those_of_one_process_byte_for_byte(alone: Path, together: Path) -> None:
    """A reward model, a policy's implicit reward, a rule and an annotator: every file of labels, in every byte."""
    one, many = files(alone / "label"), files(together / "label")
    assert set(one) == {"judgements.jsonl", "pairs.jsonl", "rankings.jsonl", "scored.jsonl", "label.json"}
    assert many == one and one["judgements.jsonl"].count(b"\n") == 4 * 216


def test_an_evaluation_is_that_of_one_process_to_the_last_bit(alone: Path, together: Path) -> None:
    """Answers, KL of every response, rewards, judgements, and all results with their intervals."""
    one, many = files(alone / "evaluate"), files(together / "evaluate")
    assert many == one and {"evaluation.jsonl", "judgements.jsonl"} < set(one)
    assert results(together / "evaluate") == results(alone / "evaluate")
    assert results(alone / "evaluate")["models"]["policy"]["kl"]["estimate"] > 0


def test_online_rounds_are_those_of_one_process(alone: Path, together: Path) -> None:
    """What the first policy says, scores and pairs included, in every byte; then the policies differ by rounding."""
    one, many = (files(out / "online", but="round-1/dpo") for out in (alone, together))
    first = {name for name in one if name.startswith("round-1/")}
    assert len(first) >= 5 and all(many[name] == one[name] for name in first)
    mine, theirs = (rows(out / "online") for out in (alone, together))
    assert len(mine) == len(theirs) == 3
    for ours, others in zip(mine, theirs, strict=True):
        assert ours.keys() == others.keys()
        numbers = {name: value for name, value in ours.items() if isinstance(value, float)}
        assert {name: others[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)
    both = [load_file(out / "online" / "model" / "model.safetensors") for out in (alone, together)]
    far = torch.cat([(both[0][name].float() - both[1][name].float()).flatten() for name in both[0]])
    assert float(far.square().mean().sqrt()) < 3e-6
    learnt = together / "online" / "round-2" / "dpo" / "checkpoints" / "step-1"
    two = len(list(together.glob("counts-*.json"))) == 2
    assert len(list(learnt.glob("tensors-*-of-*.safetensors"))) == (2 if two else 0), "two train each round in parts"


def test_no_piece_of_work_is_done_twice(alone: Path, together: Path) -> None:
    """Batches drawn, micro-batches scored, comparisons asked: together the ranks do what one does, each a part."""
    whole = json.loads((alone / "counts-0.json").read_text())
    parts = [Counter(json.loads(path.read_text())) for path in sorted(together.glob("counts-*.json"))]
    assert len(parts) in (2, 4) and sum(parts, Counter()) == Counter(whole)
    assert set(whole) == set(WORK.values())
    for what, n in whole.items():
        assert max(part[what] for part in parts) < n, what
