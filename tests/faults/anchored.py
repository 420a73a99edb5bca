"""Seeded faults of the losses that hold each log-ratio to its own target."""

from __future__ import annotations

from fault import Fault

_FILE = "src/preftune/equations/anchored.py"


def _contract(name: str) -> str:
    return f"tests/claims/test_losses.py -k {name}"


FAULTS = [
    Fault(
        "sppo: half the sum",
        _FILE,
        "return (pairs.chosen_log_ratio - 1 / (2 * beta)) ** 2 + (pairs.rejected_log_ratio + 1 / (2 * beta)) ** 2",
        "return ((pairs.chosen_log_ratio - 0.5 / beta) ** 2 + (pairs.rejected_log_ratio + 0.5 / beta) ** 2) / 2",
        tests=_contract("sppo"),
    ),
    Fault(
        "sppo: target of one over beta",
        _FILE,
        "(pairs.chosen_log_ratio - 1 / (2 * beta)) ** 2",
        "(pairs.chosen_log_ratio - 1 / beta) ** 2",
        tests=_contract("sppo"),
    ),
    Fault(
        "sppo: both responses held to the winner's target",
        _FILE,
        "(pairs.rejected_log_ratio + 1 / (2 * beta)) ** 2",
        "(pairs.rejected_log_ratio - 1 / (2 * beta)) ** 2",
        tests=_contract("sppo"),
    ),
    Fault(
        "cal_dpo: beta in the sigmoid",
        _FILE,
        "return calibration * sppo(pairs, beta=beta) - logsigmoid(gap)",
        "return calibration * sppo(pairs, beta=beta) - logsigmoid(beta * gap)",
        tests=_contract("cal_dpo"),
    ),
    Fault(
        "cal_dpo: squares not halved",
        _FILE,
        "return calibration * sppo(pairs, beta=beta) - logsigmoid(gap)",
        "return sppo(pairs, beta=beta) - logsigmoid(gap)",
        tests=_contract("cal_dpo"),
    ),
    Fault(
        "cal_dpo: squares averaged over the batch",
        _FILE,
        "return calibration * sppo(pairs, beta=beta) - logsigmoid(gap)",
        "return calibration * sppo(pairs, beta=beta).mean() - logsigmoid(gap)",
        tests=_contract("cal_dpo"),
    ),
    Fault(
        "nca: no noise from the chosen response, unbounded (biasedNCA)",
        _FILE,
        "return -logsigmoid(r_w) - (logsigmoid(-r_w) + logsigmoid(-r_l)) / 2",
        "return -logsigmoid(r_w) - logsigmoid(-r_l)",
        tests=_contract("nca"),
    ),
    Fault(
        "nca: noise summed instead of averaged over responses",
        _FILE,
        "return -logsigmoid(r_w) - (logsigmoid(-r_w) + logsigmoid(-r_l)) / 2",
        "return -logsigmoid(r_w) - (logsigmoid(-r_w) + logsigmoid(-r_l))",
        tests=_contract("nca"),
    ),
    Fault(
        "nca: weights that never pull a chosen response back",
        _FILE,
        "return beta * (torch.sigmoid(-r_w) - torch.sigmoid(r_w) / 2), beta",
        "return beta * torch.sigmoid(-r_w) / 2, beta",
        tests=_contract("nca"),
    ),
    Fault(
        "apo_zero: rejected response raised",
        _FILE,
        "+ torch.sigmoid(beta * pairs.rejected_log_ratio)",
        "+ torch.sigmoid(-beta * pairs.rejected_log_ratio)",
        tests=_contract("apo_zero"),
    ),
    Fault(
        "apo_down: chosen response raised, which is APO-zero's half",
        _FILE,
        "return torch.sigmoid(beta * pairs.chosen_log_ratio) + torch.sigmoid(-z)",
        "return torch.sigmoid(-beta * pairs.chosen_log_ratio) + torch.sigmoid(-z)",
        tests=_contract("apo_down"),
    ),
    Fault(
        "apo_down: rejected response anchored instead of compared",
        _FILE,
        "return torch.sigmoid(beta * pairs.chosen_log_ratio) + torch.sigmoid(-z)",
        "return torch.sigmoid(beta * pairs.chosen_log_ratio) + torch.sigmoid(beta * pairs.rejected_log_ratio)",
        tests=_contract("apo_down"),
    ),
]
