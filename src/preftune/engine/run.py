"""A run is a folder: what was asked, what happened at every step, how it ended.

    run.json        the run card (`records.RunCard`), always whole: replaced by renaming, never edited
    metrics.jsonl   one line per record: {"kind": "train" | "eval", "step": 3, "time": 1790000000.0,
                    "metrics": {"loss": 0.69, ...}}, time in seconds since 1970, see `jsonable` for NaN
    .lock           held while a process works in the folder; the kernel frees it however that process ends

A card that says `running` while nobody holds the lock belongs to a process that was killed. Of several processes that
train together (`parallel.py`) rank 0 alone writes and speaks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, Literal, Self

from preftune.engine.card import continued, jsonable, new_card, read_card, refuse_other_inputs
from preftune.engine.console import Display, headline
from preftune.engine.files import replace_file
from preftune.engine.parallel import World, world
from preftune.errors import ResumeMismatch, RunError, UserError
from preftune.records import RunCard, to_json

__all__ = ["Run", "Stopped"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CARD, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"


class Stopped(SystemExit):
    """A signal asked the run to stop and it did, resumably. Exit code 128 + signal: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal = signal_number


class Run:
    """One run folder while this process works in it. Made by `Run.open`, used in a `with` block.

    While the block is open SIGINT and SIGTERM only set `stop_signal`, so that the loop can save and leave; a
    second signal ends the process at once. A block that ends after a signal raises `Stopped`; one that ends
    by an error records `failed` with the message.
    """

    _open: ClassVar[int] = 0
    """Blocks this process is in: the quickstart's holds those of its stages."""

    def __init__(
        self, folder: Path, card: RunCard, earlier: RunCard | None, lock: int, display: Display, world: World
    ) -> None:
        self.folder = folder
        self.card = card
        self.world = world
        """This process's place among those that make this run."""
        self.stop_signal: int | None = None
        """The signal that asked to stop, None while there was none, or while the ranks do not agree: `stopping`."""
        self._asked = 0
        self._untold: list[str] = []
        """Notes of this rank that rank 0, which writes the card, has not heard."""
        self._earlier = earlier
        self._lock = lock
        self._display = display
        self._step = self._total = 0
        self._handlers: dict[int, Any] = {}
        self._metrics = open(os.devnull if world.rank else folder / METRICS, "ab")  # noqa: SIM115  closed by __exit__
        self._write_card()

    @classmethod
    def open(
        cls,
        out: str | Path,
        *,
        stage: str,
        config: Mapping[str, Any],
        resume: bool,
        may_differ: frozenset[str] = frozenset(),
        quiet: bool = False,
    ) -> Run:
        """Make the folder `out`, or take up the run it holds when `resume` is True.

        A folder that holds a run is refused without `resume`; one whose run ended before its first step
        counts as empty.
        Raises UserError (folder in use, taken, or impossible), ArtifactError (a card that cannot be read) and
        ResumeMismatch (another stage or config; the keys in `may_differ` may change).
        """
        folder, all_ranks = Path(out), world()
        display = Display(quiet=quiet, rank=all_ranks.rank)
        if all_ranks.rank:
            run = cls(folder, new_card(stage, config), None, os.open(os.devnull, os.O_RDWR), display, all_ranks)
            all_ranks.same(jsonable(config), "settings")
            return run
        lock = _take_lock(folder)
        try:
            earlier = _earlier_card(folder)
            if earlier is not None and not resume:
                raise UserError(
                    f"{folder} holds a run ({earlier.stage}, {earlier.status}); pass --resume or another --out"
                )
            card = new_card(stage, config)
            notes: tuple[str, ...] = ()
            if earlier is not None:
                card, notes = continued(earlier, card, may_differ, folder)
            run = cls(folder, card, earlier, lock, display, all_ranks)
        except OSError as error:
            os.close(lock)
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
        except BaseException:
            os.close(lock)
            raise
        if resume and earlier is None:
            notes = (f"nothing to resume in {folder}: starting from the beginning",)
        for note in notes:
            run.note(note)
        if all_ranks.size > 1:
            all_ranks.same(jsonable(config), "settings")
            run.note(f"{all_ranks.size} processes share the work; rank 0 writes")
        return run

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        Run._open += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._display.end()
            self._settle(error)
            if self.card.status == "stopped":
                self._display.note(f"{self.card.stage} stopped; {self._continues} continues the run in {self.folder}")
            elif error is None:
                self._display.note(f"{self.card.stage} {self.card.status}: {self.folder}")
        finally:
            Run._open -= 1
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            with contextlib.suppress(OSError):  # a full disk was reported when the line was written
                self._metrics.close()
            os.close(self._lock)
        if error is None:
            self.world.gather(0, "the end of the run")  # nobody leaves before everything is written
            if self.stop_signal is not None:
                raise Stopped(self.stop_signal)

    def stopping(self) -> bool:
        """Has a signal asked any rank to stop? All ranks ask at the same places and hear the same."""
        if self.world.size > 1:
            self.stop_signal = max(self._share(f"the end of step {self._step}")) or None
        return self.stop_signal is not None

    def _share(self, when: str) -> list[int]:
        """The signal every rank was sent, 0 for none; what ranks noted of themselves goes into the card."""
        told = self.world.gather([self._asked, self._untold], when)
        self._untold = []
        for text in (text for _, untold in told for text in untold):
            self._remember(text)
        return [asked for asked, _ in told]

    def note(self, text: str) -> None:
        """Say something the run had to decide, and keep it in the card (once, however often it is said)."""
        self._display.note(text)
        self._remember(text)

    def own_note(self, text: str) -> None:
        """A note about this rank alone, which says it; in the card when all have asked `stopping` or said `finish`."""
        text = self._display.own(text)
        if self.world.rank:
            self._untold.append(text)
        else:
            self._remember(text)

    def warn(self, text: str) -> None:
        """A note that should be read."""
        self._display.warn(text)
        self._remember(text)

    def record(
        self,
        *,
        hashes: Mapping[str, str] | None = None,
        data: Mapping[str, Any] | None = None,
        results: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Add entries to the card, which is on disk when this returns.

        Hashes, and the `sha256` of a data entry, recorded before `begin` identify what the run is made from: a
        resumed run must find the ones it recorded first, else ResumeMismatch.
        """
        if self._earlier is not None and self._total == 0:
            refuse_other_inputs(self._earlier, hashes or {}, data or {}, self.folder)
        card = self.card
        self.card = replace(
            card,
            hashes=card.hashes | dict(hashes or {}),
            data=card.data | jsonable(data or {}),
            results=card.results | jsonable(results or {}),
            versions=card.versions | dict(versions or {}),
        )
        self._write_card()

    def begin(self, total_steps: int, start_step: int) -> None:
        """Start, or go on after step `start_step`: metrics of later steps, which will be made again, are cut."""
        self._step, self._total = start_step, total_steps
        self.rewind(start_step)
        self._display.begin(self.card.stage, total_steps, start_step)

    def rewind(self, step: int) -> None:
        """Cut every metric after `step`; at step 0 everything goes, an evaluation before the first step too."""
        if self.world.rank:
            return
        path = self.folder / METRICS
        lines = path.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        kept = [line for line, at in zip(lines, steps, strict=True) if step > 0 and at <= step]
        if kept == lines:
            return
        if unreadable := steps[:-1].count(math.inf):  # the last line may be torn by a kill, the others were altered
            self.warn(f"{path}: {unreadable} unreadable lines were cut")
        with self._writing(path):
            replace_file(path, b"".join(kept))
            self._metrics.close()
            self._metrics = open(path, "ab")  # noqa: SIM115  closed by __exit__

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Optimizer step `step` (counted from 1) is done. Record a step before its checkpoint is saved."""
        self._step = step
        self._append("train", step, metrics)
        self._display.step(step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """An evaluation of the weights after `step` gave these numbers."""
        self._append("eval", step, metrics)
        self._display.note(f"evaluation after step {step}: {headline(metrics)}")

    @contextlib.contextmanager
    def working(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Progress of work outside the steps: call what is yielded with the number of items just finished.

        That call raises `Stopped` after a signal, so the work must be durable by then.
        """
        done = 0

        def advance(items: int) -> None:
            nonlocal done
            done += items
            self._display.step(done, {})
            if self.stop_signal is not None:
                raise Stopped(self.stop_signal)

        self._display.begin(what, total)
        yield advance
        self._display.end()

    def finish(self, results: Mapping[str, Any]) -> RunCard:
        """The last word: `done` with these results, or `stopped` when a signal came before the last step.

        Every rank says it, at the same place.
        """
        if self.world.size > 1:
            self._share("the end of the run")
        stopped = self.stop_signal is not None and (self._step < self._total or self._total == 0)
        self._end("stopped" if stopped else "done")
        self.record(results=results)
        return self.card

    def write(self, name: str, lines: Iterable[str]) -> None:
        """The file `name` of the folder with these lines (without line feeds), whole; rank 0 alone writes it."""
        if self.world.rank:
            return
        with self._writing(self.folder / name):
            replace_file(self.folder / name, "".join(f"{line}\n" for line in lines).encode())

    @property
    def _continues(self) -> str:
        """What a person types to go on: a stage without that switch takes up its run by itself, and those in it."""
        return "--resume" if "resume" in self.card.config and Run._open == 1 else "the same command"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self.world.size == 1:
            self.stop_signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)  # the next one needs no Python to work
        self._display.stopping()

    def _settle(self, error: BaseException | None) -> None:
        """Write down how the block ended."""
        if isinstance(error, ResumeMismatch) and self._earlier is not None:
            self.card = self._earlier  # a refused resume leaves the card as it was
        elif error is None and self.card.status != "running":
            return
        elif isinstance(error, (Stopped, KeyboardInterrupt)) or (error is None and self.stop_signal is not None):
            self._end("stopped")
        else:
            cause = "left without a result" if error is None else f"{type(error).__name__}: {error}"
            self._end("failed", f"failed: {cause}")
        with contextlib.suppress(RunError) if error is not None else contextlib.nullcontext():  # the first error counts
            self._write_card()

    def _end(self, status: Literal["done", "stopped", "failed"], *notes: str) -> None:
        times = self.card.times | {"ended": round(time.time(), 3)}
        self.card = replace(self.card, status=status, times=times, notes=(*self.card.notes, *notes))

    def _remember(self, text: str) -> None:
        if text not in self.card.notes:
            self.card = replace(self.card, notes=(*self.card.notes, text))
            self._write_card()

    def _write_card(self) -> None:
        if self.world.rank:
            return
        path = self.folder / CARD
        with self._writing(path):
            text = json.dumps(json.loads(to_json(self.card)), indent=1, ensure_ascii=False, allow_nan=False)
            replace_file(path, f"{text}\n".encode())

    def _append(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), "metrics": jsonable(metrics)}
        with self._writing(self.folder / METRICS):
            self._metrics.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._metrics.flush()

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.folder).free // 2**20
            raise RunError(
                f"{path}: cannot be written ({error.strerror}; {free} MiB free). What was saved before is whole: "
                f"free some space or mend the folder; then {self._continues} continues the run"
            ) from error


def _take_lock(folder: Path) -> int:
    """Make the folder and lock it; the descriptor holds the lock. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{folder}: cannot be a run folder ({cause}); choose an --out that can be written") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 20, 0).decode() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"{folder}: process {owner} works in this folder; wait for it, stop it, or choose another --out"
        ) from error
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _step_of(line: bytes) -> float:
    """The step of one metrics line; infinite when the line was torn by a kill, so that it is cut."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _earlier_card(folder: Path) -> RunCard | None:
    """The card of the run in `folder`; None when there is none, or when it ended before its first step."""
    path = folder / CARD
    work = [name for name in (METRICS, "checkpoints", "model") if _has_content(folder / name)]
    if not path.exists():
        if work:
            raise UserError(
                f"{folder} holds {' and '.join(work)} but no {CARD}, so nobody knows whose; choose another --out"
            )
        return None
    card = read_card(path)
    return card if work or card.status == "done" else None


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
