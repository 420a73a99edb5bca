"""The terms of Z: counted exactly, summed exactly where they fit, refused where they do not."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from preftune.errors import ConfigError
from preftune.theory.partition import brute_force_log_partition, partition_seconds, partition_terms


def chain(v: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random Markov chain over v tokens and a reward per token."""
    g = torch.Generator().manual_seed(v)
    start, move = torch.randn(v, generator=g).double(), torch.randn(v, v, generator=g).double()
    return torch.log_softmax(start, -1), torch.log_softmax(move, -1), torch.randn(v, generator=g).double()


def forced(v: int, t: int, beta: float, budget: int = 1_000_000) -> float:
    start, move, value = chain(v)
    return brute_force_log_partition(
        lambda y: start[y[:, 0]] + move[y[:, :-1], y[:, 1:]].sum(-1),
        lambda y: value[y].sum(-1),
        v,
        t,
        beta,
        budget=budget,
    )


def test_terms_are_counted_exactly() -> None:
    """V, V^2, V^T as whole numbers of any size; with an end mark the sum over lengths."""
    assert [partition_terms(50_257, t) for t in (1, 2)] == [50_257, 2_525_766_049]
    assert [round(math.log10(partition_terms(50_257, t)), 1) for t in (10, 20)] == [47.0, 94.0]
    assert partition_terms(50_257, 20) % 10**6 == 50_257**20 % 10**6
    assert partition_terms(8, 5, up_to=True) == 37_449
    listed = [y for t in range(4) for y in product(range(3), repeat=t)]
    assert partition_terms(3, 3, up_to=True) == len(listed)


def test_time_follows_from_the_terms() -> None:
    """So many terms a second."""
    assert partition_seconds(10**15) == 1000 and partition_seconds(60, terms_per_second=2) == 30


@pytest.mark.parametrize(("v", "t", "beta"), [(2, 1, 1.0), (3, 4, 0.5), (4, 3, 2.0)])
def test_brute_force_is_the_sum_over_the_enumerated_tree(v: int, t: int, beta: float) -> None:
    """Against plain Python: probabilities times exp(r / beta), added up response by response."""
    start, move, value = (x.tolist() for x in chain(v))
    z = 0.0
    for y in product(range(v), repeat=t):
        logp = start[y[0]] + sum(move[a][b] for a, b in pairwise(y))
        z += math.exp(logp + sum(value[token] for token in y) / beta)
    assert forced(v, t, beta) == pytest.approx(math.log(z), rel=1e-12)


def test_many_terms_are_summed_in_parts_that_fit() -> None:
    """78,125 terms, more than are scored at once, against the chain's transfer matrices."""
    start, move, value = chain(5)
    reach = start + value
    for _ in range(6):
        reach = torch.logsumexp(reach[:, None] + move, 0) + value
    assert forced(5, 7, 1.0) == pytest.approx(float(torch.logsumexp(reach, 0)), rel=1e-13)


@pytest.mark.parametrize(("v", "t", "terms"), [(50_257, 2, "2,525,766,049"), (50_257, 20, r"about 10\^94")])
def test_a_sum_that_does_not_fit_is_refused_before_it_starts(v: int, t: int, terms: str) -> None:
    """The message has the number of terms, the budget, and the good news."""

    def never(tokens: Tensor) -> Tensor:
        raise AssertionError("no response may be scored")

    with pytest.raises(ConfigError, match=f"has {terms} terms, .* 1,000,000 terms; DPO needs none of them"):
        brute_force_log_partition(never, never, v, t, 1.0)


def test_the_budget_is_inclusive_and_nonsense_is_refused() -> None:
    """Exactly the budget is allowed, one less is not; a response has a token, a vocabulary too."""
    assert math.isfinite(forced(3, 2, 1.0, budget=9))
    with pytest.raises(ConfigError, match="has 9 terms"):
        forced(3, 2, 1.0, budget=8)
    with pytest.raises(ConfigError, match="lengths >= 1"):
        forced(3, 0, 1.0)
    with pytest.raises(ConfigError, match="a vocabulary >= 1 and a length >= 0, not 0 and 1"):
        partition_terms(0, 1)
