"""How long does an annotator wait until a label is on disk?

    python benchmarks/label.py                                   # SQLite, and PostgreSQL where PREFTUNE_TEST_POSTGRES
    python benchmarks/label.py --url labels.db --url postgresql+psycopg://...   # names a server or initdb is installed

`Store.answer` is timed from call to return, that is until the database has flushed it: once with one annotator, once
with several at the same time, each asking for its next task in between. Beside it stands what the disk alone takes: a
4 KiB append with fsync in the same folder. benchmarks/label.json gets p50 and p99 in milliseconds, versions, hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from preftune.engine.host import host
from preftune.records import Response
from preftune.web.labels import Answer, Item, Settings
from preftune.web.store import Store

HERE = Path(__file__).resolve().parent
ANSWER = Answer(kind="ranking", ranks=(1, 2))
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", help="a database of its own, emptied by nobody: give a new one")
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--answers", type=int, default=500, help="in all, per measurement")
    parser.add_argument("--annotators", type=int, default=8, help="at the same time, in the second measurement")
    parser.add_argument("--out", default=str(HERE / "label.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "what": "milliseconds until Store.answer returns",
            "items": args.items,
            "answers": args.answers,
            "fsync": percentiles(fsyncs(Path(folder), args.answers)),
            "databases": dict(databases(args, Path(folder))),
            "versions": {name: version(name) for name in ("preftune", "SQLAlchemy", "psycopg")},
            "python": sys.version.split()[0],
            "host": host(),
        }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"fsync": result["fsync"], **result["databases"]}, indent=1))


def databases(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, object]]:
    """Name and version of each database, and its numbers."""
    for url in args.url or [str(folder / "labels.db")]:
        yield measured(url, args)
    if not args.url:
        with server() as found:
            if found:
                yield measured(found, args)


@contextmanager
def server() -> Iterator[str]:
    """The server of the tests: the one that is named, a private one, or ""."""
    sys.path.insert(0, str(HERE.parent / "tests/web"))
    from private_postgres import binaries, private_postgres

    if named := os.environ.get("PREFTUNE_TEST_POSTGRES"):
        yield named
    elif binaries() is None:
        yield ""
    else:
        with private_postgres() as url:
            yield url


def measured(url: str, args: argparse.Namespace) -> tuple[str, object]:
    store = Store.open(url, Settings(overlap=args.annotators + 1))
    if store.snapshot().items:
        raise SystemExit(f"{url} holds labels; give a new database")
    store.add_items(pair(number) for number in range(args.items))
    with store._database.reading() as connection:
        name = connection.dialect.name
        shown = "SELECT sqlite_version()" if name == "sqlite" else "SHOW server_version"
        named = f"{name} {connection.exec_driver_sql(shown).scalar()}"
    found = {}
    for annotators in (1, args.annotators):
        each = args.answers // annotators
        with ThreadPoolExecutor(annotators) as pool:
            waits = pool.map(lambda n, each=each, of=annotators: annotate(store, f"{of}/{n}", each), range(annotators))
            found[f"{annotators} annotators"] = percentiles([wait for some in waits for wait in some])
    store.close()
    return named, found


def annotate(store: Store, annotator: str, answers: int) -> list[float]:
    """Seconds of each answer."""
    waits = []
    for number in range(answers + WARM_UP):
        (task,) = store.next_tasks(annotator, 1)
        waits.append(timed(lambda task=task, number=number: store.answer(annotator, task.id, ANSWER, str(number))))
    return waits[WARM_UP:]


def fsyncs(folder: Path, times: int) -> list[float]:
    """Seconds of a 4 KiB append with fsync."""
    with (folder / "log").open("ab", buffering=0) as file:

        def append() -> None:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())

        return [timed(append) for _ in range(times)]


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99, worst = 1000 * np.quantile(seconds, (0.5, 0.99, 1))
    return {"n": len(seconds), "p50_ms": round(p50, 3), "p99_ms": round(p99, 3), "max_ms": round(worst, 3)}


def pair(number: int) -> Item:
    texts = (f"A short answer to question {number}. " * 5, f"Another answer to question {number}. " * 7)
    return Item(prompt=f"Question {number}?", responses=tuple(Response(text=text) for text in texts))


if __name__ == "__main__":
    main()
