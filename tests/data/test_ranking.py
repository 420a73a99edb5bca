"""Scores -> ranks -> pairs."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.ranking import POLICIES, pair_positions, ranks_from_pairs, ranks_from_scores
from preftune.errors import ConfigError
from preftune.records import RankedResponses, Response

SCORES = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=7)
POLICY = st.sampled_from(sorted(POLICIES))


def row(scores: list[float], prompt: str = "p", **changes: object) -> RankedResponses:
    responses = tuple(Response(text=f"answer {i}") for i in range(len(scores)))
    return RankedResponses(prompt=prompt, responses=responses, ranks=ranks_from_scores(scores), **changes)


def test_four_distinct_scores_give_six_pairs() -> None:
    """The paper's recipe: K answers are K(K-1)/2 comparisons, the larger score always chosen."""
    assert set(pair_positions(row([3.0, 9.0, 1.0, 4.0]))) == {(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)}


def test_each_policy_gives_the_pairs_it_names() -> None:
    """Of five scores with one tie: every strict comparison, neighbours, the two ends, and best against one other."""
    tied = row([5.0, 1.0, 3.0, 3.0, 0.5])
    assert set(pair_positions(tied, "all")) == {(0, 1), (0, 2), (0, 3), (0, 4), (2, 1), (3, 1), (2, 4), (3, 4), (1, 4)}
    assert pair_positions(tied, "adjacent") == ((0, 2), (0, 3), (2, 1), (3, 1), (1, 4))
    assert pair_positions(tied, "best_worst") == ((0, 4),)
    ((chosen, rejected),) = pair_positions(tied, "best_random")
    assert chosen == 0 and rejected in {1, 2, 3, 4}
    assert pair_positions(row([5.0, 1.0, 5.0]), "best_random") == ((0, 1), (2, 1))


@given(SCORES, POLICY)
def test_a_pair_always_prefers_the_strictly_larger_score(scores: list[float], policy: str) -> None:
    """No policy makes a winner out of a tie, and only all-equal scores give no pair."""
    pairs = pair_positions(row(scores), policy)
    assert all(scores[chosen] > scores[rejected] for chosen, rejected in pairs)
    assert len(set(pairs)) == len(pairs)
    assert bool(pairs) == (len(set(scores)) > 1)


@given(SCORES)
def test_all_pairs_are_every_strict_comparison(scores: list[float]) -> None:
    """Against brute force over all ordered pairs of positions."""
    every = {(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b}
    assert set(pair_positions(row(scores), "all")) == every


@given(SCORES)
def test_ranks_count_the_different_larger_scores(scores: list[float]) -> None:
    assert ranks_from_scores(scores) == tuple(1 + len({b for b in scores if b > a}) for a in scores)


@given(SCORES, POLICY, st.integers(0, 3))
def test_a_monotone_transform_of_the_scores_leaves_the_pairs(scores: list[float], policy: str, seed: int) -> None:
    """Bradley-Terry labels only carry order: exp(s / 2) - 7 ranks as s does."""
    moved = [math.exp(score / 2) - 7 for score in scores]
    assert pair_positions(row(moved), policy, seed=seed) == pair_positions(row(scores), policy, seed=seed)


def test_the_random_opponent_is_fixed_by_seed_and_content() -> None:
    """Reading again, or from another line of another file, draws the same; another seed draws anew."""
    scores = [4.0, 3.0, 2.0, 1.0]
    rows = [row(scores, prompt=f"prompt {i}") for i in range(300)]
    draws = [pair_positions(r, "best_random", seed=1) for r in rows]
    assert draws == [
        pair_positions(row(scores, prompt=r.prompt, origin="b.csv:7"), "best_random", seed=1) for r in rows
    ]
    assert draws != [pair_positions(r, "best_random", seed=2) for r in rows]


def test_the_random_opponent_is_uniform() -> None:
    """900 rows, three opponents: chi-square with 2 degrees of freedom below its 99.99 % point, 18.4."""
    counts = Counter(pair_positions(row([4.0, 3.0, 2.0, 1.0], prompt=str(i)), "best_random")[0][1] for i in range(900))
    assert set(counts) == {1, 2, 3}
    assert sum((n - 300) ** 2 / 300 for n in counts.values()) < 18.4


def test_the_random_pair_is_any_pair_that_does_not_tie() -> None:
    """Scores 3, 2, 2, 1 compare five ways; 900 rows: chi-square with 4 degrees of freedom below its 99.99 % point."""
    rows = [row([3.0, 2.0, 2.0, 1.0], prompt=str(i)) for i in range(900)]
    counts = Counter(pair for r in rows for pair in pair_positions(r, "random"))
    assert counts.total() == 900 and set(counts) == set(pair_positions(rows[0], "all"))
    assert sum((n - 180) ** 2 / 180 for n in counts.values()) < 23.6
    assert pair_positions(row([2.0, 2.0]), "random") == ()


@given(POLICY)
def test_stated_pairs_stand_above_ranks(policy: str) -> None:
    """Comparisons a person made are used as made, also against the order of the ranks."""
    assert pair_positions(row([3.0, 2.0, 1.0], pairs=((2, 0), (1, 0))), policy) == ((2, 0), (1, 0))
    assert pair_positions(row([3.0, 2.0, 1.0], pairs=()), policy) == ()


def test_ranks_of_stated_pairs_order_by_wins_minus_losses() -> None:
    """A chain a > b > c, d never compared: a first, b and d level, c last; a cycle ties."""
    assert ranks_from_pairs(4, [(0, 1), (1, 2)]) == (1, 2, 3, 2)
    assert ranks_from_pairs(3, [(0, 1), (1, 2), (2, 0)]) == (1, 1, 1)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match=r"score 1 is -?(nan|inf), a finite number was expected"):
        ranks_from_scores([1.0, score])


def test_an_unknown_policy_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match=r"pairs 'best' is unknown; allowed: all, adjacent, best_worst, best_random"):
        pair_positions(row([1.0, 2.0]), "best")
