"""The note before a run says what the cost model says of it."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from preftune.config.rl import PpoConfig
from preftune.engine.clock import Clock
from preftune.models import generate
from preftune.models.cost import Shape, Work, flops, memory
from preftune.models.load import load
from preftune.parts import outlook, rollouts
from preftune.parts.planning import SHARE_OF_PEAK, Range, sized, spoken
from preftune.recipes import dpo, ppo, reward, sft
from preftune.records import RunCard
from preftune.worlds.enumerable import write_model
from rl_world import SCORE

RATE = 1e6
"""FLOP per second of the machine of these tests."""
RUNS: dict[str, tuple[Callable[..., RunCard], dict[str, Any]]] = {
    "dpo": (lambda **keys: dpo.main(dpo.DpoConfig(**keys)), {}),
    "dpo, a reference in the loop": (lambda **keys: dpo.main(dpo.DpoConfig(**keys)), {"reference_every": 2}),
    "dpo, auto": (lambda **keys: dpo.main(dpo.DpoConfig(**keys)), {"activation_checkpointing": "auto"}),
    "sft": (lambda **keys: sft.main(sft.SftConfig(**keys)), {}),
    "reward": (lambda **keys: reward.main(reward.RewardConfig(**keys)), {}),
}


@pytest.mark.parametrize("stage", RUNS)
def test_card_tells_flops_memory_and_time_of_a_step(
    stage: str, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOPs of the mean step by `flops`; seconds of it, and of all steps, at the assumed shares of the rate."""
    monkeypatch.setattr(outlook, "product_rate", lambda device, dtype: RATE)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:8]))
    run, more = RUNS[stage]
    card = run(
        model=str(tiny_model_folder), data=str(data), out=str(tmp_path / "run"), dtype="float32", batch_size=4,
        max_length=128, epochs=3, **more,
    )  # fmt: skip
    shape = Shape.of(tiny_model_folder, torch.float32)
    if stage == "reward":
        shape = replace(shape, vocabulary=1)
    total = Work.total(works(tiny_model_folder, data, stage))
    expected = flops(shape, total.times(0.5), reference_in_loop="loop" in stage)
    (note,) = [text for text in card.notes if text.startswith("a step of mean lengths")]
    assert f"on each device: {expected / 1e12:.3g} TFLOP; at its fullest" in note
    low, high = SHARE_OF_PEAK
    seconds = Range(expected / high / RATE, expected / low / RATE)
    assert f"{spoken(seconds)} a step, {spoken(seconds, 6)} for 6 steps, if it reaches 25% to 70% of" in note


def works(model: Path, data: Path, stage: str) -> list[Work]:
    """Of every row, by the tokenizer alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt = len(tokenizer(row["prompt"]).input_ids)
        sides = ("chosen",) if stage == "sft" else ("chosen", "rejected")
        sizes = [len(tokenizer(row["prompt"] + row[side]).input_ids) + 1 - prompt for side in sides]
        work = Work.of(prompt, sizes)
        found.append(replace(work, fed=prompt + sum(sizes), scored=2.0) if stage == "reward" else work)
    return found


def test_the_rate_is_that_of_this_machine() -> None:
    """Between a millionth and a millionfold of what any processor does, so that no unit is lost."""
    assert 1e7 < outlook.product_rate(torch.device("cpu"), torch.float32) < 1e13


# --- reinforcement learning -----------------------------------------------------------------------------------------

AT_MOST = re.compile(
    r"a step with every response at max_tokens, on each device: (\S+) TFLOP to draw, (\S+) to measure, (\S+) to learn; "
    r"at its fullest (\S+ \S+) \((\S+ \S+) weights and optimizers, to which drawing adds a cache of at most "
    r"(\S+ \S+)\), "
)


def rl_run(model: Path, out: Path, **more: Any) -> RunCard:
    """Two steps of two prompts out of four, of 3, 3, 4 and 4 tokens."""
    prompts = out.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "cd", "abc", "bcd")))
    settings = {
        "reward": SCORE,
        "n": 4,
        "max_tokens": 6,
        "batch_size": 2,
        "missing_eos": "none",
        "device": "cpu",
        **more,
    }
    return ppo.main(PpoConfig(model=str(model), prompts=str(prompts), out=str(out), dtype="float32", **settings))


def said(card: RunCard, pattern: re.Pattern[str]) -> re.Match[str]:
    (found,) = filter(None, map(pattern.search, card.notes))
    return found


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that products with weights are all that counts, however attention is counted."""
    folder: Path = tmp_path_factory.mktemp("letters")
    write_model(folder, hidden=128, layers=1)
    return folder


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_step_of_reinforcement_learning_has_the_flops_that_torch_counts(
    algorithm: str, letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing, measuring and learning, where no response ends before max_tokens and each prompt is asked twice."""
    counted: dict[str, float] = defaultdict(float)

    def counting(module: Any, name: str, what: str) -> None:
        plain = getattr(module, name)

        def counts(*args: Any, **keys: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = plain(*args, **keys)
            counted[what] += counter.get_total_flops()
            return result

        monkeypatch.setattr(module, name, counts)

    monkeypatch.setattr(generate, "_stop_ids", lambda model, tokenizer: frozenset())
    counting(rollouts, "draw", "draw")
    counting(rollouts, "_measured", "measure")
    counting(ppo, f"{algorithm}_update", "learn")
    card = rl_run(letters, tmp_path / "run", algorithm=algorithm)
    told = dict(zip(("draw", "measure", "learn"), said(card, AT_MOST).groups(), strict=False))
    for what, tera in told.items():
        assert 2 * 1e12 * float(tera) == pytest.approx(counted[what], rel=0.1), what
    assert counted["learn"] > (10 if algorithm == "ppo" else 1) * counted["draw"]


def test_a_step_of_reinforcement_learning_holds_three_models_and_two_optimizers(letters: Path, tmp_path: Path) -> None:
    """Bytes that stay: weights of policy, reference and critic, moments of two; with max_kl the policy once more."""
    weights = load(letters, dtype=torch.float32).model
    size = 4 * sum(weight.numel() for weight in weights.parameters())
    head = weights.get_output_embeddings().weight
    tied = head is weights.get_input_embeddings().weight
    critic = size - (0 if tied else head.nbytes) + 4 * (head.shape[1] + 1)
    found = said(rl_run(letters, tmp_path / "run"), AT_MOST)
    assert found[5] == sized(2 * size + critic + 2 * (size + critic))
    guarded = said(rl_run(letters, tmp_path / "guarded", max_kl=50.0), AT_MOST)
    assert guarded[5] == sized(3 * size + critic + 2 * (size + critic))
    shape = Shape.of(letters, torch.float32)
    step = Work.total(Work.of(length, [6] * 4) for length in (3, 4))
    both = [memory(one, step, device="cpu") for one in (shape, replace(shape, vocabulary=1, parameters=critic // 4))]
    fills = sum(one.gradients + one.activations + one.head for one in both)
    assert found[4] == sized(2 * size + critic + 2 * (size + critic) + fills)
    assert found[6] == sized(8 * (4 + 6) * 2 * shape.attention * 4)


def test_the_time_of_measuring_and_learning_is_told_and_that_of_drawing_measured(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds of two steps by the rate; after the first of them what it took, and what the one left will take."""
    rate = 1e9
    monkeypatch.setattr(outlook, "product_rate", lambda device, dtype: rate)
    card = rl_run(letters, tmp_path / "run")
    found = said(card, AT_MOST)
    done = sum(1e12 * float(tera) for tera in found.groups()[1:3])
    (note,) = [note for note in card.notes if AT_MOST.search(note)]
    by_rate = re.search(r"to measure and learn (\S+) to (\S+) s a step, (\S+) to (\S+) s for 2 steps, if", note)
    assert by_rate is not None
    low, high = SHARE_OF_PEAK
    expected = [done / share / rate * times for times in (1, 2) for share in (high, low)]
    assert list(map(float, by_rate.groups())) == pytest.approx(expected, rel=0.06)
    assert any(re.match(r"the first step took \S+ s \(rollout \S+ s, update \S+ s\); 1 more", n) for n in card.notes)


def test_the_first_step_foretells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 s of rollout and 1 s of update: 59 more steps take 3.9 min; a later step, or the last, says nothing."""
    now, notes = iter([0.0, 3.0, 4.0, 7.0, 8.0, 11.0, 12.0]), list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    run: Any = SimpleNamespace(note=notes.append)
    for first, left in ((True, 59), (False, 58), (True, 0)):
        clock.lap("rollout")
        clock.lap("update")
        told = outlook.pace(clock, 200, run, left=left, first=first)
        assert told == {"tokens_per_second": 50.0, "share_rollout": 0.75, "share_update": 0.25}
    assert notes == ["the first step took 4 s (rollout 3 s, update 1 s); 59 more like it take 3.9 min"]
