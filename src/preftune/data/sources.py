"""Files, folders and hub data sets -> records with their place, every row accounted for.

    for item in open_source("train.jsonl", kind="preferences"):    # RankedResponses | LabelledResponse | Refusal

No tokenizer, no torch: only text. What can be told from the text of one row is refused here; what needs tokens
or other rows (length, duplicates, contradictions) is the doctor's.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from preftune.data.demonstrations import DEMONSTRATIONS
from preftune.data.fields import Row
from preftune.data.files import TEXT_READERS, kind_of
from preftune.data.formats import PREFERENCES
from preftune.data.layouts import Items, Layout, detect
from preftune.data.prompts import PROMPTS
from preftune.data.ranking import POLICIES, pair_positions
from preftune.data.sources_arrow import open_hub, read_parquet
from preftune.errors import ConfigError, DataError
from preftune.records import RankedResponses, Refusal

__all__ = ["Source", "open_source"]

READERS = {**TEXT_READERS, "parquet": read_parquet}
ROWS_TO_DETECT = 64
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Source:
    """A data set that can be iterated again and again, always in the same order."""

    name: str
    """What was asked for: a path, or a hub name."""
    kind: Literal["preferences", "demonstrations", "prompts"]
    format: str
    """The layout, as detected or forced."""
    pairs: str
    """Which pairs a ranking stands for: `all` leaves it to the reader, another policy is written into the records."""
    seed: int
    """Of the draws of `best_random`."""
    rows: Callable[[], Iterator[Row | Refusal]]
    digest: Callable[[], str]

    @cached_property
    def sha256(self) -> str:
        """Of the file's bytes, as `sha256sum` prints it; of a folder's listing of those; of a hub data set's rows."""
        return self.digest()

    def __iter__(self) -> Items:
        layout = _layouts(self.kind)[self.format]
        for item in layout.items(self.rows()):
            yield self._ordered(item, layout.order) if isinstance(item, RankedResponses) else item

    def _ordered(self, record: RankedResponses, column: str) -> RankedResponses | Refusal:
        pairs = pair_positions(record, self.pairs, seed=self.seed)
        if not pairs:
            reason = f"orders none of the {len(record.responses)} responses above another, so there is no pair"
            return Refusal(origin=record.origin, field=column, reason=reason)
        return record if self.pairs == "all" else replace(record, pairs=pairs)


def open_source(
    path_or_hub_name: str | Path,
    *,
    kind: Literal["preferences", "demonstrations", "prompts"],
    format: str = "auto",
    pairs: str = "all",
    seed: int = 0,
) -> Source:
    """The rows of a file, of all data files below a folder in sorted order, or of `name[:config][:split]` on the hub.

    Demonstrations can be read from preferences too: the best response; prompts from all of them. Raises ConfigError
    on an unknown format or pairs, DataError on what cannot be read or has no known layout.
    """
    layouts = _layouts(kind)
    _check_name("format", format, ["auto", *layouts])
    _check_name("pairs", pairs, list(POLICIES))
    name = str(path_or_hub_name)
    rows, digest = _open_rows(name)
    if format == "auto":
        first = list(islice(rows(), ROWS_TO_DETECT))
        if not first:
            raise DataError(f"{name}: holds no row; give a file with at least one")
        format = detect(first, layouts, name)
    return Source(name, kind, format, pairs, seed, rows, digest)


def _layouts(kind: str) -> Mapping[str, Layout]:
    return {"preferences": PREFERENCES, "demonstrations": DEMONSTRATIONS, "prompts": PROMPTS}[kind]


def _check_name(key: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key} {value!r} is unknown; allowed: {', '.join(allowed)}{hint}")


def _open_rows(name: str) -> tuple[Callable[[], Iterator[Row | Refusal]], Callable[[], str]]:
    path = Path(name).expanduser()
    if path.exists():
        files = _files(path, name)
        return lambda: _read(files), lambda: _digest(path, files)
    if HUB_NAME.fullmatch(name) and kind_of(path) not in READERS:
        return open_hub(name, near=_near(path))
    raise DataError(f"{name}: there is no such file or folder{_near(path)}")


def _near(path: Path) -> str:
    """Names like the missing one, at the first place on its way that does not exist."""
    while not path.parent.exists():
        path = path.parent
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings)
    return f"; {path.parent} has {', '.join(near)}" if near else f"; {path.parent} has nothing of a similar name"


def _files(path: Path, name: str) -> dict[Path, str]:
    """The data files of a path, in order, each with the name it is shown by. Raises DataError."""
    allowed = ", ".join(f".{kind}" for kind in READERS) + " (text also with .gz)"
    if not path.is_dir():
        if kind_of(path) not in READERS:
            raise DataError(f"{name}: files of this suffix are not read; read are: {allowed}")
        return {path: name}
    inside = [entry.relative_to(path) for entry in path.rglob("*") if entry.is_file()]
    data = sorted(
        (entry for entry in inside if kind_of(entry) in READERS and not any(p.startswith(".") for p in entry.parts)),
        key=lambda entry: entry.as_posix(),
    )
    if not data:
        found = ", ".join(sorted(entry.as_posix() for entry in inside)[:5]) or "nothing"
        raise DataError(f"{name}: the folder holds no data file; found: {found}; read are: {allowed}")
    return {path / entry: str(Path(name) / entry) for entry in data}


def _read(files: Mapping[Path, str]) -> Iterator[Row | Refusal]:
    for path, shown in files.items():
        yield from READERS[kind_of(path)](path, shown)


def _digest(path: Path, files: Mapping[Path, str]) -> str:
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        return hashes[path]
    listing = "".join(f"{digest}  {file.relative_to(path).as_posix()}\n" for file, digest in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest()
