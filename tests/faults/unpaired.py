"""Faults of KTO and BCO: another reference point, gradient through it, class weights mixed up, state dropped."""

from fault import Fault

FILE = "src/preftune/equations/unpaired.py"
CONTRACT = "tests/claims/test_labelled_losses.py"
CLAIMS = "tests/equations/test_unpaired.py"

FAULTS = [
    Fault(
        "kto: z0 may be negative, although it estimates a KL divergence",
        FILE,
        "    return mismatched.mean().clamp(min=0)",
        "    return mismatched.mean()",
        CLAIMS,
    ),
    Fault(
        "kto: every mismatched log-ratio is clamped before the mean",
        FILE,
        "    return mismatched.mean().clamp(min=0)",
        "    return mismatched.clamp(min=0).mean()",
        CLAIMS,
    ),
    Fault(
        "kto: z0 is the mean of the non-zero log-ratios",
        FILE,
        "    return mismatched.mean().clamp(min=0)",
        "    return (mismatched.sum() / (mismatched != 0).sum().clamp(min=1)).clamp(min=0)",
        CLAIMS,
    ),
    Fault(
        "kto: gradient flows through z0",
        FILE,
        "    mismatched = responses.mismatched_log_ratio.detach()",
        "    mismatched = responses.mismatched_log_ratio",
        CONTRACT,
    ),
    Fault(
        "kto: z0 from the responses themselves instead of mismatched ones",
        FILE,
        "    mismatched = responses.mismatched_log_ratio.detach()",
        "    mismatched = responses.log_ratio.detach()",
        CONTRACT,
    ),
    Fault(
        "kto: without a mismatched response z0 is silently 0",
        FILE,
        "        if len(responses.log_ratio):",
        "        if len(responses.log_ratio) < 0:",
        CLAIMS,
    ),
    Fault(
        "kto: the weights of the two classes are exchanged",
        FILE,
        "    scale_U = torch.full_like(side_U, undesirable).masked_fill(responses.desirable, desirable)\n"
        "    return scale_U",
        "    scale_U = torch.full_like(side_U, desirable).masked_fill(responses.desirable, undesirable)\n"
        "    return scale_U",
        CONTRACT,
    ),
    Fault(
        "kto: logistic loss instead of the bounded value function",
        FILE,
        "    return scale_U * torch.sigmoid(-beta * side_U * (responses.log_ratio - _kl_estimate(responses)))",
        "    return -scale_U * logsigmoid(beta * side_U * (responses.log_ratio - _kl_estimate(responses)))",
        CONTRACT,
    ),
    Fault(
        "kto: beta is left out of the value function",
        FILE,
        "    return scale_U * torch.sigmoid(-beta * side_U * (responses.log_ratio - _kl_estimate(responses)))",
        "    return scale_U * torch.sigmoid(-side_U * (responses.log_ratio - _kl_estimate(responses))) + 0 * beta",
        CONTRACT,
    ),
    Fault(
        "bco: the running mean is dropped",
        FILE,
        "    logit_U = beta * responses.log_ratio - running_mean(reward_sum, reward_count)\n    return -logsigmoid",
        "    logit_U = beta * responses.log_ratio\n    return -logsigmoid",
        CONTRACT,
    ),
    Fault(
        "bco: the mean is of log-ratios, not of rewards",
        FILE,
        "    rewards = beta * responses.log_ratio.double()",
        "    rewards = responses.log_ratio.double()",
        CLAIMS,
    ),
    Fault(
        "bco: only the last step's rewards are remembered",
        FILE,
        '    return {"reward_sum": reward_sum + float(rewards.sum()), "reward_count": reward_count + len(rewards)}',
        '    return {"reward_sum": float(rewards.sum()), "reward_count": float(len(rewards))}',
        CONTRACT,
    ),
]
