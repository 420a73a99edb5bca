"""python kill_writers.py URL FOLDER KILLS [ACTS]: writers of one store, killed with SIGKILL at random moments.

Four at a time, forked from this process. What a writer is about to do it notes with `try`, what the store has
acknowledged with `ack`, both by `write` on a file in FOLDER, which outlives it. The next writer of the same annotator
sends the last unacknowledged act again, as a page does after a lost reply.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from label_items import BOTH_BAD, FIRST, SECOND, TIE, pair

from preftune.errors import DataError
from preftune.web.labels import Answer, Settings
from preftune.web.store import Store

WRITERS = 4
ITEMS = 1500
ANSWERS = (FIRST, SECOND, TIE, BOTH_BAD)


def act(store: Store, annotator: str, step: dict[str, object]) -> dict[str, object]:
    """Do what a step says; the event as JSON values."""
    kind, task, key = str(step["kind"]), int(str(step["task"])), str(step["key"])
    answer: Answer = ANSWERS[task % 4 if kind == "answer" else (task + 1) % 4]
    if kind == "undo":
        return asdict(store.undo(annotator, key))
    return asdict((store.answer if kind == "answer" else store.revise)(annotator, task, answer, key))


def unacknowledged(log: Path) -> dict[str, object] | None:
    """The last act that was tried and not acknowledged."""
    lines = log.read_text().splitlines() if log.exists() else []
    if not lines or lines[-1].startswith("ack"):
        return None
    step: dict[str, object] = json.loads(lines[-1].removeprefix("try "))
    return step


def write(url: str, annotator: str, folder: Path, seed: int, ready: int) -> None:
    """Answer, revise and undo until killed."""
    log = folder / f"{annotator}.log"
    step = unacknowledged(log)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = Store.open(url)
    rng = random.Random(seed)
    for number in range(10**9):
        if step is None:
            kind = rng.choices(("answer", "revise", "undo"), (8, 1, 1))[0]
            history = store.history(annotator, 1)
            found = [task for task, _ in history] if kind != "answer" else store.next_tasks(annotator, 2)
            if not found:
                continue
            step = {"kind": kind, "task": found[0].id, "key": f"{seed} {number}"}
            os.write(out, f"try {json.dumps(step)}\n".encode())
        with suppress(DataError):  # such as nothing left to undo: no act, so no acknowledgement is owed
            os.write(out, f"ack {json.dumps(act(store, annotator, step))}\n".encode())
            os.write(ready, b"!")
        step = None


def start(url: str, folder: Path, number: int) -> tuple[int, int]:
    """A writer's process, and the end of the pipe on which it tells of acknowledgements."""
    end, ready = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            write(url, f"w{number % WRITERS}", folder, number, ready)
        finally:
            os._exit(3)
    os.close(ready)
    return process, end


def kill(process: int, end: int) -> None:
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    os.close(end)
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"a writer ended by itself: {status}")


def main(url: str, folder: Path, kills: int, acts: int = 0) -> None:
    """With ACTS, writers are killed after that many acknowledgements instead of at a random moment."""
    store = Store.open(url, Settings(overlap=2, random_share=0.5))
    store.add_items(pair(number) for number in range(ITEMS))
    store.close()
    rng = random.Random(0)
    for first in range(0, kills, WRITERS):
        running = [start(url, folder, first + number) for number in range(WRITERS)]
        for _, end in running if acts else ():
            for _ in range(acts):
                os.read(end, 1)
        if not acts and rng.random() < 0.9:  # the others die while they open the store
            os.read(rng.choice(running)[1], 1)
        time.sleep(0 if acts else rng.uniform(0, 0.1))
        for process, end in running:
            kill(process, end)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
