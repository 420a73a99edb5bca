"""Drawn labels that are not drawn as they say; a page that serves nothing."""

from __future__ import annotations

from fault import Fault

_SCORES = "src/preftune/judges/scores.py"
_SERVE = "src/preftune/web/serve.py"
_TESTS = "tests/judges/test_drawn_labels.py -k"
_PAGE = "tests/web/test_serve.py -k nothing_to_label"

FAULTS = [
    Fault(
        "drawn labels: the temperature multiplies the difference",
        _SCORES,
        "(a.score - b.score) / self.temperature / 2",
        "(a.score - b.score) * self.temperature / 2",
        f"{_TESTS} sigmoid",
    ),
    Fault(
        "drawn labels: half the difference, as tanh has it",
        _SCORES,
        "(a.score - b.score) / self.temperature / 2",
        "(a.score - b.score) / self.temperature",
        f"{_TESTS} sigmoid",
    ),
    Fault(
        "drawn labels: the seed draws nothing",
        _SCORES,
        "chance(self.name, self.seed, said.prompt, one, other)",
        "chance(self.name, said.prompt, one, other)",
        f"{_TESTS} another_seed",
    ),
    Fault(
        "drawn labels: a swapped question is drawn with the other side's chance",
        _SCORES,
        "(p if one == a.text else 1 - p)",
        "p",
        f"{_TESTS} 'sigmoid or another_seed'",
    ),
    Fault(
        "drawn labels: the command draws at temperature 1 whatever it was told",
        "src/preftune/parts/judging.py",
        "DrawnJudge(drawn, score, cfg.label_temperature, cfg.seed)",
        "DrawnJudge(drawn, score, 1.0, cfg.seed)",
        f"{_TESTS} command",
    ),
    Fault(
        "export: a slip in the name of the store makes an empty one",
        "src/preftune/web/transfer.py",
        "Store.open(options.db, new=False)",
        "Store.open(options.db)",
        "tests/web/test_serve.py -k not_there",
    ),
    Fault("page: a slip in the name makes a store", _SERVE, ", new=bool(samples or gold)", "", _PAGE),
    Fault("page: a store without items is served", _SERVE, "if store.is_empty():", "if False:", _PAGE),
]
