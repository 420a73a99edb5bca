"""A set is gone through batch by batch: however large, few batches of it are in memory at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.data import packing
from preftune.engine.parallel import World
from preftune.evaluation.divergence import divergences
from preftune.judges.reward_model import load_scorer
from preftune.judges.scores import Scorer
from preftune.models.attention import install
from preftune.models.load import load, save
from preftune.models.reward_head import load_reward_model
from preftune.parts.contestants import Contestant
from preftune.parts.implicit_reward import implicit_reward
from preftune.recipes import dpo
from preftune.records import Response
from preftune.tensors import PackedBatch, TokenGroup

WORDS = ["cat", "sat", "on", "mat", "and", "ran", "to", "park", "with", "dog"]
ASKED = [(f"the {one} {other}", Response(text=f" {other} {one}")) for one in WORDS for other in WORDS]
BUDGET = 64
"""Tokens at once, of many times as many."""


class Alive:
    """How many batches there have been, and at most at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.most, self.built, plain = 0, 0, 0, packing.pack

        def counted(*args: Any, **settings: Any) -> PackedBatch:
            batch = plain(*args, **settings)
            self.now, self.built = self.now + 1, self.built + 1
            self.most = max(self.most, self.now)
            weakref.finalize(batch.input_ids, self.forget)
            return batch

        monkeypatch.setattr(packing, "pack", counted)

    def forget(self) -> None:
        self.now -= 1


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    return Alive(monkeypatch)


def of_reward_model(folder: Path, pairs: Path, out: Path) -> Scorer:
    loaded = load_reward_model(folder, dtype=torch.float32)
    save(loaded.model, loaded.tokenizer, out / "model", state=None, card="")
    return load_scorer(out, tokens_per_batch=BUDGET)


def of_dpo_run(folder: Path, pairs: Path, out: Path) -> Scorer:
    keys = {"model": str(folder), "data": str(pairs), "max_steps": 1, "max_length": 128, "dtype": "float32"}
    dpo.main(dpo.DpoConfig.model_validate(keys | {"out": str(out)}))
    return implicit_reward(out, tokens_per_batch=BUDGET)


@pytest.mark.parametrize("open_scorer", [of_reward_model, of_dpo_run])
def test_a_scorer_holds_few_batches(
    open_scorer: Callable[[Path, Path, Path], Scorer],
    tiny_model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is scored while the next is built, of dozens."""
    score = open_scorer(tiny_model_folder, pairs_file, tmp_path / "run")
    alive = Alive(monkeypatch)
    assert len(score(ASKED)) == len(ASKED)
    assert alive.built > 10 and alive.most <= 3


def test_a_divergence_holds_few_batches(tiny_model_folder: Path, alive: Alive) -> None:
    """Of `preftune evaluate` and of online rounds, with the batches of a contestant."""
    loaded = load(tiny_model_folder, dtype=torch.float32)
    assert install(loaded.model) is None
    contestant = Contestant("it", loaded, True, torch.device("cpu"), BUDGET, World(0, 1))
    ids = np.arange(3, 9, dtype=np.int32)
    groups = [TokenGroup(ids[:3], (ids[:n], ids[n:])) for n in range(1, 6)] * 20
    groups = [TokenGroup(group.prompt, group.responses) for group in groups]
    found = divergences(loaded.model, loaded.model, groups, contestant.batching(packed=True))
    assert [[one.tokens for one in row] for row in found] == [[len(r) for r in g.responses] for g in groups]
    assert alive.built > 10 and alive.most <= 3


def test_ranks_take_items_when_it_is_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks each takes three at a time and works on its own."""
    taken: list[int] = []
    worked: list[tuple[int, int]] = []

    def work(item: int) -> int:
        worked.append((item, len(taken)))
        return 10 * item

    def items() -> Any:
        for i in range(7):
            taken.append(i)
            yield i

    monkeypatch.setattr(World, "gather", lambda self, value, what: [value])
    assert list(World(1, 3).in_turn(items(), work, "a test")) == [10, 40]
    assert worked == [(1, 3), (4, 6)]
