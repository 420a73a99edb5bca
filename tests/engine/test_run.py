"""Claims about a run folder: whole at every instant, one owner, honest about how it ended, equal after a resume."""

# ruff: noqa: PT012  how a run's block ends is what is tested, so `raises` holds whole blocks

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_folder import CONFIG, card_in, opened, rows, train

from preftune.engine import files, run
from preftune.engine.parallel import World
from preftune.engine.run import Run, Stopped
from preftune.errors import ArtifactError, RunError, UserError

WORKER = Path(__file__).with_name("run_worker.py")


@contextmanager
def worker(folder: Path, seconds: float = 0.01, **options: object) -> Iterator[subprocess.Popen]:
    """A run in another process, past its second step."""
    command = [sys.executable, str(WORKER), str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **{"stderr": subprocess.PIPE, **options})
    try:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "step 2":
            assert process.poll() is None, "the worker ended early"
        yield process
    finally:
        process.kill()
        process.communicate()


# --- the card


def test_a_finished_run_leaves_its_card_and_its_metrics(tmp_path: Path) -> None:
    """run.json holds what was asked, on what, what was recorded and how it ended; metrics.jsonl a line per record."""
    with opened(tmp_path / "a run" / "deep") as r:
        r.note("padded rows because of ALiBi")
        r.note("padded rows because of ALiBi")
        r.record(hashes={"model": "abc"}, data={"train": {"rows": 3}})
        r.begin(2, 0)
        r.after_step(1, {"loss": 0.1 + 0.2, "pairs": 4})
        r.after_step(2, {"loss": 0.5})
        r.evaluated(2, {"accuracy": 0.75})
        assert card_in(r.folder).status == "running"
        returned = r.finish({"accuracy": 0.75})
    card = card_in(r.folder)
    assert card == returned == r.card
    assert (card.stage, card.status, card.config) == ("dpo", "done", CONFIG)
    assert (card.hashes, card.data, card.results) == ({"model": "abc"}, {"train": {"rows": 3}}, {"accuracy": 0.75})
    assert card.notes == ("padded rows because of ALiBi",)
    assert card.versions["python"] == sys.version.split()[0] and card.host["cores"] >= 1
    assert [(row["kind"], row["step"]) for row in rows(r.folder)] == [("train", 1), ("train", 2), ("eval", 2)]
    assert rows(r.folder)[0]["metrics"] == {"loss": 0.1 + 0.2, "pairs": 4}
    assert '"loss": 0.30000000000000004' in (r.folder / "metrics.jsonl").read_text()
    assert abs(rows(r.folder)[0]["time"] - time.time()) < 60
    assert time.time() - 60 < card.times["began"] <= card.times["ended"] <= time.time()


def test_numbers_that_are_not_finite_are_written_as_words_never_replaced(tmp_path: Path) -> None:
    """NaN and infinities stay readable in strict JSON, in the metrics and in the card."""
    with opened(tmp_path) as r:
        r.begin(1, 0)
        r.after_step(1, {"loss": float("nan"), "margin": [float("inf"), -float("inf")]})
        r.finish({"loss": float("nan")})
    assert rows(tmp_path)[0]["metrics"] == {"loss": "nan", "margin": ["inf", "-inf"]}
    assert card_in(tmp_path).results == {"loss": "nan"}


def test_what_another_rank_noted_of_its_last_step_is_in_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note made after all have asked `stopping` for the last time is heard when the run is finished."""
    untold: list[str] = []

    def gather(self: World, value: Any, what: str) -> list[Any]:
        return [value, [0, [untold.pop()] if untold else []]]

    monkeypatch.setattr(World, "gather", gather)
    with opened(tmp_path / "run") as r:
        r.world = World(0, 2)
        r.begin(1, 0)
        assert not r.stopping()
        untold.append("rank 1: out of memory")
        r.finish({})
    assert "rank 1: out of memory" in card_in(tmp_path / "run").notes


def test_an_error_is_recorded_as_failed_with_its_message(tmp_path: Path) -> None:
    """A block left by an exception says failed and why, and the exception goes on."""
    with pytest.raises(RunError, match="loss is NaN"), opened(tmp_path) as r:
        r.begin(3, 0)
        r.after_step(1, {"loss": 1.0})
        raise RunError("the loss is NaN in a.jsonl:3")
    assert card_in(tmp_path).status == "failed"
    assert card_in(tmp_path).notes == ("failed: RunError: the loss is NaN in a.jsonl:3",)


def test_a_run_that_forgets_its_result_is_not_done(tmp_path: Path) -> None:
    """Without finish() the card says failed."""
    with opened(tmp_path) as r:
        r.begin(1, 0)
    assert card_in(tmp_path).status == "failed"
    assert card_in(tmp_path).notes == ("failed: left without a result",)


def test_the_card_is_the_old_one_or_the_new_one_when_the_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail each system call of a replacement in turn: the old content is whole, no temporary file stays."""
    path = tmp_path / "run.json"
    files.replace_file(path, b"old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                files.replace_file(path, b"new content")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["run.json"]
    files.replace_file(path, b"new content")
    assert path.read_bytes() == b"new content"


def test_a_full_disk_ends_the_run_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file, the cause and the free space; an error that came before is not hidden by it."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"run\.json: cannot be written \(No space left on device; \d+ MiB free\)"
    with pytest.raises(RunError, match=message), opened(tmp_path / "a") as r:
        monkeypatch.setattr(run, "replace_file", full)
        r.note("something")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the cause"), opened(tmp_path / "b"):
        monkeypatch.setattr(run, "replace_file", full)
        raise ValueError("the cause")
    assert card_in(tmp_path / "b").status == "running"  # the last card that could be written, whole


# --- who may open a folder


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    """Nothing is overwritten by mistake."""
    train(tmp_path, 2)
    before = (tmp_path / "run.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"holds a run \(dpo, done\); pass --resume or another --out"):
        opened(tmp_path)
    assert before == ((tmp_path / "run.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes())


def test_a_run_that_failed_before_its_first_step_does_not_occupy_the_folder(tmp_path: Path) -> None:
    """Refused data can be mended and the same command given again, with another config too."""
    with pytest.raises(UserError), opened(tmp_path) as r:
        raise UserError("3 rows are refused")
    with opened(tmp_path, beta=0.5) as r:
        r.finish({})
    assert card_in(tmp_path).config["beta"] == 0.5 and card_in(tmp_path).notes == ()


@pytest.mark.parametrize("name", ["checkpoints/step-1", "model/config.json", "metrics.jsonl"])
def test_work_without_a_card_is_refused(tmp_path: Path, name: str) -> None:
    """A folder with results of unknown origin is neither overwritten nor resumed."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"holds {name.split('/')[0]} but no run.json"):
            opened(tmp_path, resume=resume)


def test_a_damaged_card_is_refused(tmp_path: Path) -> None:
    """A card that cannot be read is named, not replaced."""
    train(tmp_path, 1)
    for text in ("{", "[]", '{"type": "Message", "role": "user", "content": "x"}', '{"type": "RunCard", "colour": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"run\.json is no run card"):
            opened(tmp_path, resume=True)


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run", "nul\0byte"])
def test_an_impossible_folder_is_the_users_error(out: str) -> None:
    """The message names the folder and asks for another one."""
    with pytest.raises(UserError, match=r"cannot be a run folder \(.+\); choose an --out that can be written"):
        opened(Path(out))


def test_a_read_only_folder_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel answers on a read-only file system, for root too."""
    read_only = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(read_only))
    with pytest.raises(UserError, match=r"cannot be a run folder \(Read-only file system\)"):
        opened(tmp_path / "run")


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    """The second is refused and told who is there; a killed owner leaves no lock behind."""
    with worker(tmp_path) as process:
        for resume in (False, True):
            with pytest.raises(UserError, match=f"process {process.pid} works in this folder"):
                opened(tmp_path, resume=resume)
        process.kill()
        process.wait()
        assert card_in(tmp_path).status == "running"
        with pytest.raises(UserError, match=r"holds a run \(dpo, running\)"):
            opened(tmp_path)


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_after_its_step(tmp_path: Path, number: int, code: int) -> None:
    """The step is finished and recorded, the card says stopped, the exit code is 128 + signal."""
    with worker(tmp_path) as process:
        process.send_signal(number)
        said, errors = process.communicate(timeout=20)
        assert process.returncode == code
    started = int(said.split()[-1]) if said else 2
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, started + 1))
    assert (card_in(tmp_path).status, card_in(tmp_path).results) == ("stopped", {"steps": started})
    assert "stopping after this step; a second signal leaves at once\n" in errors
    assert f"dpo stopped; the same command continues the run in {tmp_path}" in errors


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    """Not after the step, which would take a minute here; on a terminal the cursor is visible again."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, str(WORKER), str(tmp_path / "run"), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"step 1\n"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        screen = b""
        while b"a second signal leaves at once" not in screen:
            screen += os.read(master, 4096)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
        assert time.monotonic() - begun < 10
    os.close(slave)
    with open(master, "rb", buffering=0) as terminal:
        while chunk := _read_all(terminal.fileno()):
            screen += chunk
    assert screen.rfind(b"\x1b[?25h") > screen.rfind(b"\x1b[?25l") >= 0
    assert card_in(tmp_path / "run").status == "running"
    with Run.open(tmp_path / "run", stage="dpo", config={"lr": 1e-6}, resume=True, quiet=True) as r:
        r.finish({})


def _read_all(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux says so when the last writer of a terminal is gone
        return b""


def test_handlers_are_put_back_and_a_stop_ends_the_block_with_stopped(tmp_path: Path) -> None:
    """In one process: the signal sets stop_signal, the block raises Stopped, the handlers are those of before."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stopped, opened(tmp_path) as r:
        assert r.stop_signal is None
        r.begin(2, 0)
        r.after_step(1, {})
        signal.raise_signal(signal.SIGTERM)
        assert r.stop_signal == signal.SIGTERM
        r.finish({})
    assert stopped.value.code == 143 and card_in(tmp_path).status == "stopped"
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_a_signal_after_the_last_step_does_not_make_the_run_unfinished(tmp_path: Path) -> None:
    """All steps are done, so the card says done; the exit still tells the signal."""
    with pytest.raises(Stopped), opened(tmp_path) as r:
        r.begin(1, 0)
        r.after_step(1, {})
        signal.raise_signal(signal.SIGINT)
        r.finish({})
    assert card_in(tmp_path).status == "done"


def test_an_error_after_a_signal_is_still_a_failure(tmp_path: Path) -> None:
    """A signal does not whitewash what goes wrong while stopping."""
    with pytest.raises(RunError), opened(tmp_path):
        signal.raise_signal(signal.SIGINT)
        raise RunError("the disk is full")
    assert card_in(tmp_path).status == "failed"


def test_work_outside_the_steps_stops_between_items(tmp_path: Path) -> None:
    """A signal during a long pass ends it at the next advance, resumably."""
    done = []
    with pytest.raises(Stopped), opened(tmp_path) as r, r.working("reference log-probs", 10) as advance:
        for item in range(10):
            done.append(item)
            if item == 3:
                signal.raise_signal(signal.SIGTERM)
            advance(1)
    assert done == [0, 1, 2, 3] and card_in(tmp_path).status == "stopped"
