"""The end of a run, however it comes: its card, and its page `report.html`, see `reports/`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from preftune.engine.run import Run, Stopped
from preftune.errors import UserError
from preftune.records import RunCard

__all__ = ["finish", "opened", "page", "stoppable"]


@contextmanager
def opened(
    out: str | Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    resume: bool,
    may_differ: frozenset[str] = frozenset(),
) -> Iterator[Run]:
    """`Run.open` for a `with` block that leaves a page also when the run is stopped or fails: what there is so far.

    Input that is refused (a UserError) leaves none: nothing was run. Raises as `Run.open` and the block do.
    """
    run = Run.open(out, stage=stage, config=config, resume=resume, may_differ=may_differ)
    try:
        with run:
            yield run
    except BaseException as end:
        ended = run.card.status in ("stopped", "failed") and not isinstance(end, UserError)
        if ended and not run.world.rank and (problem := page(run.folder)):
            print(f"warning: {problem}", file=sys.stderr)
        raise


def finish(run: Run, results: Mapping[str, Any]) -> RunCard:
    """End the run with these results and write `report.html`, rank 0 alone; that of a stopped run `opened` writes.

    What it cannot write becomes a warning in the card: numbers that took hours are not lost for a picture.
    """
    card = run.finish(results)
    if card.status == "done" and not run.world.rank and (problem := page(run.folder)):
        run.warn(problem)
    return run.card


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises `Stopped` inside, as Ctrl-C raises KeyboardInterrupt: for what is whole at any instant.

    A second one ends the process at once. Only where this process works alone: the others would wait for it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def page(run: Path) -> str:
    """Write `RUN/report.html`, of a file of samples `RUN.html`; "", or a sentence to warn with where that fails."""
    try:
        from preftune.reports.html import write_report  # here, for it is needed once and costs an import

        write_report(run)
    except Exception as problem:  # whatever it is, the run behind the page is whole
        cause = f"{type(problem).__name__}: {problem}"
        return f"the report was not written ({cause}); preftune report {run} tries again"
    return ""
