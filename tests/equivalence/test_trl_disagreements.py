"""Where TRL 1.16.0 computes another loss than the paper that it names, or than its user may think: both values, pinned.

Each test states TRL's value in closed form, so that a release which changes it is noticed, and ours as the paper's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus
from trl_oracle import ROWS, Oracle, labelled, ours, pairs, tables

from preftune.equations.losses import LOSSES
from preftune.errors import ConfigError

pytest.importorskip("trl", reason="trl is a development dependency")
pytestmark = pytest.mark.filterwarnings("ignore")

POLICY, REFERENCE = tables()
READ = pairs(ROWS, POLICY, REFERENCE)
A, B, D = READ.chosen_log_ratio, READ.rejected_log_ratio, READ.chosen_log_ratio - READ.rejected_log_ratio
N_W, N_L = READ.chosen_length, READ.rejected_length
P_W, P_L = READ.chosen / N_W, READ.rejected / N_L


@pytest.fixture(scope="module")
def trl(tiny_model_folder: Path) -> Oracle:
    return Oracle(tiny_model_folder)


def value(found: tuple[Tensor, Tensor]) -> Tensor:
    return found[0].double()


def pin(theirs: Tensor, their_formula: Tensor, here: Tensor, paper: Tensor) -> None:
    """TRL's value is that of `their_formula`, ours that of the paper, both to 1e-6, and they are not the same."""
    torch.testing.assert_close(theirs, their_formula, atol=1e-6, rtol=0)
    torch.testing.assert_close(here, paper, atol=1e-6, rtol=0)
    assert abs(theirs - here) > 5e-3, f"TRL {theirs}, here {here}"


# --- knobs that do nothing, or something else ------------------------------------------------------------------------


def test_trls_sigmoid_ignores_label_smoothing(trl: Oracle) -> None:
    """DPOConfig(loss_type="sigmoid", label_smoothing=0.2) trains DPO; cDPO it is not."""
    theirs = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=["sigmoid"], beta=0.3, label_smoothing=0.2)
    here = ours("cdpo", ROWS, POLICY, REFERENCE, beta=0.3, label_smoothing=0.2)
    cross_entropy = -0.8 * torch.sigmoid(0.3 * D).log() - 0.2 * torch.sigmoid(-0.3 * D).log()
    pin(value(theirs), softplus(-0.3 * D).mean(), value(here), cross_entropy.mean())


@pytest.mark.parametrize(
    "name", ["hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm"]
)
def test_trl_ignores_label_smoothing_in_most_losses(
    trl: Oracle, name: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """No error, no warning and no effect; our losses refuse a knob that they do not have."""
    smoothed = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=[name], label_smoothing=0.3)
    assert "smoothing" not in caplog.text + " ".join(str(warning.message) for warning in recwarn)
    plain = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=[name])
    assert torch.equal(plain[0], smoothed[0]) and torch.equal(plain[1], smoothed[1])
    with pytest.raises(ConfigError, match="has no knob label_smoothing"):
        LOSSES["hinge"].bind(label_smoothing=0.3)


def test_trls_exo_takes_label_smoothing_above_one_half(trl: Oracle) -> None:
    """Labels believed to be wrong more often than right: TRL then learns the rejected response, we refuse."""
    _, gradient = trl("DPO", ROWS, REFERENCE, REFERENCE, loss_type=["exo_pair"], label_smoothing=0.7)
    chosen = [token for row in ROWS for token in row.chosen]
    assert (gradient[chosen] > 0).all(), "a step down the gradient lowers every chosen token"
    with pytest.raises(ConfigError, match=r"label_smoothing must be a number in \(0, 0.5\), not 0.7"):
        LOSSES["exo"].bind(label_smoothing=0.7)


@pytest.mark.parametrize("coefficient", [0.2, 0.7])
def test_trls_alpha_runs_the_other_way(trl: Oracle, coefficient: float) -> None:
    """`f_alpha_divergence_coef` is 1 - alpha of the paper: 1 is reverse KL. Its help says u^-alpha, as the paper."""
    policy, reference = POLICY.float(), REFERENCE.float()
    theirs = trl(
        "DPO", ROWS, policy, reference, loss_type=["sigmoid"], beta=0.3,
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient,
    )  # fmt: skip
    here = ours("fdpo_alpha", ROWS, POLICY, REFERENCE, beta=0.3, alpha=coefficient)

    def f_dpo(alpha: float) -> Tensor:
        return softplus(0.3 * ((-alpha * A).exp() - (-alpha * B).exp()) / alpha).mean()

    pin(value(theirs), f_dpo(1 - coefficient), value(here), f_dpo(coefficient))


# --- sums and means over tokens --------------------------------------------------------------------------------------


def test_trls_ipo_averages_over_tokens(trl: Oracle) -> None:
    """Eq. 17 has probabilities of whole responses; DPOTrainer's "ipo" has means per token, its own OnlineDPOTrainer's
    has sums."""
    theirs = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=["ipo"], beta=0.25)
    here = ours("ipo", ROWS, POLICY, REFERENCE, tau=0.25)
    pin(value(theirs), ((A / N_W - B / N_L - 2) ** 2).mean(), value(here), ((D - 2) ** 2).mean())
    online = trl("OnlineDPO", ROWS, POLICY, REFERENCE, loss_type="ipo", beta=0.25)
    torch.testing.assert_close(value(online), value(here), atol=1e-6, rtol=0)


def test_trls_likelihood_terms_average_over_the_micro_batch(trl: Oracle) -> None:
    """ "sft", and CPO's likelihood, are means over all tokens of a micro-batch: long responses count more, and the
    same pairs split otherwise are another loss. Ours is a mean of means."""
    whole = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=["sft"])
    here = ours("nll", ROWS, POLICY, REFERENCE)
    pin(value(whole), -READ.chosen.sum() / N_W.sum(), value(here), -P_W.mean())
    halves = [value(trl("DPO", part, POLICY, REFERENCE, loss_type=["sft"])) for part in (ROWS[:3], ROWS[3:])]
    assert abs((3 * halves[0] + 2 * halves[1]) / 5 - value(whole)) > 1e-2, "the same rows, accumulated"

    theirs = trl("CPO", ROWS, POLICY, REFERENCE, loss_type="sigmoid", beta=0.3, cpo_alpha=1.0)
    here = ours("cpo", ROWS, POLICY, REFERENCE, beta=0.3, nll_weight=1.0)
    preference = softplus(-0.3 * (READ.chosen - READ.rejected)).mean()
    pin(value(theirs), preference - READ.chosen.sum() / N_W.sum(), value(here), preference - P_W.mean())


def test_trls_orpo_learns_the_prompt(trl: Oracle) -> None:
    """Its likelihood is over prompt and response, mean over the micro-batch; the odds ratio is over responses."""
    theirs, gradient = trl("ORPO", ROWS, POLICY, REFERENCE, beta=0.2)
    here, mine = ours("orpo", ROWS, POLICY, REFERENCE, odds_weight=0.2)
    ratio = 0.2 * softplus(torch.logit(P_L.exp()) - torch.logit(P_W.exp())).mean()
    read = [token for row in ROWS for token in [*row.prompt[1:], *row.chosen]]
    pin(theirs.double(), ratio - POLICY[read].mean(), here, ratio - P_W.mean())
    prompts = [token for row in ROWS for token in row.prompt[1:]]
    assert (gradient[prompts] < 0).all() and (mine[prompts] == 0).all()


def test_trls_slic_averages_the_likelihood(trl: Oracle) -> None:
    """CPO's "hinge" is the closest to SLiC-HF: its likelihood is a mean per token, the paper's that of the sequence."""
    theirs = trl("CPO", ROWS, POLICY, REFERENCE, loss_type="hinge", beta=1.0, cpo_alpha=0.5)
    here = ours("slic_hf", ROWS, POLICY, REFERENCE, delta=1.0, nll_weight=0.5)
    margin = (1 - READ.chosen + READ.rejected).clamp(min=0).mean()
    likelihoods = -READ.chosen.sum() / N_W.sum(), -READ.chosen.mean()
    pin(value(theirs), margin + 0.5 * likelihoods[0], value(here), margin + 0.5 * likelihoods[1])


# --- state, clamps and batches ---------------------------------------------------------------------------------------


def test_trls_bco_pair_has_no_running_mean(trl: Oracle) -> None:
    """The paper's reward shift d is missing: for TRL it is 0 for ever."""
    theirs = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=["bco_pair"], beta=0.3)
    here = LOSSES["bco_pair"].bind(beta=0.3).values(READ, {"reward_sum": -4.0, "reward_count": 5.0}).mean()

    def classifier(d: float) -> Tensor:
        return (softplus(d - 0.3 * A) + softplus(0.3 * B - d)).mean()

    pin(value(theirs), classifier(0.0), here, classifier(-0.8))


def test_trls_wpo_does_not_clamp(trl: Oracle) -> None:
    """Where tokens are likelier than sampled ones, the authors hold the weight at 1 and TRL does not."""
    greedy = torch.full_like(POLICY, 0.7).log()
    theirs = trl("DPO", ROWS, greedy, REFERENCE, loss_type=["sigmoid"], beta=0.3, use_weighting=True)
    here = ours("wpo", ROWS, greedy, REFERENCE, beta=0.3)
    read = pairs(ROWS, greedy, REFERENCE)
    dpo = softplus(-0.3 * (read.chosen_log_ratio - read.rejected_log_ratio)).mean()
    pin(value(theirs), (0.7 / (0.49 + 0.09)) ** 2 * dpo, value(here), dpo)


def test_trls_aot_depends_on_the_micro_batch(trl: Oracle) -> None:
    """The sort is within a micro-batch: accumulated one pair at a time, it is DPO. Ours sorts the step."""
    matched = {
        "aot": (READ.chosen - READ.rejected).sort().values - (READ.chosen - READ.rejected - D).sort().values,
        "aot_unpaired": A.sort().values - B.sort().values,
    }
    for name, gap in matched.items():
        parts = [trl("DPO", [row], POLICY, REFERENCE, loss_type=[name], beta=0.3) for row in ROWS]
        here = ours(name, ROWS, POLICY, REFERENCE, beta=0.3)
        dpo = softplus(-0.3 * D).mean()
        pin(torch.stack([value(part) for part in parts]).mean(), dpo, value(here), softplus(-0.3 * gap).mean())


def test_trls_kto_takes_z0_per_micro_batch(trl: Oracle) -> None:
    """max(0, .) of parts of a step is above that of the whole: in small micro-batches z0 is biased upwards. (Where
    both labels weigh the same it hardly shows: one is pulled more, the other less.)"""
    policy, reference = tables(2)
    read = labelled(ROWS, policy, reference)
    side = 2 * read.desirable.double() - 1
    per_row = read.mismatched_log_ratio.reshape(-1, 2).mean(1).clamp(min=0).repeat_interleave(2)
    z0 = read.mismatched_log_ratio.mean().clamp(min=0)
    assert z0 == 0 and per_row.mean() > 0.1

    def kahneman_tversky(z0: Tensor) -> Tensor:
        return ((2 + side) * torch.sigmoid(-0.3 * side * (read.log_ratio - z0))).mean()

    settings = {"loss_type": "kto", "beta": 0.3, "desirable_weight": 3.0}
    parts = [value(trl("KTO", [row], policy, reference, **settings)) for row in ROWS]
    here = value(ours("kto", ROWS, policy, reference, beta=0.3, desirable=3.0))
    pin(torch.stack(parts).mean(), kahneman_tversky(per_row), here, kahneman_tversky(z0))


# --- defaults and what is logged -------------------------------------------------------------------------------------


def test_trls_sigmoid_norm_starts_fifty_times_too_weak(trl: Oracle) -> None:
    """One default beta for sums and means: 0.1, where the recipe that the loss comes from has 5."""
    _, theirs = trl("DPO", ROWS, REFERENCE, REFERENCE, loss_type=["sigmoid_norm"])
    _, here = ours("ln_dpo", ROWS, REFERENCE, REFERENCE)
    torch.testing.assert_close(50 * theirs, here, atol=1e-6, rtol=0)
    assert LOSSES["ln_dpo"].knobs() == {"beta": 5.0}


def test_trls_simpo_asks_for_five_nats_and_adds_the_likelihood(trl: Oracle) -> None:
    """CPOConfig(loss_type="simpo") as it stands: gamma/beta = 5 nats per token, the paper has 0.1 to 0.8, and CPO's
    likelihood term with weight 1, which SimPO does not have."""
    theirs = trl("CPO", ROWS, POLICY, REFERENCE, loss_type="simpo")
    here = ours("simpo", ROWS, POLICY, REFERENCE)
    as_trl = softplus(0.5 - 0.1 * (P_W - P_L)).mean() - READ.chosen.sum() / N_W.sum()
    pin(value(theirs), as_trl, value(here), -logsigmoid(2.0 * (P_W - P_L) - 1.0).mean())


def test_sppo_is_halved_neither_by_trl_nor_here(trl: Oracle) -> None:
    """The authors' code halves the sum of squares; TRL's hard-label form and ours are the paper's sum."""
    theirs = trl("DPO", ROWS, POLICY, REFERENCE, loss_type=["sppo_hard"], beta=0.1)
    here = ours("sppo", ROWS, POLICY, REFERENCE, beta=0.1)
    authors = ((A - 5) ** 2 + (B + 5) ** 2).mean() / 2
    torch.testing.assert_close((value(theirs), value(here)), (2 * authors, 2 * authors), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "knobs", "settings"),
    [
        ("dpo", {"beta": 0.3}, {"loss_type": ["sigmoid"]}),
        ("ln_dpo", {"beta": 0.3}, {"loss_type": ["sigmoid_norm"]}),
        ("ipo_average", {"tau": 0.3}, {"loss_type": ["ipo"]}),
        ("fdpo_js", {"beta": 0.3}, {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"}),
        ("fdpo_forward_kl", {"beta": 0.3}, {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"}),
    ],
)
def test_trl_logs_one_reward_whatever_the_loss(
    trl: Oracle, name: str, knobs: dict[str, float], settings: dict[str, object]
) -> None:
    """rewards/chosen is always beta log(pi/pi_ref), DPO's; ours is the reward that the loss at hand ascribes."""
    trainer = trl.trainer("DPO", beta=0.3, **settings)
    trl("DPO", ROWS, POLICY, REFERENCE, beta=0.3, **settings)
    (logged,) = {mode: metrics for mode, metrics in trainer._metrics.items() if metrics}.values()
    assert logged["rewards/chosen"][-1] == pytest.approx(float(0.3 * A.mean()), abs=1e-6)
    reward = float(LOSSES[name].bind(**knobs).rewards(READ)[0].mean())
    assert (reward == pytest.approx(logged["rewards/chosen"][-1], abs=1e-6)) == (name == "dpo")
