"""Claims about configs: what they accept, what they refuse, and the one line they refuse it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from preftune.data.demonstrations import DEMONSTRATIONS
from preftune.data.formats import PREFERENCES
from preftune.data.ranking import POLICIES
from preftune.engine.optim import OPTIMIZERS
from preftune.engine.schedule import SCHEDULES
from preftune.equations.losses import LOSSES
from preftune.errors import ConfigError
from preftune.recipes.configs import (
    LOSS_FACTS,
    DpoConfig,
    InspectConfig,
    QuickstartConfig,
    SftConfig,
)
from preftune.recipes.settings import did_you_mean

NEEDED = {"model": "m", "data": "d", "out": "o"}


def dpo(**more: Any) -> DpoConfig:
    return DpoConfig(**{**NEEDED, **more})


def refusal(**more: Any) -> str:
    """The message of the ConfigError, which is one line."""
    with pytest.raises(ConfigError) as caught:
        dpo(**more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_table_of_losses_is_the_real_one() -> None:
    """What configs know about the losses without torch is what the losses say."""
    real = {name: (loss.learning_rate, loss.knobs(), loss.needs_reference) for name, loss in LOSSES.items()}
    assert {name: (f.learning_rate, f.knobs, f.needs_reference) for name, f in LOSS_FACTS.items()} == real


@pytest.mark.parametrize("value", [-1.0, -1e-9, 0.0, 1e-9, 0.1, 0.4999, 0.5, 1.0, 1e9])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_config_refuses_a_knob_exactly_when_the_loss_does(loss: str, value: float) -> None:
    """Ranges in the config and in the loss agree."""
    for knob in LOSSES[loss].knobs():
        config_accepts = accepted(dpo, loss=loss, **{knob: value})
        assert config_accepts == accepted(LOSSES[loss].bind, **{knob: value}), knob


def accepted(function: Callable[..., Any], **values: Any) -> bool:
    try:
        function(**values)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("loss", LOSSES)
def test_the_knobs_of_a_config_bind_to_its_loss(loss: str) -> None:
    """Whatever is not given is the loss's own default, and nothing else is passed on."""
    bound = LOSSES[loss].bind(**dpo(loss=loss).loss_knobs())
    assert bound.knobs == LOSSES[loss].knobs()


def test_a_given_knob_wins_over_the_default_of_the_loss() -> None:
    """--beta 0.5 reaches the loss; a knob at zero is given, not missing."""
    assert dpo(loss="simpo", beta=0.5, gamma=0.0).loss_knobs() == {"beta": 0.5, "gamma": 0.0}


def test_the_defaults_are_what_the_help_promises() -> None:
    """The defaults a user meets without a single option."""
    cfg = dpo()
    assert (cfg.loss, cfg.beta, cfg.lr, cfg.optimizer, cfg.schedule) == ("dpo", None, None, "adamw", "linear")
    assert (cfg.batch_size, cfg.max_length, cfg.tokens_per_batch, cfg.epochs) == (32, 1024, 8192, 1)
    assert (cfg.truncation, cfg.allow_refused, cfg.dtype, cfg.seed, cfg.shuffle) == ("refuse", 0, "auto", 0, True)
    assert SftConfig(**NEEDED).lr == 2e-5


def test_a_default_that_depends_on_the_loss_is_told_by_loss() -> None:
    """The help of beta names each default with its losses."""
    assert DpoConfig.default_text("beta") == "default by loss: 0.1 dpo, cdpo, robust; 0.05 hinge; 2 simpo"
    assert DpoConfig.default_text("lr").startswith("default by loss: 1e-06 dpo; 5e-07 cdpo")
    assert SftConfig.default_text("lr") == "default 2e-05"
    assert DpoConfig.default_text("data") == "required"
    assert DpoConfig.default_text("shuffle") == "default true"
    assert DpoConfig.default_text("reference") == "default none"


@pytest.mark.parametrize("text", ["5e-7", "5E-7", ".0000005", 5e-7])
def test_scientific_notation_is_a_number(text: Any) -> None:
    """YAML 1.1 reads 5e-7 as text; here it is the number it looks like."""
    assert dpo(lr=text).lr == 5e-7


def test_a_config_cannot_be_changed() -> None:
    """Frozen: what was checked stays what was checked."""
    with pytest.raises(Exception, match="frozen"):
        dpo().lr = 1.0  # type: ignore[misc]


def test_a_config_is_json() -> None:
    """A run card stores it and an equal config comes back."""
    cfg = dpo(lr="5e-7", eval_data="e", eval_every=3)
    assert DpoConfig(**cfg.model_dump()) == cfg == DpoConfig.model_validate_json(cfg.model_dump_json())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"learning_rte": 1}, "unknown key learning_rte; did you mean lr?"),
    ({"learning_rate": 1}, "unknown key learning_rate; did you mean lr?"),
    ({"per_device_train_batch_size": 1}, "unknown key per_device_train_batch_size; did you mean batch_size?"),
    ({"eval_evry": 1}, "unknown key eval_evry; did you mean eval_every?"),
    ({"qqq": 1}, "unknown key qqq; known: model, data,"),
    ({"lr": 0}, "lr must be greater than 0, not 0"),
    ({"lr": "fast"}, "lr must be a number, not 'fast'"),
    ({"lr": float("nan")}, "lr must be a finite number, not nan"),
    ({"lr": "inf"}, "lr must be a finite number, not 'inf'"),
    ({"lr": True}, "lr is not a switch: found true"),
    ({"seed": False}, "seed is not a switch: found false"),
    ({"seed": 2**32}, "seed must be less than 4294967296, not 4294967296"),
    ({"epochs": 1.5}, "epochs must be a whole number, not 1.5"),
    ({"batch_size": 0}, "batch_size must be greater than or equal to 1, not 0"),
    ({"resume": "maybe"}, "resume must be true or false, not 'maybe'"),
    ({"out": ""}, "out must be text that is not empty, not ''"),
    ({"data": 5}, "data must be text, not 5"),
    (
        {"loss": "dpoo"},
        "loss must be one of dpo, cdpo, robust, ipo, ipo_average, hinge, simpo, not 'dpoo'; did you mean dpo?",
    ),
    ({"optimizer": "adam"}, "optimizer must be one of adamw, rmsprop, sgd, not 'adam'; did you mean adamw?"),
    ({"truncation": "left"}, "truncation must be one of refuse, drop, prompt, response, not 'left'"),
    ({"device": "gpu"}, "device must be auto, cpu, mps, cuda or cuda:N, not 'gpu'"),
    ({"loss": "ipo", "beta": 0.1}, "loss ipo has no knob beta; its knobs: tau"),
    ({"tau": 0.1}, "loss dpo has no knob tau; its knobs: beta"),
    ({"loss": "simpo", "reference": "r"}, "loss simpo uses no reference model; leave reference out"),
    ({"tokens_per_batch": 1000}, "tokens_per_batch 1000 must be at least max_length 1024"),
    ({"eval_every": 5}, "eval_every needs eval_data: there is nothing to evaluate on"),
    ({"early_stop": 2, "eval_data": "e"}, "early_stop counts evaluations: set eval_every (and eval_data) too"),
    ({"warmup_steps": 10, "max_steps": 10}, "warmup_steps 10 must be below max_steps 10"),
    ({"eval_data": "d"}, "eval_data is the training data, d; name a held-out set"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_what_has_no_meaning_is_refused_in_one_line(more: dict[str, Any], message: str) -> None:
    """Key, what was found, what is allowed, and a suggestion where one is near."""
    assert refusal(**more).startswith(message)


NEIGHBOURS: list[dict[str, Any]] = [
    {"loss": "ipo", "tau": 0.1},
    {"loss": "simpo"},
    {"tokens_per_batch": 1024},
    {"eval_every": 5, "eval_data": "e"},
    {"early_stop": 2, "eval_every": 5, "eval_data": "e"},
    {"warmup_steps": 9, "max_steps": 10},
    {"device": "cuda:3"},
    {"seed": 2**32 - 1},
    {"resume": "true"},
]


@pytest.mark.parametrize("more", NEIGHBOURS, ids="-".join)
def test_the_nearest_meaningful_setting_is_accepted(more: dict[str, Any]) -> None:
    """Each refusal above has an accepted neighbour."""
    assert dpo(**more)


def test_missing_keys_are_named_together() -> None:
    """A first attempt without anything learns all that is needed at once."""
    with pytest.raises(ConfigError, match=r"^missing model, data, out: give --model VALUE"):
        DpoConfig(**{})


def test_a_slip_is_named_before_what_it_leaves_missing() -> None:
    """`modle` is the cause, the missing `model` only its effect."""
    with pytest.raises(ConfigError, match="unknown key modle; did you mean model"):
        DpoConfig(**{"modle": "m", "data": "d", "out": "o"})


def test_the_place_of_a_key_opens_its_message() -> None:
    """The caller may say where keys came from; a rule over two keys names the place of the one it is about."""
    origins = {"lr": "a.yaml:3", "eval_every": "a.yaml:7"}
    with pytest.raises(ConfigError, match=r"^a\.yaml:3: lr must be greater than 0"):
        DpoConfig.model_validate({**NEEDED, "lr": -1}, context=origins)
    with pytest.raises(ConfigError, match=r"^a\.yaml:7: eval_every needs eval_data"):
        DpoConfig.model_validate({**NEEDED, "eval_every": 4}, context=origins)


def test_a_stage_reads_its_own_layouts() -> None:
    """SFT reads demonstrations and preferences, DPO preferences only; a slip gets the nearest name."""
    assert SftConfig(**NEEDED, format="alpaca").format == "alpaca"
    assert SftConfig(**NEEDED, format="hh").format == dpo(format="hh").format == "hh"
    assert refusal(format="alpaca").startswith("format must be one of auto, trl, trl_implicit, hh,")
    assert refusal(format="hhh").endswith("not 'hhh'; did you mean hh?")
    assert DpoConfig.choices("format") == ("auto", *PREFERENCES)
    assert SftConfig.choices("format") == ("auto", *DEMONSTRATIONS)


def test_names_offered_are_names_known() -> None:
    """The enumerations of the config are the tables of the parts that act on them."""
    assert set(DpoConfig.choices("pairs")) == set(POLICIES)
    assert set(DpoConfig.choices("schedule")) == set(SCHEDULES)
    assert set(DpoConfig.choices("optimizer")) == set(OPTIMIZERS)
    assert set(DpoConfig.choices("loss")) == set(LOSSES)


def test_sft_has_no_key_for_pairs() -> None:
    """A key without effect is an error, not a habit."""
    with pytest.raises(ConfigError, match="unknown key pairs"):
        SftConfig(**NEEDED, pairs="all")
    assert SftConfig(**NEEDED).pairs == "all"


def test_a_suggestion_is_only_made_when_something_is_near() -> None:
    """No far-fetched guesses, and no word that this stage does not know."""
    assert did_you_mean("lrr", ["lr", "seed"]) == "; did you mean lr?"
    assert did_you_mean("learning_rate", ["seed"]) == ""
    assert did_you_mean("qqq", ["lr", "seed"]) == ""


def test_the_small_stages_hold_the_same_promises() -> None:
    """inspect and quickstart refuse unknown keys and impossible values too."""
    assert InspectConfig(model="m", data="d").examples == 3
    assert QuickstartConfig().out == "runs/quickstart"
    with pytest.raises(ConfigError, match="unknown key beta"):
        QuickstartConfig(**{"beta": 0.1})
    with pytest.raises(ConfigError, match=r"format must be one of auto, trl, .*\(or kind: demonstrations\)"):
        InspectConfig(model="m", data="d", format="alpaca")
    with pytest.raises(ConfigError, match="pairs has no meaning for demonstrations"):
        InspectConfig(model="m", data="d", kind="demonstrations", pairs="adjacent")
    with pytest.raises(ConfigError, match="examples must be greater than or equal to 0"):
        InspectConfig(model="m", data="d", examples=-1)
