"""Losses of a pair that read the log-ratios of policy to reference: DPO and its nearest kin.

    x        prompt                       y_w, y_l   chosen and rejected response
    n_w, n_l completion tokens, end-of-sequence included
    a = log pi(y_w|x) - log pi_ref(y_w|x)            b = the same for y_l        (nats, summed over tokens)
    D = a - b                                        z = beta D                  s() = logistic sigmoid

Every loss maps `PairLogps` to one value per pair, [T] in nats, differentiable, of the dtype of its input; it never
reads the pairs' weight and never mixes pairs. Its keyword arguments are exactly its knobs.

Every loss has its gradient weights beside it, `..._weights(...) -> (w_c [T], w_r [T])`:

    -grad L = w_c grad log pi(y_w|x) - w_r grad log pi(y_l|x),   w_c = -dL/d log pi(y_w|x),   w_r = +dL/d log pi(y_l|x)

and its value where policy and reference agree (a = b = 0), `..._at_start(...)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from preftune.equations.contract import Loss
from preftune.equations.knobs import Positive, Smoothing
from preftune.tensors import PairLogps, ResponseLogps

__all__ = [
    "LOSSES",
    "cdpo",
    "cdpo_weights",
    "dpo",
    "dpo_loss",
    "dpo_reward",
    "dpo_weights",
    "hinge",
    "hinge_at_start",
    "hinge_weights",
    "implicit_reward",
    "ipo",
    "ipo_at_start",
    "ipo_average",
    "ipo_average_reward",
    "ipo_average_weights",
    "ipo_reward",
    "ipo_weights",
    "logistic_at_start",
    "robust",
    "robust_weights",
]


# --- DPO -------------------------------------------------------------------------------------------------------------


def dpo(pairs: PairLogps, *, beta: Positive = 0.1) -> Tensor:
    """L = -log s(z): the label's negative log-likelihood if pi were optimal for its implicit reward.

    beta is the strength of the KL penalty towards the reference in the RL problem that DPO solves; in the loss it
    only scales the margin, so it fixes the end point when labels are drawn from Bradley-Terry, and merely the speed
    when every comparison has one certain outcome: then stop early, or take a loss that settles.

    Addresses: a reward model, a value function and sampling, all of which RL from preferences needs and this does not.
    Reads: log-ratios summed over tokens.
    Elsewhere: logits, and sums of log-probs, kept in bf16 by some tools turn most small differences into exactly 0;
    the usual accuracy counts a tie as wrong, so a fresh policy has accuracy 0. Here sums are float32 or better, and a
    tie counts one half. Appendix A.4 of the paper prints the weight's sigmoid with the opposite sign.
    Source: arXiv 2305.18290 Eq. 7 (defaults of its Appendix B).
    """
    return -logsigmoid(beta * _gap(pairs))


def dpo_weights(pairs: PairLogps, *, beta: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta s(-z), in (0, beta): largest where the implicit reward ranks the pair wrongly.

    Section 4 of the paper; its Appendix A.4 (Eq. 21-22) prints the sigmoid's argument with the opposite sign.
    """
    weight_T = beta * torch.sigmoid(-beta * _gap(pairs))
    return weight_T, weight_T


def logistic_at_start() -> float:
    """ln 2, for `dpo`, `cdpo` and `robust` whatever their knobs."""
    return math.log(2.0)


def dpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """DPO over B responses and T pairs of positions into them: (losses [T], rewards [B], detached), nats.

    K answers to one prompt cost K log-probabilities, not K(K-1); a response in several pairs receives the sum of
    their gradients. `pi_logps`, `ref_logps`: [B] summed over completion tokens; `yw_idxs`, `yl_idxs`: [T] integers
    in [0, B), T = 0 allowed. Raises ValueError on another index, on a pair of a response with itself, on shapes
    that do not match. Source: arXiv 2305.18290, the listing of Appendix B.

        >>> dpo_loss(pi_logps, ref_logps, torch.tensor([0, 0]), torch.tensor([1, 2]), beta=0.1)
    """
    if pi_logps.ndim != 1 or pi_logps.shape != ref_logps.shape:
        raise ValueError(f"pi_logps and ref_logps must both be [B], not {[*pi_logps.shape]} and {[*ref_logps.shape]}")
    _check_index_pairs(yw_idxs, yl_idxs, len(pi_logps))
    log_ratios = pi_logps - ref_logps
    losses = -logsigmoid(beta * (log_ratios[yw_idxs.long()] - log_ratios[yl_idxs.long()]))
    return losses, implicit_reward(log_ratios, beta=beta)


def implicit_reward(log_ratio: Tensor, *, beta: float) -> Tensor:
    """r^ = beta log(pi / pi_ref), detached, nats: the reward up to beta log Z(x), which no pair can identify.

    Any shape. Comparable between responses to one prompt only. Source: arXiv 2305.18290 Eq. 5.
    """
    return beta * log_ratio.detach()


def dpo_reward(responses: ResponseLogps, *, beta: float) -> Tensor:
    """r^ = beta log(pi / pi_ref) [R]."""
    return implicit_reward(responses.log_ratio, beta=beta)


# --- labels that may be flipped --------------------------------------------------------------------------------------


def cdpo(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> Tensor:
    """L = -(1 - e) log s(z) - e log s(-z), e = `label_smoothing`: cross-entropy to a label that is right with 1 - e.

    Conservative DPO: settles at s(z) = 1 - e instead of pushing for ever, and pulls back a pair that went beyond;
    e = 0 is `dpo`.

    Addresses: wrong labels, and the overconfidence that labels which always agree teach.
    Reads: log-ratios summed over tokens.
    Elsewhere: at least one well-known trainer accepts `label_smoothing` and ignores it for this loss, without a word.
    Here `dpo` has no such knob and refuses it; this loss has.
    Source: Mitchell, "A note on DPO with noisy preferences", 2023 (ericmitchell.ai/cdpo.pdf), Eq. 3.
    """
    z = beta * _gap(pairs)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def cdpo_weights(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta [(1 - e) - s(z)]: negative beyond the target, where the pair is pulled back."""
    weight_T = beta * ((1 - label_smoothing) - torch.sigmoid(beta * _gap(pairs)))
    return weight_T, weight_T


def robust(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1) -> Tensor:
    """L = [-(1 - e) log s(z) + e log s(-z)] / (1 - 2e): its mean over labels flipped at rate e is DPO's clean loss.

    Robust DPO. Unbounded below: its slope tends to -beta e / (1 - 2e) instead of 0, so it never settles and needs
    early stopping; e = 0 is `dpo`.

    Addresses: labels flipped at a known rate: on average the gradient is that of clean labels.
    Reads: log-ratios summed over tokens.
    Source: arXiv 2403.00409 Section 3.1 (e of its Section 6).
    """
    z = beta * _gap(pairs)
    return (label_smoothing * logsigmoid(-z) - (1 - label_smoothing) * logsigmoid(z)) / (1 - 2 * label_smoothing)


def robust_weights(
    pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1
) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta [(1 - e) s(-z) + e s(z)] / (1 - 2e)."""
    z = beta * _gap(pairs)
    mixed_T = (1 - label_smoothing) * torch.sigmoid(-z) + label_smoothing * torch.sigmoid(z)
    weight_T = beta * mixed_T / (1 - 2 * label_smoothing)
    return weight_T, weight_T


# --- IPO -------------------------------------------------------------------------------------------------------------


def ipo(pairs: PairLogps, *, tau: Positive = 0.1) -> Tensor:
    """L = (D - 1/(2 tau))^2: a finite margin, 1/(2 tau) nats, even where every label is certain.

    tau is the strength of the KL penalty. It does not assume that preferences come from a reward. Values are large,
    25 at the start: read margins, not the loss.

    Addresses: labels that agree every time, with which `dpo` forgets its reference.
    Reads: log-ratios summed over tokens.
    Elsewhere: pi(y|x) is the probability of the whole response, so D sums over tokens, as the paper writes it and
    half of the tools do; the others average, which is `ipo_average`. Some write (beta D - 1/2)^2, the same minimiser
    under a gradient beta^2 times as large.
    Source: arXiv 2310.12036 Eq. 17.
    """
    return (_gap(pairs) - 1 / (2 * tau)) ** 2


def ipo_weights(pairs: PairLogps, *, tau: Positive = 0.1) -> tuple[Tensor, Tensor]:
    """w_c = w_r = 2 (1/(2 tau) - D): linear, unbounded, negative beyond the target."""
    weight_T = 2 * (1 / (2 * tau) - _gap(pairs))
    return weight_T, weight_T


def ipo_at_start(*, tau: float) -> float:
    """1 / (4 tau^2), summed or averaged."""
    return 1 / (4 * tau**2)


def ipo_reward(responses: ResponseLogps, *, tau: float) -> Tensor:
    """r^ = tau log(pi / pi_ref) [R]; the loss asks for a margin of one half."""
    return implicit_reward(responses.log_ratio, beta=tau)


def ipo_average(pairs: PairLogps, *, tau: Positive = 1.0) -> Tensor:
    """L = (a/n_w - b/n_l - 1/(2 tau))^2: IPO on mean log-ratios per token; another loss, not another scale.

    The target is 1/(2 tau) nats per token: IPO's tau = 0.1 would ask for 5 of them, which no policy reaches, so the
    default is ten times larger.

    Addresses: length exploitation, beside what `ipo` addresses.
    Reads: means of log-ratios per token.
    Elsewhere: several tools give this the name and the tau of `ipo`, with which it pushes at nearly constant strength
    for ever; one takes for the length the number of log-ratios that are not 0, which is 0/0 = NaN at the start.
    Source: arXiv 2310.12036 Eq. 17 with the mean of the tokens' log-ratios, said by those tools to be agreed with the
    authors.
    """
    return (_gap_per_token(pairs) - 1 / (2 * tau)) ** 2


def ipo_average_weights(pairs: PairLogps, *, tau: Positive = 1.0) -> tuple[Tensor, Tensor]:
    """w_c = 2 (1/(2 tau) - a/n_w + b/n_l) / n_w, w_r the same over n_l: a long response is moved less."""
    pull_T = 2 * (1 / (2 * tau) - _gap_per_token(pairs))
    return pull_T / pairs.chosen_length, pull_T / pairs.rejected_length


def ipo_average_reward(responses: ResponseLogps, *, tau: float) -> Tensor:
    """r^ = tau log(pi / pi_ref) / n [R]."""
    return ipo_reward(responses, tau=tau) / responses.length


# --- hinge -----------------------------------------------------------------------------------------------------------


def hinge(pairs: PairLogps, *, beta: Positive = 0.05) -> Tensor:
    """L = max(0, 1 - z): only pairs whose margin is below 1/beta nats are pushed, all equally hard.

    RSO's hinge-norm loss: SLiC's hinge on log-ratios. beta is one over the margin asked for, in nats.

    Addresses: pairs that are right already and yet go on pulling.
    Reads: log-ratios summed over tokens.
    Elsewhere: many tools call this SLiC, which has no reference and adds a likelihood term: `slic_hf`.
    Source: arXiv 2309.06657 Eq. 10, where beta is called gamma and is 0.05; arXiv 2305.10425.
    """
    return relu(1 - beta * _gap(pairs))


def hinge_weights(pairs: PairLogps, *, beta: Positive = 0.05) -> tuple[Tensor, Tensor]:
    """w_c = w_r = beta where z < 1, else 0."""
    weight_T = beta * (beta * _gap(pairs) < 1).to(pairs.chosen_log_ratio.dtype)
    return weight_T, weight_T


def hinge_at_start() -> float:
    """1."""
    return 1.0


# --- shared ----------------------------------------------------------------------------------------------------------


def _gap(pairs: PairLogps) -> Tensor:
    """D = a - b [T]."""
    return pairs.chosen_log_ratio - pairs.rejected_log_ratio


def _gap_per_token(pairs: PairLogps) -> Tensor:
    """a/n_w - b/n_l [T]. The lengths count tokens; counting non-zero log-ratios would be 0/0 at the start."""
    return pairs.chosen_log_ratio / pairs.chosen_length - pairs.rejected_log_ratio / pairs.rejected_length


def _check_index_pairs(yw_idxs: Tensor, yl_idxs: Tensor, responses: int) -> None:
    if yw_idxs.ndim != 1 or yw_idxs.shape != yl_idxs.shape:
        raise ValueError(f"yw_idxs and yl_idxs must both be [T], not {[*yw_idxs.shape]} and {[*yl_idxs.shape]}")
    for name, idxs in (("yw_idxs", yw_idxs), ("yl_idxs", yl_idxs)):
        if len(idxs) == 0:  # an empty tensor is float by default
            continue
        if idxs.is_floating_point() or idxs.dtype == torch.bool:
            raise ValueError(f"{name} must hold integer positions, not {idxs.dtype}")
        if int(idxs.min()) < 0 or int(idxs.max()) >= responses:
            raise ValueError(f"{name} must lie in [0, {responses}), found {int(idxs.min())} to {int(idxs.max())}")
    if bool((yw_idxs == yl_idxs).any()):
        pair = int((yw_idxs == yl_idxs).int().argmax())
        raise ValueError(f"pair {pair} compares response {int(yw_idxs[pair])} with itself")


# --- the table -------------------------------------------------------------------------------------------------------

LOSSES = (
    Loss(
        name="dpo",
        function=dpo,
        weights=dpo_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        learning_rate=1e-6,  # arXiv 2305.18290 Appendix B (RMSprop, batch 64)
    ),
    Loss(
        name="cdpo",
        function=cdpo,
        weights=cdpo_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        learning_rate=5e-7,  # the released online DPO recipe of RLHFlow, label smoothing 0.1
    ),
    Loss(
        name="robust",
        function=robust,
        weights=robust_weights,
        reward=dpo_reward,
        at_start=logistic_at_start,
        learning_rate=5e-7,  # as cdpo; the 1e-3 of arXiv 2403.00409 Appendix B is for its GPT-2 experiment
    ),
    Loss(
        name="ipo",
        function=ipo,
        weights=ipo_weights,
        reward=ipo_reward,
        at_start=ipo_at_start,
        learning_rate=5e-7,  # arXiv 2402.04792; the 1e-2 of arXiv 2310.12036 Appendix C is for its bandits
    ),
    Loss(
        name="ipo_average",
        function=ipo_average,
        weights=ipo_average_weights,
        reward=ipo_average_reward,
        at_start=ipo_at_start,
        learning_rate=5e-7,  # as ipo: the optimizers named above are blind to the loss's scale
    ),
    Loss(
        name="hinge",
        function=hinge,
        weights=hinge_weights,
        reward=dpo_reward,
        at_start=hinge_at_start,
        learning_rate=5e-7,  # arXiv 2402.04792, its SLiC runs
    ),
)
"""The losses above."""
