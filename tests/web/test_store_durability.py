"""An acknowledged label is there, once, whoever was killed when.

SIGKILL takes the process, not the machine: what the kernel holds reaches the disk all the same, so `synchronous=OFF`
would pass here. That the disk is asked before the acknowledgement is checked by reading the settings (test_store.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from label_items import NewDatabase

from preftune.web.labels import standing
from preftune.web.store import Store


def killed(url: str, folder: Path, *numbers: int) -> None:
    script = Path(__file__).with_name("kill_writers.py")
    command = [sys.executable, str(script), url, str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def acknowledged(folder: Path) -> list[dict[str, object]]:
    lines = [line for log in sorted(folder.glob("*.log")) for line in log.read_text().splitlines()]
    return [json.loads(line.removeprefix("ack ")) for line in lines if line.startswith("ack ")]


@pytest.mark.slow
@pytest.mark.parametrize(("database", "kills"), [("sqlite", 200), ("postgres", 60)])
def test_every_acknowledged_act_survives_kill_9(
    database: str, kills: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """After the kills each acknowledged event is in the history as acknowledged, no act is there twice, and no item
    has more labels than the overlap."""
    url = request.getfixturevalue(f"new_{database}")()
    killed(url, tmp_path, kills)
    store = Store.open(url)
    snapshot = store.snapshot()
    if database == "sqlite":
        with store._database.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    store.close()
    stored = {event.id: json.loads(json.dumps(asdict(event))) for event in snapshot.events}
    promised = acknowledged(tmp_path)
    assert len(promised) > kills / 4
    assert [event for event in promised if stored.get(event["id"]) != event] == []
    assert max(Counter((event.annotator, event.client_key) for event in snapshot.events).values()) == 1
    # At most one act per writer's life was on its way, unacknowledged.
    assert len(snapshot.events) <= len({event["id"] for event in promised}) + 4
    stands = standing(snapshot.events)
    labels = Counter(loan.item for loan in snapshot.loans if loan.id in stands)
    assert max(labels.values()) <= 2
    assert max(Counter((loan.item, loan.annotator) for loan in snapshot.loans).values()) == 1


def test_racing_processes_never_exceed_the_overlap(new_database: NewDatabase, tmp_path: Path) -> None:
    """Four processes with 15 acts each at the same time: no item at more than two annotators, no writer fails."""
    url = new_database()
    killed(url, tmp_path, 4, 15)
    store = Store.open(url)
    snapshot = store.snapshot()
    store.close()
    assert len({loan.annotator for loan in snapshot.loans}) == 4
    assert max(Counter(loan.item for loan in snapshot.loans).values()) == 2
