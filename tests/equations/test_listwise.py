"""Rankings with ties under Plackett-Luce, LiPO's gains and EXO's pair: claims of single losses.

What holds for every listwise loss stands in `tests/claims/test_listwise_losses.py`.
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from preftune.equations.listwise import exo_list, lipo, plackett_luce, plackett_luce_weights
from preftune.equations.ties import TIES_AT_MOST
from preftune.tensors import ListLogps


def ranked(ratio: Tensor, ranks: list[tuple[int, ...]], score: Tensor | None = None) -> ListLogps:
    """The same responses under many rankings; `log_ratio` is a leaf."""
    ratio = ratio.double().expand(len(ranks), -1).clone().requires_grad_()
    nothing = torch.full_like(ratio, torch.nan).detach()
    score = nothing if score is None else score.double().expand_as(ratio)
    return ListLogps(nothing, ratio, nothing, torch.tensor(ranks), score, nothing[:, 0])


def by_autograd(value: Tensor, lists: ListLogps) -> Tensor:
    return -torch.autograd.grad(value.sum(), lists.log_ratio)[0]


PATTERNS = [(1, 2, 3, 4), (1, 1, 2, 3), (1, 2, 2, 3), (1, 2, 3, 3), (1, 1, 2, 2), (1, 1, 1, 2), (1, 2, 2, 2), (1,) * 4]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rankings_of_one_tie_pattern_are_all_there_is(pattern: tuple[int, ...]) -> None:
    """The probabilities e^-L of all rankings with a given pattern of ties sum to one, strict ones included."""
    ratio = torch.tensor([-30.0, 4.0, 0.0, 17.0])
    likelihood = torch.exp(-plackett_luce(ranked(ratio, sorted(set(permutations(pattern)))))).detach()
    assert float(likelihood.sum()) == pytest.approx(1.0, rel=1e-13)
    assert len(likelihood) == 1 or likelihood.std() > 1e-2


def test_a_tie_is_as_likely_as_its_two_orders_together() -> None:
    """P(a = b > c) = P(a > b > c) + P(b > a > c)."""
    ratio = torch.tensor([3.0, -9.0, 14.0])
    tied, one, other = torch.exp(-plackett_luce(ranked(ratio, [(1, 1, 2), (1, 2, 3), (2, 1, 3)]))).tolist()
    assert tied == pytest.approx(one + other, rel=1e-13)


@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_gradient_of_a_strict_ranking_is_one_less_the_softmaxes_it_took_part_in(beta: float) -> None:
    """-dL/ds_i = 1 - sum over k <= rank(i) of softmax(s_(k), .., s_(K))_i."""
    s = 2 * torch.randn(6, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    by_hand = torch.ones(6).double()
    for k in range(6):
        by_hand[k:] -= torch.softmax(s[k:], -1)
    lists = ranked(s / beta, [(1, 2, 3, 4, 5, 6)])
    for found in (plackett_luce_weights(lists, beta=beta), by_autograd(plackett_luce(lists, beta=beta), lists)):
        torch.testing.assert_close(found[0], beta * by_hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [2, 5, TIES_AT_MOST])
def test_a_tie_has_the_probability_that_all_of_it_wins_a_race(size: int) -> None:
    """A block of any size up to the limit: inclusion and exclusion over arrivals at exponential times."""
    s = torch.randn(size + 2, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    with localcontext(prec=60):
        strength = [Decimal(x).exp() for x in s.tolist()]
        rest = strength[-1] + strength[-2]
        subsets = (c for m in range(size + 1) for c in combinations(strength[:size], m))
        first = sum((-1) ** len(c) * rest / (rest + sum(c)) for c in subsets)
        expected = -float((first * strength[-2] / rest).ln())
    lists = ranked(s, [(1,) * size + (2, 3)])
    value = plackett_luce(lists, beta=1.0)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(
        plackett_luce_weights(lists, beta=1.0), by_autograd(value, lists), rtol=1e-12, atol=1e-14
    )


def test_two_ties_of_one_ranking_both_count() -> None:
    """P(a = b > c = d > e) is the product of two events: a and b come first; of the rest, c and d."""
    ratio, beta = torch.tensor([5.0, -2, 9, 3, 1]), 0.3
    both, first, second = plackett_luce(
        ranked(ratio, [(1, 1, 2, 2, 3), (1, 1, 2, 2, 2), (0, 0, 1, 1, 2)]), beta=beta
    ).tolist()
    assert both == pytest.approx(first + second, rel=1e-13)


def test_a_ranking_in_which_all_tie_says_nothing() -> None:
    """Loss and gradient are exactly 0, also for more responses than can be summed, and so is a tie in the last rank."""
    ratio = torch.linspace(-50, 50, 14)
    lists = ranked(ratio, [(1,) * 14])
    value = plackett_luce(lists)
    assert value.tolist() == [0.0]
    assert not plackett_luce_weights(lists).any() and not by_autograd(value, lists).any()
    best_of_14 = plackett_luce(ranked(ratio, [(1, *(2,) * 13)]))
    torch.testing.assert_close(best_of_14, -torch.log_softmax(0.1 * ratio.double(), 0)[:1], rtol=1e-12, atol=0)


def test_a_tie_too_large_to_sum_is_refused() -> None:
    """Eleven responses above another: the message says how many, how many are allowed, and what to do."""
    message = (
        "11 responses share one rank above others, whose orders can be summed for at most 10; "
        "split the tie, rank fewer responses or use a loss of pairs"
    )
    lists = ranked(torch.zeros(12), [(1,) * 11 + (2,)])
    for called in (plackett_luce, plackett_luce_weights):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            called(lists)


@pytest.mark.parametrize("score", [-0.5, 10.5, 200.0, torch.inf])
def test_lipo_refuses_scores_that_its_gains_cannot_take(score: float) -> None:
    """2^200 would be an infinity in float32: the message names the score, the range and what may stay."""
    lists = ranked(torch.zeros(3), [(1, 2, 0)], torch.tensor([score, 0.0, -7.0]))
    message = (
        f"lipo weighs by 2^score: scores must lie in [0, 10], not {score:g}; "
        "rescale them (win rates, graded labels and ratings up to ten may stay as they are)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lipo(lists)


def test_lipo_counts_a_mistake_at_the_top_most() -> None:
    """The same wrong order by the same margin costs more between the first two places than between the last two."""
    ratio = torch.tensor([90.0, 89.0, 1.0, 0.0])
    top, bottom, nothing = (
        lipo(ranked(ratio, [(1, 1, 1, 1)], torch.tensor(scores)), beta=1.0).item()
        for scores in ([1.0, 2, 0, 0], [2.0, 2, 0, 1], [2.0, 2, 2, 2])
    )
    places = (1 / torch.log(torch.arange(2, 6).double())).tolist()
    cost = torch.nn.functional.softplus(torch.tensor(1.0).double()).item()
    assert nothing == 0
    assert top == pytest.approx(2 * (places[0] - places[1]) * cost, rel=1e-12)
    assert bottom == pytest.approx((places[2] - places[3]) * cost, rel=1e-12)
    assert top / 2 > 5 * bottom


def test_exo_of_two_responses_is_its_loss_of_pairs() -> None:
    """KL of (s(z), s(-z)) to (1 - e, e), where e is what the two scores say: arXiv 2402.00856 Eq. 16."""
    z = torch.linspace(-15, 15, 101, dtype=torch.float64)
    score = torch.tensor([0.3, 0.1], dtype=torch.float64)
    e = torch.sigmoid((score[1] - score[0]) / 0.05)
    right, wrong = torch.sigmoid(z), torch.sigmoid(-z)
    expected = right * torch.log(right / (1 - e)) + wrong * torch.log(wrong / e)
    for at, value in zip(z.tolist(), expected, strict=True):
        found = exo_list(
            ranked(torch.tensor([at / 0.4, 0.0], dtype=torch.float64), [(1, 2)], score), beta=0.4, beta_r=0.05
        )
        assert found.item() == pytest.approx(value.item(), rel=1e-9)
