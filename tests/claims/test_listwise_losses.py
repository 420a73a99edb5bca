"""Claims about every loss of a whole ranking; the rows of `rows_listwise` say what each of them should be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from listwise_contract import Lists, PairLimit, World, dense, exact, extreme_lists, random_lists
from rows_listwise import ROWS
from torch import Tensor

from preftune.equations.losses import LOSSES, BoundLoss
from preftune.tensors import ListLogps, PairLogps, ResponseLogps, TokenGroup

LISTWISE = {name: loss for name, loss in LOSSES.items() if loss.reads is ListLogps}
EVERY_LOSS = pytest.mark.parametrize("name", LISTWISE)
SCORED = [name for name, loss in LISTWISE.items() if "scores" in loss.needs]


def settings(name: str) -> Iterator[BoundLoss]:
    """Default knobs, every knob changed alone, all changed."""
    other = ROWS[name].other
    for knobs in ({}, *({knob: value} for knob, value in other.items()), other):
        yield LOSSES[name].bind(**knobs)


def values(loss: BoundLoss, lists: Lists) -> Tensor:
    return loss.values(lists.logps())


def weights(loss: BoundLoss, lists: Lists) -> Tensor:
    found = loss.weights(lists.logps())
    assert isinstance(found, Tensor) and not found.requires_grad
    return found


def by_autograd(loss: BoundLoss, lists: Lists) -> Tensor:
    """-dL/d log pi [G, K]."""
    (gradient,) = torch.autograd.grad(values(loss, lists).sum(), lists.policy)
    return -gradient


def fresh(lists: Lists) -> Lists:
    return replace(lists, policy=lists.reference)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --- what holds for every loss ---------------------------------------------------------------------------------------


def test_every_listwise_loss_is_under_contract() -> None:
    """Every loss of rankings has a row here, every knob a second value, and one name throughout."""
    assert set(ROWS) == set(LISTWISE)
    for name, loss in LISTWISE.items():
        assert loss.name == name == loss.function.__name__
        assert set(ROWS[name].other) == set(loss.knobs())
        assert inspect.signature(loss.weights).parameters == inspect.signature(loss.function).parameters
        assert not loss.state() and not loss.coupled and loss.needs_reference


@EVERY_LOSS
def test_value_of_a_ranking_at_policy_equal_to_reference(name: str) -> None:
    """Where policy and reference agree a loss has its hand-computed constant, or openly none."""
    lists, constant = fresh(random_lists(50)), ROWS[name].at_start
    for loss in settings(name):
        assert loss.at_start() == (None if constant is None else pytest.approx(constant, rel=1e-14))
        if constant is None:
            assert values(loss, lists).std() > 1e-2
        else:
            assert_close(values(loss, lists), torch.full((50,), constant, dtype=torch.float64))


@EVERY_LOSS
def test_value_of_a_ranking_equals_the_derivation_from_probabilities(name: str) -> None:
    """The loss is what exact arithmetic on the probabilities of one ranking gives, at every setting of its knobs."""
    lists = random_lists(64)
    for loss in settings(name):
        assert_close(values(loss, lists), exact(ROWS[name].derivation, lists, loss.knobs), 1e-11)


@EVERY_LOSS
def test_autograd_equals_the_analytic_weights_of_a_ranking(name: str) -> None:
    """-dL/d log pi is the gradient weight of every response, ties and padding included; absent ones have exactly 0."""
    lists = random_lists(1500, seed=1, widest=6).leaves()
    for loss in settings(name):
        found = weights(loss, lists)
        torch.testing.assert_close(found, by_autograd(loss, lists), rtol=1e-10, atol=1e-13)
        assert (found[~lists.present] == 0).all() and (by_autograd(loss, lists)[~lists.present] == 0).all()


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_rankings_stay_finite_and_right(name: str, dtype: torch.dtype) -> None:
    """Up to margins of 1e4 value, gradient and weights are finite, and value and gradient are the exact ones."""
    relative = 1e-5 if dtype == torch.float32 else 1e-11
    for loss in settings(name):
        lists = extreme_lists(loss.knobs["beta"])
        narrow = lists.leaves(dtype)
        got, gradient, found = values(loss, narrow), by_autograd(loss, narrow), weights(loss, narrow)
        assert got.dtype == gradient.dtype == found.dtype == dtype
        assert torch.isfinite(got).all() and torch.isfinite(gradient).all() and torch.isfinite(found).all()
        assert_close(got.double(), exact(ROWS[name].derivation, lists, loss.knobs), relative)
        assert_close(gradient.double(), weights(loss, lists), relative)
        assert_close(found.double(), weights(loss, lists), relative)


@EVERY_LOSS
def test_rankings_that_bfloat16_can_hold_cost_rounding_only(name: str) -> None:
    """On inputs of bfloat16, float32 arithmetic follows float64 to 1e-4 of the loss's scale."""
    lists = random_lists(200, seed=2).map(lambda t: t.bfloat16().double() if t.is_floating_point() else t)
    for loss in settings(name):
        wide, narrow = values(loss, lists), values(loss, lists.leaves(torch.float32)).detach().double()
        assert float((narrow - wide).abs().max()) < 1e-4 * float(1 + wide.abs().max())


@EVERY_LOSS
def test_order_in_the_file_does_not_matter(name: str) -> None:
    """Reordering the responses of a ranking reorders their weights and keeps its loss, ties and a fresh policy too."""
    lists = random_lists(80, seed=3)
    order = torch.rand(80, 5, generator=torch.Generator().manual_seed(0)).argsort(-1)
    shuffled = lists.map(lambda t: t.gather(1, order))
    for loss in settings(name):
        assert_close(values(loss, shuffled), values(loss, lists))
        assert_close(weights(loss, shuffled), weights(loss, lists).gather(1, order))


@EVERY_LOSS
def test_rankings_do_not_mix(name: str) -> None:
    """Reordering rankings reorders their losses; disturbing one changes that one only; none give none."""
    lists, loss = random_lists(40, seed=4), LOSSES[name].bind()
    order = torch.arange(5).expand(40, 5)  # nothing ties, so everything is read
    lists = replace(
        lists, rank=dense(order, lists.present), score=torch.where(lists.present, 2.0 - order / 4, torch.nan)
    )
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(values(loss, lists.map(lambda t: t[order])), values(loss, lists)[order])

    by = torch.zeros_like(lists.policy)
    by[17, 0] = -400.0
    assert (values(loss, lists.moved(by)) != values(loss, lists)).nonzero().flatten().tolist() == [17]
    none = lists.map(lambda t: t[:0])
    assert values(loss, none).shape == (0,) and weights(loss, none).shape == (0, 5)
    assert values(loss, none.map(lambda t: t[:, :0])).shape == (0,)


@EVERY_LOSS
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30, 0.0])
def test_padding_never_matters(name: str, garbage: float) -> None:
    """Loss and gradient of a ranking are those it has alone, whatever and however much stands in the padding."""
    lists = random_lists(24, seed=5)
    for loss in settings(name):
        for extra in (0, 3):
            filled = lists.map(
                lambda t, extra=extra: torch.cat(
                    [t if t.dtype == torch.int64 else t.nan_to_num(garbage), torch.full((24, extra), garbage)], 1
                ).double()
            )
            filled = replace(filled, rank=torch.cat([lists.rank, torch.zeros(24, extra, dtype=torch.int64)], 1))
            found, gradient = values(loss, filled), by_autograd(loss, filled.leaves())
            assert (gradient[~filled.present] == 0).all() and (weights(loss, filled)[~filled.present] == 0).all()
            for g in range(24):
                alone = lists.alone(g).leaves()
                assert_close(found[g], values(loss, alone)[0])
                assert_close(gradient[g, filled.present[g]], by_autograd(loss, alone)[0])


@EVERY_LOSS
def test_log_z_of_a_ranking_cancels_when_declared(name: str) -> None:
    """A constant added to all log-ratios of a ranking leaves the loss as it was, or the loss anchors each response."""
    lists = random_lists(200, seed=6)
    c = torch.linspace(-30, 30, 200, dtype=torch.float64)[:, None]
    for loss in settings(name):
        same = torch.allclose(values(loss, lists.moved(c)), values(loss, lists), rtol=1e-9, atol=1e-9)
        assert same == ROWS[name].shift
        first = torch.zeros(200, 5).double()
        first[:, 0] = 1.0
        assert not torch.allclose(values(loss, lists.moved(c * first)), values(loss, lists), rtol=1e-9, atol=1e-9)


@EVERY_LOSS
def test_ranks_and_scores_are_read_exactly_when_declared(name: str) -> None:
    """A loss that needs scores shows it when one is missing and ignores ranks; the other way round without."""
    lists, loss = random_lists(40, seed=7), LOSSES[name].bind()
    blind = values(loss, replace(lists, score=lists.score * torch.nan))
    turned = values(loss, replace(lists, rank=dense(-lists.rank, lists.present)))
    if name in SCORED:
        assert not torch.isfinite(blind).any()
        assert torch.equal(turned, values(loss, lists))
    else:
        assert torch.equal(blind, values(loss, lists))
        assert not torch.allclose(turned, values(loss, lists))


@EVERY_LOSS
def test_a_fresh_policy_is_pulled_towards_the_best_and_from_the_worst(name: str) -> None:
    """At the start the best response goes up and the worst down; where all are equal nothing moves."""
    lists = fresh(random_lists(200, seed=8))
    merit = lists.score if name in SCORED else -lists.rank.double()
    best = merit.masked_fill(~lists.present, -torch.inf).amax(-1, keepdim=True)
    worst = merit.masked_fill(~lists.present, torch.inf).amin(-1, keepdim=True)
    equal = (best == worst)[:, 0]
    assert int(equal.sum()) > 3
    for loss in settings(name):
        found = weights(loss, lists)
        assert (found[~equal][(merit == best)[~equal]] > 0).all()
        assert (found[~equal][(merit == worst)[~equal]] < 0).all()
        assert float(found[equal].abs().max()) < 1e-15


@EVERY_LOSS
def test_every_knob_of_a_listwise_loss_changes_value_and_gradient(name: str) -> None:
    """No knob is silent."""
    lists, plain = random_lists(50, seed=9), LOSSES[name].bind()
    for knob, value in ROWS[name].other.items():
        changed = LOSSES[name].bind(**{knob: value})
        assert not torch.allclose(values(changed, lists), values(plain, lists))
        assert not torch.allclose(weights(changed, lists), weights(plain, lists))


@EVERY_LOSS
def test_rewards_of_a_listwise_loss_are_dpos(name: str) -> None:
    """The reward is beta log(pi / pi_ref), detached."""
    ratio = torch.tensor([-3.0, 0.5], dtype=torch.float64, requires_grad=True)
    reward = LOSSES[name].bind(beta=0.5).reward(ResponseLogps(ratio - 40, ratio, torch.ones(2)))
    assert not reward.requires_grad and reward.tolist() == [-1.5, 0.25]


@pytest.mark.parametrize(
    ("name", "limit"), [pytest.param(n, l, id=f"{n}-{l.equals}") for n, row in ROWS.items() for l in row.limits]
)
def test_two_responses_are_the_pair_they_should_be(name: str, limit: PairLimit) -> None:
    """On two responses with a winner the loss is the pairwise one it generalises, in value and in both weights."""
    g = torch.Generator().manual_seed(10)
    reference = -50 * torch.rand(200, 2, generator=g, dtype=torch.float64)
    policy = reference + 15 * torch.randn(200, 2, generator=g, dtype=torch.float64)
    rank = torch.tensor([1, 2]).expand(200, 2)
    lists = Lists(policy, reference, rank, torch.tensor(limit.scores, dtype=torch.float64).expand(200, 2))
    ratio, one = policy - reference, torch.ones(200).double()
    pairs = PairLogps(*policy.T, *ratio.T, one, one, one)
    here, there = LOSSES[name].bind(**limit.knobs), LOSSES[limit.equals].bind(**limit.equals_knobs)
    assert_close(values(here, lists), limit.factor * there.values(pairs))
    w_c, w_r = there.weights(pairs)
    assert_close(weights(here, lists), limit.factor * torch.stack([w_c, -w_r], 1))


@EVERY_LOSS
def test_responses_of_a_batch_get_the_weights_of_their_rankings(name: str) -> None:
    """From token log-probs to the gradient: each response of each ranked group gets its weight, the others none."""
    ids = np.array([7])
    ranked, unranked, tied = (
        TokenGroup(ids, (ids,) * 3, ranks=(2, 1, 3), scores=(1.0, 2.0, 0.5)),
        TokenGroup(ids, (ids,) * 2, pairs=((0, 1),)),
        TokenGroup(ids, (ids,) * 4, ranks=(1, 2, 1, 2), scores=(3.0, 1.0, 3.0, 0.0)),
    )
    policy = torch.linspace(-3, -1, 9, dtype=torch.float64).cos().requires_grad_()
    responses = ResponseLogps.from_tokens(policy, torch.ones(9, dtype=torch.int64), torch.zeros_like(policy))
    lists, loss = responses.lists((ranked, unranked, tied)), LOSSES[name].bind()
    (gradient,) = torch.autograd.grad(loss.values(lists).sum(), policy)
    weights = loss.weights(lists)
    assert lists.rank.shape == (2, 4)
    assert_close(-gradient, torch.cat([weights[0, :3], torch.zeros(2).double(), weights[1]]))


@pytest.mark.parametrize("name", [name for name in SCORED if name != "lipo"])
def test_scores_of_any_size_are_labels(name: str) -> None:
    """Scores from 1e-4 to 1e4 of either sign give finite values and weights in float32."""
    lists = random_lists(100, seed=11).leaves(torch.float32)
    scale = torch.logspace(-4, 4, 100)[:, None] * torch.tensor([1.0, -1.0]).repeat(50)[:, None]
    for loss in settings(name):
        scaled = replace(lists, score=lists.score * scale)
        assert torch.isfinite(values(loss, scaled)).all() and torch.isfinite(weights(loss, scaled)).all()
        assert torch.isfinite(by_autograd(loss, scaled)).all()


# --- what the losses are minimised by --------------------------------------------------------------------------------

REFERENCE = torch.softmax(torch.randn(4, generator=torch.Generator().manual_seed(13), dtype=torch.float64), 0)
WORLD = World(REFERENCE, torch.tensor([0.9, -0.6, 0.2, -1.1]).double())


def population(ranks: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Three candidates from the reference under every ranking with these ties: (responses, ranks, chance)."""
    responses, rankings, chances = [], [], []
    for three in product(range(len(REFERENCE)), repeat=3):
        strength = torch.exp(WORLD.reward[list(three)])
        for ranking in sorted(set(permutations(ranks))):
            orders = [o for o in permutations(range(3)) if [ranking[i] for i in o] == sorted(ranking)]
            chance = sum(strength[list(o)].div(strength[list(o)].flip(0).cumsum(0).flip(0)).prod() for o in orders)
            responses.append(three)
            rankings.append(ranking)
            chances.append(float(REFERENCE[list(three)].prod() * chance))
    return torch.tensor(responses), torch.tensor(rankings), torch.tensor(chances, dtype=torch.float64)


@pytest.mark.parametrize("ranks", [(1, 2, 3), (1, 2, 2), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.optimum])
def test_population_minimiser_over_rankings_is_the_closed_form_optimum(name: str, ranks: tuple[int, ...]) -> None:
    """Over rankings drawn by Plackett-Luce of candidates from the reference the best policy is the known one.

    Also where the source names only the best, or only the worst, of three: what it leaves open does not bias.
    """
    row, (at, rank, chance) = ROWS[name], population(ranks)
    assert row.optimum and float(chance.sum()) == pytest.approx(1.0)
    loss = LOSSES[name].bind(**row.optimum_knobs)
    theta = REFERENCE.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=1000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logp = torch.log_softmax(theta, 0)
        risk = (values(loss, Lists(logp[at], REFERENCE.log()[at], rank, WORLD.reward[at])) * chance).sum()
        risk.backward()
        return risk

    optimizer.step(closure)
    found, known = torch.softmax(theta.detach(), 0), row.optimum(WORLD, **row.optimum_knobs)
    assert float((known - REFERENCE).abs().sum()) / 2 > 0.05
    assert float((found - known).abs().sum()) / 2 < 1e-6
