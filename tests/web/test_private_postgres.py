"""The tests' own PostgreSQL ends with the tests, also when they are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from private_postgres import binaries

LIVES = """
from private_postgres import private_postgres
with private_postgres() as url:
    print(url.partition("host=")[2], flush=True)
    input()
"""


@pytest.mark.skipif(binaries() is None, reason="initdb is not installed")
@pytest.mark.parametrize("end", ["kill -9", "end"])
def test_the_server_ends_with_who_started_it(end: str) -> None:
    """After SIGKILL as after an orderly end, no server process is left, nor its folder."""
    tests = subprocess.Popen(
        [sys.executable, "-c", LIVES],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tests.stdin is not None and tests.stdout is not None
    folder = Path(tests.stdout.readline().strip())
    server = int((folder / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(server, 0)  # it lives
    if end == "kill -9":
        tests.send_signal(signal.SIGKILL)
        tests.wait(20)
    else:
        tests.stdin.write("\n")
    tests.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while folder.exists() or Path(f"/proc/{server}").exists():
        assert time.monotonic() < deadline, f"server {server} or its folder {folder} outlived its tests"
        time.sleep(0.05)
