"""The table of losses: what it accepts as knobs, what it refuses, and what the documentation says of it."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest

from preftune.equations.losses import LOSSES
from preftune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/losses.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("losses")


def test_the_page_and_its_figures_are_what_the_losses_say(script: Any) -> None:
    """docs/losses.md and the curves are, byte for byte, what `python scripts/losses.py` would write now."""
    assert script.PAGE.read_text(encoding="utf-8") == script.page()
    assert {path.stem for path in script.FIGURES.iterdir()} == set(LOSSES)
    for name in LOSSES:
        drawn = script.figure(name)
        assert (script.FIGURES / f"{name}.svg").read_text(encoding="utf-8") == drawn, name
        assert not re.search(r"[ ,](nan|-?inf)", drawn), name


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("L = -log s(z): ", "The loss: "),
        ("L = -log s(z): ", "L = -log s(z), "),
        ("Addresses: ", ""),
        ("Reads: ", ""),
        ("Source: ", "See: "),
        ("Reads: ", "Source: x.\n    Reads: "),
    ],
)
def test_a_docstring_that_lacks_something_is_refused(
    script: Any, monkeypatch: pytest.MonkeyPatch, good: str, bad: str
) -> None:
    """Formula, what it does, then Addresses, Reads, Elsewhere if anyone, Source, in this order."""
    loss = LOSSES["dpo"]
    whole = loss.function.__doc__ or ""
    assert whole.count(good) == 1 and script.Entry.of(loss).formula == "-log s(z)"
    monkeypatch.setattr(loss.function, "__doc__", whole.replace(good, bad))
    with pytest.raises(ValueError, match=r"^dpo: wanted 'L = \.\.\.: \.\.\.', prose, Addresses, Reads"):
        script.Entry.of(loss)


def test_the_page_is_read_without_surprises(script: Any) -> None:
    """Prose is no markup: losses and papers become links, stars and brackets stay; a loss does not link to itself."""
    told = script.prose("as `dpo`, `ipo` or `tau` in [0, 1] * 2, arXiv 2305.18290 Eq. 7", "ipo")
    link = "[arXiv 2305.18290](https://arxiv.org/abs/2305.18290) Eq. 7"
    assert told == rf"as [`dpo`](#dpo), `ipo` or `tau` in \[0, 1\] \* 2, {link}"
