"""The report as a stage, and at the end of every other."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from preftune import cli
from preftune.engine.run import Run, Stopped
from preftune.errors import DataError, NotFinite, ResumeMismatch
from preftune.parts.ending import finish, opened
from preftune.recipes import dpo, sft
from preftune.records import RunCard, from_json
from preftune.reports import html


def card(folder: Path) -> RunCard:
    return from_json((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def runs(tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of DPO that differ in beta, and one of SFT."""
    out = tmp_path_factory.mktemp("runs")
    lines = pairs_file.read_text().splitlines(keepends=True)
    (out / "train.jsonl").write_text("".join(lines[:-12]))
    (out / "eval.jsonl").write_text("".join(lines[-12:]))
    common: dict[str, Any] = {"model": str(tiny_model_folder), "max_length": 128, "batch_size": 8, "dtype": "float32"}
    common |= {"data": str(out / "train.jsonl"), "eval_data": str(out / "eval.jsonl"), "eval_every": 2, "max_steps": 4}
    for beta in (0.1, 0.5):
        dpo.main(dpo.DpoConfig(**common, lr=1e-3, beta=beta, out=str(out / f"beta-{beta}")))
    sft.main(sft.SftConfig(**common, out=str(out / "sft")))
    return out


def test_every_training_run_ends_with_its_report(runs: Path) -> None:
    """report.html beside run.json, the same bytes that `preftune report` writes, and nothing else is left behind."""
    for name in ("beta-0.1", "beta-0.5", "sft"):
        page = runs / name / "report.html"
        first = page.read_bytes()
        page.unlink()
        assert cli.main(["report", str(runs / name)]) == 0
        assert page.read_bytes() == first
        assert not list((runs / name).glob(".report*"))


def test_runs_side_by_side_show_what_differs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One page here: both in one figure, the differing settings, the numbers of both, files named as given."""
    monkeypatch.chdir(runs)
    assert cli.main(["report", "beta-0.1", "beta-0.5", "--out", str(tmp_path / "both" / "r.html")]) == 0
    text = (tmp_path / "both" / "r.html").read_text()
    assert capsys.readouterr().out == f"Report: {tmp_path / 'both' / 'r.html'}\n"
    assert "2 runs side by side" in text and "beta-0.5/metrics.jsonl" in text
    assert "Settings: 1 key<" in text and "<code>0.1</code>" in text and "<code>0.5</code>" in text
    for name in ("beta-0.1", "beta-0.5"):
        assert f"{name}/run.json: results.loss = {card(runs / name).results['loss']!r}" in text


def test_the_quantiles_of_the_metrics_are_drawn(runs: Path) -> None:
    """Margins and both log-ratios have bands of where the pairs lie."""
    text = (runs / "beta-0.1" / "report.html").read_text()
    displacement = text.partition("displacement: ")[2].partition("</figure>")[0]
    assert displacement.count(' band"') == 4 and "5 to 95 %" in displacement


def test_a_report_that_cannot_be_written_is_a_warning_in_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is done with its results; the card says why there is no page and how to get it."""

    def broken(*folders: object) -> None:
        raise ZeroDivisionError("a figure of nothing")

    monkeypatch.setattr(html, "write_report", broken)
    with Run.open(tmp_path / "run", stage="label", config={}, resume=False) as run:
        returned = finish(run, {"loss": 0.5})
    found = card(tmp_path / "run")
    assert found == returned and found.status == "done" and found.results == {"loss": 0.5}
    expected = "the report was not written (ZeroDivisionError: a figure of nothing); preftune report "
    assert found.notes[-1].startswith(expected) and f"warning: {expected}" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "was not written" in (tmp_path / "run" / "report.html").read_text()


def stopping_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this very process once that step is told."""
    told = Run.after_step

    def after_step(run: Run, number: int, metrics: Any) -> None:
        told(run, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "after_step", after_step)


def test_a_stopped_run_leaves_the_report_of_what_is_there(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGTERM after two of four steps: status, what to do and the curves so far; resumed, the page of the whole."""
    config = card(runs / "beta-0.1").config | {"out": str(tmp_path / "run")}
    stopping_at(2, monkeypatch)
    with pytest.raises(Stopped):
        dpo.main(dpo.DpoConfig(**config))
    monkeypatch.undo()
    page = tmp_path / "run" / "report.html"
    text = page.read_text()
    assert card(tmp_path / "run").status == "stopped"
    first = text.partition("Read this first")[2].partition("</section>")[0]
    assert "this run was stopped and can be continued with --resume; these are its numbers so far" in first
    assert "margin: reward of chosen less rejected" in text and " at 2" in text
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == text
    dpo.main(dpo.DpoConfig(**(config | {"resume": True})))
    assert "Read this first" not in page.read_text() and card(tmp_path / "run").status == "done"


def test_a_run_that_fails_leaves_its_report_too(runs: Path, tmp_path: Path) -> None:
    """A loss that is not finite: the page opens with the reason and shows the steps before it."""
    config = card(runs / "beta-0.1").config | {"out": str(tmp_path / "run"), "lr": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(NotFinite):
        dpo.main(dpo.DpoConfig(**config))
    text = (tmp_path / "run" / "report.html").read_text()
    assert "this run failed: NotFinite: " in text.partition("Read this first")[2] and "metrics.jsonl" in text


def test_refused_input_leaves_no_report(runs: Path, tmp_path: Path) -> None:
    """Nothing was run, so there is nothing to show; a refused resume leaves the page of the run as it is."""
    config = card(runs / "beta-0.1").config
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(DataError):
        dpo.main(dpo.DpoConfig(**(config | {"out": str(tmp_path / "run"), "data": str(tmp_path / "bad.jsonl")})))
    assert card(tmp_path / "run").status == "failed" and not (tmp_path / "run" / "report.html").exists()
    before = (runs / "beta-0.1" / "report.html").read_bytes()
    with pytest.raises(ResumeMismatch):
        dpo.main(dpo.DpoConfig(**(config | {"resume": True, "beta": 0.2})))
    assert (runs / "beta-0.1" / "report.html").read_bytes() == before


def test_work_outside_the_steps_that_is_stopped_leaves_a_report(tmp_path: Path) -> None:
    """Of any stage: the block ends by a signal, and the page says so."""
    with pytest.raises(Stopped), opened(tmp_path / "run", stage="label", config={}, resume=False) as run:  # noqa: PT012
        run.stop_signal = 15
        with run.working("comparisons", 2) as advance:
            advance(1)
    assert "this run was stopped" in (tmp_path / "run" / "report.html").read_text()


def test_a_report_takes_less_than_a_second(runs: Path) -> None:
    """Processor time, so that every run can afford it: drawing needs no plotting library."""
    start = time.process_time()
    html.write_report(runs / "beta-0.1")
    assert time.process_time() - start < 1


def test_a_folder_without_a_run_and_a_page_that_cannot_be_written_exit_2(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each: what was found and what to do."""
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is no run card" in capsys.readouterr().err
    assert cli.main(["report", str(runs / "sft"), "--out", str(runs / "sft" / "run.json" / "r.html")]) == 2
    assert "cannot be written (File exists); choose another --out" in capsys.readouterr().err


def test_a_sample_file_is_a_run_too(tmp_path: Path) -> None:
    """Its card stands beside it; its responses are shown with their lines."""
    lines = [
        {"type": "SampledResponses", "prompt": f"p{i}", "responses": [{"text": f"r{i}"}, {"text": "s"}]}
        for i in range(3)
    ]
    (tmp_path / "s.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    told = {"type": "RunCard", "stage": "sample", "status": "done", "config": {"seed": 0}}
    (tmp_path / "s.jsonl.run.json").write_text(json.dumps(told))
    assert cli.main(["report", str(tmp_path / "s.jsonl")]) == 0
    text = (tmp_path / "s.jsonl.html").read_text()
    assert all(f"r{i}" in text and f"s.jsonl:{i + 1}" in text for i in range(3)) and "s.jsonl.run.json" in text
