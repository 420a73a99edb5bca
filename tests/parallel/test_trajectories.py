"""Several processes train as one: the trajectory does not tell how many there were.

Real processes over gloo on one machine; the oracle is the same recipe in one process, which other tests prove right.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ends, rows, start
from safetensors.torch import load_file

from preftune.config.stages import CONFIGS

DRIVER = str(Path(__file__).with_name("rank_stages.py"))
PAIRS = {"batch_size": 8, "max_steps": 3, "max_length": 128, "tokens_per_batch": 256, "device": "cpu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"lr": 1e-4, "eval_every": 2, "dtype": "float32"}),
    "coupled": ("dpo", {"loss": "bco_pair", "lr": 1e-4, "dtype": "float32"}),
    "moving_reference": ("dpo", {"reference_every": 1, "reference_mix": 0.5, "lr": 1e-4, "dtype": "float32"}),
    "one_pair_a_step": ("dpo", {"batch_size": 1, "lr": 1e-4, "dtype": "float32"}),
    "bfloat16": ("dpo", {"lr": 1e-4, "dtype": "bfloat16"}),
    "sft": ("sft", {"lr": 1e-4, "eval_every": 2, "dtype": "float32"}),
    "reward": ("reward", {"lr": 1e-4, "eval_every": 2, "dtype": "float32"}),
    "ppo": ("ppo", {"lr": 1e-4, "eval_every": 1, "dtype": "float32"}),
    "rloo": ("ppo", {"algorithm": "rloo", "standardise": True, "lr": 1e-4, "dtype": "float32"}),
}
TOLERANCE = {"bfloat16": 2e-2}
"""Of cases whose single numbers are rounded; there ..."""
CONTINUOUS = ("loss", "reward_margin", "logp_chosen", "length_chosen")
"""... are compared, and not how often a rounded margin is above 0."""
RL = {"batch_size": 5, "n": 2, "max_tokens": 6, "missing_eos": "none", "reward": "rule:regex:[aeiou]", "device": "cpu"}


@pytest.fixture(scope="module")
def inputs(tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    lines = pairs_file.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:32]))
    (folder / "eval.jsonl").write_text("".join(lines[32:]))
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "park", "with", "dog"]
    for name, part in (("asked", words[:9]), ("held", words[9:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"the {word}"}) + "\n" for word in part))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "eval", "asked", "held")} | {
        "model": str(tiny_model_folder)
    }


def settings(case: str, inputs: dict[str, str], out: Path) -> tuple[str, dict[str, Any]]:
    stage, own = CASES[case]
    common: dict[str, Any] = {"model": inputs["model"], "out": str(out / case)}
    if stage == "ppo":
        common |= {**RL, "prompts": inputs["asked"], "eval_prompts": inputs["held"]}
    else:
        common |= {**PAIRS, "data": inputs["train"], "eval_data": inputs["eval"]}
    return stage, common | own


def sampled(inputs: dict[str, str], out: Path) -> list[tuple[str, dict[str, Any]]]:
    """Two responses to each prompt in four batches, then a third one to each, in the same file."""
    config = {"model": inputs["model"], "prompts": inputs["asked"], "out": str(out / "samples.jsonl"), "device": "cpu"}
    config |= {"max_tokens": 8, "batch_size": 6, "temperature": 0.7}
    return [("sample", config | {"n": 2}), ("sample", config | {"n": 3})]


@pytest.fixture(scope="module")
def alone(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process."""
    out = tmp_path_factory.mktemp("alone")
    for stage, config in [*sampled(inputs, out), *(settings(case, inputs, out) for case in CASES)]:
        importlib.import_module(f"preftune.recipes.{stage}").main(CONFIGS[stage](**config))
    return out


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by several processes, which compute the reference anew."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    plan = out / "plan.json"
    cases = CASES if request.param == 2 else ["dpo", "coupled", "sft", "reward", "ppo"]
    plan.write_text(json.dumps([*sampled(inputs, out), *(settings(case, inputs, out) for case in cases)]))
    cache = out / "cache"
    found = ends(start([DRIVER, str(plan)], request.param, own={r: {"PREFTUNE_CACHE": str(cache)} for r in range(8)}))
    assert [code for code, _ in found] == [0] * request.param, "\n".join(told for _, told in found)
    assert [told for _, told in found[1:]] == [""] * (request.param - 1), "only rank 0 speaks"
    (out / "ranks.txt").write_text(str(request.param))
    shutil.rmtree(cache)
    return out


@pytest.mark.parametrize("case", CASES)
def test_the_trajectory_is_that_of_one_process(case: str, alone: Path, together: Path) -> None:
    """Every metric of every step and evaluation is that of one process: loss to 1e-4, in float32 without a bias."""
    if not (together / case).exists():
        pytest.skip("a case for two ranks")
    one, many = rows(alone / case), rows(together / case)
    tolerance = TOLERANCE.get(case, 1e-4)
    assert len(one) == len(many) >= 2
    residual = []
    for mine, theirs in zip(one, many, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items() if case not in TOLERANCE else [(name, mine[name]) for name in CONTINUOUS]:
            assert theirs[name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance, nan_ok=True), name
        residual.append(theirs.get("loss", 0) - mine.get("loss", 0))
    assert max(map(abs, residual)) < tolerance
    if case not in TOLERANCE:
        assert abs(sum(residual) / len(residual)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_one_process(case: str, alone: Path, together: Path) -> None:
    """The weights that are saved differ from those of one process by rounding alone, a hundredth of what was learnt."""
    if not (together / case).exists():
        pytest.skip("a case for two ranks")
    one, many = (load_file(folder / case / "model" / "model.safetensors") for folder in (alone, together))
    assert one.keys() == many.keys()
    far = torch.cat([(one[name].float() - many[name].float()).flatten() for name in one])
    assert float(far.square().mean().sqrt()) < (3e-4 if case in TOLERANCE else 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_ends_with_the_same_bits(case: str, together: Path) -> None:
    """No rank's weights differ from another's in one bit, though each computed other rows."""
    if not (together / case).exists():
        pytest.skip("a case for two ranks")
    found = [path.read_text() for path in (together / case).glob("weights-of-*.txt")]
    assert len(found) == int((together / "ranks.txt").read_text()) and len(set(found)) == 1


def test_the_work_is_shared_and_the_card_says_so(together: Path) -> None:
    """The run card names the number of processes, and all rows of a step are counted once."""
    card = json.loads((together / "dpo" / "run.json").read_text())
    size = (together / "ranks.txt").read_text()
    assert card["status"] == "done" and f"{size} processes share the work; rank 0 writes" in card["notes"]
    assert [row["pairs"] for row in rows(together / "dpo", "train")] == [8, 8, 8]


def test_each_rank_computes_a_part_of_the_reference(together: Path) -> None:
    """Every row by one rank and no rank most of them; the next run over the same rows computes none."""
    notes = json.loads((together / "dpo" / "run.json").read_text())["notes"]
    (asked,) = re.findall(r"reference log-probs: 0 groups cached, (\d+) to compute", "\n".join(notes))
    size = int((together / "ranks.txt").read_text())
    parts = [json.loads(path.read_text()) for path in sorted((together / "dpo").glob("reference-by-*.json"))]
    rows_of_all = [row for part in parts for row in part]
    assert len(parts) == size and len(rows_of_all) == len(set(rows_of_all)) == int(asked)
    assert all(0.5 < len(part) * size / int(asked) < 1.5 for part in parts)
    again = [json.loads(path.read_text()) for path in (together / "coupled").glob("reference-by-*.json")]
    assert again == [[]] * size


def test_samples_are_those_of_one_process_byte_for_byte(alone: Path, together: Path) -> None:
    """Ranks take the batches in turn; the file, log-probs included and continued once, is the one of one process."""
    found = (together / "samples.jsonl").read_bytes()
    assert found == (alone / "samples.jsonl").read_bytes() and found.count(b"\n") == 18
