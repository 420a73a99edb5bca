"""Faults of AOT, beta-DPO and BCO on pairs: nothing sorted, statistics of the wrong thing, state dropped or torn."""

from fault import Fault

FILE = "src/preftune/equations/whole_step.py"
CONTRACT = "tests/claims/test_losses.py -k 'aot or beta_dpo or bco_pair'"
CLAIMS = "tests/equations/test_whole_step.py"

FAULTS = [
    Fault(
        "aot_unpaired: sorts one list only, so every pair is compared with itself",
        FILE,
        "    return upper - lower.sort(stable=True).values[_rank(upper)]",
        "    return upper - lower",
        CONTRACT,
    ),
    Fault(
        "aot: sorts in opposite directions",
        FILE,
        "R.sort(stable=True).values[_rank(log_ratio.detach() + R)]",
        "R.sort(stable=True, descending=True).values[_rank(log_ratio.detach() + R)]",
        CLAIMS,
    ),
    Fault(
        "aot: ranks pairs by their log-ratio instead of the policy's own gap",
        FILE,
        "[_rank(log_ratio.detach() + R)]",
        "[_rank(log_ratio.detach())]",
        CONTRACT,
    ),
    Fault(
        "aot: the values come out in sorted order, beside other pairs' weights",
        FILE,
        "    return values.argsort(stable=True).argsort()",
        "    return values.argsort(stable=True)",
        CONTRACT,
    ),
    Fault(
        "aot: label smoothing is accepted and ignored",
        FILE,
        "    z = beta * _dominance(pairs)\n"
        "    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)",
        "    return -logsigmoid(beta * _dominance(pairs))",
        CONTRACT,
    ),
    Fault(
        "aot_unpaired: the pull on a rejected response is that of its own pair, not of its match",
        FILE,
        "    return weight_T, by_rank[_rank(b)]",
        "    return weight_T, weight_T",
        CONTRACT,
    ),
    Fault(
        "beta_dpo: margins without beta, as the authors' code has them",
        FILE,
        "    M = beta * gap.double()",
        "    M = gap.double()",
        CONTRACT,
    ),
    Fault(
        "beta_dpo: threshold and spread move by margins without beta",
        FILE,
        "    M = beta * _gap(pairs).double()",
        "    M = _gap(pairs).double()",
        CLAIMS,
    ),
    Fault(
        "beta_dpo: the draw takes whatever random number comes next, so a resumed run draws others",
        FILE,
        "clock.exponential_(generator=torch.Generator().manual_seed(int(step)))",
        "clock.exponential_()",
        CLAIMS,
    ),
    Fault(
        "beta_dpo: dropped pairs stay in the denominator",
        FILE,
        "index_fill(0, kept, total / len(kept))",
        "index_fill(0, kept, 1.0)",
        CLAIMS,
    ),
    Fault(
        "beta_dpo: a step of bad margins reverses the labels, beta has no lower end",
        FILE,
        "max(beta_step, LEAST_BETA)",
        "beta_step",
        CLAIMS,
    ),
    Fault(
        "beta_dpo: keeps the outliers and drops the usual pairs",
        FILE,
        "topk(max(1, round(keep * total)), largest=False)",
        "topk(max(1, round(keep * total)), largest=True)",
        CLAIMS,
    ),
    Fault(
        "beta_dpo: divides by a spread of zero at the start",
        FILE,
        "    if spread > 0:\n        log_ring",
        "    if True:\n        log_ring",
        CONTRACT,
    ),
    Fault(
        "bco_pair: the running mean is dropped, d = 0 for ever",
        FILE,
        "    d = running_mean(reward_sum, reward_count)\n    return -logsigmoid(",
        "    d = 0.0\n    return -logsigmoid(",
        CONTRACT,
    ),
    Fault(
        "bco_pair: d is the mean reward of the chosen side only",
        FILE,
        "torch.cat([pairs.chosen_log_ratio, pairs.rejected_log_ratio]).double()",
        "pairs.chosen_log_ratio.double()",
        CLAIMS,
    ),
    Fault(
        "bco_pair: DPO's formula under BCO's name, as one documentation prints it",
        FILE,
        "    return -logsigmoid(beta * pairs.chosen_log_ratio - d) - logsigmoid(d - beta * pairs.rejected_log_ratio)",
        "    return -logsigmoid(beta * _gap(pairs)) + 0 * d",
        CONTRACT,
    ),
]
