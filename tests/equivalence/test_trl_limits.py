"""Where TRL 1.16.0 overflows, loses digits, drops rows or stops, and the same loss here does not: pinned, case by case.

Values are driven to where long responses bring them: hundreds of nats per sequence are ordinary.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from trl_oracle import ROWS, Oracle, labelled, ours, pairs, rows, tables

from preftune.equations.losses import LOSSES
from preftune.equations.reference_free import log_odds

pytest.importorskip("trl", reason="trl is a development dependency")
pytestmark = pytest.mark.filterwarnings("ignore")

POLICY, REFERENCE = (table.float() for table in tables())


@pytest.fixture(scope="module")
def trl(tiny_model_folder: Path) -> Oracle:
    return Oracle(tiny_model_folder)


def fallen(nats: float, *sides: str) -> Tensor:
    """The reference, but for the responses of these sides, `nats` less likely at every token."""
    policy = REFERENCE.clone()
    for row in ROWS:
        for side in sides:
            policy[getattr(row, side)] -= nats
    return policy


def test_trls_forward_kl_is_nan_where_both_responses_have_fallen(trl: Oracle) -> None:
    """exp of minus the log-ratio is not clamped and infinity minus infinity is the margin: 89 nats do in float32."""
    policy = fallen(100.0, "chosen", "rejected")
    theirs, _ = trl("DPO", ROWS, policy, REFERENCE, loss_type=["sigmoid"], f_divergence_type="forward_kl")
    here, gradient = ours("fdpo_forward_kl", ROWS, policy, REFERENCE)
    assert theirs.isnan()
    assert float(here) == pytest.approx(math.log(2.0)) and gradient.isfinite().all()


def test_trls_discopop_is_nan_where_the_margin_has_fallen(trl: Oracle) -> None:
    """exp(-z) times s(z / tau) is infinity times zero once z < -89 in float32; the loss there is nearly -z."""
    policy = fallen(2000.0, "chosen")
    theirs, _ = trl("DPO", ROWS, policy, REFERENCE, loss_type=["discopop"], beta=0.05)
    here, gradient = ours("discopop", ROWS, policy, REFERENCE, beta=0.05)
    assert theirs.isnan()
    z = -0.05 * 2000 * pairs(ROWS, policy, REFERENCE).chosen_length
    assert float(here) == pytest.approx(float(-z.mean()), rel=1e-5) and gradient.isfinite().all()


def test_trls_alpha_divergence_loses_digits_near_reverse_kl(trl: Oracle) -> None:
    """exp(t) - 1 instead of expm1(t): at alpha 1e-4 in float32, only four digits of the rewards are left."""
    alpha = 1e-4
    theirs, _ = trl(
        "DPO", ROWS, POLICY, REFERENCE, loss_type=["sigmoid"], beta=0.3,
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha,
    )  # fmt: skip
    here, _ = ours("fdpo_alpha", ROWS, POLICY, REFERENCE, beta=0.3, alpha=alpha)
    read = pairs(ROWS, POLICY.double(), REFERENCE.double())
    exact = softplus(
        0.3 / alpha * (torch.expm1(-alpha * read.chosen_log_ratio) - torch.expm1(-alpha * read.rejected_log_ratio))
    ).mean()
    assert abs(theirs - exact) > 1e-5 > 20 * abs(here - exact)


def test_trls_alpha_divergence_refuses_float64(trl: Oracle) -> None:
    """Its clamp is looked up by dtype, and float64 is not in the table."""
    with pytest.raises(KeyError, match="float64"):
        trl(
            "DPO", ROWS, POLICY.double(), REFERENCE.double(), loss_type=["sigmoid"],
            f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.5,
        )  # fmt: skip


def test_trls_alphapo_is_not_finite_on_sums(trl: Oracle) -> None:
    """Offered for "all loss types", but e^l of a sum of 300 tokens is 0 and 0^-alpha infinite; ours reads means."""
    long = rows([(300, 280)], [2])
    policy = torch.full((1 + max(long[0].strays[1]),), -3.0)
    theirs, _ = trl("CPO", long, policy, policy, loss_type="sigmoid", alpha=0.25, cpo_alpha=0.0)
    here, gradient = ours("alphapo", long, policy, policy, alpha=0.25, gamma=0.25, beta=2.5)
    assert not theirs.isfinite()
    assert float(here) == pytest.approx(math.log1p(math.exp(0.25)), abs=1e-6) and gradient.isfinite().all()


def test_trls_orpo_is_infinite_where_a_response_is_certain(trl: Oracle) -> None:
    """A rejected mean log-prob that float32 rounds to 0 has infinite odds; here odds end at 1e7."""
    certain = torch.zeros(1, requires_grad=True)
    losses, *_ = trl.trainer("ORPO", beta=0.1).odds_ratio_loss(torch.tensor([-0.5]), certain)
    (gradient,) = torch.autograd.grad(losses.sum(), certain)
    assert losses.isinf().all() and gradient.isnan().all()
    assert float(log_odds(certain)) == pytest.approx(math.log(1e7), abs=1e-4)


def test_trls_kto_drops_nan_rows_in_silence(trl: Oracle) -> None:
    """`nanmean` over the losses: a response that has become NaN leaves the step without a word. Here it stays."""
    policy = POLICY.clone()
    policy[ROWS[0].chosen] = torch.nan
    theirs, _ = trl("KTO", ROWS, policy, REFERENCE, loss_type="kto", beta=0.3)
    values = LOSSES["kto"].bind(beta=0.3).values(labelled(ROWS, policy, REFERENCE))
    assert values.isnan().tolist() == [True] + [False] * 9
    assert theirs.isfinite() and float(theirs) == pytest.approx(float(values[1:].mean()), abs=1e-6)


def test_trls_wpo_cannot_be_combined_with_sft(trl: Oracle) -> None:
    """The weight is multiplied in place into a value that "sft" has expanded; the first step raises."""
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        trl("DPO", ROWS, POLICY, REFERENCE, loss_type=["sigmoid", "sft"], use_weighting=True)
