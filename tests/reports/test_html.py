"""The report: one file, no script, every number from a file."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.errors import ArtifactError
from preftune.records import Judgement, Message, Response, RunCard, to_json
from preftune.reports.html import render, write_report
from preftune.reports.reading import read

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</table></section><svg/onload=alert(1)>",
    "\"'><iframe src=javascript:alert(1)>",
    "{{ 7 * 7 }} {% raw %}",
    "<style>*{display:none}</style><!--",
]


def answer(prompt="The plot was", before=" dull.", after=" superb.", scores=(0.3, 0.95)):
    first, second = (Response(text=t, score=s) for t, s in zip((before, after), scores, strict=True))
    return Judgement(prompt=prompt, first=first, second=second, outcome="second", judge="reward")


def doctor(**changes):
    counts = {"rows": 1007, "used": 990, "refused": 8, "truncated": 0, "duplicate": 9, "pairs": 990, "tokens": 5}
    oddity = {"name": "no BOS", "rows": 3, "first": ["a.jsonl:4"], "meaning": "none"}
    return {"path": "a.jsonl", "format": "pairs", "sha256": "ab", **counts, "oddities": [oddity], **changes}


def write(folder, card, metrics=()):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(to_json(card))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))


def curve(offset=0.0, **extra):
    rows = []
    for step in (1, 2, 3, 4):
        for kind in ("train", "eval"):
            numbers = {"loss": 0.7 - step / 10, "loss_low": 0.5 - step / 10, "loss_high": 0.9 - step / 10, **extra}
            rows.append({"kind": kind, "step": step, "time": offset + step, "metrics": numbers})
    return rows


def card(stage="dpo", **changes):
    return RunCard(**{"stage": stage, "status": "done", "config": {"lr": 1e-3, "seed": 7}, **changes})


@pytest.fixture
def folder(tmp_path):
    """A run folder as the quickstart leaves it, in small."""
    results = {
        "reward_gain": {"estimate": 0.3214, "low": 0.3, "high": 0.3456, "n": 20},
        "win_rate": {"estimate": 0.8125, "low": 0.75, "high": 0.87, "n": 20},
        "kl": {"estimate": 5.25, "low": 5.0, "high": 5.5, "n": 20},
    }
    write(
        tmp_path, card("quickstart", results=results, versions={"torch": "2.13.0"}, host={"cores": 2, "processor": "p"})
    )
    write(tmp_path / "dpo", card("dpo", data={"train": doctor()}, notes=("a note",)), curve(100, accuracy=0.6))
    write(tmp_path / "sft", card("sft", results={"loss": 0.5, "loss_low": 0.4, "loss_high": 0.6}), curve())
    rows = [answer(f"Prompt {i} was", after=f" after {i}.", scores=(0.5, 0.5 + i / 100)) for i in range(-5, 25)]
    (tmp_path / "evaluation.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
    return tmp_path


class Page(HTMLParser):
    """What a browser would make of it: elements, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def page(folder):
    return Page(render(read(folder)))


def test_the_page_runs_and_loads_nothing(folder):
    """No script element, no event handler, no address of elsewhere, and a policy that forbids them all."""
    text = render(read(folder))
    assert "<script" not in text.lower()
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'" in text
    seen = Page(text)
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "action", "data")]
    assert all(value.startswith("#") for name, value in seen.attributes if name.endswith("href"))
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_hostile_text_is_shown_as_text_wherever_it_stands(folder):
    """In prompts, messages, answers, notes, settings, paths, versions and oddities: no element comes of it."""
    harmless = page(folder)
    every = {text: text for text in HOSTILE}
    oddities = [{"name": text, "rows": 1, "first": [text], "meaning": text} for text in HOSTILE]
    data = {text: doctor(path=text, format=text, oddities=oddities) for text in HOSTILE}
    write(folder / "dpo", card("dpo", config=every, notes=tuple(HOSTILE), hashes=every, data=data), curve())
    named = {"kind": "".join(HOSTILE), "results": {**every, "rows": [{text: text for text in HOSTILE}]}}
    title = card(named.pop("kind"), config={**every, "seed": "".join(HOSTILE)}, versions=every, **named)
    write(folder, title)
    rows = [answer(text, text, text) for text in HOSTILE]
    rows += [answer((Message(role=text, content=text),), text, text) for text in HOSTILE]
    (folder / "evaluation.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
    seen = page(folder)
    assert seen.tags <= harmless.tags | {"br", "thead"}  # between turns of a conversation, a table of results
    assert {name for name, _ in seen.attributes} <= {name for name, _ in harmless.attributes} | {"data-label"}
    assert all(seen.text.count(text) >= 30 for text in HOSTILE)


@settings(max_examples=4, deadline=None)
@given(texts=st.lists(st.text(), min_size=12, max_size=12))
def test_any_answer_is_shown_as_it_is(tmp_path_factory, texts):
    """What a model wrote reaches the page unchanged, as text."""
    root = tmp_path_factory.mktemp("any")
    write(root, card("quickstart"))
    texts = ["a\u2028b\x85c\x0bd", *texts[1:6]]  # what splits lines elsewhere; no more than are drawn at random
    rows = "".join(to_json(answer(after=text)) + "\n" for text in texts)
    (root / "evaluation.jsonl").write_text(rows, encoding="utf-8", newline="")
    shown = page(root).text.replace("\r\n", "\n").replace("\r", "\n")
    assert all(text.replace("\r\n", "\n").replace("\r", "\n") in shown for text in texts)


def test_the_same_files_give_the_same_bytes(folder):
    """Rendered twice, and in a process with another hash seed, the page is one."""
    command = "import sys; from preftune.reports.html import write_report; write_report(sys.argv[1])"
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", command, str(folder)], check=True, env=environment)
    elsewhere = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == elsewhere == render(read(folder)).encode()


def test_headline_numbers_carry_interval_and_source(folder):
    """Each result is shown with its interval, its unit and the file and key it stands in."""
    text = " ".join(page(folder).text.split())
    assert "Reward gain +0.321 [+0.300, +0.346]" in text and "run.json: results.reward_gain" in text
    assert "Win rate 81.2 % [75.0 %, 87.0 %]" in text
    assert "KL from the start 5.25 nats [5.00, 5.50]" in text
    assert "Loss 0.500 nats [0.400, 0.600]" in text and "sft/run.json: results.loss" in text
    exact = [value for name, value in page(folder).attributes if name == "title"]
    assert "run.json: results.reward_gain = 0.3214" in exact, "to the last digit under the pointer"


def test_answers_are_chosen_by_the_rules_that_are_stated(folder):
    """Six drawn with the seed, the four largest gains and losses, the four longest; each with its line of the file."""
    text = " ".join(page(folder).text.split())
    drawn, best, worst, longest = re.split(r" (?:Best the 4|Worst the 4|Longest the 4) [a-z]+", text)[:4]
    numbers = [[int(p) for p in re.findall(r"Prompt (-?\d+) was", part)] for part in (drawn, best, worst, longest)]
    assert len(numbers[0]) == 6 == len(set(numbers[0])) and numbers[0] == sorted(numbers[0])
    assert numbers[1] == [24, 23, 22, 21] and numbers[2] == [-5, -4, -3, -2]
    assert all(len(f" after {i}.") == len(" after 10.") for i in numbers[3][:4])
    assert "6 of 30, drawn with the run's seed (7)" in text and "evaluation.jsonl:30" in best, "24 stands in line 30"
    write(folder, card("quickstart", config={"seed": 8}))
    assert re.findall(r"Prompt (-?\d+) was", page(folder).text)[:6] != list(map(str, numbers[0]))


def test_stages_stand_in_the_order_in_which_they_ran(folder):
    """SFT before DPO because its first step came first, whatever the folders are called."""
    text = page(folder).text
    assert text.index("Training: sft") < text.index("Training: dpo") < text.index("dpo, train")
    assert "1,007 rows = 990 used + 8 refused + 0 truncated + 9 duplicate" in text
    assert "1,007" in text and "a note" in text and "no BOS: 3 rows (a.jsonl:4)" in text


def test_a_single_stage_folder_has_a_report_too(folder):
    """Without answers to compare there is no such section, and files are named from the stage's own folder."""
    seen = page(folder / "dpo")
    assert "Training: dpo" in seen.text and "Answers side by side" not in seen.text
    assert "metrics.jsonl" in seen.text and "dpo/metrics.jsonl" not in seen.text


def test_numbers_that_are_not_finite_leave_a_gap_not_a_crash(folder):
    """Metrics hold NaN as text; curves leave them out, and a curve of nothing else is not drawn."""
    write(folder / "dpo", card("dpo"), [*curve(100), *curve(105, loss="nan", accuracy="nan")])
    of_dpo = page(folder).text.partition("Training: dpo")[2]
    assert "accuracy: chosen above rejected" not in of_dpo and "loss, nats" in of_dpo


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    """The message names the file and what to give."""
    with pytest.raises(ArtifactError, match=r"run\.json is no run card .*name the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text(to_json(answer()))
    with pytest.raises(ArtifactError, match=r"run\.json is a Judgement, no run card"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_line_that_cannot_be_read_is_named(folder):
    """File and line of a torn record."""
    with open(folder / "evaluation.jsonl", "a") as file:
        file.write('{"type": "Judgem')
    with pytest.raises(ArtifactError, match=r"evaluation\.jsonl:31: cannot be read"):
        read(folder)


def test_a_torn_metric_and_an_unreadable_stage_are_gaps_that_the_page_states(folder):
    """The line that a kill tore is named and left out, a stage without a card too; the others are drawn."""
    with open(folder / "dpo" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 5, "ti')
    (folder / "sft" / "run.json").write_text('{"type": "RunCard", "sta')
    text = page(folder).text
    assert "dpo/metrics.jsonl: 1 unreadable lines are left out (9)" in text
    assert re.search(r"left out: \S+sft/run\.json is no run card", text)
    assert "Training: dpo" in text and "Training: sft" not in text


@pytest.mark.parametrize(
    ("status", "said"),
    [("running", "had not ended"), ("stopped", "--resume"), ("failed", "this run failed: NotFinite: rows a:3")],
)
def test_a_run_that_did_not_end_well_says_so_before_any_number(folder, status, said):
    """Above the results, with the reason."""
    config = {"resume": False}  # the stage has the key
    write(folder / "dpo", card("dpo", status=status, config=config, notes=("failed: NotFinite: rows a:3",)), curve())
    text = page(folder / "dpo").text
    assert "Read this first" in text and said in text and text.index(said) < text.index("Training: dpo")


def test_the_sentence_and_the_time_come_from_the_card(folder):
    """What was done to what, on how many pairs, when and how long."""
    config = {"model": "m", "data": "a/b/pairs.jsonl", "loss": "dpo", "beta": 0.1, "seed": 7}
    times = {"began": 1.8e9, "ended": 1.8e9 + 3723}
    data = {"train": doctor()}
    write(folder / "dpo", card("dpo", config=config, times=times, data=data, results={"steps": 31}), curve())
    text = " ".join(page(folder / "dpo").text.split())
    assert "m with loss dpo (beta 0.1) on b/pairs.jsonl: 990 pairs, 31 optimizer steps." in text
    assert "2027-01-15 08:00 UTC, 1 h 2 min" in text
    empty = page(folder / "sft").text
    assert "preftune sft" in empty and "UTC" not in empty


def test_refused_rows_are_listed_up_to_a_number_that_is_said(folder):
    """Two hundred of them on the page, the others counted with the file that holds them."""
    refused = [f"a.jsonl:{i}: chosen: is empty" for i in range(203)]
    write(folder / "dpo", card("dpo", data={"train": doctor(refusals=refused)}), curve())
    text = page(folder).text
    assert "203 rows refused" in text and "a.jsonl:199: chosen" in text and "a.jsonl:200: chosen" not in text
    assert "3 more in dpo/refused-train.txt" in " ".join(text.split())
