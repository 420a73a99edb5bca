"""Who of several processes is alive: no rank waits for ever.

Each one beats once a second into the launcher's store; rank 0 listens to all and all listen to rank 0. A rank without a
beat for DEAD_AFTER, or for LOST_AFTER once a connection broke, or that does not come to a collective within the time
limit, is named with its machine, and every rank ends with an exit code that is not 0; so does everybody when one fails.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["DEAD_AFTER", "Watch"]

BEAT, DEAD_AFTER, GRACE = 1.0, 30.0, 20.0
"""Seconds between beats, without a beat until a rank counts as dead, and from a failure until a stuck rank is ended."""
LOST_AFTER = 5.0
"""The same once a connection has broken: somebody is gone, and the question is who."""
_FAILED, _BROKEN = "preftune/failed", "preftune/broken"


class Watch(threading.Thread):
    """Beats, listens, and ends this process when the others cannot go on and it cannot notice by itself."""

    def __init__(self, store: Any, rank: int, size: int, limit: float) -> None:
        super().__init__(name="preftune-watch", daemon=True)
        self.rank, self._store, self._size, self._limit = rank, store, size, limit
        self._lock = threading.Lock()
        self._entered, self._what, self._since = 0, "", 0.0  # collectives begun; the one in progress, since when
        self._stopped, self._hub = threading.Event(), f"rank 0 or the launcher on {os.environ.get('MASTER_ADDR')}"
        self._heard = {other: (b"", time.monotonic()) for other in (range(1, size) if rank == 0 else (0,))}
        store.compare_set(_FAILED, "", "-")
        self._beat(0)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """In this block the rank waits for the others."""
        before = self._what, self._since
        self._entered, self._what, self._since = self._entered + 1, what, time.monotonic()
        try:
            yield
        finally:
            self._what, self._since = before

    def stop(self) -> None:
        """The work is done: beat no more, judge no more."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        """Until the end: beat, listen, judge."""
        beats, condemned = 0, 0.0
        while not self._stopped.wait(BEAT):
            beats += 1
            try:
                self._beat(beats)
                problem = self._failure() or self._suspect(self._patience())
            except RuntimeError:
                problem = f"{self._hub}, which keeps the ranks in touch, is gone"
            if problem and not condemned:
                condemned = time.monotonic()
            if problem and time.monotonic() - condemned > (GRACE if self._what else 2 * GRACE):
                print(f"preftune: rank {self.rank}: {problem}; ended", file=sys.stderr, flush=True)
                os._exit(1)

    def report(self, message: str) -> bool:
        """Write down why everybody must end; False when somebody has been first, True when nobody can be told."""
        mine = json.dumps([self.rank, message])
        try:
            with self._lock:
                return bytes(self._store.compare_set(_FAILED, "-", mine)) == mine.encode()
        except RuntimeError:
            return True

    def who_is_gone(self, what: str, error: RuntimeError) -> str:
        """After a broken connection: the sentence about who failed, as soon as it is known."""
        end = time.monotonic() + 3 * LOST_AFTER
        try:
            with self._lock:
                self._store.set(_BROKEN, "")  # rank 0, which hears everybody, may wait for this rank and know nothing
            while time.monotonic() < end:
                if found := self._failure() or self._suspect(LOST_AFTER):
                    return found
                time.sleep(BEAT / 4)
        except RuntimeError:
            return f"{self._hub} is gone; rank {self.rank} waited at {what}"
        return f"the connection broke at {what}: {error}"

    def _beat(self, beats: int) -> None:
        with self._lock:
            self._store.set(f"preftune/beat/{self.rank}", f"{beats} {self._entered} {os.uname().nodename}")

    def _patience(self) -> float:
        """Seconds without a beat until a rank counts as dead: few, once a connection has broken anywhere."""
        with self._lock:
            return LOST_AFTER if self._store.check([_BROKEN]) else DEAD_AFTER

    def _failure(self) -> str:
        """What has been reported, "" while nothing has."""
        with self._lock:
            told = bytes(self._store.get(_FAILED)).decode()
        if told == "-":
            return ""
        rank, message = json.loads(told)
        return str(message) if message.startswith("rank ") else f"rank {rank} failed: {message}"

    def _suspect(self, dead_after: float) -> str:
        """Who does not beat any more, or does not come; it is reported, for the others to know."""
        what, waited = self._what, time.monotonic() - self._since
        for other, (last, at) in self._heard.items():
            with self._lock:
                key = f"preftune/beat/{other}"
                beat = bytes(self._store.get(key)) if self._store.check([key]) else b""
            if beat != last:
                self._heard[other], at = (beat, time.monotonic()), time.monotonic()
            silent, problem = time.monotonic() - at, ""
            _, entered, *host = (beat.decode() or "0 0").split()
            who = " on ".join([f"rank {other}", *host])
            if silent > dead_after:
                problem = f"{who} gave no sign of life for {silent:.0f} s: it was killed, or its machine is lost"
            elif what and waited > self._limit and int(entered) < self._entered:
                problem = f"{who} did not come to {what} within {self._limit:g} seconds (PREFTUNE_TIMEOUT)"
            if problem:
                self.report(problem)
                return problem
        return ""
