"""A label that the page called saved is there, once, however often the server was killed: over HTTP, under load.

`PREFTUNE_KILLS=200 pytest tests/web/test_server_durability.py` kills as often as one likes, on each database.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from label_items import pair

from preftune.web.labels import Loan, Settings, standing
from preftune.web.store import Store

ANNOTATORS = ("Ada", "Bob", "Cleo", "Dan")
KILLS = int(os.environ.get("PREFTUNE_KILLS", "0"))


def filled(url: str, items: int) -> list[str]:
    """A store with items, wanted by two annotators each; the annotators' sessions."""
    store = Store.open(url, Settings(overlap=2, random_share=0.5))
    store.add_items(pair(number) for number in range(items))
    for name in ANNOTATORS:
        store.accounts.redeem(store.accounts.create_invite(name))
    sessions = [store.accounts.create_session(name) for name in ANNOTATORS]
    store.close()
    return sessions


def killed(url: str, folder: Path, kills: int) -> dict[str, dict[str, Any]]:
    """What each annotator sent and was told after that many kills."""
    (folder / "sessions.json").write_text(json.dumps(filled(url, 50 + 8 * kills)))
    script = Path(__file__).with_name("kill_servers.py")
    command = [sys.executable, str(script), url, str(folder / "sessions.json"), str(folder / "told.json"), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, "an unhandled error of a server"
    return dict(zip(ANNOTATORS, json.loads((folder / "told.json").read_text()), strict=True))


def by_response(said: dict[str, Any], loan: Loan) -> dict[str, Any]:
    """A sent answer as the store should hold it: ranks by response instead of by place."""
    ranks = tuple(said["ranks"][loan.order.index(response)] for response in range(2)) if said["ranks"] else ()
    return {"kind": said["kind"], "ranks": ranks, "strength": said["strength"], "reason": said["reason"]}


@pytest.mark.slow
@pytest.mark.parametrize(("database", "kills"), [("sqlite", 40), ("postgres", 20)])
def test_every_acknowledged_label_survives_kill_9_of_the_server(
    database: str, kills: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each act that was acknowledged is in the history with the content that was sent, no act is there twice, none is
    there that nobody sent, and acts were sent again whose first sending the store had kept unheard."""
    url, kills = request.getfixturevalue(f"new_{database}")(), KILLS or kills
    told = killed(url, tmp_path, kills)
    store = Store.open(url)
    snapshot = store.snapshot()
    if database == "sqlite":
        with store._database.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    store.close()

    acknowledged = [(name, key) for name, of in told.items() for key in of["acknowledged"]]
    assert len(set(acknowledged)) == len(acknowledged) > kills
    times = Counter((event.annotator, event.client_key) for event in snapshot.events)
    assert set(acknowledged) <= set(times) and max(times.values()) == 1
    # One act of each annotator may have been on its way when the last server died.
    assert len(times) <= len(acknowledged) + len(ANNOTATORS)

    loans = {loan.id: loan for loan in snapshot.loans}
    for event in snapshot.events:
        act = told[event.annotator]["sent"][event.client_key]
        assert event.kind == act["kind"]
        if event.answer is not None:
            assert event.task == act["body"]["task"]
            expected = by_response(act["body"], loans[event.task])
            assert {name: getattr(event.answer, name) for name in expected} == expected
    assert max(Counter((loan.item, loan.annotator) for loan in snapshot.loans).values()) == 1
    assert max(Counter(loans[task].item for task in standing(snapshot.events)).values()) == 2
    assert sum(of["stored_unheard"] for of in told.values()) > 0, "no server died between the disk and the reply"
