"""The page that ends a sampling run: what it tells is what the file holds, and it is there however the run ends."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune import cli
from preftune.config.loop import SampleConfig
from preftune.engine.console import Display
from preftune.engine.run import Stopped
from preftune.recipes import sample
from preftune.records import RunCard, SampledResponses, from_json
from preftune.reports import html
from preftune.worlds.enumerable import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model of nine tokens, one of them the end."""
    folder = tmp_path_factory.mktemp("world") / "model"
    write_model(folder, seed=0)
    return str(folder)


@pytest.fixture
def cfg(model: str, tmp_path: Path) -> SampleConfig:
    """Three prompts of twelve responses, a prompt at once; a fourth row is refused, a fifth is a copy."""
    rows: list[Any] = [{"prompt": text} for text in ("ca", "b", "ddd")] + [{"prompt": 3}, {"prompt": "b"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SampleConfig(
        model=model, prompts=str(tmp_path / "p.jsonl"), out=str(tmp_path / "s.jsonl"), n=12, max_tokens=4,
        batch_size=12, dtype="float32", device="cpu", allow_refused=1,
    )  # fmt: skip


def with_keys(cfg: SampleConfig, **changes: Any) -> SampleConfig:
    return SampleConfig(**(cfg.model_dump() | changes))


def records(cfg: SampleConfig) -> list[SampledResponses]:
    return [from_json(line) for line in Path(cfg.out).read_text().splitlines()]


def card(cfg: SampleConfig) -> RunCard:
    return from_json(Path(f"{cfg.out}.run.json").read_text())


def page(cfg: SampleConfig) -> str:
    return Path(f"{cfg.out}.html").read_text()


def test_a_run_ends_with_its_page(cfg: SampleConfig) -> None:
    """OUT.html beside the file, the same bytes that `preftune report OUT` writes, nothing else left behind."""
    sample.main(cfg)
    out = Path(cfg.out)
    first = page(cfg)
    Path(f"{out}.html").unlink()
    assert cli.main(["report", str(out)]) == 0 and page(cfg) == first
    names = {path.name for path in out.parent.iterdir()} - {"p.jsonl"}
    assert names == {"s.jsonl", "s.jsonl.run.json", "s.jsonl.html"}
    assert "36 responses to 3 of 3 prompts" in first and "s.jsonl.run.json: results.finished" in first


def test_the_numbers_are_those_of_the_answers(cfg: SampleConfig) -> None:
    """Recounted from the file: how many, their mean length, share that ended, share said before to the same prompt."""
    told = sample.main(cfg).results
    rows = records(cfg)
    texts = [[one.text for one in row.responses] for row in rows]
    tokens = [int(one.provenance.rpartition("tokens=")[2]) for row in rows for one in row.responses]
    assert (told["prompts"], told["answered"], told["responses"]) == (3, 3, 36)
    assert told["tokens"]["estimate"] == pytest.approx(np.mean(tokens))
    ended = [one.finished for row in rows for one in row.responses]
    assert told["finished"]["estimate"] == pytest.approx(np.mean(ended)) and 0 < np.mean(ended) < 1
    assert 0 < told["repeated"]["estimate"] == pytest.approx(np.mean([1 - len(set(said)) / 12 for said in texts]))
    assert told["tokens"]["low"] < told["tokens"]["estimate"] < told["tokens"]["high"]


def test_a_command_tells_of_its_own_answers_and_names_the_others(cfg: SampleConfig) -> None:
    """With another seed's lines in the file, and again with none to add: the numbers of this command's answers."""
    first = sample.main(cfg).results
    other = sample.main(with_keys(cfg, seed=1)).results
    assert other["tokens"] != first["tokens"] and other["added"]["responses"] == 36
    again = sample.main(cfg).results
    assert again["added"]["responses"] == 0 and again["in_the_same_file"].startswith("36 responses of other commands")
    assert {key: again[key] for key in ("answered", "responses", "tokens", "finished", "repeated")} == {
        key: first[key] for key in ("answered", "responses", "tokens", "finished", "repeated")
    }
    text = page(cfg)
    lengths = text.partition("length of answers")[2].partition("</figure>")[0]
    assert "seed=0: mean" in lengths and "seed=1: mean" in lengths
    assert "At random (seed=0)" in text and "At random (seed=1)" in text


def test_every_row_of_the_prompts_is_accounted_for_on_the_page(cfg: SampleConfig) -> None:
    """rows = used + refused + truncated + duplicate, and the refused one by its line."""
    sample.main(cfg)
    text = " ".join(page(cfg).split())
    assert "5 rows = 3 used + 1 refused + 0 truncated + 1 duplicate" in text
    assert re.search(r"1 rows refused.*p\.jsonl:4: prompt: ", text)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "fault"])
def test_a_run_that_does_not_come_to_its_end_leaves_its_page(
    how: str, cfg: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is there by then and why; the same command then makes the page of the whole."""

    def interrupted(display: Display, step: int, metrics: Any) -> None:
        if how == "Ctrl-C":
            raise KeyboardInterrupt
        if how == "fault":
            raise ZeroDivisionError("of mine")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Display, "step", interrupted)
    with pytest.raises({"Ctrl-C": KeyboardInterrupt, "SIGTERM": Stopped, "fault": ZeroDivisionError}[how]):
        sample.main(cfg)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is before
    told = "failed" if how == "fault" else "stopped and goes on with the same command"
    assert card(cfg).status == told.partition(" ")[0] and card(cfg).results["answered"] == 1
    assert f"this run {'failed' if how == 'fault' else 'was ' + told}" in page(cfg).partition("Read this first")[2]
    assert "12 responses to 1 of 3 prompts" in page(cfg)
    sample.main(cfg)
    assert "Read this first" not in page(cfg) and "36 responses to 3 of 3 prompts" in page(cfg)


def test_refused_prompts_leave_no_page(cfg: SampleConfig) -> None:
    """Nothing was drawn, so there is nothing to show."""
    assert (
        cli.main(
            [
                "sample",
                *(
                    f"--{key}={value}"
                    for key, value in with_keys(cfg, allow_refused=0).model_dump(exclude_none=True).items()
                ),
            ]
        )
        == 2
    )
    assert not Path(f"{cfg.out}.html").exists()


def test_a_page_that_cannot_be_written_is_a_warning(
    cfg: SampleConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples and their card are whole."""

    def broken(*runs: object) -> None:
        raise ZeroDivisionError("a figure of nothing")

    monkeypatch.setattr(html, "write_report", broken)
    sample.main(cfg)
    assert card(cfg).status == "done" and len(records(cfg)) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: the report was not written (ZeroDivisionError: a figure of nothing); preftune report " in said


def test_never_seen_is_not_never_and_what_is_cut_is_said(cfg: SampleConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """One answer per prompt is never said before, up to what three prompts can tell; cut off, mostly: a warning."""
    told = sample.main(with_keys(cfg, n=1, max_tokens=1)).results
    assert told["repeated"]["estimate"] == 0 and told["repeated"]["high"] > 0.3
    warning = f"{sum(not row.responses[0].finished for row in records(cfg))} of 3 responses were cut off by max_tokens"
    assert told["cut_off"].startswith(warning) and warning in " ".join(capsys.readouterr().err.split())
    assert warning in page(cfg).partition("In words")[2]
    assert "cut_off" not in sample.main(with_keys(cfg, max_tokens=12)).results
