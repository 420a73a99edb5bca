"""log pi_ref(token) of every completion token: computed once, then read from disk by every loss, beta, epoch and run.

    <root>/reference/<SHA-256 of identity.json>/
        identity.json   what the log-probs depend on besides the tokens
        values.f32      float32, little-endian, one entry after the other
        index           one line per entry, in the order of the values:
                        <BLAKE2b of prompt and response ids> <count> <CRC-32 of the values> <CRC-32 of this line>
        lock            held while an entry is added, so that processes can share the cache

An index line is written only after its values are on the disk. Killed at any instant, the cache therefore holds
whole entries and at most a tail that the next writer cuts off. Keys are contents: data that was reordered, paired
anew or extended finds what is there. No random number is drawn.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from preftune.engine.files import replace_file
from preftune.errors import ArtifactError, NotFinite
from preftune.tensors import TokenGroup

__all__ = ["ReferenceCache"]

LAYOUT = "preftune reference log-probs, layout 1"
# What a kill may cost: the log-probs of this many seconds.
FLUSH_SECONDS = 2.0
Values = NDArray[np.float32]


class _Entry(NamedTuple):
    start: int
    length: int
    check: int


class ReferenceCache:
    """Per-token float32 log-probs, nats, keyed by `identity` and by the token ids of prompt and response.

    `identity` names everything else the numbers depend on: weights, tokenizer and template, dtype.
    Used in three moves: `missing` says what to compute, `append` takes it, `lookup` gives it back.
    Raises ArtifactError when the folder cannot be used or was altered.
    """

    def __init__(self, identity: Mapping[str, str], root: Path | None = None) -> None:
        described = json.dumps({"layout": LAYOUT, "identity": dict(identity)}, indent=1, sort_keys=True).encode()
        self.folder = (root or _default_root()) / "reference" / hashlib.sha256(described).hexdigest()
        self.hits = 0
        """Responses that `missing` was asked for and found."""
        self.computed = 0
        """Responses that `append` added."""
        self._values_path, self._index_path = self.folder / "values.f32", self.folder / "index"
        self._entries: dict[bytes, _Entry] = {}
        self._pending: dict[bytes, Values] = {}
        self._digests: dict[TokenGroup, tuple[bytes, ...]] = {}  # hashing once per group, not once per epoch
        self._index_read = self._values_known = 0
        self._mapped: Values = np.empty(0, "<f4")
        self._flushed = time.monotonic()
        with self._usable():
            self._create(described)
            self._refresh()

    def missing(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """Groups to compute so that every response of `groups` is there: each response once, order kept.

        A group of which some responses are known comes back with the unknown ones alone, and without pairs.
        """
        with self._usable():
            self._refresh()
        seen: set[bytes] = set()
        result = []
        for group in groups:
            wanted = []
            for response, digest in zip(group.responses, self._digests_of(group), strict=True):
                known = digest in self._entries or digest in self._pending
                self.hits += known and digest not in seen
                if not known and digest not in seen:
                    wanted.append(response)
                seen.add(digest)
            if len(wanted) == len(group.responses):
                result.append(group)
            elif wanted:
                result.append(TokenGroup(group.prompt, tuple(wanted), weight=group.weight, origin=group.origin))
        return result

    def append(self, groups: Sequence[TokenGroup], logps_C: Tensor) -> None:
        """Take log-probs [C] of the groups' completion tokens, ordered by group, response, time; durable soon after.

        Raises NotFinite, naming the rows, before anything is kept.
        """
        lengths = [len(response) for group in groups for response in group.responses]
        values = np.array(logps_C.detach().to("cpu", torch.float32).numpy(), dtype="<f4")
        assert values.shape == (sum(lengths),), f"{values.shape} log-probs for {sum(lengths)} tokens"
        entries = np.split(values, np.cumsum(lengths)[:-1])
        owners = [(group, digest) for group in groups for digest in self._digests_of(group)]
        bad = [group.origin for (group, _), entry in zip(owners, entries, strict=True) if not np.isfinite(entry).all()]
        if bad:
            listed = ", ".join(dict.fromkeys(bad))
            raise NotFinite(
                f"the reference gives log-probs that are NaN or infinite to {listed}; nothing of it was kept"
            )
        for (_, digest), entry in zip(owners, entries, strict=True):
            if digest not in self._entries and digest not in self._pending:
                self._pending[digest] = entry
                self.computed += 1
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def lookup(self, groups: Sequence[TokenGroup]) -> Tensor:
        """Log-probs [C], float32 on the CPU, ordered by group, response, time. Every entry is checked as it is read.

        Raises KeyError for a response that was never appended: `missing` tells them.
        """
        self.flush()
        if len(self._mapped) < self._values_known:
            self._mapped = np.memmap(self._values_path, "<f4", "r", shape=(self._values_known,)).view(np.ndarray)
        return torch.from_numpy(np.concatenate([self._read(d) for group in groups for d in self._digests_of(group)]))

    def flush(self) -> None:
        """Make everything appended durable: values first, their index lines only after them."""
        if not self._pending:
            return
        with self._usable(), open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._refresh()  # another process may have added the same entries
            fresh = {digest: values for digest, values in self._pending.items() if digest not in self._entries}
            _write_durably(self._values_path, 4 * self._values_known, b"".join(v.tobytes() for v in fresh.values()))
            lines = b"".join(_index_line(digest, values) for digest, values in fresh.items())
            _write_durably(self._index_path, self._index_read, lines)
            self._refresh()
        self._pending.clear()
        self._flushed = time.monotonic()

    def _read(self, digest: bytes) -> Values:
        start, length, check = self._entries[digest]
        values = self._mapped[start : start + length]
        if crc32(values.data) != check:
            raise self._altered(f"values {start} to {start + length} are not those that were written")
        return values

    def _refresh(self) -> None:
        """Take in the index lines that this process or another has added since the last look."""
        with open(self._index_path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._index_read:
                raise self._altered("it was shortened while in use")
            file.seek(self._index_read)
            whole, newline, _torn = file.read().rpartition(b"\n")
        for line in whole.split(b"\n") if newline else ():
            digest, length, check = self._parse(line)
            self._entries[digest] = _Entry(self._values_known, length, check)
            self._values_known += length
        self._index_read += len(whole) + len(newline)
        if self._values_path.stat().st_size < 4 * self._values_known:
            raise self._altered("values are missing at its end")

    def _parse(self, line: bytes) -> tuple[bytes, int, int]:
        body, _, check = line.rpartition(b" ")
        if check != b"%08x" % crc32(body):
            raise self._altered(f"its index has a damaged line: {line[:80]!r}")
        digest, length, entry_check = body.split(b" ")
        return bytes.fromhex(digest.decode()), int(length), int(entry_check, 16)

    def _digests_of(self, group: TokenGroup) -> tuple[bytes, ...]:
        """One key per response: BLAKE2b-128 of the prompt's length, the prompt's ids and the response's ids."""
        known = self._digests.get(group)
        if known is None:
            prompt = hashlib.blake2b(len(group.prompt).to_bytes(8, "little"), digest_size=16)
            prompt.update(group.prompt.astype("<i4").tobytes())
            hashes = [prompt.copy() for _ in group.responses]
            for response, digest in zip(group.responses, hashes, strict=True):
                digest.update(response.astype("<i4").tobytes())
            known = self._digests[group] = tuple(digest.digest() for digest in hashes)
        return known

    def _create(self, described: bytes) -> None:
        """Lay the empty files, the identity last: where it stands the others do too."""
        path = self.folder / "identity.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._values_path.touch()
            self._index_path.touch()
            replace_file(path, described)
        elif path.read_bytes() != described:
            raise self._altered("its identity.json is not the one it is named after")

    def _altered(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"the cache of reference log-probs in {self.folder} was altered: {what}. Delete that folder and run again; "
            "its log-probs are computed anew"
        )

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"{self.folder} cannot keep reference log-probs ({error.strerror}); "
                "set PREFTUNE_CACHE to a folder that can be written and has room"
            ) from error


def _default_root() -> Path:
    """$PREFTUNE_CACHE, else ~/.cache/preftune."""
    try:
        return Path(os.environ.get("PREFTUNE_CACHE") or "~/.cache/preftune").expanduser()
    except RuntimeError as error:  # an account without a home
        raise ArtifactError("there is no home folder to keep reference log-probs in; set PREFTUNE_CACHE") from error


def _index_line(digest: bytes, values: Values) -> bytes:
    body = b"%s %d %08x" % (digest.hex().encode(), len(values), crc32(values.data))
    return b"%s %08x\n" % (body, crc32(body))


def _write_durably(path: Path, offset: int, content: bytes) -> None:
    """Make `content` the file's end from `offset` on, fsynced: a torn tail beyond `offset` goes."""
    with open(path, "r+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
