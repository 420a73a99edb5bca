"""Where rounds of DPO lead: with a fixed reference to pi*_beta, with a moving one past it; and where offline stays."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.equations.kl import total_variation
from preftune.equations.losses import LOSSES
from preftune.equations.optimum import optimal_policy
from preftune.tensors import PairIndex, ResponseLogps
from preftune.worlds.enumerable import LETTERS, random_world

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def strings(limit: int) -> Tensor:
    """[M, T] the strings of one to `limit` letters, filled up with the end: 72 for two letters."""
    end = len(LETTERS)
    found = torch.cartesian_prod(*[torch.arange(end + 1)] * limit)
    ended = (found == end).cumsum(-1) > 0
    return found[((found == end) == ended).all(-1) & (found[:, 0] != end)]


def after_a_round(policy: Tensor, ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log-law [M] that minimises the expected DPO loss of pairs that `policy` wrote and Bradley-Terry labelled."""
    m = len(policy)
    first, second = torch.cartesian_prod(torch.arange(m), torch.arange(m)).T
    weight = (policy[first] + policy[second]).exp() * torch.sigmoid(rewards[first] - rewards[second])
    index = PairIndex(first, second, weight, torch.zeros_like(weight))
    lengths, loss = torch.full((m,), 3), LOSSES["dpo"].bind(beta=beta)
    scale = policy.exp().rsqrt() / beta  # rare responses are seen rarely: without it the search would crawl
    search = torch.zeros_like(ref).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [search], max_iter=600, history_size=40, tolerance_grad=1e-13, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = torch.log_softmax(policy + scale * search, 0)
        values = loss.values(ResponseLogps(logps, logps - ref, lengths).pairs(index))
        risk = (values * weight).sum() / weight.sum()
        risk.backward()  # type: ignore[no-untyped-call]
        return risk

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return torch.log_softmax(policy + scale * search.detach(), 0)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_moving_reference_divides_beta_by_the_rounds_and_a_fixed_one_does_not(rounds: int) -> None:
    """With exact expectations n rounds arrive at pi_0 exp(n r / beta) / Z or, with pi_0 as reference, at pi*_beta."""
    world, beta = random_world(3), 2.0
    tokens = strings(2)
    start = torch.log_softmax(world.grammar_logps(["ca"], tokens)[0], 0)
    rewards = world.rewards(["ca"], tokens)[0]
    moving = fixed = start
    for _ in range(rounds):
        moving = after_a_round(moving, moving, rewards, beta)
        fixed = after_a_round(fixed, start, rewards, beta)
    assert total_variation(moving, optimal_policy(start, rewards, beta / rounds)) < 1e-5
    assert total_variation(fixed, optimal_policy(start, rewards, beta)) < 1e-5
    if rounds > 1:
        assert total_variation(moving, optimal_policy(start, rewards, beta)) > 0.05


@pytest.fixture(scope="module")
def benchmark_of_online() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_online", BENCHMARKS / "online.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_online_closes_the_gap_that_offline_data_leave(benchmark_of_online: Any, tmp_path: Path) -> None:
    """beta = 0.1: pi* lives where pi_0 rarely writes. As many steps on as many answers of pi_0 stay far.

    The whole path of the product: 34 steps each, seed 0; benchmarks/online.py has longer runs and three seeds.
    """
    bench = benchmark_of_online
    setting = bench.Setting(letters=3, rounds=8, n=16, epochs=2, lr=1e-3, sft_epochs=8)
    start = bench.begin(tmp_path, 0, setting)
    fixed = bench.online(start, "fixed")
    results = bench.results(fixed)
    pairs = bench.pairs_of_the_start(start)
    offline = bench.offline(start, "offline", pairs, results["steps"])
    assert sum(seen.get("pair", 0) for seen in results["course"]) < bench.count(pairs)
    there, here = (bench.measure(out / "model", start, setting.beta) for out in (fixed, offline))
    assert there["total_variation"] < 0.6 < 0.8 < here["total_variation"]
    assert there["kl"] < here["kl"] / 2 and there["objective_gap"] < here["objective_gap"] / 2
