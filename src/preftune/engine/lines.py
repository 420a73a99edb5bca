"""A file of lines that grows: killed at any instant it holds whole lines, and the next process goes on behind them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from preftune.engine.files import sync_folder
from preftune.errors import ArtifactError, RunError, UserError

__all__ = ["GrowingFile", "growing"]


class GrowingFile:
    """The lines found, and a way to add more; made by `growing`."""

    def __init__(self, path: Path, descriptor: int, begins: str) -> None:
        self._path, self._descriptor = path, descriptor
        content = path.read_bytes()
        whole, newline, torn = content.rpartition(b"\n")
        start = begins.encode()
        found = whole.split(b"\n") if newline else []
        strange = next((n for n, line in enumerate(found, 1) if not line.startswith(start)), None)
        if strange is None and not (torn.startswith(start) or start.startswith(torn)):
            strange = len(found) + 1
        if strange is not None:
            raise ArtifactError(f"{path}:{strange}: the line does not begin with {begins}; choose another --out")
        self.lines: tuple[str, ...] = tuple(line.decode(errors="replace") for line in found)
        """Whole lines found when the file was opened, without line feeds; a torn last one was cut."""
        if torn:
            os.ftruncate(descriptor, len(content) - len(torn))

    def append(self, lines: Sequence[str]) -> None:
        """Add lines (without line feeds); they are on the disk when this returns. Raises RunError."""
        content = "".join(f"{line}\n" for line in lines).encode()
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be written ({error.strerror}). What was written before stays: "
                "free some space or mend the folder, then run the same command again"
            ) from error


@contextmanager
def growing(path: Path, *, begins: str) -> Iterator[GrowingFile]:
    """`path` opened for this process alone, made if there is none; every line in it begins with `begins`.

    Raises UserError when it cannot be opened or another process adds to it, ArtifactError when a line of it, the torn
    last one included, begins with anything else: such a file is somebody else's and is left as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process is writing it; wait for it or choose another --out") from None
        sync_folder(path.parent)
        yield GrowingFile(path, descriptor, begins)
    finally:
        os.close(descriptor)
