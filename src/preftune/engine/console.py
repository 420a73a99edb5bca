"""What the user sees while a stage runs: one live bar on a terminal, plain lines everywhere else.

Everything goes through one object, so notes never tear the bar. It writes to stderr; stdout stays free
for results. Where stderr is not a terminal (a log, a pipe, CI) no control code is ever written.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Display", "headline"]

# A plain line is due at the first and the last step, after so many seconds, or after this share of the steps unless
# the last line is younger than a second.
LINE_SECONDS = 10.0
LINE_SHARE = 0.05
SHOWN = 5
MARGIN = 4  # columns left free: a terminal echoes ^C at the cursor, and a wrapped line would stay behind
SHOW_CURSOR = b"\x1b[?25h"
STOPPING = "stopping after this step; a second signal leaves at once"


class Display:
    """The display of one run; nothing is printed when `quiet`, and by ranks above 0 only what is their own."""

    def __init__(self, *, quiet: bool = False, rank: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._silent, self._rank = quiet, rank
        self._quiet = quiet = quiet or rank > 0
        terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._console = Console(file=self._stream, highlight=False) if terminal and not quiet else None
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._line = ""
        self._stopping = False
        self._what, self._total, self._start = "", 0, 0
        self._begun = self._printed_at = 0.0
        self._printed_step = 0

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        self._say(text, "")

    def own(self, text: str) -> str:
        """A line about this rank alone; it is returned, with the rank where that is not 0."""
        if not self._rank:
            self.note(text)
            return text
        text = f"rank {self._rank}: {text}"
        if not self._silent:
            print(text, file=self._stream, flush=True)
        return text

    def warn(self, text: str) -> None:
        """A line that stays and should be read."""
        self._say(f"warning: {text}", "yellow")

    def begin(self, what: str, total: int, start: int = 0) -> None:
        """Show progress of `what` from `start` to `total`; a bar already there is closed."""
        self.end()
        self._what, self._total, self._start = what, total, start
        self._line = ""
        self._begun, self._printed_at, self._printed_step = time.monotonic(), float("-inf"), start
        if self._console is None:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self._console,
        )
        self._progress.add_task(what, total=total, completed=start, rate="")
        self._live = Live(
            console=self._console,
            get_renderable=partial(self._render, self._console),
            refresh_per_second=5,
            redirect_stdout=sys.stdout.isatty(),  # what is printed to a pipe or a file goes there
        )
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Step `step` is done, with these metrics: the first few numbers are shown, and tokens/s."""
        self._line = headline(metrics)
        rate = "".join(f"{v:.0f} tokens/s" for name, v in metrics.items() if name.endswith("tokens_per_second"))
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, rate=rate)
        elif self._line_due(step):
            self._printed_at, self._printed_step = time.monotonic(), step
            parts = [f"{self._what} {step}/{self._total}", self._left(step), rate, self._line]
            self._say("  ".join(filter(None, parts)), "")

    def end(self) -> None:
        """Close the bar; its last state stays on the screen."""
        if self._live is not None:
            self._live.stop()
        self._live = self._progress = None

    def stopping(self) -> None:
        """Say that a signal was understood. Called inside a signal handler: takes no lock, leaves no half line.

        The cursor is shown here because a second signal ends the process without another line of Python.
        """
        self._stopping = True
        if not self._quiet:
            with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
                os.write(self._stream.fileno(), f"{STOPPING}\n".encode() if self._live is None else SHOW_CURSOR)

    def _say(self, text: str, style: str) -> None:
        if self._console is not None:
            self._console.print(Text(text, style=style), soft_wrap=True)
        elif not self._quiet:
            print(text, file=self._stream, flush=True)

    def _render(self, console: Console) -> RenderableType:
        """The bar, the metrics, and that a signal was understood: drawn by rich's thread, five times a second."""
        rows: list[RenderableType] = [] if self._progress is None else [self._progress.get_renderable()]
        for text, style in ((self._line, "dim"), (STOPPING if self._stopping else "", "yellow")):
            if text:
                row = Text(f"  {text}", style=style, no_wrap=True)
                row.truncate(console.width - MARGIN, overflow="ellipsis")
                rows.append(row)
        return Group(*rows)

    def _line_due(self, step: int) -> bool:
        age = time.monotonic() - self._printed_at
        further = step - self._printed_step >= LINE_SHARE * self._total
        return step == self._total or age >= LINE_SECONDS or (further and age >= 1)

    def _left(self, step: int) -> str:
        if not self._start < step < self._total:
            return ""
        seconds = (time.monotonic() - self._begun) / (step - self._start) * (self._total - step)
        minutes, second = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{second:02d} left"


def headline(metrics: Mapping[str, Any]) -> str:
    """The first numbers of `metrics` in their own order, with their interval where there is one.

    `name_low` and `name_high` beside `name` are its interval: `accuracy 0.61 [0.55, 0.66]`.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    shown: list[str] = []
    for name, value in numbers.items():
        low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        if len(shown) < SHOWN and not name.endswith(("_low", "_high", "per_second")):
            interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
            shown.append(f"{name} {value if isinstance(value, int) else f'{value:.4g}'}{interval}")
    return "  ".join(shown)
