"""The table of losses: what it accepts as knobs, what it refuses, and what the documentation says of it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from preftune.equations.losses import LOSSES
from preftune.errors import ConfigError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "losses.md"


def test_knobs_are_the_losses_own_defaults() -> None:
    """Knobs and defaults of every loss are this list: one more knob, or another default, is an event."""
    assert {name: loss.knobs() for name, loss in LOSSES.items()} == {
        "dpo": {"beta": 0.1},
        "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
        "robust": {"beta": 0.1, "label_smoothing": 0.1},
        "ipo": {"tau": 0.1},
        "ipo_average": {"tau": 1.0},
        "hinge": {"beta": 0.05},
        "exo": {"beta": 0.1, "label_smoothing": 0.001},
        "discopop": {"beta": 0.05, "tau": 0.05},
        "rdpo": {"beta": 0.1, "alpha": 0.05},
        "odpo": {"beta": 0.1, "alpha": 1.0},
        "margin_dpo": {"beta": 0.1, "alpha": 1.0},
        "dpop": {"beta": 0.3, "penalty": 50.0},
        "xpo": {"beta": 0.1, "alpha": 1e-05},
        "sppo": {"beta": 0.001},
        "cal_dpo": {"beta": 0.002, "calibration": 0.5},
        "nca": {"beta": 0.01},
        "apo_zero": {"beta": 0.1},
        "apo_down": {"beta": 0.1},
        "ln_dpo": {"beta": 5.0},
        "fdpo_forward_kl": {"beta": 0.1},
        "fdpo_js": {"beta": 0.1},
        "fdpo_alpha": {"beta": 0.1, "alpha": 0.5},
        "chipo": {"beta": 0.05, "r_max": 5.0},
        "tdpo1": {"beta": 0.1},
        "tdpo2": {"beta": 0.1, "alpha": 0.5},
        "wpo": {"beta": 0.01},
        "ld_dpo": {"beta": 0.1, "alpha": 0.5},
        "simpo": {"beta": 2.0, "gamma": 1.0},
        "alphapo": {"beta": 2.5, "gamma": 0.25, "alpha": 0.25},
        "nll": {},
        "cpo": {"beta": 0.1, "nll_weight": 1.0},
        "slic_hf": {"delta": 1.0, "nll_weight": 0.5},
        "orpo": {"odds_weight": 0.1},
        "unlikelihood": {"alpha": 0.5},
        "plackett_luce": {"beta": 0.1},
        "lipo": {"beta": 0.05},
        "exo_list": {"beta": 0.1, "beta_r": 0.1},
        "infonca": {"beta": 0.01, "alpha": 1.0},
        "nca_list": {"beta": 0.01, "alpha": 1.0},
        "aot": {"beta": 0.01, "label_smoothing": 0.0},
        "aot_unpaired": {"beta": 0.01, "label_smoothing": 0.0},
        "beta_dpo": {"beta": 0.1, "alpha": 0.6, "keep": 0.8},
        "bco_pair": {"beta": 0.1},
        "kto": {"beta": 0.1, "desirable": 1.0, "undesirable": 1.0},
        "bco": {"beta": 0.1},
    }


def test_binding_keeps_what_it_is_not_told() -> None:
    """A bound loss has all knobs: those given, as floats, and the defaults of the others."""
    assert LOSSES["simpo"].bind(beta=10).knobs == {"beta": 10.0, "gamma": 1.0}
    assert LOSSES["dpo"].bind().knobs == {"beta": 0.1}


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("ipo", {"beta": 0.1}, "loss ipo has no knob beta; its knobs: tau"),
        ("dpo", {"label_smoothing": 0.1}, "loss dpo has no knob label_smoothing; its knobs: beta"),
        ("dpo", {"betta": 0.1}, "loss dpo has no knob betta; its knobs: beta; did you mean beta?"),
        ("simpo", {"margin": 0.1}, "loss simpo has no knob margin; its knobs: beta, gamma"),
        ("cdpo", {"label_smoothing": 0.5}, "loss cdpo: label_smoothing must be a number in [0, 0.5), not 0.5"),
        ("robust", {"label_smoothing": -0.1}, "loss robust: label_smoothing must be a number in [0, 0.5), not -0.1"),
        ("dpo", {"beta": 0}, "loss dpo: beta must be a number > 0, not 0"),
        ("ipo", {"tau": math.inf}, "loss ipo: tau must be a number > 0, not inf"),
        ("hinge", {"beta": math.nan}, "loss hinge: beta must be a number > 0, not nan"),
        ("simpo", {"gamma": -1}, "loss simpo: gamma must be a number >= 0, not -1"),
        ("unlikelihood", {"alpha": 1.1}, "loss unlikelihood: alpha must be a number in [0, 1], not 1.1"),
        ("alphapo", {"alpha": -math.inf}, "loss alphapo: alpha must be a number that is finite, not -inf"),
        ("nll", {"beta": 0.1}, "loss nll has no knob beta; its knobs: none"),
        ("dpo", {"beta": True}, "loss dpo: beta must be a number > 0, not True"),
        ("dpo", {"beta": "0.1"}, "loss dpo: beta must be a number > 0, not '0.1'"),
    ],
)
def test_a_knob_that_means_nothing_is_refused(name: str, knobs: dict[str, Any], message: str) -> None:
    """A knob the loss lacks and a value out of its range stop the run, and say what would be right."""
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LOSSES[name].bind(**knobs)


def test_ends_of_the_ranges_belong_where_they_should() -> None:
    """Without smoothing and without a target margin the losses are defined; at one half labels say nothing."""
    assert LOSSES["robust"].bind(label_smoothing=0).knobs["label_smoothing"] == 0.0
    assert LOSSES["simpo"].bind(gamma=0).knobs["gamma"] == 0.0
    assert LOSSES["fdpo_alpha"].bind(alpha=1).knobs["alpha"] == 1.0
    assert LOSSES["alphapo"].bind(alpha=-2).knobs["alpha"] == -2.0
    assert {name: {k: str(r) for k, r in loss.ranges().items()} for name, loss in LOSSES.items()}["cdpo"] == {
        "beta": "> 0",
        "label_smoothing": "in [0, 0.5)",
    }


def test_documentation_states_the_table() -> None:
    """docs/losses.md has one row per loss with its knobs, defaults, constant and learning rate as they are."""
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            rows[cells[0].strip("`")] = cells
    assert list(rows) == list(LOSSES)
    for name, loss in LOSSES.items():
        knobs = ", ".join(f"`{knob} = {value:g}`" for knob, value in loss.knobs().items())
        start = loss.bind().at_start()
        constant = "depends on the data" if start is None else f"{start:.4g}"
        assert rows[name][2:] == [knobs, constant, f"{loss.learning_rate:.0e}".replace("e-0", "e-")]
