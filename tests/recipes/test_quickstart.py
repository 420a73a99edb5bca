"""The quickstart: from nothing to a report, with a gain that is real."""

import html
import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune import cli
from preftune.config.stages import QuickstartConfig
from preftune.engine.run import Run, Stopped
from preftune.errors import ResumeMismatch
from preftune.models.load import quiet
from preftune.recipes import quickstart
from preftune.records import Judgement, Response, from_json
from preftune.worlds.reviews import prompts, reward

TINY = quickstart.Size(hidden=32, reviews=1500, prompts=160, held_out=24, epochs=4, lr=1e-3)


def lines(path):
    return [from_json(line) for line in path.read_text().splitlines()]


def numbers(card):
    return {name: value for name, value in card.results.items() if name != "look_next"}


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """(run folder, CPU seconds) of `preftune quickstart --fast`."""
    out = tmp_path_factory.mktemp("fast") / "run"
    start = time.process_time()
    assert cli.main(["quickstart", "--fast", "--out", str(out)]) == 0
    return out, time.process_time() - start


def tiny(out, seed=0):
    """The card of a run too small to mean anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "FAST", TINY)
        return quickstart.main(QuickstartConfig(out=str(out), fast=True, seed=seed))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, card) of an uninterrupted tiny run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, tiny(out)


@pytest.mark.slow
def test_the_reward_rises_beyond_doubt_in_under_a_minute(fast):
    """On held-out prompts the interval of the gain lies above 0, that of the win rate above a half; KL is paid."""
    out, seconds = fast
    results = from_json((out / "run.json").read_text()).results
    assert results["reward_gain"]["low"] > 0.05
    assert results["win_rate"]["low"] > 0.5
    assert results["kl"]["low"] > 0
    assert abs(results["reward_before"]["estimate"] - 0.5) < 0.1
    assert seconds < 60


@pytest.mark.slow
def test_the_numbers_are_those_of_the_files(fast):
    """Rewards, gain and win rate follow from evaluation.jsonl, whose scores are the world's reward of its texts."""
    out, _ = fast
    rows, results = lines(out / "evaluation.jsonl"), from_json((out / "run.json").read_text()).results
    before, after = ([reward(r.prompt, getattr(r, side).text) for r in rows] for side in ("first", "second"))
    assert [r.first.score for r in rows] == before and [r.second.score for r in rows] == after
    wins = sum(1.0 if b > a else 0.5 if b == a else 0.0 for a, b in zip(before, after, strict=True))
    assert results["win_rate"]["estimate"] == pytest.approx(wins / len(rows))
    assert results["reward_before"]["estimate"] == pytest.approx(sum(before) / len(rows))
    assert results["reward_gain"]["estimate"] == pytest.approx((sum(after) - sum(before)) / len(rows))
    assert {r.prompt for r in rows} <= set(prompts("held_out"))


@pytest.mark.slow
def test_the_kl_is_that_of_plain_transformers(fast):
    """Mean over the policy's answers of log pi - log pi_start, by full forwards of the two saved folders."""
    out, _ = fast
    with quiet():
        policy, start = (AutoModelForCausalLM.from_pretrained(out / s / "model").eval() for s in ("dpo", "sft"))
        tokenizer = AutoTokenizer.from_pretrained(out / "dpo" / "model")
    total, rows = 0.0, lines(out / "evaluation.jsonl")
    for row in rows:
        ids = tokenizer(row.prompt + row.second.text + ("</s>" if row.second.finished else ""))["input_ids"]
        first = len(tokenizer(row.prompt)["input_ids"])
        with torch.no_grad():
            laws = [m(torch.tensor([ids])).logits[0, first - 1 : -1].double().log_softmax(-1) for m in (policy, start)]
        total += float((laws[0] - laws[1])[torch.arange(len(ids) - first), ids[first:]].sum())
    assert from_json((out / "run.json").read_text()).results["kl"]["estimate"] == pytest.approx(
        total / len(rows), abs=1e-4
    )


@pytest.mark.slow
def test_pairs_are_judged_samples_of_the_start_and_held_out_ones_stay_out(fast):
    """Every pair is two answers of the SFT model with the judge's choice first; no prompt is on both sides."""
    out, _ = fast
    judged = {(j.prompt, j.first.text, j.second.text): j for j in lines(out / "judgements.jsonl")}
    files = {name: [json.loads(line) for line in (out / name).read_text().splitlines()] for name in
             ("pairs.jsonl", "pairs-held-out.jsonl", "reviews.jsonl")}  # fmt: skip
    for pair in files["pairs.jsonl"] + files["pairs-held-out.jsonl"]:
        texts = [(pair["chosen"], pair["rejected"]), (pair["rejected"], pair["chosen"])]
        (verdict,) = [judged[pair["prompt"], *t] for t in texts if (pair["prompt"], *t) in judged]
        chosen = verdict.first if verdict.outcome == "first" else verdict.second
        assert chosen.text == pair["chosen"] and "sft" in chosen.provenance
    trained = {row["prompt"] for name in ("pairs.jsonl", "reviews.jsonl") for row in files[name]}
    assert len(files["pairs.jsonl"]) > 1900 and not trained & {row["prompt"] for row in files["pairs-held-out.jsonl"]}


@pytest.mark.slow
def test_the_report_shows_the_run(fast):
    """report.html holds the headline numbers, the answers and the next command; no script."""
    out, _ = fast
    page = html.unescape((out / "report.html").read_text())
    results = from_json((out / "run.json").read_text()).results
    assert f"+{results['reward_gain']['estimate']:.3f}" in page and "<script" not in page
    for part in (
        "Reward and its price",
        "Before and after",
        "Answers side by side",
        "Training: sft",
        "Training: dpo",
        "Data",
    ):
        assert part in page
    assert results["look_next"]["why"] in page and results["look_next"]["command"] in page


def test_the_next_command_is_accepted(whole):
    """What the report proposes is a valid command on files that exist."""
    _, card = whole
    stage, config = cli.parse(card.results["look_next"]["command"].split()[1:])
    assert stage == "dpo" and config.beta == 0.3
    assert all(Path(path).exists() for path in (config.model, config.data, config.eval_data))


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(whole, tmp_path):
    """World, weights, samples, labels and training all follow the seed; another seed gives another run."""
    folder, card = whole
    again, other = tiny(tmp_path / "again"), tiny(tmp_path / "other", seed=1)
    assert numbers(again) == numbers(card) != numbers(other)
    texts = [(path / "pairs.jsonl").read_text() for path in (folder, tmp_path / "again", tmp_path / "other")]
    assert texts[0] == texts[1] != texts[2]


def test_called_again_it_continues_what_was_interrupted(whole, tmp_path, capsys):
    """Stopped in the middle of a stage, it says that the same command continues; so it does, to the same numbers."""
    taught = Run.after_step

    def interrupted(run, step, metrics):
        taught(run, step, metrics)
        if run.card.stage == "dpo" and step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "after_step", interrupted)
        with pytest.raises(Stopped):
            tiny(tmp_path / "run")
    told = capsys.readouterr().err
    for stage, folder in (("dpo", tmp_path / "run" / "dpo"), ("quickstart", tmp_path / "run")):
        assert f"{stage} stopped; the same command continues the run in {folder}\n" in told
    assert "--resume" not in told
    assert from_json((tmp_path / "run" / "run.json").read_text()).status == "stopped"
    continued = tiny(tmp_path / "run")
    assert continued.status == "done" and numbers(continued) == numbers(whole[1])
    assert continued.hashes["policy_weights"] != continued.hashes["reference_weights"]


def test_a_finished_run_is_shown_again_and_never_mixed_with_another(whole):
    """The same command on a finished run ends with its numbers at once; another seed is refused."""
    folder, card = whole
    assert numbers(tiny(folder)) == numbers(card)
    with pytest.raises(ResumeMismatch, match="seed: 1"):
        tiny(folder, seed=1)


def test_ties_empty_and_cut_off_answers_teach_nothing(tmp_path):
    """They are left out of the pairs and counted; the winner comes first in the others."""
    good, bad, cut, empty = (Response(text=t, finished=t != " cut") for t in (" good.", " bad.", " cut", " "))
    cases = [
        (good, bad, "first"),
        (bad, good, "second"),
        (good, good, "tie"),
        (good, cut, "first"),
        (empty, bad, "second"),
    ]
    labels = [Judgement(prompt="p", first=a, second=b, outcome=outcome, judge="") for a, b, outcome in cases]
    notes = []
    quickstart.write_pairs(
        tmp_path / "p.jsonl", labels, type("Run", (), {"note": lambda self, text: notes.append(text)})()
    )
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "p", "chosen": " good.", "rejected": " bad."}] * 2
    assert "2 pairs from 5 prompts" in notes[0]


def test_measures_of_a_comparison_worked_by_hand():
    """Two wins, a tie and a loss are a win rate of 5/8; the gain is the mean of the differences; lengths are words."""
    rows = [
        ((0.1, " a."), (0.9, " a b c.")),
        ((0.2, " a."), (0.4, " a.")),
        ((0.5, " a."), (0.5, " b.")),
        ((0.8, " a."), (0.6, " a.")),
    ]
    compared = [
        Judgement(
            prompt="p",
            first=Response(text=a[1], score=a[0]),
            second=Response(text=b[1], score=b[0]),
            outcome="second" if b[0] > a[0] else "first" if b[0] < a[0] else "tie",
            judge="",
        )
        for a, b in rows
    ]
    found = {name: interval.estimate for name, interval in quickstart.measure(compared).items()}
    expected = {"reward_before": 0.4, "reward_after": 0.6, "reward_gain": 0.2, "win_rate": 0.625}
    assert found == pytest.approx({**expected, "length_before": 1.0, "length_after": 1.5})
    assert all(math.isfinite(i.low + i.high) and i.low <= i.high for i in quickstart.measure(compared).values())
