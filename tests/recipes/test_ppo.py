"""`preftune ppo` as a user meets it: its artefacts, its refusals, its KL budget, resuming to the last bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli import main as cli
from preftune.config.rl import OF_PPO
from preftune.engine.run import Run
from preftune.errors import ConfigError, DataError, NotFinite, ResumeMismatch, RunError, UserError
from preftune.models.load import save
from preftune.models.reward_head import load_reward_model
from preftune.recipes import ppo
from rl_world import model_folder

TIMES = ("tokens_per_second", "share_rollout", "share_update")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(12 prompts to train on, 6 held-out ones of which 2 are among the former)."""
    folder = tmp_path_factory.mktemp("prompts")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "park", "with", "dog", "answer"]
    prompts = [f"the {word} {words[(i * 5) % 13]}" for i, word in enumerate(words)] + ["a", "once", "upon", "time"]
    for name, part in (("train", prompts[:12]), ("eval", prompts[10:16])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part))
    return folder / "train.jsonl", folder / "eval.jsonl"


def config(model: Path, prompts: Path, out: Path, **more: Any) -> ppo.PpoConfig:
    settings = {
        "reward": "rule:regex:[aeiou]", "batch_size": 4, "n": 2, "max_tokens": 6, "lr": 1e-3, "missing_eos": "none",
        "device": "cpu", **more,
    }  # fmt: skip
    return ppo.PpoConfig(model=str(model), prompts=str(prompts), out=str(out), **settings)


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics of every step, without what the clock says."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line["metrics"].items() if k not in TIMES} for line in lines if line["kind"] == kind]


def weights(out: Path) -> str:
    """A hash of them: what pytest tells of two unequal files of numbers takes it minutes."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_from_the_command_line_to_a_model_that_transformers_reads(
    algorithm: str, tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    """Everything a run leaves: a card with its data, metrics of every step, an evaluation with intervals, a model."""
    from transformers import AutoModelForCausalLM

    train, held_out = asked
    flags = (
        f"--n 4 --batch_size 5 --max_tokens 8 --lr 1e-3 --eval_every 2 --missing_eos subtract --algorithm {algorithm}"
    )
    named = ["--model", str(tiny_model_folder), "--prompts", str(train), "--eval_prompts", str(held_out)]
    out = tmp_path / "run"
    assert cli(["ppo", *named, "--reward", "rule:length", "--out", str(out), *flags.split(), "--device", "cpu"]) == 0
    told = json.loads((out / "run.json").read_text())
    assert told["status"] == "done" and told["results"]["steps"] == 2
    assert told["data"]["train"]["used"] == 10 and told["data"]["train"]["held_out"] == 2
    assert told["data"]["eval"]["used"] == 6
    steps = rows(out)
    assert len(steps) == 2 and steps[0]["kl"] == 0 and steps[0]["first_approx_kl"] == 0
    common = {
        "reward", "score_std", "kl", "kl_k1", "kl_coef", "objective", "entropy", "length", "length_histogram",
        "finished", "responses", "unscored", "policy_loss", "first_approx_kl", "grad_norm", "lr",
    }  # fmt: skip
    own = {
        "ppo": {
            "approx_kl", "clip_fraction", "value_loss", "value_clip_fraction", "ratio_mean", "ratio_var", "value_mean",
            "critic_grad_norm", "return_mean", "return_var", "explained_variance",
        },
        "rloo": {"alone", "advantage_std"},
    }  # fmt: skip
    assert all(set(step) == common | own[algorithm] for step in steps)
    assert [sum(step["length_histogram"][2:]) for step in steps] == [20, 20], "every response is in its bin"
    assert [step["lr"] for step in steps] == [1e-3, 5e-4], "linear decay, to 0 when all steps are done"
    for number in rows(out, "eval"):
        assert number["reward_low"] <= number["reward"] <= number["reward_high"] and number["kl"] >= 0
        assert number["loss"] == pytest.approx(0.05 * number["kl"] - number["reward"])
    trained, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out / "model", tiny_model_folder))
    moved = [bool((a != b).any()) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert all(moved) and algorithm.upper() in (out / "model" / "README.md").read_text()


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_run_that_breaks_off_resumes_to_the_same_bits(
    algorithm: str, tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy, critic, both optimizers and the adaptive coefficient: weights and every metric of the whole run."""
    settings = {"epochs": 2, "save_every": 2, "target_kl": 0.01, "kl_horizon": 10, "algorithm": algorithm}
    ppo.main(config(tiny_model_folder, asked[0], tmp_path / "whole", **settings))

    told = Run.after_step

    def breaks_off(run: Run, step: int, metrics: Any) -> None:
        told(run, step, metrics)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "after_step", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(config(tiny_model_folder, asked[0], tmp_path / "broken", **settings))
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "model").exists()
    card = ppo.main(config(tiny_model_folder, asked[0], tmp_path / "broken", resume=True, **settings))
    assert any("continuing from the checkpoint of step 4" in note for note in card.notes)
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole") and len(rows(tmp_path / "whole")) == 6
    assert len({row["kl_coef"] for row in rows(tmp_path / "whole")}) > 3, "the coefficient must have moved"


def test_the_run_stops_at_its_kl_budget_and_stays_stopped(
    tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    """The result is the last policy measured within the budget; resumed, nothing happens but the same model again."""
    settings = {"epochs": 20, "kl_coef": 0.0, "lr": 3e-4, "schedule": "constant", "save_every": 2}
    card = ppo.main(config(tiny_model_folder, asked[0], tmp_path / "run", max_kl=0.5, **settings))
    steps = rows(tmp_path / "run")
    assert 2 < len(steps) < 60 and steps[-1]["kl"] > 0.5 >= max(step["kl"] for step in steps[:-1])
    assert "grad_norm" not in steps[-1] and "grad_norm" in steps[-2]
    assert any("is above max_kl 0.5; the policy before it is kept" in note for note in card.notes)
    before = weights(tmp_path / "run")
    ppo.main(config(tiny_model_folder, asked[0], tmp_path / "short", max_steps=len(steps) - 2, **settings))
    assert before == weights(tmp_path / "short"), "one update less than led beyond the budget"
    again = ppo.main(config(tiny_model_folder, asked[0], tmp_path / "run", max_kl=0.5, resume=True, **settings))
    assert again.status == "done" and weights(tmp_path / "run") == before and rows(tmp_path / "run") == steps


def test_a_reward_model_scores_and_starts_the_critic(
    tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its folder's weights are the critic's start, recorded by hash; another vocabulary falls back to the policy."""
    loaded = load_reward_model(tiny_model_folder, dtype=torch.float32)
    save(loaded.model, loaded.tokenizer, tmp_path / "rm" / "model", state=None, card="")
    reward = f"reward:{tmp_path / 'rm'}"
    settings = {"reward": reward, "max_steps": 1, "n": 32}
    card = ppo.main(config(tiny_model_folder, asked[0], tmp_path / "run", standardise=True, **settings))
    assert "critic_weights" in card.hashes and any(f"critic: a copy of {tmp_path / 'rm'}" in n for n in card.notes)
    assert any("mean 0, deviation 1 on 12" in note for note in card.notes), "all that have a score"
    (step,) = rows(tmp_path / "run")
    assert abs(step["reward"]) < 0.2 and abs(step["score_std"] - 1) < 0.1, "the policy is still the reference"
    ppo.main(config(tiny_model_folder, asked[0], tmp_path / "raw", **settings))
    (raw,) = rows(tmp_path / "raw")
    assert abs(raw["reward"]) > 0.3 and abs(raw["score_std"] - 1) > 0.2, "or standardising was not tried"

    ppo.main(config(tiny_model_folder, asked[0], tmp_path / "rloo", algorithm="rloo", **settings))
    loaded.model.score.weight.data *= 2
    save(loaded.model, loaded.tokenizer, tmp_path / "rm" / "model", state=None, card="")
    resumed = config(tiny_model_folder, asked[0], tmp_path / "rloo", algorithm="rloo", resume=True, **settings)
    with pytest.raises(ResumeMismatch, match="reward_weights"):
        ppo.main(resumed)

    (tmp_path / "letters.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n')
    letters = config(model_folder(tmp_path / "world"), tmp_path / "letters.jsonl", tmp_path / "other", **settings)
    notes = ppo.main(letters).notes
    assert any("critic: a copy of the policy" in n and "another vocabulary" in n for n in notes)


def test_what_has_no_score_is_reported_and_not_zeroed(
    tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step says how many responses were left out; a reward that is silent throughout ends the run."""
    (tmp_path / "house_reward.py").write_text(
        "def some(prompt, text):\n    return float('nan') if 'e' in text else 1.0\n"
        "def none(prompt, text):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    common = {"allow_python": True, "n": 4}
    ppo.main(config(tiny_model_folder, asked[0], tmp_path / "a", reward="rule:python:house_reward:some", **common))
    steps = rows(tmp_path / "a")
    assert all(step["unscored"] + step["responses"] == 16 for step in steps)
    assert sum(step["unscored"] for step in steps) > 0 and all(step["reward"] == 1.0 for step in steps)
    with pytest.raises(RunError, match="none of 16 responses has a score"):
        ppo.main(config(tiny_model_folder, asked[0], tmp_path / "b", reward="rule:python:house_reward:none", **common))
    assert not (tmp_path / "b" / "model").exists()


def test_a_reward_that_never_differs_is_said(tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path) -> None:
    """One warning, kept in the card, with how many responses ended; none where scores differ."""
    common = {"max_steps": 1, "algorithm": "rloo"}
    card = ppo.main(config(tiny_model_folder, asked[0], tmp_path / "a", reward="rule:regex:Zebra", **common))
    assert any("all 8 responses of the first step have score 0, " in note for note in card.notes)
    card = ppo.main(config(tiny_model_folder, asked[0], tmp_path / "b", reward="rule:length", **common))
    assert not any("have score" in note for note in card.notes)


def test_early_stopping_keeps_the_best_held_out_objective(
    tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    """At a destructive rate the evaluation gets worse: the weights of the best one are the result."""
    settings = {"eval_prompts": str(asked[1]), "eval_every": 1, "early_stop": 2, "epochs": 20, "lr": 0.3}
    card = ppo.main(
        config(tiny_model_folder, asked[0], tmp_path / "run", reward="rule:length", kl_coef=5.0, **settings)
    )
    losses = [row["loss"] for row in rows(tmp_path / "run", "eval")]
    assert len(rows(tmp_path / "run")) < 60
    assert card.results["loss"] == pytest.approx(min(losses), abs=1e-6)


def test_a_first_ratio_that_is_not_one_stops_the_run(
    tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollout whose log-probs are not those of the update is a fault of the program, said as one."""
    whole = ppo.roll_out
    monkeypatch.setattr(ppo, "roll_out", lambda *a, **k: (r := whole(*a, **k)) and replace(r, logps=r.logps - 0.01))
    with pytest.raises(RunError, match=r"before the first update the policy is 5e-05 nats per token from its own"):
        ppo.main(config(tiny_model_folder, asked[0], tmp_path / "run"))


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_policy_that_is_no_number_any_more_ends_the_run_with_its_page(
    algorithm: str, tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    """An absurd rate: NotFinite before a step is taken with it, no model, the card failed, the reason on the page."""
    out = tmp_path / "run"
    settings = {"lr": 1e30, "max_grad_norm": 0.0, "algorithm": algorithm, "epochs": 2}
    with pytest.raises(NotFinite):
        ppo.main(config(tiny_model_folder, asked[0], out, **settings))
    assert json.loads((out / "run.json").read_text())["status"] == "failed" and not (out / "model").exists()
    assert "this run failed: NotFinite: " in (out / "report.html").read_text().partition("Read this first")[2]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "rloo", "n": 1}, "n must be at least 2, not 1"),
    ({"minibatches": 5}, "minibatches 5 cannot be cut from batch_size 4 prompts"),
    ({"target_kl": 1.0, "kl_coef": 0.0}, "target_kl multiplies kl_coef, and 0 stays 0"),
    ({"kl_horizon": 5}, "kl_horizon is of an adaptive kl_coef; give target_kl"),
    ({"target_kl": 1.0, "kl_horizon": 1}, "kl_horizon 1 must be above a fifth of a step's 8 responses"),
    ({"target_kl": 1.0, "max_kl": 0.5}, "max_kl 0.5 must be above target_kl 1.0"),
    ({"missing_eos": "none", "missing_eos_value": -1.0}, "missing_eos_value -1.0 has no meaning for missing_eos none"),
    ({"missing_eos": "subtract", "missing_eos_value": -1.0}, "has no meaning for missing_eos subtract"),
    ({"eval_every": 1}, "eval_every needs eval_prompts"),
    ({"early_stop": 1}, "early_stop counts evaluations"),
    ({"format": "csv"}, "format must be one of auto, prompt"),
    ({"temperature": 0.0}, "temperature must be greater than 0"),
    ({"clip": 1.0}, "clip must be less than 1"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_settings_without_meaning_are_refused(settings: dict[str, Any], sentence: str) -> None:
    """Before a file is opened, in one sentence with what is allowed."""
    with pytest.raises(ConfigError) as told:
        config(Path("model"), Path("prompts"), Path("out"), **settings)
    assert sentence in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("key", OF_PPO)
def test_rloo_refuses_what_belongs_to_ppo(key: str) -> None:
    """It has no critic, no clip and one step: a key that would do nothing is an error; its default is not."""
    value = {"critic": "folder", "whiten_rewards": True, "ppo_epochs": 2, "minibatches": 2}.get(key, 0.5)
    with pytest.raises(ConfigError, match=f"^{key} belongs to ppo"):
        config(Path("model"), Path("prompts"), Path("out"), algorithm="rloo", **{key: value})
    default = ppo.PpoConfig.model_fields[key].default
    assert config(Path("model"), Path("prompts"), Path("out"), algorithm="rloo", **{key: default}).algorithm == "rloo"


def test_what_does_not_fit_together_is_refused_with_exit_code_2(
    tiny_model_folder: Path, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    """Prompts without room, an unknown reward, a reference or critic of another vocabulary, no prompt left."""
    other = str(model_folder(tmp_path / "letters"))
    empty = tmp_path / "flawed.jsonl"
    empty.write_text('{"prompt": ""}\n{"prompt": "fine"}\n')
    wrong: list[tuple[dict[str, Any], type[UserError], str]] = [
        ({"max_tokens": 600}, DataError, r"12 rows are refused, 0 allowed, and 0 prompts are left"),
        ({"reward": "rule:nothing"}, ConfigError, r"^reward 'rule:nothing' is unknown; allowed: rule:length"),
        ({"reward": "rule:python:os:getcwd"}, ConfigError, "say so with --allow_python"),
        ({"reference": other}, ConfigError, "has another vocabulary than model"),
        ({"critic": other}, ConfigError, "does not know the vocabulary of model"),
        ({"prompts": empty}, DataError, "1 rows are refused, 0 allowed"),
    ]
    for number, (settings, kind, sentence) in enumerate(wrong):
        train = settings.pop("prompts", asked[0])
        with pytest.raises(kind, match=sentence) as told:
            ppo.main(config(tiny_model_folder, train, tmp_path / f"run{number}", **settings))
        assert told.value.exit_code == 2
