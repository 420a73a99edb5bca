"""Divergences, optima and intervals that are plausible and wrong."""

from __future__ import annotations

from fault import Fault

_KL = "src/preftune/equations/kl.py"
_OPTIMUM = "src/preftune/equations/optimum.py"
_BT = "src/preftune/equations/bradley_terry.py"
_STATS = "src/preftune/equations/stats.py"
_WORLD = "src/preftune/worlds/enumerable.py"
_LAW = "src/preftune/theory/enumerable.py"


def _kl(test: str) -> str:
    return f"tests/equations/test_kl.py -k {test}"


def _optimum(test: str) -> str:
    return f"tests/equations/test_optimum.py -k {test}"


FAULTS = [
    Fault(
        "KL: the two directions are exchanged",
        _KL,
        "return (logps.exp() * log_ratio).sum(-1)",
        "return -(other_logps.exp() * log_ratio).sum(-1)",
        _kl("bound_each_other"),
    ),
    Fault(
        "KL: 0 log 0 is NaN",
        _KL,
        "log_ratio = torch.where(logps.isneginf(), 0.0, logps - other_logps)",
        "log_ratio = logps - other_logps",
        _kl("impossible"),
    ),
    Fault(
        "Gaussian KL: the logarithm of the deviations upside down",
        _KL,
        "(other_s / s).log()",
        "(s / other_s).log()",
        _kl("torchs"),
    ),
    Fault(
        "k2: not halved",
        _KL,
        "return log_ratio**2 / 2",
        "return log_ratio**2",
        _kl("k2_is_right"),
    ),
    Fault(
        "k3: of the inverse ratio, the estimator of the other divergence",
        _KL,
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(log_ratio) - log_ratio",
        _kl("unbiased"),
    ),
    Fault(
        "k3: without its control variate",
        _KL,
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(-log_ratio)",
        _kl("unbiased"),
    ),
    Fault(
        "KL of a sequence: steps after its end count",
        _KL,
        "return torch.where(mask.bool(), per_step, 0.0).sum(-1)",
        "return per_step.sum(-1)",
        _kl("after_the_end"),
    ),
    Fault(
        "drift: reported with the sign of the log-ratio",
        _KL,
        "return -log_ratio_R.detach()",
        "return log_ratio_R.detach()",
        "tests/equations/test_likelihood_and_kl.py -k in_expectation",
    ),
    Fault(
        "optimum: beta multiplies the reward",
        _OPTIMUM,
        "ref_logps + (rewards - best) / _positive(beta)",
        "ref_logps + (rewards - best) * _positive(beta)",
        _optimum("falls_short"),
    ),
    Fault(
        "optimum: not normalised",
        _OPTIMUM,
        "return torch.log_softmax(_tilt(ref_logps, rewards, beta)[0], -1)",
        "return _tilt(ref_logps, rewards, beta)[0]",
        _optimum("falls_short"),
    ),
    Fault(
        "partition: the best reward, taken out for safety, is not put back",
        _OPTIMUM,
        "return torch.logsumexp(tilted, -1) + best[..., 0] / beta",
        "return torch.logsumexp(tilted, -1)",
        _optimum("written_out"),
    ),
    Fault(
        "implied reward: without beta log Z, although it is given",
        _OPTIMUM,
        "return _positive(beta) * (log_ratio + log_z[..., None])",
        "return _positive(beta) * log_ratio",
        _optimum("is_the_identity"),
    ),
    Fault(
        "objective: the KL penalty is a bonus",
        _OPTIMUM,
        "return expected_reward(logps, rewards) - _positive(beta) * kl_divergence(logps, ref_logps)",
        "return expected_reward(logps, rewards) + _positive(beta) * kl_divergence(logps, ref_logps)",
        _optimum("falls_short"),
    ),
    Fault(
        "objective: the penalty is the forward KL",
        _OPTIMUM,
        "- _positive(beta) * kl_divergence(logps, ref_logps)",
        "- _positive(beta) * kl_divergence(ref_logps, logps)",
        _optimum("falls_short"),
    ),
    Fault(
        "win rate: a tie is a loss",
        _OPTIMUM,
        "return (logps.exp() * (below + up_to) / 2).sum(-1)",
        "return (logps.exp() * below).sum(-1)",
        _optimum("double_sum"),
    ),
    Fault(
        "best of n: the formula without ties",
        _OPTIMUM,
        "factor = torch.where(u > 0, -torch.expm1(n * torch.log1p(-u)) / u, float(n))",
        "factor = torch.full_like(u, float(n))",
        _optimum("enumeration"),
    ),
    Fault(
        "Bradley-Terry: the cost is the objective",
        _BT,
        "return -bt_objective(r_w, r_l, weight)",
        "return bt_objective(r_w, r_l, weight)",
        "tests/equations/test_bradley_terry.py",
    ),
    Fault(
        "Bradley-Terry: weighted sum over the number of pairs",
        _BT,
        "(weight_T * bt_log_prob(r_w, r_l)).sum() / weight_T.sum()",
        "(weight_T * bt_log_prob(r_w, r_l)).mean()",
        "tests/equations/test_bradley_terry.py",
    ),
    Fault(
        "Plackett-Luce: drawn from the worst end",
        _BT,
        "rest = torch.logcumsumexp(rewards.flip(-1), dim=-1).flip(-1)",
        "rest = torch.logcumsumexp(rewards, dim=-1)",
        "tests/equations/test_bradley_terry.py",
    ),
    Fault(
        "interval of a share: the normal one, which leaves [0, 1]",
        _STATS,
        "half = z * math.sqrt(share * (1 - share) / n_eff + z**2 / (4 * n_eff**2)) / shrink",
        "half = z * math.sqrt(share * (1 - share) / n_eff)",
        "tests/equations/test_stats.py -k score_test",
    ),
    Fault(
        "interval of a mean: normal quantile for few values",
        _STATS,
        "half = _t_quantile(quantile, groups - 1) * _standard_error",
        "half = NORMAL.inv_cdf(quantile) * _standard_error",
        "tests/equations/test_stats.py -k tabulated",
    ),
    Fault(
        "bootstrap: answers to one prompt are taken for independent",
        _STATS,
        "owner_N, groups = owners(len(difference_N), clusters)",
        "owner_N, groups = owners(len(difference_N), None)",
        "tests/equations/test_stats.py -k clusters",
    ),
    Fault(
        "labels of the world: flipped at twice the rate",
        _WORLD,
        "return (1 - 2 * self.flip) * clean + self.flip",
        "return (1 - 4 * self.flip) * clean + 2 * self.flip",
        "tests/worlds/test_enumerable_world.py -k their_formulas",
    ),
    Fault(
        "labels of the world: the length pays on the wrong side",
        _WORLD,
        "return self.scale * rewards + self.length_bias * letters",
        "return self.scale * rewards - self.length_bias * letters",
        "tests/worlds/test_enumerable_world.py -k their_formulas",
    ),
    Fault(
        "enumeration: temperature multiplies the logits",
        _LAW,
        "level.double() / temperature",
        "level.double() * temperature",
        "tests/theory/test_enumerable.py -k temperature",
    ),
    Fault(
        "sampling: the temperature of scoring and of sampling differ",
        "src/preftune/models/generate.py",
        "probs = torch.softmax(logits_BV.double() / temperature, dim=-1)",
        "probs = torch.softmax(logits_BV.double(), dim=-1)",
        "tests/models/test_generate.py -k distribution",
    ),
    Fault(
        "sampling: logits that are no law make a token",
        "src/preftune/models/generate.py",
        "if not all(map(math.isfinite, told))",
        "if not told",
        "tests/models/test_generate.py -k no_law",
    ),
]
