"""Losses of a whole ranking: all K responses to one prompt at once. Reference log-ratios as in `pairwise`.

    log_ratio_i = log pi(y_i|x) - log pi_ref(y_i|x)  (nats, summed over tokens)        s_i = beta log_ratio_i
    rank_i      1 is best, equal numbers tie                                           psi_i = the source's score

Every loss maps `ListLogps` [G, K] to one value per ranking, [G] in nats; its `..._weights` are -dL/d log pi(y_i|x),
[G, K]: positive pulls a response up. Absent responses, which fill short rankings up to K, take no part: they are
blanked before the first operation, so that not even a NaN in their place could come back as a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from preftune.equations.contract import Loss
from preftune.equations.knobs import Positive
from preftune.equations.pairwise import dpo_reward
from preftune.equations.ties import log_first, log_first_gradient, tied_blocks
from preftune.tensors import ListLogps

__all__ = [
    "LOSSES",
    "exo_list",
    "exo_list_weights",
    "infonca",
    "infonca_weights",
    "lipo",
    "lipo_weights",
    "nca_list",
    "nca_list_at_start",
    "nca_list_weights",
    "plackett_luce",
    "plackett_luce_weights",
]

SCORES = 0.0, 10.0
"""What `lipo` takes as scores: its gains grow like 2^psi, and beyond ten one response would outweigh all others."""


# --- Plackett-Luce ---------------------------------------------------------------------------------------------------


def plackett_luce(lists: ListLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = -sum_k [s_(k) - log sum_(j >= k) e^s_(j)], (k) the response of rank k: the ranking's negative log-likelihood.

    The best response is drawn from all with odds e^s, the next from those left, and so on; two responses are `dpo`.
    Tied responses may have been drawn in any order, so the likelihood is the sum over the orders of each tie: exact
    for ties of up to 10. A tie in the last rank says nothing more, so a ranking in which all tie has loss 0.
    `beta` is `dpo`'s, and so is the optimum, whatever the length of the lists and wherever a source leaves ties.

    Addresses: rankings cut into pairs, which count the same judgement several times over.
    Reads: ranks; sums over tokens; reference.
    Elsewhere: the paper knows no ties; tools sort, so that a tie is decided by the order in the file, or expand into
    pairs. Here a larger tie than can be summed is a ValueError.
    Source: arXiv 2305.18290 Eq. 20 (Appendix A.3); beta as for pairs.
    """
    s_GK, rank = _scaled(lists, beta), lists.rank
    chosen_GK = _left(s_GK, rank).log_softmax(-1).diagonal(dim1=1, dim2=2)
    values_G = -torch.where(_alone(rank), chosen_GK, 0).sum(-1)
    for group, members in tied_blocks(rank):
        block = log_first(s_GK[group], members, _below(rank[group], members))
        values_G = values_G.index_add(0, group, -block)
    return values_G


def plackett_luce_weights(lists: ListLogps, *, beta: Positive = 0.1) -> Tensor:
    """beta (1 - sum over the draws that y_i was still in of its chance there), averaged over the orders ties leave.

    Each draw pulls what it drew and pushes what it left behind, by its share of their strength.
    """
    s_GK, rank = _scaled(lists, beta), lists.rank
    drawn_GKK = torch.where(_alone(rank)[:, :, None], _left(s_GK, rank).softmax(-1), 0)
    weights_GK = _alone(rank).to(s_GK) - drawn_GKK.sum(1)
    for group, members in tied_blocks(rank):
        block = log_first_gradient(s_GK[group], members, _below(rank[group], members))
        weights_GK = weights_GK.index_add(0, group, block)
    return beta * weights_GK


def _left(s_GK: Tensor, rank: Tensor) -> Tensor:
    """[G, K, K] s_j of those that y_i was drawn from, those not ranked better; -inf elsewhere."""
    return s_GK[:, None, :].masked_fill(rank[:, None, :] < rank[:, :, None], -torch.inf)


def _below(rank: Tensor, members: Tensor) -> Tensor:
    """[B, K] whether a response is ranked worse than the block `members` [B, m] of its ranking."""
    return rank > rank.gather(1, members[:, :1])


def _alone(rank: Tensor) -> Tensor:
    """[G, K] whether nothing else has the rank of i."""
    return ((rank[:, :, None] == rank[:, None, :]).sum(-1) == 1) & (rank > 0)


# --- LiPO-lambda -----------------------------------------------------------------------------------------------------


def lipo(lists: ListLogps, *, beta: Positive = 0.05) -> Tensor:
    """L = sum_(psi_i > psi_j) |G_i - G_j| |1/D(k_i) - 1/D(k_j)| log(1 + e^(s_j - s_i)), G = 2^psi - 1, D = log(1 + k):
    a pair counts as much as swapping its places would change the discounted gain.

    k_i is the rank of y_i by the current s, 1 is largest, detached. Responses that tie in s, all of them at the
    start, share their places: the weight is its mean over their orders, so that no order in the file decides. Equal
    psi give no pair. psi is the source's score and must lie in [0, 10], such as a win rate, a graded label or a
    rating; the gain is exponential in its unit, so rescaling the scores is another loss. Two responses are `dpo`
    times a constant of theirs.

    Addresses: all pairs of a ranking counting alike, the last places as much as the first.
    Reads: scores; sums over tokens; reference.
    Elsewhere: 2^psi of an unbounded reward overflows unnoticed; here scores out of range are a ValueError.
    Source: arXiv 2402.01878 Eq. 8 (LiPO-lambda); there psi in [0, 1] is the mean chance to win against the others.
    """
    s_GK = _scaled(lists, beta)
    return -(_lambdas(lists) * logsigmoid(s_GK[:, :, None] - s_GK[:, None, :])).sum((1, 2))


def lipo_weights(lists: ListLogps, *, beta: Positive = 0.05) -> Tensor:
    """beta [sum_j lambda_ij s(s_j - s_i) - sum_j lambda_ji s(s_i - s_j)], lambda the weights of the pairs."""
    s_GK = _scaled(lists, beta)
    pull_GKK = _lambdas(lists) * torch.sigmoid(s_GK[:, None, :] - s_GK[:, :, None])
    return beta * (pull_GKK.sum(2) - pull_GKK.sum(1))


def _lambdas(lists: ListLogps) -> Tensor:
    """[G, K, K] weight of "y_i above y_j", detached; 0 unless psi_i > psi_j, NaN where a score is missing."""
    psi_GK = lists.score.masked_fill(~lists.present, 0.0)
    wrong = (psi_GK < SCORES[0]) | (psi_GK > SCORES[1])
    if bool(wrong.any()):
        raise ValueError(
            f"lipo weighs by 2^score: scores must lie in [{SCORES[0]:g}, {SCORES[1]:g}], not {psi_GK[wrong][0]:g}; "
            f"rescale them (win rates, graded labels and ratings up to ten may stay as they are)"
        )
    gain_GK = torch.exp2(psi_GK)
    both_GKK = lists.present[:, :, None] & lists.present[:, None, :]
    return (relu(gain_GK[:, :, None] - gain_GK[:, None, :]) * _place_gaps(lists)).masked_fill(~both_GKK, 0.0)


def _place_gaps(lists: ListLogps) -> Tensor:
    """[G, K, K] mean of |1/D(k_i) - 1/D(k_j)| over all orders of the responses that tie in s."""
    s_GK = _scaled(lists, 1.0).detach()
    beside_GKK = lists.present[:, None, :] & (s_GK[:, None, :] == s_GK[:, :, None])
    above_GK = (lists.present[:, None, :] & (s_GK[:, None, :] > s_GK[:, :, None])).sum(-1)
    count_GK = beside_GKK.sum(-1).clamp(min=1)
    place = torch.arange(1, s_GK.shape[1] + 1, dtype=s_GK.dtype, device=s_GK.device)
    worth = 1 / torch.log1p(place)
    total, moment = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (worth, place * worth))
    end_GK = (above_GK + count_GK).clamp(max=s_GK.shape[1])  # beyond K only where absent, and masked by the caller
    sum_GK = total[end_GK] - total[above_GK]
    mean_GK = sum_GK / count_GK
    # a tie of m over the places a+1 .. a+m: sum over p < q of worth_p - worth_q is sum_p worth_p (m + 1 - 2 (p - a))
    spread_GK = (count_GK + 1 + 2 * above_GK) * sum_GK - 2 * (moment[end_GK] - moment[above_GK])
    within_GK = 2 * spread_GK / (count_GK * (count_GK - 1)).clamp(min=1)
    return torch.where(beside_GKK, within_GK[:, :, None], (mean_GK[:, :, None] - mean_GK[:, None, :]).abs())


# --- scores as soft labels -------------------------------------------------------------------------------------------


def exo_list(lists: ListLogps, *, beta: Positive = 0.1, beta_r: Positive = 0.1) -> Tensor:
    """L = sum_i p_i (log p_i - log q_i) = KL(p || q), p = softmax(s), q = softmax(psi / beta_r): seeks the mode.

    The reverse KL of the optimal policy, on the K responses drawn: the direction RL minimises, which would rather
    leave a good response out than keep a bad one. Settles at pi_ref e^(psi / (beta beta_r)). The gradient vanishes
    where p is nearly 0, so a list that is ranked quite wrongly is hardly moved.

    Addresses: the forward KL of DPO, which spreads a policy that cannot be optimal over what it should leave out.
    Reads: scores; sums over tokens; reference.
    Elsewhere: the paper's `beta_pi` is our beta.
    Source: arXiv 2402.00856 Section 3, its loss on rewards for K responses (Eq. 16 is the pair); beta = beta_r = 0.1
    of the authors' scripts.
    """
    log_p, log_q = _log_softmax(_scaled(lists, beta), lists), _log_softmax(lists.score / beta_r, lists)
    return (_softmax(_scaled(lists, beta), lists) * (log_p - log_q)).sum(-1)


def exo_list_weights(lists: ListLogps, *, beta: Positive = 0.1, beta_r: Positive = 0.1) -> Tensor:
    """beta p_i [L - (log p_i - log q_i)]: what is less likely than it should be, in proportion to how likely it is."""
    log_p, log_q = _log_softmax(_scaled(lists, beta), lists), _log_softmax(lists.score / beta_r, lists)
    p_GK, excess_GK = _softmax(_scaled(lists, beta), lists), log_p - log_q
    return beta * p_GK * ((p_GK * excess_GK).sum(-1, keepdim=True) - excess_GK)


def infonca(lists: ListLogps, *, beta: Positive = 0.01, alpha: Positive = 1.0) -> Tensor:
    """L = -sum_i q_i log softmax(s)_i, q = softmax(psi / alpha): cross-entropy to the scores, read as soft labels.

    alpha is the temperature of the scores: large, all responses are alike; towards 0 only the best counts, and two
    responses are `dpo`. The forward KL of `exo_list`, with its optimum pi_ref e^(psi / (alpha beta)).

    Addresses: scores of which `dpo` keeps only the order.
    Reads: scores; sums over tokens; reference.
    Elsewhere: the authors' code adds 0.01 to the first score and divides scores up to 10 by 1e-4, so that in effect
    only the first of the best responses counts. Here scores stay as they are, alpha = 1, and ties share.
    Source: arXiv 2402.05369 Table 1, InfoNCA on rewards (derived in Section 3); beta of the authors' configuration.
    """
    label_GK = _softmax(lists.score / alpha, lists)
    return -(label_GK * _log_softmax(_scaled(lists, beta), lists)).sum(-1)


def infonca_weights(lists: ListLogps, *, beta: Positive = 0.01, alpha: Positive = 1.0) -> Tensor:
    """beta (q_i - softmax(s)_i)."""
    return beta * (_softmax(lists.score / alpha, lists) - _softmax(_scaled(lists, beta), lists))


def nca_list(lists: ListLogps, *, beta: Positive = 0.01, alpha: Positive = 1.0) -> Tensor:
    """L = -sum_i [q_i log s(s_i) + (1/K) log s(-s_i)], q = softmax(psi / alpha): each response judged by itself.

    Policy is told from reference one response at a time, so log Z does not cancel: a response settles at
    s_i = log(K q_i), the better ones above the reference and the others below, instead of all falling together. K
    counts the responses that are there. alpha as in `infonca`.

    Addresses: likelihood displacement, the chosen response losing probability while its margin grows.
    Reads: scores; sums over tokens; reference.
    Elsewhere: as `infonca`; the authors' code takes the mean over K for the second term, which is the same.
    Source: arXiv 2402.05369 Table 1, NCA on rewards (derived in Section 4); beta of the authors' configuration.
    """
    s_GK, label_GK = _scaled(lists, beta), _softmax(lists.score / alpha, lists)
    return -(label_GK * logsigmoid(s_GK) + _uniform(lists, s_GK) * logsigmoid(-s_GK)).sum(-1)


def nca_list_weights(lists: ListLogps, *, beta: Positive = 0.01, alpha: Positive = 1.0) -> Tensor:
    """beta [q_i s(-s_i) - s(s_i) / K]."""
    s_GK, label_GK = _scaled(lists, beta), _softmax(lists.score / alpha, lists)
    return beta * (label_GK * torch.sigmoid(-s_GK) - _uniform(lists, s_GK) * torch.sigmoid(s_GK))


def nca_list_at_start() -> float:
    """2 ln 2, whatever K and the scores."""
    return 2 * math.log(2.0)


# --- shared ----------------------------------------------------------------------------------------------------------


def _scaled(lists: ListLogps, beta: float) -> Tensor:
    """s = beta log_ratio [G, K], 0 where absent."""
    return beta * lists.log_ratio.masked_fill(~lists.present, 0.0)


def _log_softmax(x_GK: Tensor, lists: ListLogps) -> Tensor:
    """[G, K] over the responses that are there; 0 where absent, for a probability of 0 to multiply."""
    absent = ~lists.present
    return x_GK.masked_fill(absent, -torch.inf).log_softmax(-1).masked_fill(absent, 0.0)


def _softmax(x_GK: Tensor, lists: ListLogps) -> Tensor:
    """[G, K] over the responses that are there, 0 where absent."""
    return x_GK.masked_fill(~lists.present, -torch.inf).softmax(-1)


def _uniform(lists: ListLogps, like: Tensor) -> Tensor:
    """[G, K] one over the responses that are there, 0 where absent."""
    return lists.present.to(like.dtype) / lists.present.sum(-1, keepdim=True)


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="plackett_luce",
        function=plackett_luce,
        weights=plackett_luce_weights,
        reward=dpo_reward,
        at_start=None,
        reads=ListLogps,
        learning_rate=1e-6,  # as dpo, its pair: arXiv 2305.18290 Appendix B
    ),
    Loss(
        name="lipo",
        function=lipo,
        weights=lipo_weights,
        reward=dpo_reward,
        at_start=None,
        reads=ListLogps,
        needs=frozenset({"reference", "scores"}),
        learning_rate=5e-7,  # as hinge, arXiv 2402.04792: its pairs are dpo's and the optimizer is blind to the scale
    ),
    Loss(
        name="exo_list",
        function=exo_list,
        weights=exo_list_weights,
        reward=dpo_reward,
        at_start=None,
        reads=ListLogps,
        needs=frozenset({"reference", "scores"}),
        learning_rate=1e-6,  # the authors' scripts
    ),
    Loss(
        name="infonca",
        function=infonca,
        weights=infonca_weights,
        reward=dpo_reward,
        at_start=None,
        reads=ListLogps,
        needs=frozenset({"reference", "scores"}),
        learning_rate=5e-7,  # as dpo with beta 0.01; the 5e-6 of the authors' configuration is for QLoRA
    ),
    Loss(
        name="nca_list",
        function=nca_list,
        weights=nca_list_weights,
        reward=dpo_reward,
        at_start=nca_list_at_start,
        reads=ListLogps,
        needs=frozenset({"reference", "scores"}),
        learning_rate=5e-7,  # as infonca
    ),
)
"""The losses above."""
