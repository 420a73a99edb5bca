"""Claims about the run card and about resuming: what is recorded, and what must be equal to go on."""

# ruff: noqa: PT012, SIM117  how a run's block ends is what is tested, so `raises` holds whole blocks
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from run_folder import CONFIG, card_in, opened, rows, train

from preftune.engine.card import jsonable
from preftune.engine.host import versions
from preftune.engine.run import Run, Stopped
from preftune.errors import ResumeMismatch


def test_a_card_takes_records_paths_and_numpy_numbers_and_nothing_else() -> None:
    """Whatever enters a card is JSON afterwards; what has no place there is an error, not a guess."""

    @dataclass(frozen=True)
    class Interval:
        low: float
        high: float

    value = {"i": Interval(0.1, 0.2), "p": Path("a/b"), "n": np.float32(0.5), "k": np.int64(3), 7: (None, True)}
    assert jsonable(value) == {"i": {"low": 0.1, "high": 0.2}, "p": "a/b", "n": 0.5, "k": 3, "7": [None, True]}
    with pytest.raises(TypeError, match="a object has no place in a run card"):
        jsonable({"x": [object()]})


def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Resume at step 4 of a run killed in step 8, in the middle of a line: the files are equal but for the times."""

    def steps(r: Run, first: int, last: int) -> None:
        for step in range(first, last + 1):
            r.after_step(step, {"loss": 1 / step})
            if step % 2 == 0:
                r.evaluated(step, {"loss": 2 / step})

    with opened(tmp_path / "whole") as r:
        r.begin(10, 0)
        r.evaluated(0, {"loss": 9.0})
        steps(r, 1, 10)
        r.finish({})
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "killed") as r:
        r.begin(10, 0)
        r.evaluated(0, {"loss": 9.0})
        steps(r, 1, 7)
        raise KeyboardInterrupt
    first = card_in(tmp_path / "killed")
    assert first.status == "stopped"
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 8, "ti')
    with opened(tmp_path / "killed", resume=True) as r:
        r.begin(10, 4)
        steps(r, 5, 10)
        r.finish({})
    whole, resumed = ([row | {"time": 0} for row in rows(tmp_path / name)] for name in ("whole", "killed"))
    assert whole == resumed and len(whole) == 16
    last = card_in(tmp_path / "killed").times
    assert last["began"] == first.times["began"] <= first.times["ended"] < last["ended"], "began once, ended later"


def test_a_run_killed_before_its_first_checkpoint_starts_its_metrics_anew(tmp_path: Path) -> None:
    """Resumed at step 0 nothing is kept, so that an evaluation before the first step is not there twice."""
    for resume in (False, True):
        with pytest.raises(Stopped), opened(tmp_path, resume=resume) as r:
            r.begin(3, 0)
            r.evaluated(0, {"loss": 1.0})
            r.after_step(1, {"loss": 1.0})
            raise Stopped(signal.SIGTERM)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1]


def test_altered_metrics_are_cut_and_said(tmp_path: Path) -> None:
    """A damaged line in the middle goes with a note; a torn last one is what a kill leaves, and goes without."""
    train(tmp_path, 5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "rubbish\n", *lines[2:4], lines[4].rstrip()]))
    with opened(tmp_path, resume=True) as r:
        r.begin(6, 5)
        r.after_step(6, {})
        r.finish({})
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4, 6]
    assert card_in(tmp_path).notes == (f"{path}: 1 unreadable lines were cut",)


def test_resume_wants_the_recorded_stage_and_config(tmp_path: Path) -> None:
    """Every differing key is listed with both values, and the card stays as it was."""
    train(tmp_path, 2)
    before = (tmp_path / "run.json").read_bytes()
    config = {"lr": 2e-6, "resume": True, "max_steps": 5}
    with pytest.raises(ResumeMismatch) as caught:
        Run.open(tmp_path, stage="sft", config=config, resume=True, may_differ=frozenset({"resume"}), quiet=True)
    assert str(caught.value) == (
        f'{tmp_path} cannot be resumed with stage: "sft" (the run has "dpo"); lr: 2e-06 (the run has 1e-06); '
        "beta: absent (the run has 0.1); max_steps: 5 (the run has absent). "
        "Give what the run has, or choose another --out"
    )
    assert (tmp_path / "run.json").read_bytes() == before


def test_settings_that_may_differ_are_taken_up_and_noted(tmp_path: Path) -> None:
    """The card shows the new value, a note tells the change; other versions are noted too."""
    train(tmp_path, 2)
    card = json.loads((tmp_path / "run.json").read_text())
    card["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(card))
    may_differ = frozenset({"resume", "save_every"})
    config = CONFIG | {"resume": True, "save_every": 5}
    with Run.open(tmp_path, stage="dpo", config=config, resume=True, may_differ=may_differ, quiet=True) as r:
        r.finish({})
    card = card_in(tmp_path)
    assert card.config == config and card.versions == versions()
    assert card.notes == (
        "resumed with save_every: 5 (the run has absent)",
        f'resumed under torch: "{versions()["torch"]}" (the run has "1.0"): '
        "equality with an uninterrupted run is no longer certain",
    )


def test_resume_on_other_inputs_is_refused_and_leaves_the_card(tmp_path: Path) -> None:
    """Model and data are recognised by content: the same path with other bytes is another run."""
    with opened(tmp_path) as r:
        r.record(hashes={"model": "aaa"}, data={"train": {"sha256": "111", "rows": 5}})
        r.begin(1, 0)
        r.after_step(1, {})
        r.record(hashes={"result": "old"})
        r.finish({"loss": 0.5})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ResumeMismatch, match=r'with SHA-256 of model: "bbb" \(the run has "aaa"\)'):
        with opened(tmp_path, resume=True) as r:
            r.record(hashes={"model": "bbb"})
    assert (tmp_path / "run.json").read_bytes() == before
    with pytest.raises(ResumeMismatch, match=r'with SHA-256 of train data: "222" \(the run has "111"\)'):
        with opened(tmp_path, resume=True) as r:
            r.record(data={"train": {"sha256": "222", "rows": 5}})
    assert (tmp_path / "run.json").read_bytes() == before
    with opened(tmp_path, resume=True) as r:
        r.record(hashes={"model": "aaa"}, data={"train": {"sha256": "111", "rows": 5}, "eval": {"sha256": "3"}})
        r.begin(1, 1)
        r.record(hashes={"result": "new"})  # what a run makes may change, what it is made from may not
        r.finish({})
    assert card_in(tmp_path).hashes == {"model": "aaa", "result": "new"}


def test_resume_in_an_empty_folder_starts_fresh_and_says_so(tmp_path: Path) -> None:
    """The same command line serves the first start and every later one."""
    with opened(tmp_path / "new", resume=True) as r:
        r.finish({})
    assert card_in(tmp_path / "new").notes == (f"nothing to resume in {tmp_path / 'new'}: starting from the beginning",)
