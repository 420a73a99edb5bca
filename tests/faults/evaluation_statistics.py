"""Intervals, win rates, ratings and plans that are plausible and wrong."""

from __future__ import annotations

from fault import Fault

_STATS = "src/preftune/equations/stats.py"
_RATE = "src/preftune/evaluation/win_rate.py"
_LENGTH = "src/preftune/evaluation/length_control.py"
_BOARD = "src/preftune/evaluation/leaderboard.py"
_POWER = "src/preftune/evaluation/power.py"
_AGREEMENT = "src/preftune/judges/agreement.py"
_CLAIMS = "tests/equations/test_resampling.py"

FAULTS = [
    Fault(
        "share: a cluster counts as many independent verdicts as it holds",
        _STATS,
        "    if groups == n:\n        return wilson",
        "    if groups > 1:\n        return wilson",
        f"{_CLAIMS} -k 'share'",
    ),
    Fault(
        "share: opposed verdicts of a cluster count for more than their number",
        _STATS,
        "min(n, p * (1 - p) / variance)",
        "p * (1 - p) / variance",
        "tests/equations/test_calibration.py tests/evaluation/test_win_rate.py tests/equations/test_resampling.py",
    ),
    Fault(
        "mean of shares: no surer than as many verdicts",
        _STATS,
        "n_eff = p * (1 - p) / variance if variance >",
        "n_eff = min(len(share_N), p * (1 - p) / variance) if variance >",
        "tests/equations/test_stats.py -k mean_of_shares",
    ),
    Fault(
        "mean of shares: where nothing varies it is known exactly",
        _STATS,
        "if variance > 1e-24 else float(groups)",
        "if variance > 1e-24 else math.inf",
        "tests/equations/test_stats.py -k without_spread",
    ),
    Fault(
        "mean of shares: that of different words has the interval of any mean",
        "src/preftune/parts/measuring.py",
        "mean_share([row.distinct for row in rows], clusters=prompts)",
        "mean_interval([row.distinct for row in rows], clusters=prompts)",
        "tests/parts/test_measuring.py",
    ),
    Fault(
        "mean: the spread between clusters without G / (G - 1)",
        _STATS,
        "groups / (groups - 1) * float((sums_G**2).sum())",
        "float((sums_G**2).sum())",
        "tests/equations/test_stats.py -k t_interval",
    ),
    Fault(
        "bca: the acceleration has the wrong sign",
        _STATS,
        "pull = left_out.mean() - left_out",
        "pull = left_out - left_out.mean()",
        f"{_CLAIMS} -k bca",
    ),
    Fault(
        "holm: adjusted p-values may fall",
        _STATS,
        "np.maximum.accumulate(np.arange(len(p_M), 0, -1) * p_M[order_M])",
        "np.arange(len(p_M), 0, -1) * p_M[order_M]",
        f"{_CLAIMS} -k holm",
    ),
    Fault(
        "equivalence: the better of the two one-sided tests decides",
        _STATS,
        "p = max(1 - _one_sided",
        "p = min(1 - _one_sided",
        f"{_CLAIMS} -k equivalence",
    ),
    Fault(
        "win rate: a turned match keeps its outcome",
        _RATE,
        "outcome=_TURNED.get(self.outcome, self.outcome)",
        "outcome=self.outcome",
        "tests/evaluation/test_win_rate.py",
    ),
    Fault(
        "win rate: both bad is a loss of the first model",
        _RATE,
        '"both_bad": 0.5, "skip": math.nan}',
        '"both_bad": 0.0, "skip": math.nan}',
        "tests/evaluation/test_win_rate.py",
    ),
    Fault(
        "length control: s of the first sample for every resample",
        _LENGTH,
        "s_R1 = np.sqrt((weights_RN * (longer_N - mean_R1) ** 2).sum(1, keepdims=True) / n_R1)",
        "s_R1 = np.full_like(n_R1, longer_N.std())",
        "tests/evaluation/test_length_control.py -k weights",
    ),
    Fault(
        "length control: predicted at the mean difference, not at equal length",
        _LENGTH,
        "x_RN = np.tanh(np.divide(longer_N,",
        "x_RN = np.tanh(np.divide(longer_N - mean_R1,",
        "tests/evaluation/test_length_control.py -k 'planted or posterior'",
    ),
    Fault(
        "leaderboard: a model that never lost has a finite end",
        _BOARD,
        "high_K = np.where(reach_KK[fixed], high_K, math.inf)",
        "high_K = np.where(reach_KK[fixed], high_K, high_K)",
        "tests/evaluation/test_leaderboard.py -k 'unbounded or islands'",
    ),
    Fault(
        "leaderboard: being in one weak component is being connected",
        _BOARD,
        "both_KK = reach_KK & reach_KK.T",
        "both_KK = reach_KK | reach_KK.T",
        "tests/evaluation/test_leaderboard.py",
    ),
    Fault(
        "power: ties vary like coins",
        _POWER,
        "    variance = (1 - ties) / 4",
        "    variance = 1 / 4",
        "tests/evaluation/test_power.py -k ties",
    ),
    Fault(
        "power: the pooled spread of one arm",
        _POWER,
        "math.sqrt(2 * pooled * (1 - pooled))",
        "math.sqrt(pooled * (1 - pooled))",
        "tests/evaluation/test_power.py -k 'published or shares'",
    ),
    Fault(
        "agreement: verdicts of one prompt are independent",
        _AGREEMENT,
        "share(found, clusters=prompts)",
        "share(found)",
        "tests/judges/test_agreement.py -k one_prompt",
    ),
    Fault(
        "ratio: its denominator is taken for known",
        "src/preftune/equations/stats.py",
        "ratio + (above_N - ratio * below_N) / below_N.mean()",
        "above_N / below_N.mean()",
        "tests/evaluation/test_coverage.py -k ratio_interval",
    ),
    Fault(
        "length: answers to one prompt are taken for independent",
        "src/preftune/evaluation/drift.py",
        "len(fit_N2), clusters=clusters, resamples",
        "len(fit_N2), resamples",
        "tests/evaluation/test_coverage.py -k 'slope or explained'",
    ),
    Fault(
        "agreement: items of one prompt are taken for independent",
        "src/preftune/judges/agreement.py",
        "return bootstrap(weighted, n, clusters=clusters,",
        "return bootstrap(weighted, n, clusters=None,",
        "tests/judges/test_agreement.py -k one_prompt",
    ),
    Fault(
        "power: ties are left out of what a win rate takes",
        _POWER,
        "prompts_needed(win_rate_design(rate.estimate, ties), power, alpha)",
        "prompts_needed(win_rate_design(rate.estimate), power, alpha)",
        "tests/evaluation/test_power.py -k how_many_prompts_it_takes",
    ),
    Fault(
        "power: what is told from half already is asked for more prompts",
        _POWER,
        "if not rate.low <= 0.5 <= rate.high",
        "if not rate.low <= rate.high",
        "tests/evaluation/test_power.py -k how_many_prompts_it_takes",
    ),
]
