"""Losses that read the same gap as DPO through another shape, offset or weight. Notation as in `pairwise`.

The gap D = a - b meets another curve (`exo`, `discopop`), a head start that lengths or scores give (`rdpo`, `odpo`,
`margin_dpo`), or a term that also looks at one response alone (`dpop`, `xpo`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from preftune.equations.contract import Loss, Need
from preftune.equations.knobs import NonNegative, OpenSmoothing, Positive, Share
from preftune.equations.pairwise import dpo_reward, logistic_at_start
from preftune.errors import DataError
from preftune.tensors import PairLogps

__all__ = [
    "LOSSES",
    "discopop",
    "discopop_at_start",
    "discopop_weights",
    "dpop",
    "dpop_weights",
    "exo",
    "exo_at_start",
    "exo_weights",
    "margin_dpo",
    "margin_dpo_weights",
    "odpo",
    "odpo_weights",
    "rdpo",
    "rdpo_weights",
    "xpo",
    "xpo_weights",
]


# --- another curve ---------------------------------------------------------------------------------------------------


def exo(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: OpenSmoothing = 1e-3) -> Tensor:
    """L = q log(q/(1 - e)) + (1 - q) log((1 - q)/e), q = s(z): KL from the model's choice to the smoothed label.

    e = `label_smoothing` keeps the KL finite, and it settles at q = 1 - e. DPO is the KL the other way round, which
    covers every label; this one seeks the mode. Not convex: the pull, beta q (1 - q) [logit(1 - e) - z], vanishes
    for pairs that are ranked very wrongly as well, so these are given up rather than repaired.

    Addresses: probability spread over all that the labels allow instead of gathered where they agree.
    Reads: log-ratios summed over tokens.
    Elsewhere: the authors' code has log e = -10 and log(1 - e) = 0; some tools refuse e = 0, one turns it into 1e-3
    without a word. Here e is the knob, strictly between 0 and 1/2, and both logarithms are those of one e.
    Source: arXiv 2402.00856 Eq. 16 (two responses; e of its Section 5).
    """
    z = _margin(pairs, beta)
    to_label = logsigmoid(z) - math.log1p(-label_smoothing)
    return torch.sigmoid(z) * to_label + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(label_smoothing))


def exo_weights(
    pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: OpenSmoothing = 1e-3
) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta q (1 - q) [logit(1 - e) - z]."""
    z = _margin(pairs, beta)
    target = math.log1p(-label_smoothing) - math.log(label_smoothing)
    weight_T = beta * torch.sigmoid(z) * torch.sigmoid(-z) * (target - z)
    return weight_T, weight_T


def exo_at_start(*, label_smoothing: float) -> float:
    """-ln 2 - ln(e (1 - e)) / 2."""
    return -math.log(2.0) - (math.log(label_smoothing) + math.log1p(-label_smoothing)) / 2


def discopop(pairs: PairLogps, *, beta: Positive = 0.05, tau: Share = 0.05) -> Tensor:
    """L = -(1 - m) log s(z) + m exp(-z), m = s(z / tau): logistic where the pair is wrong, exponential where right.

    A curve found by a language model's search, not derived. tau is how sharply one half gives way to the other.
    Not monotone at tau = 0.05: a minimum at z = -0.1186 and a maximum at z = +0.0720, so a fresh policy (z = 0) is
    pulled the wrong way, and a pair that is not carried past the maximum by its neighbours settles on the wrong side.

    Addresses: nothing by design; it was selected for the quality of what it trained.
    Reads: log-ratios summed over tokens.
    Elsewhere: the first release took m = s(D), tau tied to beta; the curve is of z / tau. exp(-z) and s(z / tau) as
    two factors overflow; here their logarithms are added first. tau > 1 is refused: the loss would grow like exp(-z).
    Source: arXiv 2406.08414 Eq. 5 of v3 (the log-ratio modulated loss, with this tau).
    """
    z = _margin(pairs, beta)
    return torch.exp(logsigmoid(z / tau) - z) - torch.sigmoid(-z / tau) * logsigmoid(z)


def discopop_weights(pairs: PairLogps, *, beta: Positive = 0.05, tau: Share = 0.05) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta [(1 - m) s(-z) - m (1 - m) log s(z) / tau + exp(-z) m (1 - (1 - m) / tau)]: of both signs."""
    z = _margin(pairs, beta)
    m, rest = torch.sigmoid(z / tau), torch.sigmoid(-z / tau)
    right = torch.exp(logsigmoid(z / tau) - z) * (1 - rest / tau)
    weight_T = beta * (rest * (torch.sigmoid(-z) - m * logsigmoid(z) / tau) + right)
    return weight_T, weight_T


def discopop_at_start() -> float:
    """(ln 2 + 1) / 2."""
    return (math.log(2.0) + 1) / 2


# --- a head start ----------------------------------------------------------------------------------------------------


def rdpo(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.05) -> Tensor:
    """L = -log s(z + alpha (n_w - n_l)): labels are explained by the policy's reward plus alpha per token.

    alpha is the reward, in nats per token, that the labeller pays for length alone and that the policy is not to
    learn: the optimum is that of the reward r - alpha |y|. A longer winner needs less margin and is pulled less, a
    shorter one more. alpha = 0 is `dpo`.

    Addresses: length exploitation, answers that grow because the chosen ones of the data are longer.
    Reads: log-ratios summed over tokens; both lengths.
    Elsewhere: written as a penalty on the reward it invites the opposite sign, which would reward length; the length
    enters with plus because it moves from the policy's reward to the labeller's. Some code adds (alpha / beta)
    (n_w - n_l) to D: the same.
    Source: arXiv 2403.19159 Eq. 9.
    """
    return -logsigmoid(_margin(pairs, beta) + alpha * (pairs.chosen_length - pairs.rejected_length))


def rdpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.05) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta s(-z - alpha (n_w - n_l))."""
    head_start = alpha * (pairs.rejected_length - pairs.chosen_length)
    weight_T = beta * torch.sigmoid(head_start - _margin(pairs, beta))
    return weight_T, weight_T


def odpo(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """L = -log s(z - alpha log g), g = the scores' gap: how much better asks for how much more margin.

    alpha scales the offset. A gap below 1 makes the offset negative: the margin asked for is then below zero, so the
    unit of the scores matters. In the limit g -> 0 the loss is 0: a tie asks for nothing, and neither does a pair
    whose scores contradict its label; both are read as g = 0. alpha = 0 is `dpo`, for these too.

    Addresses: clear and marginal preferences pulled alike.
    Reads: log-ratios summed over tokens; the scores of both responses.
    Elsewhere: the logarithm as it stands is -inf at a tie and NaN below, and the step is lost; here the limit is
    taken, so such pairs weigh nothing. An offset cut at zero would turn every pair of scores in [0, 1] into `dpo`.
    Source: arXiv 2402.10571 Eq. 7c (Findings of ACL 2024; alpha f(gap), f = log; alpha of the authors' code).
    """
    return -logsigmoid(_margin(pairs, beta) - torch.xlogy(alpha, relu(_score_gap(pairs))))


def odpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta s(alpha log g - z): 0 for a tie."""
    weight_T = beta * torch.sigmoid(torch.xlogy(alpha, relu(_score_gap(pairs))) - _margin(pairs, beta))
    return weight_T, weight_T


def margin_dpo(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """L = -log s(z - alpha g), g = the scores' gap: the margin of reward models, asked of the implicit reward.

    alpha is in nats per point of score; a gap of grades (0 to 3, say) gives Llama 2's margins. If the scores are the
    rewards in nats by which labels are drawn, the optimum is that of beta / (1 + alpha): the policy goes further
    than the reward says. Ties are `dpo`, and so is alpha = 0; scores that contradict the label lower the margin.

    Addresses: clear and marginal preferences pulled alike.
    Reads: log-ratios summed over tokens; the scores of both responses.
    Elsewhere: the margin comes from reward modelling; tools that offer it for DPO differ in whether beta multiplies
    it. Here it does not, so its unit is that of the reward.
    Source: arXiv 2307.09288 Eq. 2 (for a reward model), in the offset form of arXiv 2402.10571 Eq. 7c.
    """
    return -logsigmoid(_margin(pairs, beta) - alpha * _score_gap(pairs))


def margin_dpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta s(alpha g - z)."""
    weight_T = beta * torch.sigmoid(alpha * _score_gap(pairs) - _margin(pairs, beta))
    return weight_T, weight_T


# --- a term that looks at one response -------------------------------------------------------------------------------


def dpop(pairs: PairLogps, *, beta: Positive = 0.3, penalty: NonNegative = 50.0) -> Tensor:
    """L = -log s(beta (D - penalty max(0, -a))): a chosen response below its reference costs `penalty` times that.

    Where a >= 0 this is `dpo`; below, chosen is pulled 1 + penalty times as hard as rejected is pushed. The penalty
    stands inside the sigmoid, so s(-u) gates it too. penalty = 0 is `dpo`.

    Addresses: likelihood displacement, chosen log-probs that fall with the rejected ones, above all where the two
    responses differ in few tokens.
    Reads: log-ratios summed over tokens, the chosen one also alone.
    Elsewhere: some tools default to a penalty of 0.1 or 0, which is hardly or not this loss.
    Source: arXiv 2402.13228 Eq. 3.
    """
    below = relu(-pairs.chosen_log_ratio)
    return -logsigmoid(_margin(pairs, beta) - beta * penalty * below)


def dpop_weights(pairs: PairLogps, *, beta: Positive = 0.3, penalty: NonNegative = 50.0) -> tuple[Tensor, Tensor]:
    """w_r = beta s(-u), w_c = w_r (1 + penalty [a < 0]), u = beta (D - penalty max(0, -a))."""
    a = pairs.chosen_log_ratio
    pull_T = beta * torch.sigmoid(beta * penalty * relu(-a) - _margin(pairs, beta))
    return pull_T * (1 + penalty * (a < 0).to(a.dtype)), pull_T


def xpo(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1e-5) -> Tensor:
    """L = -log s(z) + alpha (a + b) / 2: DPO that also lowers the log-probs of what the reference writes.

    alpha is the optimism: probability taken from the reference's responses goes to what has not been tried. In
    expectation over the reference the term is -alpha KL(pi_ref || pi). Meant for online rounds; alpha = 0 is `dpo`.

    Addresses: too little exploration, a policy that never leaves what the reference would write.
    Reads: log-ratios summed over tokens, of both responses alone too; both must be samples of the reference.
    Elsewhere: the paper draws one response of a pair from the policy, one from the reference, and adds alpha log pi
    of the latter; a row does not say which is which, so both must come from the reference and the term is the mean
    over both. log-ratios differ from log-probs by a constant, which keeps the value at the start at ln 2.
    Source: arXiv 2405.21046 Algorithm 1, step 6.
    """
    optimism = alpha * (pairs.chosen_log_ratio + pairs.rejected_log_ratio) / 2
    return optimism - logsigmoid(_margin(pairs, beta))


def xpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 1e-5) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-z) - alpha / 2, w_r = beta s(-z) + alpha / 2."""
    pull_T = beta * torch.sigmoid(-_margin(pairs, beta))
    return pull_T - alpha / 2, pull_T + alpha / 2


# --- shared ----------------------------------------------------------------------------------------------------------


def _margin(pairs: PairLogps, beta: float) -> Tensor:
    """z = beta (a - b) [T]."""
    return beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)


def _score_gap(pairs: PairLogps) -> Tensor:
    """g [T]; NaN, so that the step is refused by row, where the source has no score."""
    if pairs.score_gap is None:
        raise DataError(
            "this loss reads the scores of both responses and these pairs carry none: "
            "give data with scores, or choose a loss that needs none (dpo)"
        )
    return pairs.score_gap


# --- the table -------------------------------------------------------------------------------------------------------

_SCORED: frozenset[Need] = frozenset({"reference", "scores"})

LOSSES = (
    Loss(
        name="exo",
        function=exo,
        weights=exo_weights,
        reward=dpo_reward,
        at_start=exo_at_start,
        learning_rate=1e-6,  # arXiv 2402.00856, batch 64
    ),
    Loss(
        name="discopop",
        function=discopop,
        weights=discopop_weights,
        reward=dpo_reward,
        at_start=discopop_at_start,
        learning_rate=5e-7,  # arXiv 2406.08414, batch 64
    ),
    Loss(
        name="rdpo",
        function=rdpo,
        weights=rdpo_weights,
        reward=dpo_reward,
        at_start=None,
        learning_rate=5e-7,  # as cdpo: a logistic loss of a margin of the same scale
    ),
    Loss(
        name="odpo",
        function=odpo,
        weights=odpo_weights,
        reward=dpo_reward,
        at_start=None,
        needs=_SCORED,
        learning_rate=5e-7,  # as rdpo
    ),
    Loss(
        name="margin_dpo",
        function=margin_dpo,
        weights=margin_dpo_weights,
        reward=dpo_reward,
        at_start=None,
        needs=_SCORED,
        learning_rate=5e-7,  # as rdpo
    ),
    Loss(
        name="dpop",
        function=dpop,
        weights=dpop_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        learning_rate=5e-7,  # as rdpo, although a chosen response below its reference pulls 51 times as hard
    ),
    Loss(
        name="xpo",
        function=xpo,
        weights=xpo_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        learning_rate=5e-7,  # online DPO, arXiv 2402.04792
    ),
)
"""The losses above."""
