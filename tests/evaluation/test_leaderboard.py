"""Bradley-Terry ratings: what was planted, whatever the order of rows, and never an invented number."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from preftune.errors import DataError
from preftune.evaluation.leaderboard import POINTS, bradley_terry_fit, components, leaderboard
from preftune.evaluation.win_rate import Match, Outcome


def match(first: str, second: str, outcome: Outcome, prompt: str = "p") -> Match:
    return Match(prompt=prompt, judge="j", first=first, second=second, outcome=outcome, first_length=1, second_length=1)


def tournament(theta: dict[str, float], each: int, seed: int = 0) -> list[Match]:
    """`each` prompts, on which every two models meet, with outcomes of the model itself."""
    rng = np.random.default_rng(seed)
    return [
        match(a, b, "first" if rng.random() < 1 / (1 + math.exp(theta[b] - theta[a])) else "second", f"p{i}")
        for i in range(each)
        for a, b in combinations(theta, 2)
    ]


def by_name(board: object) -> dict[str, object]:
    return {row.model: row for row in board.standings}


PLANTED = {"a": 0.0, "b": 0.8, "c": -0.6, "d": 1.5}


def test_planted_ratings_are_recovered() -> None:
    """800 prompts: every planted difference is inside its interval, order and ranks are right, nothing is warned of."""
    board = leaderboard(tournament(PLANTED, 800), anchor_rating=1200, resamples=300)
    rows = by_name(board)
    assert [row.model for row in board.standings] == ["d", "b", "a", "c"] and board.anchor == "a"
    assert rows["a"].rating.low == rows["a"].rating.high == rows["a"].rating.estimate == 1200
    for name, theta in PLANTED.items():
        if name != "a":
            assert rows[name].rating.low < 1200 + POINTS * theta < rows[name].rating.high
    assert [(r.rank.low, r.rank.estimate, r.rank.high) for r in board.standings] == [(k, k, k) for k in (1, 2, 3, 4)]
    assert board.connected and board.warnings == () and (board.cycles, board.triples) == (0, 4)
    assert board.degrees == 6 - 3 and board.deviance < 16.3, "99.9 % quantile of chi-square with 3 degrees"


def test_order_of_rows_and_sides_does_not_matter() -> None:
    """Rows shuffled and half of them turned: the same ratings, to rounding."""
    rng = np.random.default_rng(1)
    rows = tournament(PLANTED, 60)
    shuffled = [rows[i].turned() if rng.random() < 0.5 else rows[i] for i in rng.permutation(len(rows))]
    one, other = (leaderboard(x, anchor="b", resamples=20) for x in (rows, shuffled))
    for row in one.standings:
        assert by_name(other)[row.model].rating.estimate == pytest.approx(row.rating.estimate, abs=1e-6)
    assert one.deviance == pytest.approx(other.deviance, abs=1e-8)


def test_it_is_logistic_regression_on_indicators_of_the_models() -> None:
    """Plain gradient ascent on log-likelihood of rows with +1 and -1, ties as two half rows, finds the same maximum."""
    rng = np.random.default_rng(2)
    wins = rng.integers(1, 9, (4, 4)) / 2.0
    np.fill_diagonal(wins, 0)
    theta = np.zeros(4)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    X = np.zeros((len(pairs), 4))
    for row, (i, j) in zip(X, pairs, strict=True):
        row[i], row[j] = 1, -1
    weight = np.array([wins[i, j] for i, j in pairs])
    for _ in range(4000):
        theta += 0.05 * X.T @ (weight / (1 + np.exp(X @ theta)))
    assert bradley_terry_fit(wins, math.inf) == pytest.approx(theta - theta.mean(), abs=1e-9)


def test_two_models_are_the_logit_of_the_win_rate() -> None:
    """Without a prior theta_1 - theta_2 = log(w / (1 - w)), ties as half; with one it is pulled towards 0."""
    rows = [match("a", "b", "first")] * 12 + [match("a", "b", "second")] * 5 + [match("a", "b", "tie")] * 3
    w = 13.5 / 20
    board = by_name(leaderboard(rows, prior=math.inf, anchor="b", resamples=10))
    assert board["a"].rating.estimate == pytest.approx(1000 + POINTS * math.log(w / (1 - w)), abs=1e-7)
    assert board["a"].rate == pytest.approx(w) and board["b"].rate == pytest.approx(1 - w)
    pulled = by_name(leaderboard(rows, anchor="b", resamples=10))["a"].rating.estimate
    assert 1000 < pulled < board["a"].rating.estimate < pulled + 6


def test_many_fits_at_once_are_the_single_fits() -> None:
    """[R, K, K] in, [R, K] out."""
    wins = np.random.default_rng(3).integers(0, 5, (6, 3, 3)) * (1 - np.eye(3))
    for one, theta in zip(wins, bradley_terry_fit(wins), strict=True):
        assert bradley_terry_fit(one) == pytest.approx(theta, abs=1e-9) and theta.sum() == pytest.approx(0, abs=1e-9)


def test_a_model_with_wins_only_is_unbounded_and_said() -> None:
    """The prior gives a number, the end is infinite, the warning names the groups; without a prior it is refused."""
    rows = [*tournament({"a": 0.0, "b": 0.2}, 30), *(match("top", "a", "first", f"p{i}") for i in range(10))]
    board = leaderboard(rows, anchor="a", resamples=50)
    top, b = by_name(board)["top"], by_name(board)["b"]
    assert top.rating.high == math.inf and math.isfinite(top.rating.low) and 1000 < top.rating.estimate < 4000
    assert math.isfinite(b.rating.high) and math.isfinite(b.rating.low)
    assert not board.connected and "no chain of wins and losses joins {a, b}; {top}" in board.warnings[0]
    assert by_name(leaderboard(rows, anchor="top", resamples=50))["b"].rating.low == -math.inf
    with pytest.raises(DataError, match="no finite ratings: no chain of wins and losses joins"):
        leaderboard(rows, prior=math.inf)
    with pytest.raises(ValueError, match="without a prior ratings need strongly connected wins"):
        bradley_terry_fit([[0.0, 3.0], [0.0, 0.0]], math.inf)


def test_islands_are_not_compared() -> None:
    """Models that never met by any chain: both ends infinite between the islands, degrees count each island."""
    rows = tournament({"a": 0.0, "b": 0.3}, 40) + tournament({"x": 0.0, "y": 0.5}, 40, seed=1)
    board = leaderboard(rows, anchor="a", resamples=50)
    for name in "xy":
        assert (by_name(board)[name].rating.low, by_name(board)[name].rating.high) == (-math.inf, math.inf)
    assert {row.model: row.component for row in board.standings} == {"a": 0, "b": 0, "x": 1, "y": 1}
    assert board.degrees == 0 and board.deviance == pytest.approx(0, abs=0.05)


def test_components_are_those_of_mutual_reach() -> None:
    """A cycle is one component, what it only beats another."""
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 2] = wins[2, 0] = wins[2, 3] = 1
    assert components(wins) == [[0, 1, 2], [3]]


def test_a_circle_is_counted_and_does_not_fit() -> None:
    """Rock, paper, scissors: equal ratings, one cycle, a deviance far beyond its degree."""
    rows = [match(a, b, "first", f"p{i}") for i in range(20) for a, b in (("r", "s"), ("s", "p"), ("p", "r"))]
    rows += [match(a, b, "second", f"q{i}") for i in range(5) for a, b in (("r", "s"), ("s", "p"), ("p", "r"))]
    board = leaderboard(rows, resamples=20)
    assert (board.cycles, board.triples, board.degrees) == (1, 1, 1) and board.deviance > 20
    assert [row.rating.estimate for row in board.standings] == pytest.approx([1000] * 3)
    assert {row.rank.estimate for row in board.standings} == {1}


def test_the_deviance_is_twice_the_gain_of_free_rates() -> None:
    """Against binomial log-likelihoods, pair by pair."""
    board = leaderboard(rows := tournament(PLANTED, 40), prior=1e6, resamples=5)
    theta = {row.model: (row.rating.estimate - 1000) / POINTS for row in board.standings}
    gain = 0.0
    for a, b in combinations(PLANTED, 2):
        won = sum(m.score for m in rows if (m.first, m.second) == (a, b))
        for count, share, p in (
            (won, won / 40, 1 / (1 + math.exp(theta[b] - theta[a]))),
            (40 - won, 1 - won / 40, 1 / (1 + math.exp(theta[a] - theta[b]))),
        ):
            gain += 2 * count * math.log(share / p)
    assert board.deviance == pytest.approx(gain, rel=1e-9)


def test_skips_are_counted_and_nothing_is_refused() -> None:
    """A skip rates nobody; only skips, or an unknown anchor, are errors."""
    rows = [match("a", "b", "first"), match("b", "a", "first"), match("a", "b", "skip")]
    board = leaderboard(rows, resamples=5)
    assert (board.verdicts, board.skips, board.prompts) == (2, 1, 1)
    with pytest.raises(DataError, match="found 1 judgements, all skips"):
        leaderboard(rows[2:])
    with pytest.raises(DataError, match="the anchor z was compared with nobody; models: a, b"):
        leaderboard(rows, anchor="z")
