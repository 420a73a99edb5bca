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
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["Display", "headline"]

# A plain line is due after this many seconds, or after this share of the steps, and at the first and the last one.
LINE_SECONDS = 10.0
LINE_SHARE = 0.05
SHOWN = 5
SHOW_CURSOR = b"\x1b[?25h"
STOPPING = "stopping after this step; the same signal again leaves at once"


class Display:
    """The display of one run; nothing is printed when `quiet`."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
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

    def warn(self, text: str) -> None:
        """A line that stays and should be read."""
        self._say(f"warning: {text}", "yellow")

    def begin(self, what: str, total: int, start: int = 0) -> None:
        """Show progress of `what` from `start` to `total`; a bar already there is closed."""
        self.end()
        self._what, self._total, self._start, self._line = what, total, start, ""
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
            console=self._console,
        )
        self._progress.add_task(what, total=total, completed=start)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=5)
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Step `step` is done, with these metrics: the first few numbers are shown, and tokens/s."""
        self._line = headline(metrics)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)
        elif self._line_due(step):
            self._printed_at, self._printed_step = time.monotonic(), step
            self._say(f"{self._what} {step}/{self._total}  {self._left(step)}{self._line}".rstrip(), "")

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

    def _render(self) -> RenderableType:
        line = Text(f"  {self._line}", style="dim", no_wrap=True, overflow="ellipsis")
        rows: list[RenderableType] = [] if self._progress is None else [self._progress.get_renderable()]
        if self._line:
            rows.append(line)
        if self._stopping:
            rows.append(Text(f"  {STOPPING}", style="yellow", no_wrap=True, overflow="ellipsis"))
        return Group(*rows)

    def _line_due(self, step: int) -> bool:
        if step == self._total or time.monotonic() - self._printed_at >= LINE_SECONDS:
            return True
        return step - self._printed_step >= LINE_SHARE * self._total

    def _left(self, step: int) -> str:
        if not self._start < step < self._total:
            return ""
        seconds = (time.monotonic() - self._begun) / (step - self._start) * (self._total - step)
        minutes, second = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{second:02d} left  "


def headline(metrics: Mapping[str, Any]) -> str:
    """The first numbers of `metrics` in their own order, with their interval where there is one, and tokens/s.

    `name_low` and `name_high` beside `name` are its interval: `accuracy 0.61 [0.55, 0.66]`.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    shown: list[str] = []
    for name, value in numbers.items():
        low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        if len(shown) < SHOWN and not name.endswith(("_low", "_high", "per_second")):
            interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
            shown.append(f"{name} {value if isinstance(value, int) else f'{value:.4g}'}{interval}")
    shown += [f"{value:.0f} tokens/s" for name, value in numbers.items() if name.endswith("tokens_per_second")]
    return "  ".join(shown)
