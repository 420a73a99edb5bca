"""Claims about the display: a live bar on a terminal, plain lines elsewhere, nothing torn, nothing when quiet."""

import io
import os
import pty
import re
import threading
from collections.abc import Iterator

import pytest

from preftune.engine import console
from preftune.engine.console import Display, headline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def on_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, script, *, term: str = "xterm") -> tuple[str, list[str]]:
    """What `script(display)` sends to a terminal of so many columns, and the screen that leaves."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "50")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux says so when the last writer of a terminal is gone
                return
            received.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        script(Display(stream=stream))
    reader.join()
    os.close(master)
    raw = b"".join(received).decode()
    return raw, screen(raw)


def screen(raw: str) -> list[str]:
    """A terminal that knows what rich's live display uses: line feed, carriage return, cursor up, erase line."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", raw):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_a_log_gets_plain_lines_and_no_control_code(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """Not even where the environment asks for colour: a log is read by people and by grep."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    log = io.StringIO()
    display = Display(stream=log)
    display.note("model [bold]x[/bold]: packed rows")
    display.begin("dpo", 2)
    display.step(1, {"loss": 0.693147, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6})
    display.warn("odd")
    clock[0] = 90 * 60
    display.step(2, {"loss": 0.5, "pairs": 12345, "unique_tokens_per_second": 1234.5})
    display.end()
    assert log.getvalue().splitlines() == [
        "model [bold]x[/bold]: packed rows",
        "dpo 1/2  0:00:00 left  loss 0.6931  accuracy 0.5 [0.4, 0.6]",
        "warning: odd",
        "dpo 2/2  1234 tokens/s  loss 0.5  pairs 12345",
    ]


def test_plain_lines_come_every_ten_seconds_or_twentieth_but_not_faster_than_one_a_second(clock: list[float]) -> None:
    """A slow run shows signs of life, a fast one does not flood the log; first and last step are always there."""

    def steps_shown(seconds_per_step: float, total: int, start: int = 0) -> list[int]:
        log = io.StringIO()
        display = Display(stream=log)
        display.begin("dpo", total, start)
        for step in range(start + 1, total + 1):
            clock[0] += seconds_per_step
            display.step(step, {})
        return [int(n) for n in re.findall(r"dpo (\d+)/", log.getvalue())]

    assert steps_shown(4.0, 1000)[:4] == [1, 4, 7, 10]  # every 12 s
    assert steps_shown(0.1, 400) == [1, *range(21, 400, 20), 400]  # every 5 %, 2 s
    assert steps_shown(0.001, 500) == [1, 500]
    assert steps_shown(60.0, 5) == [1, 2, 3, 4, 5]
    assert steps_shown(60.0, 5, start=3) == [4, 5]


def test_the_time_left_counts_only_what_this_process_did(clock: list[float]) -> None:
    """After a resume at step 900 the first 900 steps do not make the run look fast."""
    log = io.StringIO()
    display = Display(stream=log)
    display.begin("dpo", 1000, 900)
    clock[0] += 40
    display.step(910, {})
    assert log.getvalue() == "dpo 910/1000  0:06:00 left\n"


def test_the_first_numbers_are_shown_with_their_intervals() -> None:
    """In the caller's order, five of them; what is no number, an interval's end or a rate is not among them."""
    metrics = {"loss": 0.5, "note": "x", "loss_low": 0.4, "loss_high": 0.625, "lr": 1e-6, "a": 1, "b": 2}
    assert headline(metrics | {"tokens_per_second": 9.0, "c": float("nan"), "d": 4}) == (
        "loss 0.5 [0.4, 0.625]  lr 1e-06  a 1  b 2  c nan"
    )


def test_quiet_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Not even a signal's message."""
    display = Display(quiet=True)
    display.note("x")
    display.warn("x")
    display.begin("dpo", 1)
    display.step(1, {"loss": 1.0})
    display.stopping()
    display.end()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_notes_stand_above_the_bar_and_do_not_tear_it(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the notes stay in order, the bar is drawn once below them, metrics fit the width."""
    metrics = {f"a_long_name_of_a_metric_{i}": 1 / 3 for i in range(5)} | {"tokens_per_second": 77.0}

    def script(display: Display) -> None:
        display.note("before [link=x]the bar")
        display.begin("reference", 2)
        display.step(2, {})
        display.begin("dpo", 20)
        for step in range(1, 21):
            display.step(step, metrics)
            if step % 10 == 0:
                display.note(f"note {step}")
        display.warn("odd")
        display.end()
        display.note("after the bar")

    raw, lines = on_terminal(columns, monkeypatch, script)
    assert "\x1b[?25l" in raw and raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l")  # the cursor is back
    shown = [line for line in lines if line]
    assert shown[0] == "before [link=x]the bar"
    assert shown[1].startswith("reference ") and "2/2" in shown[1]
    assert shown[2:5] == ["note 10", "note 20", "warning: odd"]
    assert shown[5].startswith("dpo ") and "20/20" in shown[5]
    assert shown[6].startswith("  a_long_name_of_a_metric_0 0.3333") and len(shown[6]) <= columns - console.MARGIN
    assert shown[7:] == ["after the bar"]
    if columns >= 80:
        assert shown[5].endswith("77 tokens/s")


def test_a_signal_is_answered_on_the_terminal_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The live part says what will happen next."""

    def script(display: Display) -> None:
        display.begin("dpo", 20)
        display.stopping()
        display.end()

    _, lines = on_terminal(80, monkeypatch, script)
    assert f"  {console.STOPPING}" in lines


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors and old consoles call themselves dumb: no control code goes there."""

    def script(display: Display) -> None:
        display.begin("dpo", 1)
        display.step(1, {"loss": 1.0})
        display.stopping()
        display.end()

    raw, _ = on_terminal(80, monkeypatch, script, term="dumb")
    assert raw == f"dpo 1/1  loss 1\r\n{console.STOPPING}\r\n"
