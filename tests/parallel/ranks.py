"""What the tests of several processes share: ranks started as a launcher does, waited for, and what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT = 300.0
"""Seconds a rank may take before it counts as hanging."""
CLOCK = ("share_", "_per_second", "padding_fraction")
"""Metrics that tell how the work was cut and how fast it went."""


def start(
    arguments: Sequence[str], size: int, *, own: Mapping[int, Mapping[str, str]] | None = None
) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in `size` processes with the variables of torchrun; `own`: more of them for one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), **(own or {}).get(rank, {}),
        }  # fmt: skip
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments], env=os.environ | variables, stderr=subprocess.PIPE, text=True
            )
        )
    return started


def ends(started: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, stderr) of every rank. Fails, and ends them all, when one of them hangs."""
    deadline, found = time.monotonic() + LIMIT, []
    try:
        for process in started:
            _, told = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found.append((process.returncode, told))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return found


def wait_for_step(out: Path, step: int, started: Sequence[subprocess.Popen[str]]) -> None:
    """Until `step` stands in metrics.jsonl."""
    deadline = time.monotonic() + LIMIT
    while len(train_rows(out)) < step:
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.05)


def train_rows(out: Path) -> list[dict[str, Any]]:
    return rows(out, "train")


def rows(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The metrics of every record, without what the clock and the cutting say."""
    path = out / "metrics.jsonl"
    lines = (
        [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    )
    found = [json.loads(line) for line in lines]
    return [
        {name: value for name, value in row["metrics"].items() if not any(part in name for part in CLOCK)}
        for row in found
        if kind in (None, row["kind"])
    ]
