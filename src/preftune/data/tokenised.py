"""A data set is tokenised once and then read from disk, by every run that would do the same with it.

    <root>/data/<SHA-256 of identity.json's `identity`>/
        tokens.arrow, rows.npy    its groups                 (`token_file`)
        report.json               what became of its rows    (`report`)
        identity.json             what all this depends on, and the SHA-256 of the other files; written last
        lock                      held while the files are read over, or written

The identity is the source's content, the tokenizer's, the settings and the versions of what turns one into the other.
Files that are not those that were written are made anew. A second process that wants the same waits for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preftune.data.conversations import Tokenizer
from preftune.data.doctor import ROWS, TOKENS, Prepared, examine
from preftune.data.ranking import DRAWN
from preftune.data.report import DataReport
from preftune.data.sources import Source
from preftune.data.truncation import Truncation
from preftune.errors import ArtifactError, DataError

__all__ = ["tokenised"]

LAYOUT = "preftune tokens, layout 2"
_REPORT, _IDENTITY = "report.json", "identity.json"
_PACKAGES = ("preftune", "tokenizers", "transformers")


def tokenised(
    source: Source,
    tokenizer: Tokenizer,
    *,
    tokenizer_sha256: str,
    root: Path,
    max_length: int,
    truncation: Truncation,
    pairs: str = "all",
    seed: int = 0,
    held_out: frozenset[str] = frozenset(),
    note: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """What `doctor.prepare` makes of these arguments, from disk where it was made before; `note` hears of damage.

    Raises what `doctor.examine` raises, DataError when the source changes meanwhile, ArtifactError when `root` cannot
    be written.
    """
    settings: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "pairs": pairs, "seed": seed}
    drawn = pairs in DRAWN or source.pairs in DRAWN
    identity = settings | {
        "layout": LAYOUT,
        "source": [source.name, source.kind, source.format, source.pairs, source.sha256],
        "tokenizer": tokenizer_sha256,
        "seed": [seed, source.seed] if drawn else [],
        "held_out": hashlib.sha256("".join(sorted(held_out)).encode()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    folder = root / "data" / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, fcntl.LOCK_SH):
            if report := _whole(folder, identity):
                return Prepared.read(folder, report)
        with _locked(folder, fcntl.LOCK_EX):
            report = _whole(folder, identity)  # made while this process waited
            if report is None:
                if (folder / _IDENTITY).exists():
                    note(f"{folder}: not what was written there; {source.name} is tokenised anew")
                _clear(folder)
                report = examine(source, tokenizer, folder, held_out=held_out, **settings)
                if source.digest() != source.sha256:
                    raise DataError(f"{source.name} was changed while it was read; run again when it is complete")
                _complete(folder, identity, report)
            return Prepared.read(folder, report)
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot keep tokenised data ({error.strerror or error}); set PREFTUNE_CACHE to a folder that can "
            "be written and has room"
        ) from error


def _whole(folder: Path, identity: dict[str, Any]) -> DataReport | None:
    """The report, when every file is the one that was written; None otherwise."""
    try:
        written = json.loads((folder / _IDENTITY).read_bytes())
        if written != {"identity": identity, "files": _hashes(folder)}:
            return None
        return DataReport.from_json((folder / _REPORT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _complete(folder: Path, identity: dict[str, Any], report: DataReport) -> None:
    (folder / _REPORT).write_text(report.to_json(), encoding="utf-8")
    temporary = folder / f"{_IDENTITY}.tmp"
    temporary.write_text(json.dumps({"identity": identity, "files": _hashes(folder)}, indent=1), encoding="utf-8")
    os.replace(temporary, folder / _IDENTITY)


def _clear(folder: Path) -> None:
    """Nothing is written over: whoever has mapped a file keeps it."""
    for name in (_IDENTITY, _REPORT, ROWS, TOKENS):
        (folder / name).unlink(missing_ok=True)


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for name in (TOKENS, ROWS, _REPORT):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, kind)
        yield
