"""A PostgreSQL server of one's own: in a temporary folder, reached by a socket in it, gone with who started it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """The folder with initdb and pg_ctl, the newest version first."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


# Waits for its input to end, which it does with the process that holds the other end, however that dies.
GUARD = 'cat; folder=$1; shift; "$@"; code=$?; rm -rf "$folder"; exit $code'


@contextmanager
def private_postgres() -> Iterator[str]:
    """The URL of a running server. The server refuses to be root, so root runs it as the user `postgres`."""
    place = binaries()
    assert place is not None, "PostgreSQL is not installed"
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    as_user = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]

    def run(*command: str | Path) -> None:
        done = subprocess.run([*as_user, *map(str, command)], capture_output=True, text=True, cwd="/", timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    data = folder / "data"
    stop = ["sh", "-c", GUARD, "guard", folder, *as_user, place / "pg_ctl", "-D", data, "-m", "immediate", "stop"]
    guard = subprocess.Popen(  # in a session of its own, so that a Ctrl-C at the tests is not for it
        stop, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", start_new_session=True
    )
    started = False
    try:
        run(place / "initdb", "-D", data, "-U", "preftune", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c shared_buffers=16MB"
        run(place / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-o", options, "start")
        started = True
        yield f"postgresql+psycopg://preftune@/postgres?host={folder}"
    finally:
        said, _ = guard.communicate(timeout=60)
        assert guard.returncode == 0 or not started, said.decode()
