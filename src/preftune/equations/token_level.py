"""Losses that look inside a response: at single tokens or at whole next-token distributions. Notation of `pairwise`.

    K_w, K_l   sum over t of KL(pi_ref(.|x, y<t) || pi(.|x, y<t)) along y_w and y_l, nats    (see models/distributions)
    A_w, A_l   mean over t of log pi(y_t) - log sum_v pi(v)^2, nats, a constant of the gradient
    a', b'     the part of a and b on the first min(n_w, n_l) tokens of either response
    sg()       the value without its gradient

The weights beside a loss are those of log pi(y|x); what else it pulls at, K in TDPO, stands in its docstring.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.equations.contract import Loss
from preftune.equations.knobs import NonNegative, Positive, Unit
from preftune.equations.pairwise import dpo, dpo_reward, dpo_weights, logistic_at_start
from preftune.tensors import PairLogps

__all__ = [
    "LOSSES",
    "ld_dpo",
    "ld_dpo_weights",
    "tdpo1",
    "tdpo1_weights",
    "tdpo2",
    "tdpo2_weights",
    "wpo",
    "wpo_weights",
]


# --- TDPO: divergences of whole distributions ------------------------------------------------------------------------


def tdpo1(pairs: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = -log s(beta (D - (K_l - K_w))): DPO on an advantage that also counts how far pi has left pi_ref on the way.

    dL/dK_w = -dL/dK_l = -beta s(-u), u the argument of s: the policy is driven away from the reference along the
    chosen response and held to it along the rejected one. Where both responses are one token, K_w = K_l: `dpo`.

    Addresses: divergence that grows faster along rejected than along chosen responses.
    Reads: sums over tokens; reference, as whole distributions: no cache of log-probs can serve it.
    Elsewhere: the authors' code logs beta (a + K) as reward; here it is beta a, as in DPO. It also takes the log of
        a softmax, which is NaN where a probability underflows; here no probability is ever taken the log of.
    Source: arXiv 2404.11999 Eq. 15 of v5, TDPO_1 (the procedure is Algorithm 1).
    """
    K_w, K_l = _divergences(pairs)
    return -logsigmoid(beta * (_gap(pairs) - (K_l - K_w)))


def tdpo1_weights(pairs: PairLogps, *, beta: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta s(-u), u = beta (D - (K_l - K_w))."""
    K_w, K_l = _divergences(pairs)
    weight_T = beta * torch.sigmoid(-beta * (_gap(pairs) - (K_l - K_w)))
    return weight_T, weight_T


def tdpo2(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.5) -> Tensor:
    """L = -log s(beta (D - alpha (K_l - sg(K_w)))): TDPO1 that does not reward divergence along the chosen response.

    alpha weighs the divergence: 0 is `dpo`, and at 1 the value, but not the gradient, is that of `tdpo1`.
    dL/dK_l = alpha beta s(-u) pulls pi to pi_ref along rejected responses; dL/dK_w = 0, for sg stops it.

    Addresses: divergence from the reference that grows with training, rejected responses first.
    Reads: sums over tokens; reference, as whole distributions: no cache of log-probs can serve it.
    Elsewhere: the authors' function is TDPO2 by default, their configuration TDPO1; here each has its own name. For
        logged rewards and underflow see `tdpo1`.
    Source: arXiv 2404.11999 Eq. 17-18 of v5, TDPO_2 (the procedure is Algorithm 1; alpha, beta of its experiments).
    """
    K_w, K_l = _divergences(pairs)
    return -logsigmoid(beta * (_gap(pairs) - alpha * (K_l - K_w.detach())))


def tdpo2_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: NonNegative = 0.5) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta s(-u), u = beta (D - alpha (K_l - K_w))."""
    K_w, K_l = _divergences(pairs)
    weight_T = beta * torch.sigmoid(-beta * (_gap(pairs) - alpha * (K_l - K_w)))
    return weight_T, weight_T


# --- WPO: how much a pair looks like the policy's own ----------------------------------------------------------------


def wpo(pairs: PairLogps, *, beta: Positive = 0.01) -> Tensor:
    """L = -v log s(z), v = min(1, exp(A_w + A_l)): DPO in which pairs count as much as pi would write them.

    v is a constant of the gradient, 1 where tokens are as likely as sampled ones are, and small for a pair that pi
    would not produce; a policy that is uniform at every token has v = 1, and the loss is `dpo`.

    Addresses: off-policy data, pairs written by other models.
    Reads: sums over tokens; reference; the policy's whole distributions, as means per token.
    Elsewhere: the equation has no bound; the authors' code clamps the product at 1, not its factors, and so do we;
        TRL does not, so greedy text counts more than sampled text. One implementation has no sum over v, keeps
        the gradient of v, and sums over tokens where it should average: weights of e^-100 and less.
    Source: arXiv 2406.11827 Eq. 2 with the sampled alignment, the paper's default; beta of its experiments.
    """
    return _likeness(pairs) * dpo(pairs, beta=beta)


def wpo_weights(pairs: PairLogps, *, beta: Positive = 0.01) -> tuple[Tensor, Tensor]:
    """w_c = w_r = v beta s(-z)."""
    weight_T = _likeness(pairs) * dpo_weights(pairs, beta=beta)[0]
    return weight_T, weight_T


# --- LD-DPO: tokens that only the longer response has ----------------------------------------------------------------


def ld_dpo(pairs: PairLogps, *, beta: Positive = 0.1, alpha: Unit = 0.5) -> Tensor:
    """L = -log s(beta ([a' + alpha (a - a')] - [b' + alpha (b - b')])): what only the longer one says counts alpha.

    alpha = 1 is `dpo`, as are responses of one length; at 0 nothing after the shorter one's end matters. The shorter
    response is whole either way: a' = a where n_w <= n_l.

    Addresses: length exploitation: a longer response has more log-ratio to win or lose.
    Reads: sums over tokens and over the first min(n_w, n_l) of them; reference.
    Elsewhere: one tool discounts the policy only: then pi = pi_ref is not L = ln 2, and half of the pairs begin
        saturated. Here log-ratios of single tokens are discounted, so policy and reference alike. The reward is that
        of DPO: a discounted one would depend on the response's partner.
    Source: arXiv 2409.06411 Eq. 10 (the modified likelihood), in DPO's loss.
    """
    return -logsigmoid(beta * _discounted_gap(pairs, alpha))


def ld_dpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, alpha: Unit = 0.5) -> tuple[Tensor, Tensor]:
    """w_c = w_r = alpha beta s(-u) for tokens beyond the first min(n_w, n_l); the shared ones have beta s(-u)."""
    weight_T = alpha * beta * torch.sigmoid(-beta * _discounted_gap(pairs, alpha))
    return weight_T, weight_T


# --- shared ----------------------------------------------------------------------------------------------------------


def _gap(pairs: PairLogps) -> Tensor:
    """D = a - b [T]."""
    return pairs.chosen_log_ratio - pairs.rejected_log_ratio


def _divergences(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """(K_w, K_l) [T]."""
    return _asked_for("divergence", pairs.chosen_divergence, pairs.rejected_divergence)


def _likeness(pairs: PairLogps) -> Tensor:
    """v [T]; bounded before the exponential, which so never overflows."""
    A_w, A_l = _asked_for("alignment", pairs.chosen_alignment, pairs.rejected_alignment)
    return (A_w + A_l).detach().clamp(max=0.0).exp()


def _discounted_gap(pairs: PairLogps, alpha: float) -> Tensor:
    """alpha D + (1 - alpha) (a' - b') [T]."""
    shared_w, shared_l = _asked_for("tokens", pairs.chosen_shared_log_ratio, pairs.rejected_shared_log_ratio)
    return alpha * _gap(pairs) + (1 - alpha) * (shared_w - shared_l)


def _asked_for(need: str, chosen: Tensor | None, rejected: Tensor | None) -> tuple[Tensor, Tensor]:
    if chosen is None or rejected is None:
        raise ValueError(f"these pairs have no {need}: a loss whose `needs` name it must be given it when scoring")
    return chosen, rejected


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="tdpo1",
        function=tdpo1,
        weights=tdpo1_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        needs=frozenset({"reference", "divergence"}),
        learning_rate=1e-6,  # as dpo, whose first step it shares; the authors' configuration has 5e-6 (RMSprop, 2.8B)
    ),
    Loss(
        name="tdpo2",
        function=tdpo2,
        weights=tdpo2_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        needs=frozenset({"reference", "divergence"}),
        learning_rate=1e-6,  # as tdpo1
    ),
    Loss(
        name="wpo",
        function=wpo,
        weights=wpo_weights,
        reward=dpo_reward,
        at_start=None,
        needs=frozenset({"reference", "alignment"}),
        learning_rate=1e-6,  # the card of the authors' Llama3-Instruct-8B-WPO-HB-v2 (AdamW, batch 128, cosine)
    ),
    Loss(
        name="ld_dpo",
        function=ld_dpo,
        weights=ld_dpo_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        needs=frozenset({"reference", "tokens"}),
        learning_rate=1e-6,  # as dpo, which it is on responses of one length
    ),
)
"""The losses above."""
