"""Our losses as settings of TRL 1.16.0: for each loss that it has, the knobs and arguments that must give one value.

Written out by hand from both documentations, so that no translation hides in code. What differs even so is pinned in
`test_trl_disagreements` and `test_trl_limits`; a loss that is not here has no counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["MATCHES", "Match", "Trainer"]

Trainer = Literal["DPO", "KTO", "CPO", "ORPO", "OnlineDPO"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """`factor` times the loss of `trainer` with `settings` is ours with `knobs`."""

    trainer: Trainer = "DPO"
    settings: Mapping[str, object]
    knobs: Mapping[str, float] = field(default_factory=dict)
    factor: float = 1.0
    alone: bool = False
    """Only in micro-batches of one pair: TRL mixes the rows of a micro-batch."""
    bare: bool = False
    """Only where the prompt is one token: TRL's loss reads the others."""
    single: bool = False
    """In float32, because TRL refuses float64."""

    def __str__(self) -> str:
        """As docs/parity.md spells it."""
        told = [f"{name}={_spelled(value)}" for name, value in self.settings.items()]
        factor = "" if self.factor == 1 else f"{self.factor:.6g} x "
        conditions = ", one pair at a time" * self.alone + ", prompt of one token" * self.bare
        return f"{factor}`{self.trainer}({', '.join(told)})`{conditions}"


def _spelled(value: object) -> str:
    if isinstance(value, list):
        return _spelled(value[0]) if len(value) == 1 else f"[{', '.join(map(_spelled, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _dpo(loss_type: str | list[str], **settings: object) -> dict[str, object]:
    return {"loss_type": [loss_type] if isinstance(loss_type, str) else loss_type, **settings}


FLIPPED = 1 / (1 + math.exp(2.0))
"""s(-2): the chance of the worse of two responses whose scores are 1 and 0 at temperature 1/2."""
SWAP = 1 / math.log(2.0) - 1 / math.log(3.0)
"""LiPO's weight of the pair (1, 0): gains 1 and 0, places 1 and 2."""

MATCHES: dict[str, Match] = {
    "dpo": Match(settings=_dpo("sigmoid", beta=0.3), knobs={"beta": 0.3}),
    "cdpo": Match(
        settings=_dpo("aot", beta=0.3, label_smoothing=0.2), knobs={"beta": 0.3, "label_smoothing": 0.2}, alone=True
    ),
    "robust": Match(
        settings=_dpo("robust", beta=0.3, label_smoothing=0.2), knobs={"beta": 0.3, "label_smoothing": 0.2}
    ),
    "ipo": Match(trainer="OnlineDPO", settings={"loss_type": "ipo", "beta": 0.25}, knobs={"tau": 0.25}),
    "ipo_average": Match(settings=_dpo("ipo", beta=0.8), knobs={"tau": 0.8}),
    "hinge": Match(settings=_dpo("hinge", beta=0.5), knobs={"beta": 0.5}),
    "exo": Match(
        settings=_dpo("exo_pair", beta=0.3, label_smoothing=1e-3), knobs={"beta": 0.3, "label_smoothing": 1e-3}
    ),
    "discopop": Match(settings=_dpo("discopop", beta=0.05, discopop_tau=0.07), knobs={"beta": 0.05, "tau": 0.07}),
    "sppo": Match(settings=_dpo("sppo_hard", beta=1e-3), knobs={"beta": 1e-3}),
    "cal_dpo": Match(
        settings=_dpo(["sigmoid", "sppo_hard"], loss_weights=[1.0, 0.5], beta=1.0),
        knobs={"beta": 1.0, "calibration": 0.5},
    ),
    "nca": Match(settings=_dpo("nca_pair", beta=0.3), knobs={"beta": 0.3}),
    "apo_zero": Match(settings=_dpo("apo_zero", beta=0.3), knobs={"beta": 0.3}),
    "apo_down": Match(settings=_dpo("apo_down", beta=0.3), knobs={"beta": 0.3}),
    "fdpo_forward_kl": Match(settings=_dpo("sigmoid", beta=0.3, f_divergence_type="forward_kl"), knobs={"beta": 0.3}),
    "fdpo_js": Match(settings=_dpo("sigmoid", beta=0.3, f_divergence_type="js_divergence"), knobs={"beta": 0.3}),
    "fdpo_alpha": Match(
        settings=_dpo("sigmoid", beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7),
        knobs={"beta": 0.3, "alpha": 0.3},
        single=True,
    ),
    "ln_dpo": Match(settings=_dpo("sigmoid_norm", beta=5.0), knobs={"beta": 5.0}),
    "wpo": Match(settings=_dpo("sigmoid", beta=0.3, use_weighting=True), knobs={"beta": 0.3}),
    "ld_dpo": Match(settings=_dpo("sigmoid", beta=0.3, ld_alpha=0.4), knobs={"beta": 0.3, "alpha": 0.4}),
    "simpo": Match(
        trainer="CPO",
        settings={"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        knobs={"beta": 2.0, "gamma": 1.0},
    ),
    "alphapo": Match(
        trainer="CPO",
        settings={"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.25, "alpha": 0.25},
        knobs={"beta": 2.5, "gamma": 0.25, "alpha": 0.25},
    ),
    "nll": Match(settings=_dpo("sft"), alone=True),
    "cpo": Match(
        trainer="CPO",
        settings={"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7},
        knobs={"beta": 0.3, "nll_weight": 0.7},
        alone=True,
    ),
    "slic_hf": Match(
        trainer="CPO",
        settings={"loss_type": "hinge", "beta": 0.5, "cpo_alpha": 0.0},
        knobs={"delta": 2.0, "nll_weight": 0.0},
        factor=2.0,
    ),
    "orpo": Match(trainer="ORPO", settings={"beta": 0.2}, knobs={"odds_weight": 0.2}, alone=True, bare=True),
    "plackett_luce": Match(settings=_dpo("sigmoid", beta=0.3), knobs={"beta": 0.3}),
    "lipo": Match(settings=_dpo("sigmoid", beta=0.3), knobs={"beta": 0.3}, factor=SWAP),
    "exo_list": Match(settings=_dpo("exo_pair", beta=0.3, label_smoothing=FLIPPED), knobs={"beta": 0.3, "beta_r": 0.5}),
    "infonca": Match(
        settings=_dpo("aot", beta=0.3, label_smoothing=FLIPPED), knobs={"beta": 0.3, "alpha": 0.5}, alone=True
    ),
    "nca_list": Match(settings=_dpo("nca_pair", beta=0.3), knobs={"beta": 0.3, "alpha": 1e-3}),
    "aot": Match(settings=_dpo("aot", beta=0.3, label_smoothing=0.1), knobs={"beta": 0.3, "label_smoothing": 0.1}),
    "aot_unpaired": Match(
        settings=_dpo("aot_unpaired", beta=0.3, label_smoothing=0.1), knobs={"beta": 0.3, "label_smoothing": 0.1}
    ),
    "bco_pair": Match(settings=_dpo("bco_pair", beta=0.3), knobs={"beta": 0.3}),
    "kto": Match(
        trainer="KTO",
        settings={"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8},
        knobs={"beta": 0.3, "desirable": 1.3, "undesirable": 0.8},
    ),
    "bco": Match(settings=_dpo("bco_pair", beta=0.3), knobs={"beta": 0.3}, factor=0.5),
}
"""Our loss -> TRL's settings. Lists are of two responses with ranks 1, 2 and scores 1, 0; labelled responses are those
of pairs; a running mean stands where it starts, at 0."""
