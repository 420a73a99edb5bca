"""Token groups on disk, memory-mapped: written row by row, read in any order, resident only while they are looked at.

    tokens.arrow    Arrow IPC: every row the doctor let in, with what else is known of it (`Entry`, `columns.COLUMNS`)
    rows.npy        which of these rows are left when it is through with all of them

A group is built when it is asked for, as views into the mapped file; numbers of all groups are read as whole columns.
Writing holds ROWS_AT_ONCE rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow
from numpy.typing import NDArray

from preftune.data.columns import COLUMNS, Numbers
from preftune.tensors import Ids, TokenGroup

__all__ = ["Entry", "TokenGroups", "TokenRows", "TokenWriter"]

ROWS_AT_ONCE, BATCHES_MAPPED = 4096, 256
_KEY = pyarrow.binary(16)
_DIGEST = np.dtype("S16")


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of `tokens.arrow`: the group, and what the doctor notes of it."""

    group: TokenGroup
    position: int
    """Which row of the source, from 1."""
    key: bytes
    """Digest of the prompt's text, 16 bytes."""
    content: bytes
    """Digest of all that makes two rows copies of one another, 16 bytes."""
    claims: Sequence[int]
    """64-bit digests of its comparisons; the lowest bit tells which side is better."""
    gaps: Sequence[int]
    """Tokens of the chosen minus tokens of the rejected response, pair by pair."""
    annotator: str
    field: str
    """What its pairs or its label are called in messages."""
    oddities: int
    """A bit for each."""
    counts: Sequence[int]
    """What it adds to the report, equally many numbers for every row."""


class TokenWriter:
    """Writes `tokens.arrow`; whole once it is closed."""

    def __init__(self, path: Path) -> None:
        self._rows: list[Entry] = []
        self._file = pyarrow.ipc.new_file(str(path), _record_batch([]).schema)

    def add(self, entry: Entry) -> None:
        self._rows.append(entry)
        if len(self._rows) == ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        self._file.write_batch(_record_batch(self._rows))
        self._rows.clear()


def _record_batch(rows: Sequence[Entry]) -> Any:
    groups = [row.group for row in rows]
    columns: dict[str, Any] = {
        "prompt": _lists([group.prompt for group in groups], np.int32),
        "responses": _nested([group.responses for group in groups]),
        "pairs": _lists([list(chain.from_iterable(group.pairs)) for group in groups], np.int32),
        "ranks": _lists([group.ranks for group in groups], np.int32),
        "scores": _lists([group.scores for group in groups], np.float64),
        "labels": _lists([group.labels for group in groups], np.int8),
        "weight": _column([group.weight for group in groups], np.float64),
        "mismatched": _column([group.mismatched for group in groups], np.int32),
        "origin": _texts([group.origin for group in groups]),
        **{f"n_{name}": _column(list(map(size, groups)), np.int64) for name, size in COLUMNS.items()},
        "position": _column([row.position for row in rows], np.int64),
        "key": _digests([row.key for row in rows]),
        "content": _digests([row.content for row in rows]),
        "claims": _lists([row.claims for row in rows], np.uint64),
        "gaps": _lists([row.gaps for row in rows], np.int32),
        "annotator": _texts([row.annotator for row in rows]),
        "field": _texts([row.field for row in rows]),
        "oddities": _column([row.oddities for row in rows], np.int64),
        "counts": _lists([row.counts for row in rows], np.int64),
    }
    return pyarrow.RecordBatch.from_arrays(list(columns.values()), list(columns))


# Arrays are made of buffers and read as such: pyarrow's conversions import pandas, a quarter of a second.


def _column(values: Sequence[Any] | NDArray[Any], kind: type[np.generic]) -> Any:
    numbers = np.asarray(values, kind)
    return pyarrow.Array.from_buffers(_kind(kind), len(numbers), [None, pyarrow.py_buffer(numbers)])


def _lists(rows: Sequence[Any], kind: type[np.generic]) -> Any:
    values = np.concatenate([np.empty(0, kind), *(np.asarray(row, kind) for row in rows)])
    return _grouped(list(map(len, rows)), _column(values, kind))


def _nested(rows: Sequence[tuple[Ids, ...]]) -> Any:
    return _grouped(list(map(len, rows)), _lists(list(chain.from_iterable(rows)), np.int32))


def _grouped(lengths: Sequence[int], values: Any) -> Any:
    buffers = [None, pyarrow.py_buffer(_offsets(lengths))]
    return pyarrow.Array.from_buffers(pyarrow.large_list(values.type), len(lengths), buffers, children=[values])


def _texts(texts: Sequence[str]) -> Any:
    encoded = [text.encode(errors="surrogatepass") for text in texts]  # a file's name need not be UTF-8
    buffers = [None, pyarrow.py_buffer(_offsets(list(map(len, encoded)))), pyarrow.py_buffer(b"".join(encoded))]
    return pyarrow.Array.from_buffers(pyarrow.large_binary(), len(texts), buffers)


def _digests(digests: Sequence[bytes]) -> Any:
    return pyarrow.Array.from_buffers(_KEY, len(digests), [None, pyarrow.py_buffer(b"".join(digests))])


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _kind(dtype: Any) -> Any:
    return pyarrow.from_numpy_dtype(np.dtype(dtype))


def _numbers(array: Any) -> NDArray[Any]:
    """A column of numbers or digests, as a view."""
    dtype = _DIGEST if array.type == _KEY else np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array)) if len(array) else np.empty(0, dtype)


@dataclass(frozen=True, slots=True)
class _Lists:
    """A list of numbers for every row, as its values one after the other."""

    at: NDArray[np.int64]
    values: NDArray[Any]

    @classmethod
    def of(cls, array: Any) -> _Lists:
        return cls(_numbers(array.offsets), _numbers(array.values))

    @classmethod
    def of_texts(cls, array: Any) -> _Lists:
        _, at, letters = array.buffers()
        return cls(np.frombuffer(at, np.int64, len(array) + 1), np.frombuffer(letters or b"", np.uint8))

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.at[row] : self.at[row + 1]]

    def text(self, row: int) -> str:
        return self[row].tobytes().decode(errors="surrogatepass")


class _Batch:
    """The groups of one record batch, as views into the mapped file."""

    def __init__(self, batch: Any) -> None:
        self._prompt, inner = _Lists.of(batch["prompt"]), batch["responses"]
        self._responses, self._ids = _numbers(inner.offsets), _Lists.of(inner.values)
        self._pairs, self._ranks, self._scores, self._labels = (
            _Lists.of(batch[name]) for name in ("pairs", "ranks", "scores", "labels")
        )
        self._weight, self._mismatched = _numbers(batch["weight"]), _numbers(batch["mismatched"])
        self._origin = _Lists.of_texts(batch["origin"])

    def group(self, row: int) -> TokenGroup:
        first, end = self._responses[row : row + 2].tolist()
        pairs = self._pairs[row].tolist()
        return TokenGroup(
            prompt=self._prompt[row],
            responses=tuple(self._ids.values[i:j] for i, j in pairwise(self._ids.at[first : end + 1].tolist())),
            pairs=tuple(zip(pairs[::2], pairs[1::2], strict=True)),
            weight=float(self._weight[row]),
            origin=self._origin.text(row),
            ranks=tuple(self._ranks[row].tolist()),
            scores=tuple(self._scores[row].tolist()),
            labels=tuple(map(bool, self._labels[row].tolist())),
            mismatched=int(self._mismatched[row]),
        )


class TokenRows:
    """`tokens.arrow`, mapped: its groups by row number, its other columns whole.

    Columns lie between tokens, so that reading them all maps pages of the whole file: it is let go of as it is read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file = pyarrow.ipc.open_file(pyarrow.py_buffer(self._mapped))
        self._batches: list[_Batch | None] = [None] * self._file.num_record_batches

    def group(self, row: int) -> TokenGroup:
        number, row = divmod(row, ROWS_AT_ONCE)
        batch = self._batches[number] or _Batch(self._file.get_batch(number))
        self._batches[number] = batch
        return batch.group(row)

    def __len__(self) -> int:
        last = self._file.num_record_batches - 1
        return last * ROWS_AT_ONCE + len(self._file.get_batch(last)) if last >= 0 else 0

    def value(self, name: str, row: int) -> Any:
        """One value of a column of numbers or digests."""
        number, row = divmod(row, ROWS_AT_ONCE)
        return _numbers(self._file.get_batch(number)[name])[row].item()

    def text(self, name: str, row: int) -> str:
        """One value of a column of texts."""
        number, row = divmod(row, ROWS_AT_ONCE)
        return _Lists.of_texts(self._file.get_batch(number)[name]).text(row)

    def parts(self, name: str) -> Iterator[NDArray[Any]]:
        """A column, in pieces of ROWS_AT_ONCE rows: numbers, or digests."""
        for number in range(self._file.num_record_batches):
            yield _numbers(self._file.get_batch(number)[name])

    def column(self, name: str, dtype: Any) -> NDArray[Any]:
        """A column, whole."""
        found, start = np.empty(len(self), dtype), 0
        for number, part in enumerate(self.parts(name), start=1):
            found[start : start + len(part)] = part
            start += len(part)
            if number % BATCHES_MAPPED == 0:
                self._let_go()
        self._let_go()
        return found

    def _let_go(self) -> None:
        """Leave the pages to the system, which may have them in its cache; whoever looks again gets them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def counted(self, name: str) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """(how many values each row has, the values) of a column of lists, in such pieces."""
        for number in range(self._file.num_record_batches):
            values = _Lists.of(self._file.get_batch(number)[name])
            yield np.diff(values.at), values.values

    def lists(self, name: str, kept: NDArray[np.bool_]) -> Iterator[NDArray[Any]]:
        """The values of the `kept` rows of a column of lists, in such pieces."""
        start = 0
        for counts, values in self.counted(name):
            yield values[np.repeat(kept[start : start + len(counts)], counts)]
            start += len(counts)


class TokenGroups(Sequence[TokenGroup]):
    """The groups that are left, in the order of the source; a slice is a list of them."""

    def __init__(self, tokens: Path, rows: Path) -> None:
        self._rows, self._row = TokenRows(tokens), np.load(rows)

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, at: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, at: slice) -> list[TokenGroup]: ...
    def __getitem__(self, at: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(at, slice):
            return [self._rows.group(row) for row in self._row[at].tolist()]
        return self._rows.group(int(self._row[at]))

    def column(self, name: str) -> Numbers:
        whole = self._rows.column(f"n_{name}", np.int64)
        return whole if len(whole) == len(self._row) else whole[self._row]

    def prompt_keys(self) -> frozenset[str]:
        """The `prompt_key` of every group."""
        keys = np.unique(self._rows.column("key", _DIGEST)[self._row])
        return frozenset(key.ljust(16, b"\0").hex() for key in keys.tolist())
