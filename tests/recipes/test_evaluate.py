"""Evaluation as a stage: its numbers against plain transformers and exact laws, its files, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.cli import main
from preftune.config.comparison import EvaluateConfig
from preftune.engine.card import read_card
from preftune.equations.kl import kl_divergence
from preftune.equations.optimum import best_of_n, expected_reward
from preftune.errors import ArtifactError, ConfigError, DataError, RunError
from preftune.models.load import load
from preftune.recipes import dpo, evaluate
from preftune.records import Response, SampledResponses, from_json, to_json
from preftune.theory.enumerable import enumerate_completions
from preftune.worlds.enumerable import EOS_ID, random_world, write_model

PROMPTS = ["the cat sat", "a good answer", "once upon", "the dog ran to", "what is", "the best film"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="module")
def moved(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models some way off the tiny one, the second further."""
    folders = []
    for name, size in (("near", 0.01), ("far", 0.03)):
        folder = tmp_path_factory.mktemp("moved") / name
        loaded = load(tiny_model_folder, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight.add_(size * torch.randn(weight.shape, generator=generator))
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


def config(models: list[Path], reference: Path, prompts: Path, out: Path, **more: Any) -> EvaluateConfig:
    settings = {"n": 4, "max_tokens": 8, "dtype": "float32", "reward": "rule:length", **more}
    named = ",".join(map(str, models))
    return EvaluateConfig(model=named, reference=f"base={reference}", prompts=str(prompts), out=str(out), **settings)


@pytest.fixture(scope="module")
def evaluated(
    moved: list[Path],
    tiny_model_folder: Path,
    prompts: Path,
    pairs_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run over both models with everything asked for; its folder."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    more = {"pairs": str(pairs_file), "truth": "rule:regex:the", "against": "all"}
    evaluate.main(config(moved, tiny_model_folder, prompts, out, **more))
    return out


def rows(out: Path, model: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "evaluation.jsonl").read_text().splitlines())
    return [line for line in lines if line["model"] == model]


def test_the_numbers_of_a_response_are_those_of_plain_transformers(
    evaluated: Path, moved: list[Path], tiny_model_folder: Path
) -> None:
    """KL per step over the whole vocabulary and k1 of drawn tokens, by the models' own forward of each alone; 1e-4."""
    policy, reference = (load(folder, dtype=torch.float32).model for folder in (moved[1], tiny_model_folder))
    tokens = [json.loads(line) for line in (evaluated / "tokens" / "far.jsonl").read_text().splitlines()]
    samples: list[SampledResponses] = [
        from_json(line) for line in (evaluated / "samples" / "far.jsonl").read_text().splitlines()
    ]
    by_place = {(row["prompt"], row["number"]): row for row in rows(evaluated, "far")}
    assert len(by_place) == len(PROMPTS) * 4
    for drawn, sampled in zip(tokens, samples, strict=True):
        for i, response in enumerate(drawn["responses"]):
            ids = torch.tensor([drawn["prompt"] + response])
            steps = slice(len(drawn["prompt"]) - 1, -1)
            with torch.no_grad():
                ours, theirs = (torch.log_softmax(one(ids).logits[0, steps], -1) for one in (policy, reference))
            at = torch.arange(len(response)), torch.tensor(response)
            row = by_place[PROMPTS.index(str(sampled.prompt)), i]
            assert row["kl"] == pytest.approx(float(kl_divergence(ours, theirs).sum()), rel=1e-3, abs=1e-4)
            assert row["k1"] == pytest.approx(float((ours - theirs)[at].sum()), abs=1e-3)
            assert sampled.responses[i].logp == pytest.approx(float(ours[at].sum()), abs=1e-3)
            text = sampled.responses[i].text
            assert (row["reward"], row["truth"], row["tokens"]) == (len(text), float("the" in text), len(response))


def test_results_are_means_of_the_rows_with_intervals_over_prompts(evaluated: Path) -> None:
    """Every mean of run.json is the mean of its column; differences are paired by prompt; KL grows with the move."""
    results = read_card(evaluated / "run.json").results
    assert list(results["models"]) == ["base", "near", "far"] and results["reference"] == "base"
    for name, model in results["models"].items():
        own = rows(evaluated, name)
        for column in ("reward", "truth", "tokens", "characters", "words", "distinct", "finished", "loop"):
            assert model[column]["estimate"] == pytest.approx(np.mean([row[column] for row in own])), column
            assert model[column]["low"] <= model[column]["estimate"] <= model[column]["high"]
        if name != "base":
            base = rows(evaluated, "base")
            gap = np.mean([row["reward"] for row in own]) - np.mean([row["reward"] for row in base])
            assert model["reward_difference"]["estimate"] == pytest.approx(gap)
            assert model["kl"]["estimate"] == pytest.approx(np.mean([row["kl"] for row in own]))
            per_token = sum(row["kl"] for row in own) / sum(row["tokens"] for row in own)
            assert model["kl_per_token"]["estimate"] == pytest.approx(per_token)
    near, far = results["models"]["near"], results["models"]["far"]
    assert 0 < near["kl"]["estimate"] < far["kl"]["estimate"]
    assert 0 < near["forward_kl"]["estimate"] < far["forward_kl"]["estimate"]


def test_comparisons_are_of_the_sampled_texts_and_make_the_win_rates(evaluated: Path) -> None:
    """By length: every judgement recounted; all pairs of three models, ratings with the reference fixed."""
    results = read_card(evaluated / "run.json").results
    said = [from_json(line) for line in (evaluated / "judgements.jsonl").read_text().splitlines()]
    assert len(said) == 3 * 4 * len(PROMPTS)
    for judgement in said:
        first, second = len(judgement.first.text), len(judgement.second.text)
        assert judgement.outcome == ("first" if first > second else "second" if second > first else "tie")
    assert [(r["one"], r["other"]) for r in results["win_rates"]] == [
        ("near", "base"),
        ("far", "base"),
        ("near", "far"),
    ]
    for rate in results["win_rates"]:
        ours, theirs = (rows(evaluated, rate[side]) for side in ("one", "other"))
        scores = [np.heaviside(a["reward"] - b["reward"], 0.5) for a, b in zip(ours, theirs, strict=True)]
        assert rate["rate"]["estimate"] == pytest.approx(np.mean(scores))
    board = results["leaderboard"]
    assert board["anchor"] == "base" and {one["model"] for one in board["standings"]} == {"base", "near", "far"}
    assert len(results["length_controlled"]) == 3 and "prompts" in results["noise"][0]
    open_ones = [r for r in results["win_rates"] if r["rate"]["low"] <= 0.5 <= r["rate"]["high"]]
    assert [line.partition(": ")[0] for line in results["needed"]] == [
        f"{r['one']} against {r['other']}" for r in open_ones
    ]
    assert open_ones and all("prompts to tell it from 50 %" in line or "exactly" in line for line in results["needed"])


def test_best_of_n_of_the_reference_is_an_anchor(evaluated: Path) -> None:
    """Best of 1 is the mean, best of 4 the mean of the maxima, with the KL that choosing costs at most."""
    anchor = {one["n"]: one for one in read_card(evaluated / "run.json").results["best_of_n"]}
    rewards = np.array([row["reward"] for row in rows(evaluated, "base")]).reshape(len(PROMPTS), 4)
    assert list(anchor) == [1, 2, 4]
    assert anchor[1]["reward"]["estimate"] == pytest.approx(rewards.mean())
    assert anchor[4]["reward"]["estimate"] == pytest.approx(rewards.max(1).mean())
    assert anchor[4]["kl_at_most"] == pytest.approx(np.log(4) - 3 / 4)
    truths = np.array([row["truth"] for row in rows(evaluated, "base")]).reshape(len(PROMPTS), 4)
    chosen = [(one[score == score.max()]).mean() for one, score in zip(truths, rewards, strict=True)]
    assert anchor[4]["truth"]["estimate"] == pytest.approx(np.mean(chosen))


def test_pairs_calibrate_the_reward_and_every_finding_says_what_it_rests_on(evaluated: Path) -> None:
    """rule:length is right where the chosen response is longer; findings have sentences and one of three verdicts."""
    results = read_card(evaluated / "run.json").results
    found = results["calibration"]["pairs"]
    assert found["pairs"] == 48 and found["accuracy"] == found["longest_wins"]
    parts = {part["name"]: part["accuracy"]["estimate"] for part in found["by_length"]}
    assert parts["chosen_longer"] == 1 and parts["chosen_shorter"] == 0
    assert set(results["calibration"]["truth"]) == {"pearson", "spearman"}
    names = {finding["name"] for finding in results["findings"]}
    expected = {"displacement", "accuracy_not_quality", "length", "over_optimisation", "collapse"}
    assert names == expected  # no DPO run: no beta, no saturation
    for finding in results["findings"]:
        assert finding["verdict"] in ("seen", "not seen") or finding["verdict"].startswith("cannot be told from ")
        assert finding["sentence"] and finding["numbers"]
    (path,) = [finding for finding in results["findings"] if finding["name"] == "over_optimisation"]
    assert (path["model"], path["verdict"]) == ("near, far", "cannot be told from these models")  # no runs, no path
    assert results["models"]["far"]["implicit_accuracy"]["n"] == 48


def test_a_resumed_run_equals_an_uninterrupted_one(
    evaluated: Path, moved: list[Path], tiny_model_folder: Path, prompts: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """With lines of samples and tokens missing, one torn: the rest is drawn again, and every file is as it was."""
    out = tmp_path / "run"
    shutil.copytree(evaluated, out)
    samples, tokens = (out / kind / "near.jsonl" for kind in ("samples", "tokens"))
    before = samples.read_bytes(), tokens.read_bytes()
    lines = before[0].splitlines(keepends=True)
    samples.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    (out / "samples" / "far.jsonl").unlink()
    more = {"pairs": str(pairs_file), "truth": "rule:regex:the", "against": "all", "resume": True}
    card = evaluate.main(config(moved, tiny_model_folder, prompts, out, **more))
    assert samples.read_bytes() == before[0]
    assert card.results == read_card(evaluated / "run.json").results
    for name in ("evaluation.jsonl", "judgements.jsonl", "samples/far.jsonl"):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes(), name


def test_samples_of_other_settings_are_never_reused(
    evaluated: Path, moved: list[Path], tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """A folder whose run ended before its results: another temperature is refused instead of mixed with the samples."""
    out = tmp_path / "run"
    for kind in ("samples", "tokens"):
        shutil.copytree(evaluated / kind, out / kind)
    with pytest.raises(ArtifactError, match=r"base.jsonl:1: sampled from another model or otherwise"):
        evaluate.main(config(moved, tiny_model_folder, prompts, out, temperature=0.9))


def test_a_response_scored_otherwise_than_it_was_drawn_ends_the_run(
    evaluated: Path, moved: list[Path], tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """One of 24 log-probs as drawn, off by 1 nat on 8 tokens: packed rows would change the model, and its KL."""
    out = tmp_path / "run"
    for kind in ("samples", "tokens"):
        shutil.copytree(evaluated / kind, out / kind)
    path = out / "samples" / "near.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["responses"][0]["logp"] += 1
    path.write_text(json.dumps(row) + "\n" + "".join(others))
    with pytest.raises(RunError, match=r"near: responses are 0\.026 nats per token more or less likely when"):
        evaluate.main(config(moved, tiny_model_folder, prompts, out))


def test_one_prompt_has_no_interval(moved: list[Path], tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """However many samples: means are open-ended, shares anything, and nothing is fitted to a single prompt."""
    more = {"max_prompts": 1, "against": "all"}
    card = evaluate.main(config(moved, tiny_model_folder, prompts, tmp_path / "run", **more))
    found = card.results["models"]["far"]
    for name in ("reward", "reward_difference", "kl", "kl_per_token", "k1", "forward_kl", "tokens"):
        assert (found[name]["low"], found[name]["high"]) == ("-inf", "inf"), name
    for name in ("finished", "loop", "distinct", "repeated", "said_elsewhere"):
        assert (found[name]["low"], found[name]["high"]) == (0, 1), name
    assert card.results["length_controlled"] == [] and "leaderboard" not in card.results


def test_judges_see_both_orders_and_stand_apart(
    moved: list[Path], tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """Two judges, both orders: everything shown is kept, rates of each judge beside those of all verdicts."""
    more = {"reward": None, "judge": "rule:length ; rule:regex:the", "orders": "both", "n": 2}
    card = evaluate.main(config(moved[1:], tiny_model_folder, prompts, tmp_path / "run", **more))
    ((by_judge),) = card.results["by_judge"]
    (rate,) = card.results["win_rates"]
    assert list(by_judge) == rate["judges"] == ["rule:length", "rule:regex:the"]
    assert sum(one["wins"] for one in by_judge.values()) == rate["wins"]
    said, shown = (len((tmp_path / "run" / f).read_text().splitlines()) for f in ("judgements.jsonl", "shown.jsonl"))
    assert said == 2 * 2 * len(PROMPTS) and said < shown <= 2 * said


def test_the_enumerable_world_is_measured_within_its_intervals(tmp_path: Path) -> None:
    """Through the command: expected reward and KL of a moved model against the exact laws, 16 prompts, 24 responses.

    So is the best of n: chosen by a reward, what the truth says of it, and its KL is below the bound that is told.
    """
    world, proxy = (random_world(seed=seed, max_tokens=3) for seed in (0, 1))
    folders = [tmp_path / name for name in ("base", "moved")]
    write_model(folders[0], seed=0)
    loaded = load(folders[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for folder, size in zip(folders, (0.15, 0.06), strict=True):
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight.add_(size * torch.randn(weight.shape, generator=generator))
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    asked = world.prompts[::4]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    arguments = {
        "model": f"{folders[1]}", "reference": f"{folders[0]}", "prompts": f"{tmp_path / 'p.jsonl'}", "n": 24,
        "max_tokens": 3, "temperature": 0.8, "reward": "rule:enumerable:1", "truth": "rule:enumerable:0",
        "out": f"{tmp_path / 'run'}", "batch_size": 512, "dtype": "float32",
    }  # fmt: skip
    assert main(["evaluate", *(f"--{key}={value}" for key, value in arguments.items())]) == 0
    results = read_card(tmp_path / "run" / "run.json").results
    found = results["models"]["moved"]
    settings: dict[str, Any] = {"eos_id": EOS_ID, "max_tokens": 3, "temperature": 0.8}
    with torch.no_grad():
        theirs, ours = (
            enumerate_completions(load(f, dtype=torch.float32).model, [world.prompt_ids(p) for p in asked], **settings)
            for f in folders
        )
    rewards, truths = (of.rewards(asked, theirs.tokens) for of in (proxy, world))
    exact = {
        "reward": expected_reward(ours.logps, rewards).mean(),
        "truth": expected_reward(ours.logps, truths).mean(),
        "kl": kl_divergence(ours.logps, theirs.logps).mean(),
        "k1": kl_divergence(ours.logps, theirs.logps).mean(),
        "forward_kl": kl_divergence(theirs.logps, ours.logps).mean(),
    }
    for name, value in exact.items():
        assert found[name]["low"] < float(value) < found[name]["high"], name
    assert exact["kl"] > 0.1
    assert [one["n"] for one in results["best_of_n"]] == [1, 2, 4, 8, 16, 24]
    for one in results["best_of_n"][:5]:  # of 24 samples the best of 24 has one draw a prompt
        chosen = best_of_n(theirs.logps, rewards, one["n"])
        for name, values in (("reward", rewards), ("truth", truths)):
            assert one[name]["low"] < float(expected_reward(chosen, values).mean()) < one[name]["high"], (
                one["n"],
                name,
            )
        assert bool((kl_divergence(chosen, theirs.logps) <= one["kl_at_most"] + 1e-12).all())
    gain = [results["best_of_n"][i]["reward"]["estimate"] for i in (0, 3)]
    assert gain[1] - gain[0] > 0.5, "or choosing chose nothing"


def test_equal_models_are_no_distance_apart(tiny_model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    """KL exactly 0 both ways, though their samples are independent draws; a run folder is read as its model."""
    run = tmp_path / "trained"
    shutil.copytree(tiny_model_folder, run / "model")
    card = evaluate.main(config([run], tiny_model_folder, prompts, tmp_path / "out"))
    found = card.results["models"]["trained"]
    for name in ("kl", "k1", "forward_kl"):
        assert (found[name]["estimate"], found[name]["low"], found[name]["high"]) == (0, 0, 0)
    base, own = (rows(tmp_path / "out", name) for name in ("base", "trained"))
    assert [row["reward"] for row in base] != [row["reward"] for row in own]


def test_a_cut_or_greedy_law_says_what_its_kl_is_not(
    moved: list[Path], tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """top_p < 1 leaves k1, of the sampler's own law; temperature 0 leaves no KL; both are said in the notes."""
    more = {"n": 2, "reward": None}
    card = evaluate.main(config(moved[1:], tiny_model_folder, prompts, tmp_path / "cut", top_p=0.8, **more))
    found = card.results["models"]["far"]
    assert "k1" in found and not {"kl", "kl_per_token", "forward_kl"} & set(found)
    assert any("cuts every law" in note for note in card.notes) and "win_rates" not in card.results
    samples = [from_json(line) for line in (tmp_path / "cut/samples/far.jsonl").read_text().splitlines()]
    reference = load(tiny_model_folder, dtype=torch.float32).model
    drawn = json.loads((tmp_path / "cut/tokens/far.jsonl").read_text().splitlines()[0])
    row = rows(tmp_path / "cut", "far")[PROMPTS.index(samples[0].prompt) * 2]
    ids = torch.tensor([drawn["prompt"] + drawn["responses"][0]])
    with torch.no_grad():
        logps = torch.log_softmax(reference(ids).logits[0, len(drawn["prompt"]) - 1 : -1], -1)
    theirs = logps[torch.arange(len(logps)), torch.tensor(drawn["responses"][0])].sum()
    assert row["k1"] == pytest.approx(samples[0].responses[0].logp - float(theirs), abs=1e-3)
    card = evaluate.main(config(moved[1:], tiny_model_folder, prompts, tmp_path / "greedy", temperature=0, **more))
    assert "k1" not in card.results["models"]["far"] and any("temperature 0 has no law" in n for n in card.notes)


def test_a_reward_that_cannot_be_told_is_counted_and_not_zero(
    moved: list[Path], tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """The enumerable world's reward knows no word of these: no mean, all missing, every comparison a skip."""
    card = evaluate.main(config(moved[1:], tiny_model_folder, prompts, tmp_path / "run", reward="rule:enumerable:0"))
    found = card.results["models"]["far"]
    assert found["reward"] is None and found["reward_missing"] == 4 * len(PROMPTS)
    assert found["reward_difference"] is None and card.results["best_of_n"] == []
    (rate,) = card.results["win_rates"]
    assert rate["skips"] == 4 * len(PROMPTS) and rate["rate"]["n"] == 0


def test_a_dpo_run_brings_its_beta(tiny_model_folder: Path, pairs_file: Path, prompts: Path, tmp_path: Path) -> None:
    """Saturation is looked for in margins of the run's own beta: 48 pairs, none decided after two small steps."""
    settings: dict[str, Any] = {"max_steps": 2, "batch_size": 8, "lr": 1e-5, "dtype": "float32", "beta": 0.2}
    dpo.main(dpo.DpoConfig(model=str(tiny_model_folder), data=str(pairs_file), out=str(tmp_path / "dpo"), **settings))
    card = evaluate.main(
        config([tmp_path / "dpo"], tiny_model_folder, prompts, tmp_path / "run", pairs=str(pairs_file), n=1)
    )
    (found,) = [finding for finding in card.results["findings"] if finding["name"] == "saturation"]
    assert found["verdict"] == "not seen" and found["numbers"]["decided"]["n"] == 48


def test_inputs_that_cannot_be_read_end_the_run_with_their_reason(
    tiny_model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """An unknown scorer, prompts without a prompt, pairs that are too long or prefer nothing."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    with pytest.raises(ConfigError, match="scorer 'rule:taste' is unknown; allowed: rule:length"):
        evaluate.main(config([other], tiny_model_folder, prompts, tmp_path / "a", reward="rule:taste"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": ""}\n')
    with pytest.raises(DataError, match="1 rows are refused, 0 allowed"):
        evaluate.main(config([other], tiny_model_folder, bad, tmp_path / "b"))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a", "chosen": " b" * 600, "rejected": " c"}) + "\n")
    with pytest.raises(DataError, match=r"long.jsonl: 1 of 1 rows are refused, 0 allowed; .* --allow_refused 1$"):
        evaluate.main(config([other], tiny_model_folder, prompts, tmp_path / "d", pairs=str(long)))
    drawn = tmp_path / "samples.jsonl"
    drawn.write_text(to_json(SampledResponses(prompt="a", responses=(Response(text=" b"), Response(text=" c")))) + "\n")
    with pytest.raises(DataError, match="none of its rows prefers one response to another"):
        evaluate.main(config([other], tiny_model_folder, prompts, tmp_path / "c", pairs=str(drawn)))
