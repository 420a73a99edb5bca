"""`preftune label export` and `preftune label import`: a store to files to train on, and labels into a store."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Protocol

from preftune.engine.files import replace_file
from preftune.equations.stats import Interval
from preftune.errors import DataError
from preftune.records import Refusal
from preftune.web.export import count, export, snapshot_agreement
from preftune.web.imports import Columns, read_history, read_labels
from preftune.web.labels import Snapshot
from preftune.web.store import Store

__all__ = ["ExportOptions", "ImportOptions", "export_labels", "import_labels"]


class ExportOptions(Protocol):
    """What `preftune label export` can be told."""

    @property
    def db(self) -> str: ...
    @property
    def kind(self) -> Literal["pairs", "unpaired", "rankings", "judgements", "history"]: ...
    @property
    def out(self) -> str: ...


class ImportOptions(Protocol):
    """What `preftune label import` can be told."""

    @property
    def db(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def responses(self) -> str: ...
    @property
    def question(self) -> str: ...


def export_labels(options: ExportOptions) -> None:
    """Write one kind of file, whole or not at all; print counts and how far the annotators agree."""
    store = Store.open(options.db, new=False)
    try:
        snapshot = store.snapshot()
    finally:
        store.close()
    lines = export(snapshot, options.kind)
    try:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(options.out), lines.encode())
    except OSError as problem:
        raise DataError(f"cannot write {options.out}: {problem.strerror}") from None
    print(f"{options.out}: {lines.count(chr(10))} lines of {options.kind}")
    print("\n".join(_summary(snapshot)))


def import_labels(options: ImportOptions) -> None:
    """Add the labels of a file; a history fills an empty store. Rows that cannot be read refuse the whole file."""
    path = Path(options.data)
    store = Store.open(options.db)
    try:
        if _is_history(path):
            store.restore(read_history(path.read_text(encoding="utf-8")))
            print(f"{options.data}: the whole history")
            return
        names = tuple(name.strip() for name in options.responses.split(",") if name.strip())
        read = read_labels(path, Columns(prompt=options.prompt, responses=names, question=options.question))
        labels = [label for label in read if not isinstance(label, Refusal)]
        if refused := [row for row in read if isinstance(row, Refusal)]:
            print("\n".join(str(row) for row in refused), file=sys.stderr)
            raise DataError(
                f"{options.data}: {len(refused)} of {len(read)} rows are no labels, listed above; none was added"
            )
        added = store.add_labels(labels)
        print(f"{options.data}: {added.new} new labels, {added.known} known already")
    finally:
        store.close()


def _is_history(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline(200).replace(" ", "").startswith('{"type":"history"')
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        return False


def _summary(snapshot: Snapshot) -> list[str]:
    """Counts in one line, then one line per annotator and one about all."""
    lines = [", ".join(f"{number} {name.replace('_', ' ')}" for name, number in asdict(count(snapshot)).items())]
    found = snapshot_agreement(snapshot)
    for row in found.annotators:
        shares = {
            "P(first wins)": row.first,
            "P(longer wins)": row.longer,
            "agrees with longest-wins": row.longest_wins,
            "agrees with the others": row.others,
        }
        lines.append(f"{row.name}: {row.judged} comparisons, {_shares(shares)}")
    if len(found.annotators) > 1:
        together = {"raw": found.raw, "kappa": found.kappa, "alpha": found.alpha, "alpha ordinal": found.alpha_ordinal}
        lines.append(f"agreement over {found.shared} shared comparisons: {_shares(together)}")
    return lines


def _shares(named: dict[str, Interval]) -> str:
    return (
        ", ".join(f"{name} {value}" for name, value in named.items() if not math.isnan(value.estimate)) or "no number"
    )
