"""A process killed while it saves, and a disk that refuses, cost nothing that was whole before."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved import assert_is, names, save, state_of, tensors_of

from preftune.engine import checkpoint
from preftune.engine.checkpoint import Checkpoints
from preftune.errors import RunError

KILLER = """
import os, random, signal, sys, time
import torch
from preftune.engine.checkpoint import Checkpoints

folder, rng, kills, torn, reached, left = sys.argv[1], random.Random(0), 0, 0, 0, []
while kills < 20 or torn < 10 or reached < 3:
    kills += 1
    child = os.fork()
    if child == 0:
        step, checkpoints = reached, Checkpoints(folder)
        while True:
            step += 1
            tensors = {f"weights/{i}": torch.full((50_000,), float(step)) for i in range(4)}
            checkpoints.save(step, tensors, {"step": step})
    time.sleep(rng.uniform(0.005, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before, left = left, [(e.name, e.stat().st_ctime_ns) for e in os.scandir(folder) if e.name.startswith(".tmp-")]
    torn += bool(left) and left != before
    found = Checkpoints(folder).latest(lambda sentence: sys.exit(f"kill {kills}: {sentence}"))
    if found is None:
        assert reached == 0, f"kill {kills}: step {reached} was there and is gone"
        continue
    assert found.step >= reached and found.state == {"step": found.step}, (kills, reached, found.step, found.state)
    assert all(bool((t == found.step).all()) for t in found.tensors.values()) and len(found.tensors) == 4, kills
    reached = found.step
print(kills)
"""


def test_killed_at_any_instant_of_saving_the_latest_checkpoint_is_whole(tmp_path: Path) -> None:
    """20 SIGKILLs or more, 10 of them inside a save, of a process that does nothing else: the latest checkpoint is
    whole, holds what its step wrote, and is never an older one than before."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", KILLER, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20


CALLS = ("write", "fsync", "mkdir", "rename", "open")


def fail_at(patch: pytest.MonkeyPatch, n: int, error: int, partial: bool = False) -> list[str]:
    """Let the n-th call to the operating system that changes the disk fail; the list of the calls made."""
    made: list[str] = []

    def failing(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            if len(made) != n:
                return original(*arguments, **options)
            if partial and name == "write":
                original(arguments[0], arguments[1][: len(arguments[1]) // 2])
            raise OSError(error, os.strerror(error))

        return call

    for name in CALLS:
        patch.setattr(checkpoint.os, name, failing(name))
    return made


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_a_disk_that_fails_at_the_nth_call_leaves_the_older_checkpoint(
    partial: bool, again: bool, tmp_path: Path
) -> None:
    """For every n: RunError with path, needed and free bytes; a whole checkpoint is found; the next save works.

    `again`: the save replaces a checkpoint of its own step.
    """
    before, target = ((1, 2), 2) if again else ((1,), 2)
    with pytest.MonkeyPatch.context() as patch:
        calls = fail_at(patch, 0, errno.ENOSPC)
        save(tmp_path / "count", *before)
        calls.clear()
        save(tmp_path / "count", target)
        total = len(calls)
    assert total > 14 and calls.count("fsync") == 5 and calls.count("write") >= 5
    for n in range(2, total + 1):  # the first is mkdir of a folder that is there: its failure does not matter
        folder = tmp_path / f"fails-at-{n}"
        checkpoints = save(folder, *before)
        with pytest.MonkeyPatch.context() as patch:
            made = fail_at(patch, n, errno.ENOSPC, partial)
            with pytest.raises(RunError) as caught:
                save(folder, target)
            assert len(made) >= n
        message = str(caught.value)
        if made[:n].count("fsync") == 5 and made[n - 1] != "fsync":  # the new one is whole, an older one could not go
            assert f"step-{target} is saved, but an older checkpoint could not be removed: " in message
        else:
            needed = sum(t.nbytes for t in tensors_of(target).values()) + len(json.dumps(state_of(target)))
            assert f"{folder / f'step-{target}'}: the checkpoint could not be written" in message
            assert f"No space left on device): it needs {needed:,} bytes, " in message and " are free" in message
            assert not any(name.startswith(".tmp") for name in names(folder))  # the space is given back at once
        found = checkpoints.latest(pytest.fail)
        assert found is not None
        assert_is(found, found.step)
        assert found.step in {before[-1], target}
        save(folder, 3)
        assert_is(checkpoints.latest(pytest.fail), 3)
        assert not any(name.startswith(".tmp") for name in names(folder))


def test_a_write_that_takes_less_than_it_was_given_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system may write fewer bytes than asked: the rest follows, and the sums are right."""
    original = os.write
    monkeypatch.setattr(checkpoint.os, "write", lambda fd, data: original(fd, data[:7]))
    assert_is(save(tmp_path, 1).latest(pytest.fail), 1)


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check names folder, needed and free bytes; it works before the folder exists, and counts every tensor."""
    checkpoints = save(tmp_path / "run", 1)
    needed = sum(t.nbytes for t in tensors_of(2).values()) + len(json.dumps(state_of(2)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(RunError, match=f"run: a checkpoint needs {needed:,} bytes and {needed - 1:,} are free; free"):
        save(tmp_path / "run", 2)
    assert names(tmp_path / "run") == ["step-1"]
    with pytest.raises(RunError, match="a checkpoint needs 10,000,000,000 bytes"):
        Checkpoints(tmp_path / "not" / "yet").check_space(10**10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    checkpoints.check_space(needed)
