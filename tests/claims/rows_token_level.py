"""TDPO, WPO and LD-DPO derived again from probabilities, divergences as they are and shares of tokens as powers."""

from __future__ import annotations

from decimal import Decimal

from loss_contract import Chances, Limit, Row, log_ratio_reward

LN_2 = 0.6931471805599453

# --- the losses, derived again ---------------------------------------------------------------------------------------


def surprise(w: Decimal, l: Decimal) -> Decimal:
    """At w's victory, when chances are as the strengths."""
    return -(w / (w + l)).ln()


def tdpo1(q: Chances, beta: Decimal) -> Decimal:
    """A response is as strong as it is likelier than the reference's, times e for every nat of divergence passed."""
    w, l = (q.w / q.ref_w) * q.kl_w.exp(), (q.l / q.ref_l) * q.kl_l.exp()
    return surprise(w**beta, l**beta)


def tdpo2(q: Chances, beta: Decimal, alpha: Decimal) -> Decimal:
    """l alone is handed the difference, as strength; its size is alpha's."""
    handicap = (q.kl_l.exp() / q.kl_w.exp()) ** alpha
    return surprise((q.w / q.ref_w) ** beta, (handicap * q.l / q.ref_l) ** beta)


def wpo(q: Chances, beta: Decimal) -> Decimal:
    """Surprise, times the chance that the pair is kept: the product of both alignments, as far as it is a chance."""
    kept = min(Decimal(1), q.align_w.exp() * q.align_l.exp())
    return kept * surprise((q.w / q.ref_w) ** beta, (q.l / q.ref_l) ** beta)


def ld_dpo(q: Chances, beta: Decimal, alpha: Decimal) -> Decimal:
    """Strengths are products over tokens; those beyond the shorter response enter by their alpha-th power."""

    def strength(ratio: Decimal, shared: Decimal) -> Decimal:
        early, late = ratio**shared, ratio ** (1 - shared)
        return (early * late**alpha) ** beta

    return surprise(strength(q.w / q.ref_w, q.shared_w), strength(q.l / q.ref_l, q.shared_l))


# --- the rows --------------------------------------------------------------------------------------------------------

ROWS: dict[str, Row] = {
    "tdpo1": Row(
        derivation=tdpo1,
        reward=log_ratio_reward,
        other={"beta": 0.37},
        at_start=(LN_2, LN_2),
        swap=None,  # closed in u, which holds the divergences too: see the tests of the module
        shift="response",
        steepness=lambda beta: beta,
    ),
    "tdpo2": Row(
        derivation=tdpo2,
        reward=log_ratio_reward,
        other={"beta": 0.37, "alpha": 1.3},
        at_start=(LN_2, LN_2),
        swap=None,
        shift="response",
        steepness=lambda beta, **_: beta,
        limits=(
            Limit({"beta": 0.2, "alpha": 0.0}, "dpo", {"beta": 0.2}),
            Limit({"beta": 0.2, "alpha": 1.0}, "tdpo1", {"beta": 0.2}),
        ),
    ),
    "wpo": Row(
        derivation=wpo,
        reward=log_ratio_reward,
        other={"beta": 0.37},
        at_start=None,
        swap=None,
        shift="response",
        steepness=lambda beta: beta,
    ),
    "ld_dpo": Row(
        derivation=ld_dpo,
        reward=log_ratio_reward,
        other={"beta": 0.37, "alpha": 0.8},
        at_start=(LN_2, LN_2),
        swap=None,
        shift=None,  # log Z is the reward of a whole response: where parts of it are discounted it no longer cancels
        steepness=lambda beta, **_: beta,
        by_token=True,
        limits=(Limit({"beta": 0.2, "alpha": 1.0}, "dpo", {"beta": 0.2}),),
    ),
}
