"""Faults of the losses without a reference: sums for means, unstable logarithms, terms that other tools define anew."""

from fault import Fault

FILE = "src/preftune/equations/reference_free.py"
CONTRACT = "tests/claims/test_losses.py -k "
CLAIMS = "tests/equations/test_reference_free.py"

FAULTS = [
    Fault(
        "simpo: gamma is multiplied by beta",
        FILE,
        "(_mean(pairs)[0] - _mean(pairs)[1]) - gamma)",
        "(_mean(pairs)[0] - _mean(pairs)[1] - gamma))",
        CONTRACT + "simpo",
    ),
    Fault(
        "simpo: reward without beta",
        FILE,
        "    return beta * responses.policy / responses.length\n",
        "    return responses.policy / responses.length\n",
        CONTRACT + "simpo",
    ),
    Fault(
        "means per token: the chosen response's length divides both",
        FILE,
        "pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length",
        "pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.chosen_length",
        CONTRACT + "simpo",
    ),
    Fault(
        "means per token: sums",
        FILE,
        "pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length",
        "pairs.chosen, pairs.rejected",
        CONTRACT + "simpo",
    ),
    Fault(
        "alphapo: powers of probabilities of whole sequences",
        FILE,
        "    p_w, p_l = _mean(pairs)\n    return -logsigmoid(beta * (power_log(p_w, alpha)",
        "    p_w, p_l = pairs.chosen, pairs.rejected\n    return -logsigmoid(beta * (power_log(p_w, alpha)",
        CONTRACT + "alphapo",
    ),
    Fault(
        "nll: mean over the tokens of the micro-batch",
        FILE,
        "    return -_mean(pairs)[0]\n",
        "    return -pairs.chosen / pairs.chosen_length.mean()\n",
        CONTRACT + "nll",
    ),
    Fault(
        "cpo: the likelihood term is a sum over tokens",
        FILE,
        "(pairs.chosen - pairs.rejected)) + nll_weight * nll(pairs)",
        "(pairs.chosen - pairs.rejected)) - nll_weight * pairs.chosen",
        CONTRACT + "cpo",
    ),
    Fault(
        "cpo: a switch brings the reference back",
        FILE,
        "-logsigmoid(beta * (pairs.chosen - pairs.rejected)) +",
        "-logsigmoid(beta * (pairs.chosen_log_ratio - pairs.rejected_log_ratio)) +",
        CONTRACT + "cpo",
    ),
    Fault(
        "slic_hf: the likelihood term is a constant margin",
        FILE,
        "relu(delta - (pairs.chosen - pairs.rejected)) - nll_weight * pairs.chosen",
        "relu(delta - (pairs.chosen - pairs.rejected)) - nll_weight * pairs.chosen.detach()",
        CONTRACT + "slic_hf",
    ),
    Fault(
        "orpo: log(1 - e^p) formed naively",
        FILE,
        "torch.where(p > -math.log(2.0), torch.log(-torch.expm1(p)), torch.log1p(-torch.exp(p)))",
        "torch.log1p(-torch.exp(p))",
        CLAIMS,
    ),
    Fault(
        "orpo: no limit at p = 0",
        FILE,
        "    p = p.clamp(max=MEAN_LOGP_LIMIT)\n",
        "",
        CLAIMS,
    ),
    Fault(
        "orpo: ratio of probabilities in place of odds",
        FILE,
        "logsigmoid(log_odds(p_w) - log_odds(p_l))",
        "logsigmoid(p_w - p_l)",
        CONTRACT + "orpo",
    ),
    Fault(
        "orpo: the odds term rewards what it should penalise",
        FILE,
        "-p_w - odds_weight * logsigmoid",
        "-p_w + odds_weight * logsigmoid",
        CONTRACT + "orpo",
    ),
    Fault(
        "unlikelihood: alpha weighs the chosen response",
        FILE,
        "-pairs.chosen + alpha * pairs.rejected",
        "-alpha * pairs.chosen + pairs.rejected",
        CONTRACT + "unlikelihood",
    ),
]
