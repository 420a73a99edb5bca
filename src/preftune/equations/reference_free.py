"""Losses of a pair that need no reference: they read the policy's own log-probabilities. Notation as in `pairwise`.

    l_w, l_l = log pi(y|x), summed over the n completion tokens        p = l / n, the mean per token, nats

Nothing ties these policies to where they started but the data, the learning rate and, in some, a likelihood term.
No loss here has a constant at the start: its value there depends on the reference and the data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from preftune.equations.contract import Loss
from preftune.equations.divergences import power_log, power_log_slope
from preftune.equations.knobs import Finite, NonNegative, Positive, Unit
from preftune.tensors import PairLogps, ResponseLogps

__all__ = [
    "LOSSES",
    "MEAN_LOGP_LIMIT",
    "alphapo",
    "alphapo_reward",
    "alphapo_weights",
    "cpo",
    "cpo_reward",
    "cpo_weights",
    "log_odds",
    "nll",
    "nll_reward",
    "nll_weights",
    "orpo",
    "orpo_reward",
    "orpo_weights",
    "simpo",
    "simpo_reward",
    "simpo_weights",
    "slic_hf",
    "slic_hf_weights",
    "unlikelihood",
    "unlikelihood_reward",
    "unlikelihood_weights",
]


# --- means per token: SimPO, AlphaPO ---------------------------------------------------------------------------------


def simpo(pairs: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> Tensor:
    """L = -log s(beta p_w - beta p_l - gamma): DPO on mean log-probabilities, with a target margin.

    gamma is the margin asked for, inside the sigmoid and not multiplied by beta; what matters, and is tuned, is the
    ratio gamma/beta in nats per token: 0.5 here, 0.1 to 0.8 in the paper. beta is far larger than DPO's because it
    multiplies a mean, not a sum: 2 to 10.

    Addresses: length exploitation; a training objective that is not what decoding maximises; memory for a reference.
    Reads: means per token; no reference.
    Elsewhere: TRL's defaults beta 0.1, gamma 0.5 ask for 5 nats per token; turbo-alignment multiplies gamma by beta;
    HALOs logs rewards without beta. Here the paper's.
    Source: arXiv 2405.14734 Eq. 6.
    """
    return -logsigmoid(beta * (_mean(pairs)[0] - _mean(pairs)[1]) - gamma)


def simpo_weights(pairs: PairLogps, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-u) / n_w, w_r = beta s(-u) / n_l, u = beta p_w - beta p_l - gamma."""
    p_w, p_l = _mean(pairs)
    pull_T = beta * torch.sigmoid(gamma - beta * (p_w - p_l))
    return pull_T / pairs.chosen_length, pull_T / pairs.rejected_length


def simpo_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta p [R], Eq. 4 of the paper."""
    return beta * responses.policy / responses.length


def alphapo(pairs: PairLogps, *, beta: Positive = 2.5, gamma: NonNegative = 0.25, alpha: Finite = 0.25) -> Tensor:
    """L = -log s(r_w - r_l - gamma), r = beta (1 - e^(-alpha p)) / alpha: SimPO with a bent reward.

    alpha > 0 makes the reward steeper the less likely a response is, so a chosen one that falls is pulled back;
    alpha < 0 bends the other way, alpha = 0 is `simpo`. Only gamma/beta matters, as there.

    Addresses: falling chosen likelihood under SimPO; over-optimisation.
    Reads: means per token; no reference.
    Elsewhere: TRL raises e^l to the power -alpha, for sums of log-probabilities too, where e^l is 0 and the power
    infinite. Here expm1 of the mean, the exponent held below 40 (`divergences.EXPONENT_LIMIT`): at alpha 0.25 that is
    a mean of -160 nats per token.
    Source: arXiv 2501.03884 (alpha and beta of its Mistral-Instruct run, gamma/beta = 0.1 as in SimPO's).
    """
    p_w, p_l = _mean(pairs)
    return -logsigmoid(beta * (power_log(p_w, alpha) - power_log(p_l, alpha)) - gamma)


def alphapo_weights(
    pairs: PairLogps, *, beta: Positive = 2.5, gamma: NonNegative = 0.25, alpha: Finite = 0.25
) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-u) e^(-alpha p_w) / n_w, w_r the same in p_l and n_l, u = r_w - r_l - gamma."""
    p_w, p_l = _mean(pairs)
    pull_T = beta * torch.sigmoid(gamma - beta * (power_log(p_w, alpha) - power_log(p_l, alpha)))
    w_c, w_r = pull_T * power_log_slope(p_w, alpha), pull_T * power_log_slope(p_l, alpha)
    return w_c / pairs.chosen_length, w_r / pairs.rejected_length


def alphapo_reward(responses: ResponseLogps, *, beta: float, alpha: float) -> Tensor:
    """r^ = beta (1 - e^(-alpha p)) / alpha [R]."""
    return beta * power_log(responses.policy / responses.length, alpha)


# --- a preference term plus a likelihood term: NLL, CPO, SLiC-HF, ORPO -----------------------------------------------


def nll(pairs: PairLogps) -> Tensor:
    """L = -p_w: the negative log-likelihood of the chosen response, mean over its tokens.

    Supervised fine-tuning on chosen responses, and the term that RPO and MPO add to a preference loss. The mean is
    taken in each response by itself: every pair counts by its weight however long its responses are, and the value
    does not depend on which rows share a micro-batch.

    Addresses: falling chosen likelihood, when added to a preference loss.
    Reads: means per token, of the chosen response only; no reference.
    Elsewhere: TRL takes the mean over all tokens of the micro-batch, so long responses count more and the same step
    split otherwise is another step; NeMo and oat agree with this one.
    Source: arXiv 2404.19733 Eq. 1 (weight 1 beside DPO); arXiv 2405.16436.
    """
    return -_mean(pairs)[0]


def nll_weights(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """w_c = 1 / n_w, w_r = 0."""
    return 1 / pairs.chosen_length, torch.zeros_like(pairs.rejected)


def nll_reward(responses: ResponseLogps) -> Tensor:
    """r^ = p [R], nats per token."""
    return responses.policy / responses.length


def cpo(pairs: PairLogps, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0) -> Tensor:
    """L = -log s(beta (l_w - l_l)) - nll_weight p_w: DPO against a constant reference, plus `nll`.

    The sums of the first term carry DPO's length bias without a reference to take it off. nll_weight = 0 is DPO with
    pi_ref = 1 for every response.

    Addresses: memory for a reference; translations that are adequate but not the better of two.
    Reads: sums over tokens in the preference term, mean per token in the likelihood term; no reference.
    Elsewhere: the paper prints the sequence's log-likelihood; TRL takes the mean over the micro-batch's tokens,
    turbo-alignment the sum, and its `norm` flag brings the reference back. Here the mean in each sequence, see `nll`.
    Source: arXiv 2401.08417 Eq. 5, its preference term Eq. 3 (beta 0.1).
    """
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected)) + nll_weight * nll(pairs)


def cpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, nll_weight: NonNegative = 1.0) -> tuple[Tensor, Tensor]:
    """w_c = beta s(-z) + nll_weight / n_w, w_r = beta s(-z), z = beta (l_w - l_l)."""
    pull_T = beta * torch.sigmoid(-beta * (pairs.chosen - pairs.rejected))
    return pull_T + nll_weight / pairs.chosen_length, pull_T


def cpo_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta log pi [R]."""
    return beta * responses.policy


def slic_hf(pairs: PairLogps, *, delta: Positive = 1.0, nll_weight: NonNegative = 0.5) -> Tensor:
    """L = max(0, delta - l_w + l_l) - nll_weight l_w: a margin of delta nats, held by the likelihood of the target.

    Pairs ordered by less than delta are pushed, all equally hard; the others are only imitated. The likelihood term
    is a sum over tokens, as the margin is, so nll_weight compares like with like.

    Addresses: reward models and sampling of RLHF; drift of a pure ranking loss.
    Reads: sums over tokens in both terms; no reference.
    Elsewhere: the paper imitates a separate fine-tuning target or the best of its samples; a pair has neither, so the
    chosen response stands for it. TRL's and RSO's "SLiC" is `hinge`, on log-ratios and without the second term;
    turbo-alignment subtracts a constant margin in place of it; HALOs adds a per-sequence hinge [B] to a per-token
    likelihood [B, L], which broadcasts only by accident.
    Source: arXiv 2305.10425 Eq. 4 (the weight is ours).
    """
    return relu(delta - (pairs.chosen - pairs.rejected)) - nll_weight * pairs.chosen


def slic_hf_weights(pairs: PairLogps, *, delta: Positive = 1.0, nll_weight: NonNegative = 0.5) -> tuple[Tensor, Tensor]:
    """w_c = 1 + nll_weight, w_r = 1 where l_w - l_l < delta; nll_weight and 0 elsewhere."""
    pull_T = (delta - (pairs.chosen - pairs.rejected) > 0).to(pairs.chosen.dtype)
    return pull_T + nll_weight, pull_T


MEAN_LOGP_LIMIT = -1e-7
"""Odds are those of a mean log-probability of at most this, the last below 0 that float32 tells from certainty."""


def log_odds(p: Tensor) -> Tensor:
    """log(P / (1 - P)) = p - log(1 - e^p) of a mean token probability P = e^p; any shape.

    Singular at p = 0, so p is clamped to `MEAN_LOGP_LIMIT`, with no gradient beyond. There the gradient of p itself
    vanishes, which the model's softmax has rounded to certainty. log(1 - e^p) is log(-expm1 p) near 0, where 1 - e^p
    cancels, and log1p(-e^p) below -ln 2, where expm1 p is nearly -1.
    """
    p = p.clamp(max=MEAN_LOGP_LIMIT)
    return p - torch.where(p > -math.log(2.0), torch.log(-torch.expm1(p)), torch.log1p(-torch.exp(p)))


def orpo(pairs: PairLogps, *, odds_weight: NonNegative = 0.1) -> Tensor:
    """L = -p_w - odds_weight log s(o_w - o_l), o = log(P / (1 - P)), P = e^p: fine-tuning with an odds-ratio penalty.

    One stage in place of two: `nll` learns the chosen response, the log odds ratio pushes the rejected one down.
    odds_weight is the paper's lambda, 0 is `nll`. The gradient is singular as the rejected P tends to 1, see
    `log_odds`.

    Addresses: fine-tuning on chosen responses raises the rejected ones too; memory for a reference; a second stage.
    Reads: means per token; no reference.
    Elsewhere: one name, three likelihoods: the authors' code takes it over prompt and response unless told not to,
    TRL over prompt and completion, mean over the micro-batch, LLaMA-Factory over the completion. Here over completion
    tokens, `nll`. The first and the last form log(1 - e^p) naively, which is -inf near p = 0; turbo-alignment clamps
    1 - P at 1e-7.
    Source: arXiv 2403.07691 Eq. 6-7 (0.1: its Mistral run; 0.1 to 0.25).
    """
    p_w, p_l = _mean(pairs)
    return -p_w - odds_weight * logsigmoid(log_odds(p_w) - log_odds(p_l))


def orpo_weights(pairs: PairLogps, *, odds_weight: NonNegative = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = (1 + odds_weight s(-o) / (1 - P_w)) / n_w, w_r = odds_weight s(-o) / (1 - P_l) / n_l, o = o_w - o_l."""
    p_w, p_l = _mean(pairs)
    pull_T = odds_weight * torch.sigmoid(log_odds(p_l) - log_odds(p_w))
    w_c, w_r = 1 + pull_T * _log_odds_slope(p_w), pull_T * _log_odds_slope(p_l)
    return w_c / pairs.chosen_length, w_r / pairs.rejected_length


def orpo_reward(responses: ResponseLogps) -> Tensor:
    """r^ = log(P / (1 - P)) [R]: the loss compares log odds; TRL logs its weight times l or p."""
    return log_odds(responses.policy / responses.length)


def _log_odds_slope(p: Tensor) -> Tensor:
    """d log_odds / dp = 1 / (1 - e^p), and 0 beyond the limit."""
    slope = -1 / torch.expm1(p.clamp(max=MEAN_LOGP_LIMIT))
    return torch.where(p <= MEAN_LOGP_LIMIT, slope, torch.zeros_like(slope))


# --- a baseline ------------------------------------------------------------------------------------------------------


def unlikelihood(pairs: PairLogps, *, alpha: Unit = 0.5) -> Tensor:
    """L = -l_w + alpha l_l: raise the chosen response, lower the rejected one.

    The baseline of the DPO paper, and the reason for DPO's weight s(-z): here the push never ends. The loss is
    unbounded below, its gradient the same however low the rejected response has fallen, and text degenerates.
    alpha = 0 is fine-tuning on chosen responses (sums over tokens).

    Addresses: nothing that another loss does not do better; it is here to be compared with.
    Reads: sums over tokens; no reference.
    Source: arXiv 2305.18290 Section 6, in words and without a formula, alpha in [0, 1] (the middle is ours).
    """
    return -pairs.chosen + alpha * pairs.rejected


def unlikelihood_weights(pairs: PairLogps, *, alpha: Unit = 0.5) -> tuple[Tensor, Tensor]:
    """w_c = 1, w_r = alpha, wherever the pair stands."""
    return torch.ones_like(pairs.chosen), torch.full_like(pairs.rejected, alpha)


def unlikelihood_reward(responses: ResponseLogps) -> Tensor:
    """r^ = log pi [R]; `slic_hf`'s too."""
    return responses.policy


# --- shared ----------------------------------------------------------------------------------------------------------


def _mean(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """p_w, p_l [T], nats per token."""
    return pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="simpo",
        function=simpo,
        weights=simpo_weights,
        reward=simpo_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=5e-7,  # the authors' repository: 3e-7 to 1e-6 by model, incoherent text at 1e-5
    ),
    Loss(
        name="alphapo",
        function=alphapo,
        weights=alphapo_weights,
        reward=alphapo_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=7e-7,  # arXiv 2501.03884, the Mistral-Instruct run the knobs are from
    ),
    Loss(
        name="nll",
        function=nll,
        weights=nll_weights,
        reward=nll_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=5e-6,  # supervised fine-tuning of 8B in arXiv 2411.15124; beside another loss take that one's
    ),
    Loss(
        name="cpo",
        function=cpo,
        weights=cpo_weights,
        reward=cpo_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=5e-7,  # as simpo; the 1e-4 of arXiv 2401.08417 is for adapters
    ),
    Loss(
        name="slic_hf",
        function=slic_hf,
        weights=slic_hf_weights,
        reward=unlikelihood_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=5e-7,  # as hinge: arXiv 2402.04792
    ),
    Loss(
        name="orpo",
        function=orpo,
        weights=orpo_weights,
        reward=orpo_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=5e-6,  # arXiv 2403.07691, the Mistral run (8e-6 for its smaller models)
    ),
    Loss(
        name="unlikelihood",
        function=unlikelihood,
        weights=unlikelihood_weights,
        reward=unlikelihood_reward,
        at_start=None,
        needs=frozenset(),
        learning_rate=1e-6,  # as dpo, whose paper has it as a baseline; stop early
    ),
)
"""The losses above."""
