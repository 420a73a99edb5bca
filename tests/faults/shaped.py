"""Seeded faults of the losses of the gap through another shape, offset or weight, and of the mean per token."""

from __future__ import annotations

from fault import Fault

_FILE = "src/preftune/equations/shaped.py"
_MEAN = "src/preftune/equations/length_normalised.py"


def _contract(name: str) -> str:
    return f"tests/claims/test_losses.py -k {name}"


FAULTS = [
    Fault(
        "exo: log(1 - e) taken for 0",
        _FILE,
        "to_label = logsigmoid(z) - math.log1p(-label_smoothing)",
        "to_label = logsigmoid(z)",
        tests=_contract("exo"),
    ),
    Fault(
        "exo: KL from label to model, which is conservative DPO",
        _FILE,
        "return torch.sigmoid(z) * to_label + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(label_smoothing))",
        "return -(1 - label_smoothing) * to_label - label_smoothing * (logsigmoid(-z) - math.log(label_smoothing))",
        tests=_contract("exo"),
    ),
    Fault(
        "exo: no smoothing accepted, an infinite loss",
        _FILE,
        "def exo(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: OpenSmoothing = 1e-3)",
        "def exo(pairs: PairLogps, *, beta: Positive = 0.1, label_smoothing: NonNegative = 1e-3)",
        tests="tests/equations/test_shaped.py -k refused",
    ),
    Fault(
        "discopop: modulated by D, tau ignored",
        _FILE,
        "return torch.exp(logsigmoid(z / tau) - z) - torch.sigmoid(-z / tau) * logsigmoid(z)",
        "return torch.exp(logsigmoid(z / beta) - z) - torch.sigmoid(-z / beta) * logsigmoid(z)",
        tests=_contract("discopop"),
    ),
    Fault(
        "discopop: exp(-z) and s(z / tau) multiplied, 0 times infinity on wrong pairs",
        _FILE,
        "return torch.exp(logsigmoid(z / tau) - z) -",
        "return torch.exp(-z) * torch.sigmoid(z / tau) -",
        tests=_contract("discopop"),
    ),
    Fault(
        "rdpo: length rewarded instead of charged",
        _FILE,
        "+ alpha * (pairs.chosen_length - pairs.rejected_length))",
        "- alpha * (pairs.chosen_length - pairs.rejected_length))",
        tests=_contract("rdpo"),
    ),
    Fault(
        "rdpo: alpha multiplied by beta",
        _FILE,
        "+ alpha * (pairs.chosen_length - pairs.rejected_length))",
        "+ beta * alpha * (pairs.chosen_length - pairs.rejected_length))",
        tests=_contract("rdpo"),
    ),
    Fault(
        "odpo: offset cut at zero, plain DPO for scores in [0, 1]",
        _FILE,
        "_margin(pairs, beta) - torch.xlogy(alpha, relu(_score_gap(pairs))))",
        "_margin(pairs, beta) - torch.xlogy(alpha, _score_gap(pairs).clamp(min=1)))",
        tests=_contract("odpo"),
    ),
    Fault(
        "odpo: logarithm of a negative gap",
        _FILE,
        "_margin(pairs, beta) - torch.xlogy(alpha, relu(_score_gap(pairs))))",
        "_margin(pairs, beta) - alpha * _score_gap(pairs).log())",
        tests="tests/equations/test_shaped.py -k odpo",
    ),
    Fault(
        "margin_dpo: margin multiplied by beta",
        _FILE,
        "return -logsigmoid(_margin(pairs, beta) - alpha * _score_gap(pairs))",
        "return -logsigmoid(_margin(pairs, beta) - beta * alpha * _score_gap(pairs))",
        tests=_contract("margin_dpo"),
    ),
    Fault(
        "margin_dpo: pairs without scores taken for ties",
        _FILE,
        "    return pairs.score_gap\n",
        "    return pairs.score_gap.nan_to_num(0.0)\n",
        tests=_contract("margin_dpo"),
    ),
    Fault(
        "dpop: penalty outside the sigmoid",
        _FILE,
        "return -logsigmoid(_margin(pairs, beta) - beta * penalty * below)",
        "return -logsigmoid(_margin(pairs, beta)) + beta * penalty * below",
        tests=_contract("dpop"),
    ),
    Fault(
        "dpop: a rise of the chosen log-prob punished",
        _FILE,
        "below = relu(-pairs.chosen_log_ratio)",
        "below = relu(pairs.chosen_log_ratio)",
        tests=_contract("dpop"),
    ),
    Fault(
        "xpo: optimism turned into pessimism",
        _FILE,
        "    return optimism - logsigmoid(_margin(pairs, beta))",
        "    return -optimism - logsigmoid(_margin(pairs, beta))",
        tests=_contract("xpo"),
    ),
    Fault(
        "xpo: only the chosen response taken for the reference's",
        _FILE,
        "optimism = alpha * (pairs.chosen_log_ratio + pairs.rejected_log_ratio) / 2",
        "optimism = alpha * pairs.chosen_log_ratio",
        tests=_contract("xpo"),
    ),
    Fault(
        "ln_dpo: the gap of sums over one length",
        _MEAN,
        "pairs.rejected_log_ratio / pairs.rejected_length",
        "pairs.rejected_log_ratio / pairs.chosen_length",
        tests=_contract("ln_dpo"),
    ),
    Fault(
        "ln_dpo: the beta of DPO",
        _MEAN,
        "def ln_dpo(pairs: PairLogps, *, beta: Positive = 5.0)",
        "def ln_dpo(pairs: PairLogps, *, beta: Positive = 0.1)",
        tests="tests/equations/test_loss_table.py -k defaults",
    ),
]
