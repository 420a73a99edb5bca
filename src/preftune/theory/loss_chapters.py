"""The second half of the lesson: from preferences and pi_r to the DPO loss, its gradient and its reference, in numbers.

The rewards of the running example stand for an annotator; everything else is the library's own loss.
"""

from __future__ import annotations

import math
from itertools import permutations

import torch
from torch import Tensor

from preftune.data.ranking import pair_positions, ranks_from_scores
from preftune.equations.bradley_terry import bt_cost, bt_log_prob, bt_objective, bt_prob, ranking_log_prob
from preftune.equations.optimum import implied_reward, log_partition, optimal_policy
from preftune.equations.pairwise import dpo, dpo_weights
from preftune.records import RankedResponses, Response
from preftune.tensors import PairLogps
from preftune.theory.curves import loss_of_u, slope_of_u, uniform_token_shift
from preftune.theory.numbers import Chapter, number, table
from preftune.theory.policy_chapters import BETA, REF_LOGPS, RESPONSES, REWARDS, tv_of_shift

__all__ = ["bradley_terry", "cancellation", "constant_reference", "gradient", "loss_against_u", "preferences", "reward"]

SCORES = (9.0, 7.0, 7.0, 2.0)
VOCABULARY = 50_257


def _f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _pairs(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor) -> PairLogps:
    """Pairs of which only the log-ratios matter."""
    one = torch.ones_like(chosen_log_ratio)
    return PairLogps(chosen_log_ratio, rejected_log_ratio, chosen_log_ratio, rejected_log_ratio, one, one, one)


def preferences() -> Chapter:
    """Scores -> ranks -> pairs, and the probability of a whole ranking."""

    def row(scores: tuple[float, ...]) -> RankedResponses:
        responses = tuple(Response(text=str(i)) for i in range(len(scores)))
        return RankedResponses(prompt="this is a", responses=responses, ranks=ranks_from_scores(scores))

    tied, distinct, stretched = row(SCORES), row((9.0, 7.0, 6.0, 2.0)), row(tuple(math.exp(s) for s in SCORES))
    orders = {
        " > ".join(("cats", "reward", "else")[i] for i in order): (float(ranking_log_prob(REWARDS[list(order)]).exp()),)
        for order in permutations(range(3))
    }
    orders = dict(sorted(orders.items(), key=lambda item: -item[1][0]))
    four = _f64(0.3, -1.0, 2.0, 0.5)
    total = sum(float(ranking_log_prob(four[list(order)]).exp()) for order in permutations(range(4)))
    two = float(ranking_log_prob(REWARDS[[1, 0]]) - bt_log_prob(REWARDS[1], REWARDS[0]))
    ranks = {f"{chr(65 + i)}": (int(s), tied.ranks[i]) for i, s in enumerate(SCORES)}
    return Chapter(
        "preferences", "Scores, ranks, pairs, rankings", "scores -> ranks -> pairs; only the order of scores counts",
        (
            number("pairs_distinct", len(pair_positions(distinct)), "pairs of four responses without a tie"),
            number("pairs_tied", len(pair_positions(tied)), "pairs of these four, of which two tie"),
            number(
                "pairs_stretched", len(set(pair_positions(stretched)) ^ set(pair_positions(tied))),
                "pairs that change when every score s becomes e^s",
            ),
            number("rankings_total", total, "sum of the probabilities of all 24 rankings of four responses"),
            number("ranking_of_two", abs(two), "Plackett-Luce against Bradley-Terry for two responses, difference"),
        ),
        (table("ranks", ("response", "score", "rank"), ranks), table("rankings", ("ranking", "probability"), orders)),
        {f"ranking: {order}": probability for order, probability in orders.items()},
    )  # fmt: skip


def bradley_terry() -> Chapter:
    """A likelihood to maximise and a cost to minimise, which differ by a sign that matters."""
    r_w, r_l = REWARDS[1:2], REWARDS[:1]
    gap = _f64(0.0).requires_grad_()
    (up,) = torch.autograd.grad(bt_objective(gap, torch.zeros_like(gap)), gap)
    (down,) = torch.autograd.grad(bt_cost(gap, torch.zeros_like(gap)), gap)
    twice, weighted = (
        bt_cost(torch.cat([r_w, r_w, r_l]), torch.cat([r_l, r_l, r_w])),
        bt_cost(torch.cat([r_w, r_l]), torch.cat([r_l, r_w]), _f64(2.0, 1.0)),
    )
    margins = [-6 + i / 5 for i in range(61)]
    zero = torch.zeros(1, dtype=torch.float64)
    return Chapter(
        "bradley-terry", "Bradley-Terry, objective and cost", "p(y_w > y_l | x) = s(r_w - r_l);  cost = -objective",
        (
            number("bt_margin", float(r_w - r_l), "r_w - r_l, 'reward function' over 'cats'"),
            number("bt_prob", float(bt_prob(r_w, r_l)), "p(y_w > y_l) = s(r_w - r_l)"),
            number("bt_sum", float(bt_prob(r_w, r_l) + bt_prob(r_l, r_w)), "p(y_w > y_l) + p(y_l > y_w)"),
            number("bt_objective", float(bt_objective(r_w, r_l)), "objective E log s, to be maximised, nats"),
            number("bt_cost", float(bt_cost(r_w, r_l)), "cost -E log s, to be minimised, nats"),
            number("bt_weight", abs(float(twice - weighted)), "a pair given twice against weight 2, difference"),
            number("descent_on_cost", float(-down), "margin after one descent step of size 1 on the cost, from 0"),
            number("descent_on_objective", float(-up), "the same step on the objective taken for a loss: backwards"),
        ),
        series={
            "bt.margin": tuple(margins),
            "bt.objective": tuple(float(bt_objective(_f64(m), zero)) for m in margins),
            "bt.cost": tuple(float(bt_cost(_f64(m), zero)) for m in margins),
        },
    )  # fmt: skip


def reward() -> Chapter:
    """pi_r inverted for the reward; and what the formula without its logarithm would say."""
    pi_r = optimal_policy(REF_LOGPS, REWARDS, BETA)
    log_z = log_partition(REF_LOGPS, REWARDS, BETA)
    bare, full = implied_reward(pi_r, REF_LOGPS, BETA), implied_reward(pi_r, REF_LOGPS, BETA, log_z)
    no_log = BETA * (pi_r - REF_LOGPS).exp() + BETA * log_z
    columns = ("response", "reward", "`beta log(pi_r/pi_ref)`", "`+ beta log Z`", "without the log")
    stacked = torch.stack([REWARDS, bare, full, no_log], -1).round(decimals=12).tolist()
    rows = {name: tuple(values) for name, values in zip(RESPONSES, stacked, strict=True)}
    return Chapter(
        "reward", "The reward of a policy", "r(x, y) = beta log(pi_r(y|x) / pi_ref(y|x)) + beta log Z(x)",
        (
            number("round_trip", float((full - REWARDS).abs().max()), "r -> pi_r -> r, largest error"),
            number("margin_true", float(REWARDS[1] - REWARDS[0]), "r_w - r_l"),
            number("margin_with_log", float(bare[1] - bare[0]), "the same from log-ratios, log Z left out"),
            number("margin_without_log", float(no_log[1] - no_log[0]), "the same from ratios without the log"),
            number("prob_true", float(bt_prob(REWARDS[1], REWARDS[0])), "p(y_w > y_l) that the rewards state"),
            number("prob_without_log", float(bt_prob(no_log[1], no_log[0])), "p(y_w > y_l) without the log"),
        ),
        (table("inverse", columns, rows),),
    )  # fmt: skip


def cancellation() -> Chapter:
    """c(x) added to every reward of a prompt moves log Z and nothing that is trained on."""

    def row(constant: float) -> tuple[float, ...]:
        rewards = REWARDS + constant
        ratio = optimal_policy(REF_LOGPS, rewards, BETA) - REF_LOGPS
        loss = float(dpo(_pairs(ratio[1:2], ratio[:1]), beta=BETA))
        cost = float(bt_cost(rewards[1:2], rewards[:1]))
        return float(log_partition(REF_LOGPS, rewards, BETA)), loss, cost, tv_of_shift(constant)

    rows = {f"{constant:g}": row(constant) for constant in (0.0, 7.0, -100.0)}
    losses = [values[1] for values in rows.values()]
    return Chapter(
        "cancellation", "`log Z` cancels", "r_w - r_l = beta log(pi/pi_ref)(y_w) - beta log(pi/pi_ref)(y_l)",
        (
            number("cancel_loss", losses[0], "DPO loss of pi_r on ('reward function', 'cats'), nats"),
            number("cancel_cost", rows["0"][2], "Bradley-Terry cost of the rewards themselves, nats"),
            number("cancel_spread", max(losses) - min(losses), "spread of the DPO loss over all c(x)"),
            number("log_z_moved", rows["7"][0] - rows["0"][0], "log Z moves by c/beta for c = 7"),
        ),
        (table("shifted", ("`c(x)`", "`log Z`", "DPO loss", "Bradley-Terry cost", "`pi_r` moves by (TV)"), rows),),
    )  # fmt: skip


def loss_against_u() -> Chapter:
    """L(u) = log(1 + u^-beta), below and above u = 1, for several beta."""
    betas, us = (0.1, 0.5, 1.0, 2.0), (0.01, 0.1, 0.5, 1.0, 2.0, 10.0, 100.0)
    rows = {f"{u:g}": tuple(float(loss_of_u(_f64(u), beta)) for beta in betas) for u in us}
    sides = {"below": [(1 + i) / 100 for i in range(100)], "above": [1 + 9 * i / 99 for i in range(100)]}
    ratio = _f64(math.log(0.1)), _f64(0.0)
    series = {f"u.{side}.{b:g}": tuple(loss_of_u(_f64(*u), b).tolist()) for b in betas for side, u in sides.items()}
    return Chapter(
        "u", "The loss against `u`", "L = -log s(beta log u) = log(1 + u^-beta)",
        (
            number("loss_u_1", float(loss_of_u(_f64(1.0), 1.0)), "L(1) = ln 2 for every beta"),
            number("loss_u_0.1", float(loss_of_u(_f64(0.1), 1.0)), "L(0.1), beta = 1"),
            number("loss_u_10", float(loss_of_u(_f64(10.0), 1.0)), "L(10), beta = 1"),
            number("slope_u_1", float(slope_of_u(_f64(1.0), 1.0)), "dL/du at u = 1, beta = 1: -1/(u (1 + u))"),
            number(
                "loss_u_dpo", abs(float(dpo(_pairs(*ratio), beta=1.0) - loss_of_u(_f64(0.1), 1.0))),
                "L(0.1) against the library's DPO loss, difference",
            ),
        ),
        (table("loss_u", ("`u`", *(f"`beta = {b:g}`" for b in betas)), rows, 4),),
        {**{f"u.{name}": tuple(u) for name, u in sides.items()}, "u.ln2": (math.log(2),), **series},
    )  # fmt: skip


def gradient() -> Chapter:
    """The weight beta s(r_l - r_w) of a pair, against autograd, and with the sign of the paper's appendix."""
    beta, margins = BETA, (-8.0, -2.0, 0.0, 2.0, 8.0)

    def weights(margin: float) -> tuple[float, float, float]:
        chosen, rejected = _f64(margin / beta).requires_grad_(), _f64(0.0).requires_grad_()
        pairs = _pairs(chosen, rejected)
        (by_autograd,) = torch.autograd.grad(dpo(pairs, beta=beta).sum(), chosen)
        formula, _ = dpo_weights(_pairs(chosen.detach(), rejected.detach()), beta=beta)
        appendix = beta * torch.sigmoid(_f64(margin))
        return float(formula), float(-by_autograd), float(appendix)

    rows = {f"{m:g}": weights(m) for m in margins}
    log_u = _f64(0.0).requires_grad_()
    (slope,) = torch.autograd.grad(dpo(_pairs(log_u, torch.zeros_like(log_u)), beta=beta).sum(), log_u)
    drawn = [-8 + i / 5 for i in range(81)]
    small = float(dpo(_pairs(_f64(5.0), _f64(0.0)), beta=1e-3))
    columns = ("`r_w - r_l`", "`beta sigma(r_l - r_w)`", "by autograd", "appendix, `beta sigma(r_w - r_l)`")
    return Chapter(
        "gradient", "The gradient", "-grad L = beta s(r_l - r_w) [grad log pi(y_w|x) - grad log pi(y_l|x)]",
        (
            number("weight_error", max(abs(f - a) for f, a, _ in rows.values()), "formula against autograd, largest"),
            number("weight_at_start", weights(0.0)[0], "weight of every pair where pi = pi_ref: beta/2"),
            number(
                "appendix_error", max(abs(p - a) for _, a, p in rows.values()),
                "the appendix's sign against autograd, largest difference",
            ),
            number("u_after_step", float(torch.exp(-slope)), "u after one step of size 1 on the cost, from u = 1"),
            number("small_beta_loss", small, "loss at beta = 0.001, log u = 5 nats: ln 2 nearly, whatever the pair"),
        ),
        (table("weights", columns, rows),),
        {
            "weight.margin": tuple(drawn),
            "weight.right": tuple((beta * torch.sigmoid(-_f64(*drawn))).tolist()),
            "weight.appendix": tuple((beta * torch.sigmoid(_f64(*drawn))).tolist()),
        },
    )  # fmt: skip


def constant_reference() -> Chapter:
    """'Replace the reference by a constant' is two different references, unless both responses have one length."""
    policy, longer = -20.0, (-2, -1, 0, 1, 2)

    def losses(extra: int) -> tuple[float, float, float]:
        per_token = math.log(VOCABULARY)
        n_w, n_l = 10 + extra, 10
        uniform = _pairs(_f64(policy + n_w * per_token), _f64(policy + n_l * per_token))
        equal = _pairs(_f64(policy), _f64(policy))
        shift = uniform_token_shift(VOCABULARY, n_w, n_l)
        return shift, float(dpo(uniform, beta=1.0)), float(dpo(equal, beta=1.0))

    columns = ("`n_w - n_l`", "shift of `log u`, nats", "loss, uniform over tokens", "loss, uniform over responses")
    rows = {f"{extra:+d}" if extra else "0": losses(extra) for extra in longer}
    return Chapter(
        "constant", "What 'a constant reference' needs", "C = V^-n cancels only where n_w = n_l",
        (
            number("vocabulary", VOCABULARY, "tokens V"),
            number("nats_per_token", uniform_token_shift(VOCABULARY, 11, 10), "log V: nats per extra token of y_w"),
            number("even_odds", losses(0)[1], "loss of equally likely responses of one length: ln 2"),
        ),
        (table("lengths", columns, rows),),
        {
            "constant.extra": tuple(float(e) for e in range(-5, 6)),
            "constant.tokens": tuple(uniform_token_shift(VOCABULARY, 10 + e, 10) for e in range(-5, 6)),
        },
    )  # fmt: skip
