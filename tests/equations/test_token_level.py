"""Claims about what TDPO, WPO and LD-DPO do beyond log pi(y|x): to divergences, alignments and single tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from preftune.equations.losses import LOSSES
from preftune.tensors import PairIndex, PairLogps, ResponseLogps

LENGTHS = torch.tensor([3, 7, 7, 1])
PAIRS = PairIndex(torch.tensor([0, 1, 1, 3, 2]), torch.tensor([1, 0, 2, 1, 3]), torch.ones(5))
"""The chosen response is the shorter, the longer, as long, one token against seven, seven against one."""
ALPHA = 0.3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_pairs(count: int = 400) -> PairLogps:
    """Log-ratios of a few nats, divergences of 0 to 8, alignments of both signs, all leaves."""
    a, b, kl_w, kl_l, align_w, align_l = draw(6, count)
    one = torch.ones(count, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (9 * a, 9 * b, 4 * kl_w.abs(), 4 * kl_l.abs(), align_w, align_l)]
    ratio_w, ratio_l, k_w, k_l, A_w, A_l = leaves
    return PairLogps(
        ratio_w, ratio_l, ratio_w, ratio_l, one, one, one,
        chosen_divergence=k_w, rejected_divergence=k_l, chosen_alignment=A_w, rejected_alignment=A_l,
    )  # fmt: skip


def gradient(values: Tensor, leaf: Tensor | None) -> Tensor:
    assert leaf is not None
    (found,) = torch.autograd.grad(values.sum(), leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


# -- TDPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "knobs", "on_w", "on_l"), [
    ("tdpo1", {"beta": 0.2}, -1.0, 1.0),
    ("tdpo2", {"beta": 0.2, "alpha": 0.7}, 0.0, 0.7),
    ("tdpo2", {"beta": 0.2, "alpha": 0.0}, 0.0, 0.0),
])  # fmt: skip
def test_the_gradient_of_each_divergence_is_the_analytic_one(
    name: str, knobs: Mapping[str, float], on_w: float, on_l: float
) -> None:
    """dL/dK_w is -beta s(-u) in TDPO1 and nothing in TDPO2; dL/dK_l is beta s(-u), alpha times that in TDPO2."""
    pairs, loss = drawn_pairs(), LOSSES[name].bind(**knobs)
    values = loss.values(pairs)
    K_w, K_l = pairs.chosen_divergence, pairs.rejected_divergence
    assert K_w is not None and K_l is not None
    u = pairs.chosen_log_ratio - pairs.rejected_log_ratio - knobs.get("alpha", 1.0) * (K_l - K_w)
    pull = knobs["beta"] / (1 + torch.exp(knobs["beta"] * u)).detach()
    torch.testing.assert_close(gradient(values, K_w), on_w * pull, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(gradient(values, K_l), on_l * pull, rtol=1e-11, atol=1e-15)


def test_stopping_the_gradient_changes_no_value() -> None:
    """TDPO2 at alpha = 1 is TDPO1 in value; along the chosen response one lets go and the other drives away."""
    pairs = drawn_pairs()
    first, second = (LOSSES[name].bind(beta=0.3, **alpha).values(pairs) for name, alpha in
                     (("tdpo1", {}), ("tdpo2", {"alpha": 1.0})))  # fmt: skip
    assert torch.equal(first, second)
    assert (gradient(first, pairs.chosen_divergence) < 0).all()
    assert not gradient(second, pairs.chosen_divergence).any()


def test_divergence_along_the_chosen_response_lowers_the_loss_and_along_the_rejected_raises_it() -> None:
    """The direction in which both enter, for both forms."""
    pairs = drawn_pairs()
    assert pairs.chosen_divergence is not None and pairs.rejected_divergence is not None
    for name in ("tdpo1", "tdpo2"):
        values = LOSSES[name].bind().values(pairs)
        further_w = replace(pairs, chosen_divergence=pairs.chosen_divergence + 1)
        further_l = replace(pairs, rejected_divergence=pairs.rejected_divergence + 1)
        assert (LOSSES[name].bind().values(further_w) < values).all()
        assert (LOSSES[name].bind().values(further_l) > values).all()


def test_swapping_the_responses_reverses_the_argument_of_the_sigmoid() -> None:
    """L(w, l) - L(l, w) = -u, divergences included."""
    pairs = drawn_pairs()
    a, b, K_w, K_l = (
        pairs.chosen_log_ratio,
        pairs.rejected_log_ratio,
        pairs.chosen_divergence,
        pairs.rejected_divergence,
    )
    assert K_w is not None and K_l is not None
    swapped = replace(pairs, chosen_log_ratio=b, rejected_log_ratio=a, chosen_divergence=K_l, rejected_divergence=K_w)
    for name, alpha in (("tdpo1", 1.0), ("tdpo2", 0.5)):
        loss = LOSSES[name].bind(beta=0.2)
        difference = loss.values(pairs) - loss.values(swapped)
        torch.testing.assert_close(difference, -0.2 * (a - b - alpha * (K_l - K_w)), rtol=1e-11, atol=1e-12)


def one_token_worlds(theta: Tensor, reference: Tensor) -> ResponseLogps:
    """Every one-token response of one prompt: log-probs and divergences of a softmax policy, by their definitions."""
    logp = torch.log_softmax(theta, 0)
    divergence = (reference * (reference.log() - logp)).sum().expand(len(theta))
    return ResponseLogps(logp, logp - reference.log(), torch.ones(len(theta)).double(), divergence=divergence)


def test_on_responses_of_one_token_tdpo1_is_dpo_and_tdpo2_holds_to_the_reference() -> None:
    """Both walk from the same prompt, so K_w = K_l: TDPO1's pulls at it cancel, TDPO2's do not."""
    reference = torch.softmax(draw(5, seed=1), 0)
    theta = draw(5, seed=2).requires_grad_()
    index = PairIndex(torch.tensor([0, 1, 4]), torch.tensor([2, 3, 0]), torch.ones(3))

    def value_and_gradient(name: str) -> tuple[Tensor, Tensor]:
        values = LOSSES[name].bind(beta=0.1).values(one_token_worlds(theta, reference).pairs(index))
        return values.detach(), torch.autograd.grad(values.sum(), theta)[0]

    (dpo, d_dpo), (tdpo1, d_tdpo1), (tdpo2, d_tdpo2) = map(value_and_gradient, ("dpo", "tdpo1", "tdpo2"))
    torch.testing.assert_close(tdpo1, dpo, rtol=1e-14, atol=0)
    torch.testing.assert_close(d_tdpo1, d_dpo, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(tdpo2, dpo, rtol=1e-14, atol=0)
    q = torch.softmax(theta.detach(), 0)
    pull = LOSSES["tdpo2"].bind().weights(one_token_worlds(theta, reference).pairs(index))[0].sum()
    torch.testing.assert_close(d_tdpo2 - d_dpo, 0.5 * pull * (q - reference), rtol=1e-11, atol=1e-15)


# -- WPO --------------------------------------------------------------------------------------------------------------


def test_alignment_weighs_a_pair_and_is_never_differentiated() -> None:
    """L is DPO's times min(1, e^(A_w + A_l)), and no gradient reaches A_w or A_l."""
    pairs = drawn_pairs()
    A_w, A_l = pairs.chosen_alignment, pairs.rejected_alignment
    assert A_w is not None and A_l is not None
    products = [math.exp(w) * math.exp(l) for w, l in zip(A_w.tolist(), A_l.tolist(), strict=True)]
    likeness = torch.tensor(products, dtype=torch.float64).clamp(max=1)
    values = LOSSES["wpo"].bind(beta=0.2).values(pairs)
    torch.testing.assert_close(values, likeness * LOSSES["dpo"].bind(beta=0.2).values(pairs), rtol=1e-13, atol=0)
    assert not gradient(values, A_w).any() and not gradient(values, A_l).any()


def test_the_product_is_bounded_not_its_factors() -> None:
    """A greedy response, alignment 1, makes up for one that the policy would hardly write, alignment -1."""
    pairs, dpo = drawn_pairs(1), LOSSES["dpo"].bind(beta=0.01)

    def share(w: float, l: float) -> float:
        A_w, A_l = torch.tensor([[w], [l]], dtype=torch.float64)
        given = replace(pairs, chosen_alignment=A_w, rejected_alignment=A_l)
        return float((LOSSES["wpo"].bind().values(given) / dpo.values(pairs)).detach())

    assert share(1.0, -1.0) == share(-1.0, 1.0) == pytest.approx(1.0, rel=1e-14)
    assert share(1.0, 2.0) == pytest.approx(1.0, rel=1e-14)
    assert share(-1.0, -1.0) == pytest.approx(math.exp(-2), rel=1e-14)
    assert share(1e4, 1e4) == pytest.approx(1.0, rel=1e-14), "no overflow on the way"


def test_a_policy_uniform_at_every_token_makes_wpo_dpo() -> None:
    """Then every token is exactly as likely as a sampled one: alignment 0, weight 1."""
    pairs = drawn_pairs()
    zero = torch.zeros_like(pairs.chosen)
    given = replace(pairs, chosen_alignment=zero, rejected_alignment=zero)
    dpo = LOSSES["dpo"].bind(beta=0.01).values(pairs)
    assert torch.equal(LOSSES["wpo"].bind().values(given), dpo)


def test_alignments_are_means_over_tokens() -> None:
    """A hundred tokens of alignment -0.1 weigh as one of them: responses of any length stay in the loss."""
    lengths = torch.tensor([100, 1])
    tokens = torch.zeros(101, dtype=torch.float64)
    responses = ResponseLogps.from_tokens(tokens, lengths, tokens, alignment_C=torch.full_like(tokens, -0.1))
    value = LOSSES["wpo"].bind().values(responses.pairs(PairIndex(torch.tensor([0]), torch.tensor([1]), torch.ones(1))))
    assert float(value) == pytest.approx(math.exp(-0.2) * math.log(2), rel=1e-12)


# -- LD-DPO -----------------------------------------------------------------------------------------------------------


def tokens_of(offset: int) -> slice:
    """The scored tokens of one response."""
    ends = LENGTHS.cumsum(0).tolist()
    return slice(ends[offset] - int(LENGTHS[offset]), ends[offset])


def test_shared_tokens_have_full_weight_and_later_ones_alpha_times_it() -> None:
    """dL/d log pi(y_t) token by token, against the weights: only a longer response has discounted tokens."""
    policy, reference = draw(18, seed=3).requires_grad_(), draw(18, seed=4)
    loss = LOSSES["ld_dpo"].bind(beta=0.4, alpha=ALPHA)
    pairs = ResponseLogps.from_tokens(policy, LENGTHS, reference, keep_tokens=True).pairs(PAIRS)
    late_w, late_l = loss.weights(pairs)
    assert torch.equal(late_w, late_l)
    for t, (w, l) in enumerate(zip(PAIRS.chosen.tolist(), PAIRS.rejected.tolist(), strict=True)):
        (found,) = torch.autograd.grad(loss.values(pairs)[t], policy, retain_graph=True)
        expected = torch.zeros(18, dtype=torch.float64)
        for response, sign in ((w, -1.0), (l, 1.0)):
            late = (torch.arange(int(LENGTHS[response])) >= int(min(LENGTHS[w], LENGTHS[l]))).double()
            expected[tokens_of(response)] = sign * late_w[t] * (late + (1 - late) / ALPHA)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_the_value_is_dpo_on_discounted_log_ratios() -> None:
    """Against a loop over tokens, and its ends: alpha = 0 forgets what comes late, one length forgets alpha."""
    policy, reference = draw(18, seed=5), draw(18, seed=6)
    pairs = ResponseLogps.from_tokens(policy, LENGTHS, reference, keep_tokens=True).pairs(PAIRS)
    for alpha in (0.0, 0.5, 1.0):
        values = LOSSES["ld_dpo"].bind(beta=0.4, alpha=alpha).values(pairs)
        for t, (w, l) in enumerate(zip(PAIRS.chosen.tolist(), PAIRS.rejected.tolist(), strict=True)):
            shared = int(min(LENGTHS[w], LENGTHS[l]))
            rewards = [
                sum(
                    float(r) * (1.0 if i < shared else alpha)
                    for i, r in enumerate((policy - reference)[tokens_of(side)])
                )
                for side in (w, l)
            ]
            assert float(values[t]) == pytest.approx(math.log1p(math.exp(-0.4 * (rewards[0] - rewards[1]))), rel=1e-12)
    equal = LOSSES["dpo"].bind(beta=0.4).values(pairs)[2]
    assert float(LOSSES["ld_dpo"].bind(beta=0.4, alpha=0.1).values(pairs)[2]) == pytest.approx(float(equal), rel=1e-14)


def test_a_fresh_policy_starts_at_ln_2_whatever_the_lengths() -> None:
    """Policy and reference are discounted alike; discounting one of them would saturate pairs of unequal length."""
    tokens = -3 + draw(18, seed=7)
    pairs = ResponseLogps.from_tokens(tokens, LENGTHS, tokens, keep_tokens=True).pairs(PAIRS)
    values = LOSSES["ld_dpo"].bind(beta=0.4, alpha=ALPHA).values(pairs)
    assert torch.equal(values, torch.full((5,), math.log(2), dtype=torch.float64))


# -- pairs that lack what a loss reads --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "wpo", "ld_dpo"])
def test_pairs_without_what_the_loss_reads_are_refused(name: str) -> None:
    """The message names the need, as `Loss.needs` spells it."""
    (need,) = LOSSES[name].needs - {"reference"}
    plain = ResponseLogps(draw(4), draw(4), LENGTHS.double()).pairs(PAIRS)
    for call in (LOSSES[name].bind().values, LOSSES[name].bind().weights):
        with pytest.raises(ValueError, match=f"^these pairs have no {need}: "):
            call(plain)
