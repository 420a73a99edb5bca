"""`preftune label --judge`: from samples to files that train, every comparison accounted for, nothing asked twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from preftune.cli import main as cli
from preftune.data.sources import open_source
from preftune.engine.card import read_card
from preftune.models.fresh import tiny_llama, word_tokenizer
from preftune.models.load import quiet
from preftune.records import Message, RankedResponses, Response, SampledResponses, from_json, to_json
from preftune.web.inputs import sampled_items
from preftune.worlds.reviews import corpus, prompts, reward, vocabulary

ROOT = Path(__file__).resolve().parents[2]


def row(prompt: Any, *texts: str | Response) -> SampledResponses:
    responses = tuple(
        Response(text=t, provenance="model=secret temperature=1") if isinstance(t, str) else t for t in texts
    )
    return SampledResponses(prompt=prompt, responses=responses, origin="prompts.jsonl:1")


def write(path: Path, rows: list[SampledResponses]) -> str:
    path.write_text("".join(to_json(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def reviews(n: int, k: int) -> list[SampledResponses]:
    texts = [review.response.text for review in corpus(n * k, seed=3)]
    return [row(prompt, *texts[i * k : (i + 1) * k]) for i, prompt in enumerate(prompts("train")[:n])]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label(samples: str, judge: str, out: Path, *more: str) -> dict[str, Any]:
    assert cli(["label", "--samples", samples, "--judge", judge, "--out", str(out), *more]) == 0
    return json.loads((out / "label.json").read_text())


def test_winners_become_pairs_and_a_prompt_weighs_one(tmp_path: Path) -> None:
    """K (K - 1) / 2 pairs of K different responses, chosen by the rule, their weights summing to 1 by prompt."""
    label(write(tmp_path / "s.jsonl", reviews(9, 4)), "rule:reviews ; rule:length", tmp_path / "out")
    weights: dict[str, Fraction] = defaultdict(Fraction)
    for pair in lines(tmp_path / "out/pairs.jsonl"):
        weights[pair["prompt"]] += Fraction(pair["weight"]).limit_denominator(1000)
        if pair["annotator"] == "rule:reviews":
            scores = [reward(pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
            assert scores == [pair["score_chosen"], pair["score_rejected"]] and scores[0] > scores[1]
        else:
            assert len(pair["chosen"]) > len(pair["rejected"])
    assert set(weights.values()) == {1} and set(weights) == set(prompts("train")[:9])


def test_every_comparison_is_in_exactly_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty, unfinished, identical, tied, repeated: all counted, the counts add up, and none of them is trained on."""
    cut = Response(text="cut off in the", finished=False)
    samples = [
        row("p", "a", "bb"), row("p", "bb", "a"), row("q", "a", "  "), row("q", "a", cut), row("r", "a", "a"),
        row("r", "a", "b"), row("s", "alone"), row("t", "", cut, "a", "bb", "ccc"),
    ]  # fmt: skip
    found = label(write(tmp_path / "s.jsonl", samples), "rule:length", tmp_path / "out")["counts"]
    assert found["prompts"] == {"all": 8, "compared": 5}
    assert found["comparisons"] == {"all": 16, "judged": 7, "empty": 5, "unfinished": 4}
    assert found["rule:length"] == {"pair": 4, "repeated": 1, "identical": 1, "tie": 1}
    assert found["rankings"] == {"ranking": 1}
    assert len(lines(tmp_path / "out/judgements.jsonl")) == 7 and len(lines(tmp_path / "out/pairs.jsonl")) == 4
    said = capsys.readouterr().out
    assert "comparisons: 16 all, 7 judged" in said and "P(first wins)" in said and "longest wins" in said
    assert read_card(tmp_path / "out/run.json").results["labels"]["counts"] == found


def test_rankings_are_by_comparisons_won_with_ties(tmp_path: Path) -> None:
    """Equal lengths tie; no order is no ranking; a reader of rankings reads them, weight and annotator included."""
    samples = [row("p", "a", "ccc", "bb", "xx"), row("q", "a", "b", "c"), row("r", "a", "bb")]
    found = label(write(tmp_path / "s.jsonl", samples), "rule:length", tmp_path / "out")
    assert found["counts"]["rankings"] == {"ranking": 1, "no order": 1}
    (read,) = open_source(tmp_path / "out/rankings.jsonl", kind="preferences")
    assert isinstance(read, RankedResponses)
    assert (read.ranks, read.weight, read.annotator) == ((3, 1, 2, 2), 1 / 5, "rule:length")


def test_a_judges_scores_let_the_page_ask_close_calls_first(tmp_path: Path) -> None:
    """scored.jsonl is the samples, line by line, with the judge's scores; the page's items are ordered by their gap."""
    samples = reviews(6, 3)
    label(write(tmp_path / "s.jsonl", samples), "rule:reviews", tmp_path / "out")
    scored = [from_json(line) for line in (tmp_path / "out/scored.jsonl").read_text().splitlines()]
    assert [(row.prompt, [r.text for r in row.responses]) for row in scored] == [
        (row.prompt, [r.text for r in row.responses]) for row in samples
    ]
    assert all(r.score == reward(row.prompt, r.text) for row in scored for r in row.responses)
    gaps = [sorted(r.score for r in row.responses)[-2] - max(r.score for r in row.responses) for row in scored]
    assert [item.priority for item in sampled_items(tmp_path / "out/scored.jsonl")] == gaps
    assert len(set(gaps)) > 3


def test_a_conversation_stays_one(tmp_path: Path) -> None:
    """Messages are written as messages, and read back as the same prompt."""
    prompt = (Message(role="system", content=""), Message(role="user", content="Hello"))
    label(write(tmp_path / "s.jsonl", [row(prompt, "a", "bb", "ccc")]), "rule:length", tmp_path / "out")
    for name in ("pairs", "rankings"):
        for read in open_source(tmp_path / f"out/{name}.jsonl", kind="preferences"):
            assert isinstance(read, RankedResponses) and read.prompt == prompt
            assert {response.text for response in read.responses} <= {"a", "bb", "ccc"}


def test_the_order_shown_is_recorded_and_the_files_repeat(tmp_path: Path) -> None:
    """About half are turned; judgements keep provenance; the same run gives the same bytes, another seed others."""
    samples = write(tmp_path / "s.jsonl", reviews(60, 2))
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        label(samples, "rule:reviews", tmp_path / out, "--seed", seed)
    files = [[(tmp_path / out / f"{name}.jsonl").read_bytes() for name in ("judgements", "pairs")] for out in "abc"]
    assert files[0] == files[1] and files[0][0] != files[2][0]
    said = [from_json(line) for line in files[0][0].decode().splitlines()]
    turned = sum(j.first.text != r.responses[0].text for j, r in zip(said, reviews(60, 2), strict=True))
    assert 15 < turned < 45 and {j.first.provenance for j in said} == {"model=secret temperature=1"}


def test_preference_data_is_labelled_anew_and_compared_with_its_own_labels(tmp_path: Path) -> None:
    """The data's labels are an annotator beside the judge; without their name in any layout, and ties count."""
    data = tmp_path / "data.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "chosen": "aaa", "rejected": "b"} for i in range(6)]
    rows += [{"prompt": f"q{i}", "chosen": "a", "rejected": "bbb"} for i in range(2)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = label(str(data), "rule:length", tmp_path / "out")
    assert found["agreement"]["raw"]["estimate"] == 0.75
    assert [r["name"] for r in found["agreement"]["annotators"]] == ["rule:length", "the data's own labels"]
    assert found["agreement"]["annotators"][1]["first"]["n"] == 0


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("rule:shortest", "judge 'rule:shortest' is unknown; allowed: rule:length, rule:regex:PATTERN"),
        ("length", "judge 'length' is unknown"),
        ("rule:length ; rule:length", "judge rule:length is named twice"),
        ("rule:python:os:getcwd", "runs code of your own; say so with --allow_python"),
        ("simulated:noisy:flip", "judge simulated:noisy:flip: 'flip' is no KNOB=NUMBER"),
        ("simulated:noisy:flip=2", r"flip must be in [0, 1], not 2"),
        ("llm:http://localhost:1", "which model of the server? Write llm:URL#MODEL"),
        ("llm:localhost#m", "'localhost' is no server"),
    ],
)
def test_an_impossible_judge_is_refused(
    judge: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line, before anything is written."""
    samples = write(tmp_path / "s.jsonl", [row("p", "a", "b")])
    assert cli(["label", "--samples", samples, "--judge", judge, "--out", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()


def test_samples_that_never_ended_say_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too small a max_tokens leaves nothing to compare: the count, and the setting, in one line."""
    cut = [Response(text=text, finished=False) for text in "abc"]
    samples = write(tmp_path / "s.jsonl", [replace(row("p", "a"), responses=tuple(cut))])
    assert cli(["label", "--samples", samples, "--judge", "rule:length", "--out", str(tmp_path / "out")]) == 2
    assert "; left out: 3 unfinished comparisons; sample with a larger --max_tokens, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (to_json(row("p", "a", "b")) + "\n" + to_json(row("q", "a", "b"))[:40], "s.jsonl:2: no line of samples"),
        (to_json(row("p", "a")) + "\n", "none of 1 rows holds two responses that are finished and not empty"),
        ('{"prompt": "p", "chosen": "a", "rejected": 3}\n', "s.jsonl:1: rejected: is the number 3"),
        ('{"prompt": "p", "completion": "a", "label": true}\n', "s.jsonl:1: holds one response"),
    ],
)
def test_bad_samples_are_refused_by_line(
    content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A torn line, a row of another kind: named, and nothing is labelled."""
    (tmp_path / "s.jsonl").write_text(content)
    out = str(tmp_path / "out")
    assert cli(["label", "--samples", str(tmp_path / "s.jsonl"), "--judge", "rule:length", "--out", out]) == 2
    assert problem in capsys.readouterr().err


@dataclass(frozen=True)
class Played:
    """The server process that plays judges."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    port, log = tmp_path / "port", tmp_path / "asked.log"
    script = ROOT / "tests/judges/playing_server.py"
    process = subprocess.Popen([sys.executable, str(script), str(port), str(log)])
    try:
        deadline = time.monotonic() + 20
        while not port.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        yield Played(f"http://127.0.0.1:{port.read_text()}", log, process)
    finally:
        process.kill()
        process.wait()


# Part -> (categories of 12 comparisons of different lengths, share of answers that turn with the order).
PARTS: dict[str, tuple[set[str], float | None]] = {
    "sensible": ({"pair"}, 0.0),
    "first": ({"inconsistent"}, 1.0),
    "random": ({"pair", "inconsistent"}, None),
    "gibberish": ({"unparsable"}, None),
    "half": ({"pair", "failed"}, 0.0),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_language_model_wins_only_from_both_sides(part: str, played: Played, tmp_path: Path) -> None:
    """A sensible judge's winners are pairs, one that looks at the position only ties, gibberish and failure decide
    nothing; without the server the same run gives the same files.
    """
    samples = write(tmp_path / "s.jsonl", [row(f"p{i}", "a" * (i + 1), "b" * (i + 3)) for i in range(12)])
    judge, out = f"llm:{played.url}#{part}", tmp_path / "out"
    found = label(samples, judge, out)
    categories, flips = PARTS[part]
    assert {name for name, n in found["counts"][judge].items() if n} == categories
    assert sum(found["counts"][judge].values()) == 12
    assert all(len(pair["chosen"]) > len(pair["rejected"]) for pair in lines(out / "pairs.jsonl")) or part == "random"
    if flips is not None:
        assert found["flips"][judge]["estimate"] == flips
    assert len(played.asked()) == 24 == len(lines(out / "shown.jsonl"))
    assert not any("secret" in asked or "prompts.jsonl" in asked for asked in played.asked())
    if part != "half":
        before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
        played.process.kill()
        played.process.wait()
        label(samples, judge, out)
        assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before


def test_a_judge_that_never_answers_ends_the_run(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 with what the server said, and no file of labels."""
    samples = write(tmp_path / "s.jsonl", [row("p", "a", "bb")])
    out = tmp_path / "out"
    assert cli(["label", "--samples", samples, "--judge", f"llm:{played.url}#ill", "--out", str(out)]) == 1
    assert "none of 2 questions was answered" in (said := capsys.readouterr().err) and "this judge is ill" in said
    assert not (out / "pairs.jsonl").exists()


def test_after_a_kill_nothing_is_asked_twice(played: Played, tmp_path: Path) -> None:
    """kill -9 in the middle: the second run asks exactly what has no answer on disk, and ends as if never killed."""
    samples = write(tmp_path / "s.jsonl", [row(f"p{i}", "a", "bb") for i in range(100)])
    out, judge = tmp_path / "out", f"llm:{played.url}#slow"
    command = ["label", "--samples", samples, "--judge", judge, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    killed = subprocess.Popen([sys.executable, "-m", "preftune", *command], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(played.asked()) < 60:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.3)  # what was in flight is logged by now
    before, kept = len(played.asked()), (out / "answers.jsonl").read_bytes().count(b"\n")
    assert 30 < kept < 200 and not (out / "pairs.jsonl").exists()
    found = label(samples, judge, out)
    assert len(played.asked()) - before == 200 - kept
    assert found["counts"][judge] == {"pair": 100}


def test_a_reward_model_judges_by_its_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reward:RUN` asks the scorer loaded from that folder; a score that is no number decides nothing."""

    def load(folder: str, device: str, **options: Any) -> Any:
        assert folder == "runs/rm" and device in ("cpu", "cuda")
        return lambda asked: [math.nan if response.text == "?" else -len(response.text) for _, response in asked]

    monkeypatch.setattr("preftune.judges.reward_model.load_scorer", load)
    samples = write(tmp_path / "s.jsonl", [row("p", "a", "bbb"), row("q", "a", "?"), row("r", "aa", "bb")])
    found = label(samples, "reward:runs/rm", tmp_path / "out")
    assert found["counts"]["reward:runs/rm"] == {"pair": 1, "skip": 1, "tie": 1}
    (pair,) = lines(tmp_path / "out/pairs.jsonl")
    assert (pair["chosen"], pair["score_chosen"], pair["score_rejected"]) == ("a", -1.0, -3.0)


@pytest.mark.parametrize("file", ["pairs", "rankings"])
def test_sample_label_dpo_on_the_embedded_world(file: str, tmp_path: Path) -> None:
    """Responses of a model, labelled by rule, train it: the files are read as they are, no row refused."""
    tokenizer = word_tokenizer(vocabulary())
    with quiet():
        tiny_llama(len(tokenizer), hidden=32, layers=1, seed=0).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    asked = tmp_path / "prompts.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts("train")[:20]))
    model, samples = str(tmp_path / "model"), str(tmp_path / "samples.jsonl")
    flags = ["--n", "4", "--max_tokens", "100", "--device", "cpu", "--out", samples]
    assert cli(["sample", "--model", model, "--prompts", str(asked), *flags]) == 0
    found = label(samples, "rule:length ; simulated:noisy:flip=0.3", tmp_path / "labels")
    written = lines(tmp_path / f"labels/{file}.jsonl")
    assert len(written) >= 8 and Counter(r["annotator"] for r in written).keys() == found["counts"].keys() - {
        "prompts", "comparisons", "rankings"
    }  # fmt: skip
    flags = f"--out {tmp_path}/dpo --max_steps 1 --batch_size 8 --tokens_per_batch 2048 --device cpu --lr 1e-3"
    data = str(tmp_path / f"labels/{file}.jsonl")
    assert cli(["dpo", "--model", model, "--data", data, *flags.split()]) == 0
    report = read_card(tmp_path / "dpo/run.json").data["train"]
    assert report["rows"] == report["used"] == len(written)
