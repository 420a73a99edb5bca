"""Faults of f-DPO and chi-PO: wrong directions, missing or one-sided clamps, the wrong divergence."""

from fault import Fault

FILE = "src/preftune/equations/divergences.py"
CONTRACT = "tests/claims/test_losses.py -k "
CLAIMS = "tests/equations/test_divergences.py"

FAULTS = [
    Fault(
        "fdpo_alpha: alpha runs the other way, as TRL's coefficient does",
        FILE,
        "power_log(pairs.chosen_log_ratio, alpha) - power_log(pairs.rejected_log_ratio, alpha)",
        "power_log(pairs.chosen_log_ratio, 1 - alpha) - power_log(pairs.rejected_log_ratio, 1 - alpha)",
        CLAIMS,
    ),
    Fault(
        "powers of u: no clamp of the exponent, as in the authors' code of f-DPO",
        FILE,
        "torch.where(exponent > EXPONENT_LIMIT, EXPONENT_LIMIT, exponent)",
        "exponent",
        CONTRACT + "fdpo_forward_kl",
    ),
    Fault(
        "powers of u: no gradient at the limit itself, as by the clamp of torch 2.15",
        FILE,
        "torch.where(exponent > EXPONENT_LIMIT, EXPONENT_LIMIT, exponent)",
        "torch.where(exponent >= EXPONENT_LIMIT, EXPONENT_LIMIT, exponent)",
        "tests/equations/test_divergences.py -k below_the_limit",
    ),
    Fault(
        "powers of u: the weights go on growing where the value is clamped",
        FILE,
        "torch.where(exponent <= EXPONENT_LIMIT, slope, torch.zeros_like(slope))",
        "slope",
        CONTRACT + "fdpo_forward_kl",
    ),
    Fault(
        "powers of u: the division by alpha is dropped",
        FILE,
        "EXPONENT_LIMIT, exponent)) / alpha",
        "EXPONENT_LIMIT, exponent))",
        CONTRACT + "fdpo_alpha",
    ),
    Fault(
        "powers of u: the limit alpha = 0 is computed by the formula, 0 / 0",
        FILE,
        "    if alpha == 0:\n        return log_u\n",
        "",
        CONTRACT + "fdpo_alpha",
    ),
    Fault(
        "forward KL is reverse KL: the flag of the divergence is dead",
        FILE,
        "    return fdpo_alpha(pairs, beta=beta, alpha=1.0)",
        "    return fdpo_alpha(pairs, beta=beta, alpha=0.0)",
        CONTRACT + "fdpo_forward_kl",
    ),
    Fault(
        "JS: the weights of chosen and rejected response are exchanged",
        FILE,
        "pull_T * torch.sigmoid(-a), pull_T * torch.sigmoid(-b)",
        "pull_T * torch.sigmoid(-b), pull_T * torch.sigmoid(-a)",
        CONTRACT + "fdpo_js",
    ),
    Fault(
        "JS: the margin is taken of the probabilities, not of their logarithms",
        FILE,
        "beta * (logsigmoid(pairs.chosen_log_ratio) - logsigmoid(pairs.rejected_log_ratio))",
        "beta * (torch.sigmoid(pairs.chosen_log_ratio) - torch.sigmoid(pairs.rejected_log_ratio))",
        CONTRACT + "fdpo_js",
    ),
    Fault(
        "chi-PO: only the upper side is clipped",
        FILE,
        "_chipo_margin(pairs, beta).clamp(-2 * r_max, 2 * r_max)",
        "_chipo_margin(pairs, beta).clamp(max=2 * r_max)",
        CONTRACT + "chipo",
    ),
    Fault(
        "chi-PO: clipped at r_max instead of 2 r_max",
        FILE,
        "_chipo_margin(pairs, beta).clamp(-2 * r_max, 2 * r_max)",
        "_chipo_margin(pairs, beta).clamp(-r_max, r_max)",
        CONTRACT + "chipo",
    ),
    Fault(
        "chi-PO: pure chi-squared, the logarithm that keeps every response possible is left out",
        FILE,
        "return power_log(log_u, -1.0) + log_u",
        "return power_log(log_u, -1.0)",
        CONTRACT + "chipo",
    ),
    Fault(
        "chi-PO: the weights pull beyond the clip",
        FILE,
        "torch.where(z.abs() <= 2 * r_max, beta * torch.sigmoid(-z), torch.zeros_like(z))",
        "beta * torch.sigmoid(-z)",
        CONTRACT + "chipo",
    ),
]
