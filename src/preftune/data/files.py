"""Text files -> rows, each with its place: JSON Lines, JSON, CSV and TSV, plain or gzipped.

Every row of a file gives exactly one item, a `Row` or a `Refusal`, in the file's order; a flawed row never hides
the next one. JSON Lines and CSV are streamed. What leaves the rest of a file unreadable (a broken gzip stream, a
syntax error inside one JSON document) is a DataError that says where.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from itertools import islice
from pathlib import Path

from preftune.data.fields import MAX_TEXT_CHARS, Row, printable
from preftune.errors import DataError
from preftune.records import Refusal

__all__ = ["MAX_ROW_BYTES", "MAX_UNPACKED_BYTES", "TEXT_READERS", "kind_of"]

MAX_ROW_BYTES = 64 * 2**20
"""A longer line, its end included, is refused unread, so that one damaged line cannot fill the memory."""
MAX_UNPACKED_BYTES = 64 * 2**30
"""A gzipped file that unpacks to more is not read to its end: it is more likely a bomb than a data set."""
MAX_DOCUMENT_BYTES = 4 * 2**30
"""A JSON document is decoded in memory: a larger one has to become JSON Lines."""

SPACE = re.compile(r"[ \t\n\r]*")
BLANK = "is a blank line between rows"


def kind_of(path: Path) -> str:
    """`jsonl`, `json`, ...: the file's suffix without `.gz`, in lower case, aliases resolved; "" when it has none."""
    name = path.name.lower().removesuffix(".gz")
    kind = name.rpartition(".")[2] if "." in name else ""
    return {"ndjson": "jsonl", "jsonlines": "jsonl"}.get(kind, kind)


def read_jsonl(path: Path, shown: str) -> Iterator[Row | Refusal]:
    """One JSON value per line. Blank lines after the last row are no rows; before it they are refused."""
    decode = _Decoder()
    blank_from = None
    for number, line in _lines(path, shown):
        if line is not None and not line.strip():
            blank_from = blank_from or number
            continue
        for blank in range(blank_from or number, number):
            yield Refusal(origin=f"{shown}:{blank}", field="row", reason=BLANK)
        blank_from = None
        origin = f"{shown}:{number}"
        if line is None:
            yield Refusal(origin=origin, field="row", reason=f"is longer than {MAX_ROW_BYTES} bytes")
        else:
            yield decode.line(line.removeprefix("\ufeff") if number == 1 else line, origin)


def read_json(path: Path, shown: str) -> Iterator[Row | Refusal]:
    """A list of rows, or one object that maps prompts to rows; JSON Lines under this suffix are recognised.

    Rows carry the line they start on, or, in a file that is one line, their number.
    """
    text = _document(path, shown).removeprefix("\ufeff").rstrip()
    if _is_json_lines(text):
        yield from read_jsonl(path, shown)
    elif text[:1] in ("[", "{"):
        yield from _members(text, shown)
    elif text:
        raise DataError(f"{shown}: is neither a list of rows nor an object; save it as JSON Lines or as a list")


def read_csv(path: Path, shown: str, delimiter: str = ",") -> Iterator[Row | Refusal]:
    """Rows of cells under a header line; a row may span lines and carries the first. All cells are text."""
    csv.field_size_limit(MAX_TEXT_CHARS + 1)  # the module's own limit, 128 KiB, is shorter than some prompts
    text = (line or _too_long(f"{shown}:{number}") for number, line in _lines(path, shown))
    reader = csv.reader(_without_mark(text), delimiter=delimiter, strict=True)
    header: list[str] = []
    blank_from = None
    while True:
        line = reader.line_num + 1
        origin = f"{shown}:{line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Refusal(origin=origin, field="row", reason=f"is not CSV: {error} (read to line {reader.line_num})")
            continue
        if not header:
            header = _header(cells, origin)
            continue
        if not cells:
            blank_from = blank_from or line
            continue
        for blank in range(blank_from or line, line):
            yield Refusal(origin=f"{shown}:{blank}", field="row", reason=BLANK)
        blank_from = None
        if cells == header or cells[0].startswith("\ufeff"):
            reason = "repeats the header" if cells == header else "begins with a byte-order mark"
            yield Refusal(origin=origin, field="row", reason=f"{reason}: two files were joined")
        elif len(cells) != len(header):
            reason = f"has {len(cells)} cells, the header has {len(header)}"
            yield Refusal(origin=origin, field="row", reason=reason)
        else:
            yield Row(origin, dict(zip(header, cells, strict=True)), cells=True)


TEXT_READERS: dict[str, Callable[[Path, str], Iterator[Row | Refusal]]] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "tsv": lambda path, shown: read_csv(path, shown, delimiter="\t"),
}


class _Decoder:
    """JSON in which a key given twice is an error, not a silent choice of the last one."""

    def __init__(self) -> None:
        self.json = json.JSONDecoder(object_pairs_hook=self._object)
        self.twice: list[str] = []

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            self.twice += [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
        return values

    def line(self, line: str, origin: str) -> Row | Refusal:
        """The row on one line."""
        self.twice.clear()
        try:
            value = self.json.decode(line)
        except (ValueError, RecursionError) as error:
            return Refusal(origin=origin, field="row", reason=_trouble(line, error))
        return self.row(value, origin)

    def row(self, value: object, origin: str) -> Row | Refusal:
        if self.twice:
            return Refusal(origin=origin, field=printable(self.twice[0]), reason="is given twice in one object")
        return Row(origin, value)


def _trouble(line: str, error: Exception) -> str:
    """Why a line is not one JSON value, in the words of what most likely happened to it."""
    if line.startswith("\ufeff"):
        return "begins with a byte-order mark in the middle of the file"
    if "\0" in line:
        return f"holds a NUL byte (character {line.index(chr(0)) + 1})"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error}"
    if error.msg == "Extra data":
        return f"holds more than one JSON value, the next begins at character {error.pos + 1}"
    if error.msg.startswith("Unterminated string") or not line[error.pos :].strip():
        return "is cut off: the line ends inside a JSON value"
    return f"is not JSON: {error.msg} at character {error.pos + 1}"


def _lines(path: Path, shown: str) -> Iterator[tuple[int, str | None]]:
    """(1-based number, text) of every line; None for one over MAX_ROW_BYTES, which is skipped in pieces.

    A byte that is not UTF-8 becomes a lone surrogate, which the field that holds it is refused for. Lines end
    at a line feed only: JSON strings and CSV cells may hold every other separator that str.splitlines knows.
    """
    number = unpacked = 0
    limit = MAX_UNPACKED_BYTES if _is_gzip(path) else None
    try:
        with _open(path) as stream:
            while line := stream.readline(MAX_ROW_BYTES + 1):
                number += 1
                piece = line
                while len(line) > MAX_ROW_BYTES and piece and not piece.endswith(b"\n"):
                    unpacked += len(piece)
                    _check_size(unpacked, limit, f"{shown}:{number}")
                    piece = stream.readline(2**20)
                unpacked += len(piece)
                _check_size(unpacked, limit, f"{shown}:{number}")
                yield number, None if len(line) > MAX_ROW_BYTES else line.decode("utf-8", "surrogateescape")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown}: cannot be read past line {number}: {error}; restore the file") from error


def _document(path: Path, shown: str) -> str:
    """The whole text of a file, decoded as `_lines` does."""
    content = bytearray()
    try:
        with _open(path) as stream:
            while piece := stream.read(2**20):
                content += piece
                _check_size(len(content), MAX_DOCUMENT_BYTES, shown)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{shown}: cannot be read past byte {len(content)}: {error}; restore the file") from error
    return content.decode("utf-8", "surrogateescape")


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path, "rb") if _is_gzip(path) else path.open("rb")


def _check_size(size: int, limit: int | None, place: str) -> None:
    if limit is not None and size > limit:
        raise DataError(f"{place}: the file unpacks to more than {limit} bytes; save it as several JSON Lines files")


def _too_long(place: str) -> str:
    raise DataError(f"{place}: the line is longer than {MAX_ROW_BYTES} bytes; put the rows on lines of their own")


def _is_json_lines(text: str) -> bool:
    """Whether the first line is a whole object of its own: with more after it, or no map from prompts to rows."""
    if not text.startswith("{"):
        return False
    end = text.find("\n")
    try:
        value = json.loads(text if end < 0 else text[:end])
    except (ValueError, RecursionError):
        return False
    return end >= 0 or not all(isinstance(row, dict) for row in value.values())


def _members(text: str, shown: str) -> Iterator[Row | Refusal]:
    """The elements of the list, or the entries of the object, that the text is, decoded one at a time."""
    decode = _Decoder()
    one_line = "\n" not in text
    is_list = text[0] == "["
    line, counted, number, at = 1, 0, 0, 1
    try:
        while True:
            at = _skip(text, at)
            if text[at : at + 1] == ("]" if is_list else "}") and number == 0:
                break
            number += 1
            line += text.count("\n", counted, at)
            counted = at
            decode.twice.clear()
            key = None
            if not is_list:
                key, at = decode.json.raw_decode(text, at)
                at = _skip(text, _expect(text, _skip(text, at), ":"))
            value, end = decode.json.raw_decode(text, at)
            at = _skip(text, end)
            origin = f"{shown}:row {number}" if one_line else f"{shown}:{line}"
            yield decode.row(value if key is None or not isinstance(value, dict) else {**value, "prompt": key}, origin)
            if text[at : at + 1] != ",":
                _expect(text, at, "]" if is_list else "}")
                break
            at += 1
        end = _skip(text, at + 1)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        where = f"{shown}:{error.lineno}"
        reason = f"is not JSON: {error.msg} at character {error.colno} of the line"
        raise DataError(f"{where}: {reason}; the rows after it cannot be told apart: repair it first") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown}:row {number}: cannot be decoded: {error}; repair it first") from error


def _skip(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    assert found is not None
    return found.end()


def _expect(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r}", text, at)
    return at + 1


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    """The lines; the byte-order mark that may begin the first one is none of its text."""
    yield from (line.removeprefix("\ufeff") for line in islice(lines, 1))
    yield from lines


def _header(cells: list[str], origin: str) -> list[str]:
    """The column names, each once. Raises DataError."""
    flawed = [name for name in cells if not name.strip() or cells.count(name) > 1]
    if not cells or flawed:
        found = ", ".join(printable(name) for name in cells) or "none"
        raise DataError(f"{origin}: the header needs a name of its own for each column, found: {found}")
    if len(cells) == 1 and (mark := next((mark for mark in ";\t|," if mark in cells[0]), None)):
        how = f"the header {cells[0]!r} is one column; the file seems to be separated by {mark!r}"
        raise DataError(f"{origin}: {how}: .csv wants commas, .tsv tabs: save it so, or rename it")
    return cells
