"""The labelling page refuses strangers: every route the app has is tried with everything that can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from asking import COOKIE, HOST, ORIGIN, Reply, ask, honest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from preftune.records import Message, Response
from preftune.web.app import ENTRY, PUBLIC, Site, create_app
from preftune.web.doors import LocalDoor, TeamDoor
from preftune.web.labels import Item, Settings
from preftune.web.security import HEADERS, MAX_BODY_BYTES, Guard, Policy, csrf_token, is_loopback, new_token
from preftune.web.store import Store

POLICY = Policy(
    hosts=frozenset({HOST, "localhost:8517"}), origins=frozenset({ORIGIN}), cookie=COOKIE, public=PUBLIC, entry=ENTRY
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECRET = "model=0123456789abcdef temperature=1 engine=canary"


@dataclass
class Bench:
    """A site with one item, and a session on it."""

    store: Store
    door: LocalDoor | TeamDoor
    app: Guard
    session: str

    def ask(self, method: str, path: str, body: bytes = b"{}", **changed: str | None) -> Reply:
        return ask(self.app, method, path, honest(self.session, **changed), body)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    store = Store.open(str(tmp_path / "labels.db"), Settings(overlap=2))
    texts = (Response(text="one", provenance=SECRET, score=7.25), Response(text="two", provenance=SECRET, score=7.5))
    prompt = (Message(role="user", content="which?"),)
    store.add_items([Item(prompt=prompt, responses=texts, origin="canary.jsonl:77", priority=-0.25)])
    door = LocalDoor(store.accounts, "me")
    app = create_app(store, door, POLICY, Site(database="0" * 16, guidelines="Be **kind**."))
    yield Bench(store, door, app, store.accounts.create_session("me"))
    store.close()


def routes(app: Guard) -> list[tuple[str, str]]:
    """(method, path) of everything the app answers to."""
    assert isinstance(app.app, Starlette)
    found = []
    for route in app.app.routes:
        assert isinstance(route, Route), f"{route} is no plain route: this test would not see what it serves"
        found += [(method, route.path) for method in sorted(route.methods or ())]
    return found


def stored(bench: Bench) -> int:
    return len(bench.store.snapshot().events) + len(bench.store.snapshot().loans)


WRONG: dict[str, dict[str, str | None]] = {
    "no session": {"cookie": None, "x_csrf_token": None},
    "no session, a CSRF token": {"cookie": None},
    "wrong session": {"cookie": f"{COOKIE}={'x' * 22}"},
    "another cookie": {"cookie": "preftune_80=whatever"},
    "broken cookie": {"cookie": "\x7f;;==" + COOKIE},
    "foreign host": {"host": "evil.example:8517"},
    "our host, another port": {"host": "127.0.0.1:80"},
    "our host within another": {"host": f"{HOST}.evil.example"},
    "no host": {"host": None},
    "foreign origin": {"origin": "http://evil.example"},
    "null origin": {"origin": "null"},
    "origin of another port": {"origin": "http://127.0.0.1:9999"},
    "another site": {"sec_fetch_site": "cross-site"},
    "another port of this machine": {"sec_fetch_site": "same-site"},
}
WRITES: dict[str, dict[str, str | None]] = {
    "no origin": {"origin": None},
    "no CSRF token": {"x_csrf_token": None},
    "wrong CSRF token": {"x_csrf_token": "0" * 64},
    "CSRF token of another session": {"x_csrf_token": csrf_token("another session")},
}
SESSION_ONLY = {"no session", "no session, a CSRF token", "wrong session", "another cookie", "broken cookie"}


def test_every_route_refuses_what_is_wrong(bench: Bench) -> None:
    """Each route and method, with each thing wrong: refused, and nothing is stored. Public paths need no session."""
    before, tried = stored(bench), 0
    for method, path in routes(bench.app):
        reading = method in ("GET", "HEAD")
        for name, wrong in (WRONG if reading else {**WRONG, **WRITES}).items():
            opens = path in (PUBLIC if reading else ENTRY)
            if opens and (name in SESSION_ONLY or "CSRF" in name):
                continue
            reply = bench.ask(method, path, **wrong)
            assert reply.status in (401, 403, 421), (method, path, name, reply.status)
            assert b"which?" not in reply.body and csrf_token(bench.session).encode() not in reply.body
            tried += 1
    assert stored(bench) == before and tried > 100


def test_the_same_requests_pass_when_nothing_is_wrong(bench: Bench) -> None:
    """The routes above are refused for what is wrong, not for being asked: unchanged, each one is answered."""
    for method, path in routes(bench.app):
        bench.session = bench.store.accounts.create_session("me")  # /api/leave ends it
        reply = bench.ask(method, path)
        assert reply.status in (200, 400) or (path in ENTRY and reply.status == 401), (method, path, reply.status)
    bench.session = bench.store.accounts.create_session("me")
    assert b"which?" in bench.ask("POST", "/api/tasks", b'{"count": 1}').body


def test_no_method_is_answered_but_those_of_the_table(bench: Bench) -> None:
    """Every other method of every path, and a path that does not exist, is refused even with all credentials."""
    known = set(routes(bench.app))
    for path in {path for _, path in known} | {"/nowhere", "/static/", "/static/../app.py", "//", "/api"}:
        for method in METHODS:
            if (method, path) not in known:
                assert bench.ask(method, path).status in (401, 403, 404, 405), (method, path)


def test_what_is_public_is_short_and_knows_nobody(bench: Bench) -> None:
    """Without a session one can read the door, the script and the style; they are the same for everybody."""
    assert {"/enter", "/static/page.js", "/static/page.css"} == PUBLIC and {"/api/session"} == ENTRY
    for path in PUBLIC:
        assert bench.ask("GET", path, cookie=None).body == bench.ask("GET", path).body != b""


def test_a_new_route_without_protection_is_noticed(bench: Bench) -> None:
    """The enumeration fails on a route that the guard lets anyone read."""

    async def leak(_: Request) -> PlainTextResponse:
        return PlainTextResponse("fine")

    assert isinstance(bench.app.app, Starlette)
    bench.app.app.router.routes.append(Route("/leak", leak))
    test_every_route_refuses_what_is_wrong(bench)
    careless = replace(POLICY, public=PUBLIC | {"/leak"})
    bench.app = Guard(bench.app.app, careless, bench.door.who)
    with pytest.raises(AssertionError, match="'/leak', 'no session'"):
        test_every_route_refuses_what_is_wrong(bench)


def test_a_browser_without_session_is_shown_the_door(bench: Bench) -> None:
    """Opening the page without a session leads to the door; a script that asks gets a plain refusal."""
    reply = bench.ask("GET", "/", cookie=None, sec_fetch_mode="navigate", sec_fetch_site="none", origin=None)
    assert (reply.status, reply.header("location"), reply.body) == (303, "/enter", b"")
    assert bench.ask("GET", "/", cookie=None).status == 401


def test_a_session_begins_with_the_token_only(bench: Bench) -> None:
    """The link's token gives an HttpOnly, SameSite=Strict cookie that opens the page; any other text gives none."""
    assert isinstance(bench.door, LocalDoor)
    for wrong in ("", "x" * 22, bench.door.token[:-1], bench.door.token + "x", "\u00e9"):
        reply = bench.ask("POST", "/api/session", json.dumps({"token": wrong}).encode(), cookie=None, x_csrf_token=None)
        assert reply.status == 401 and reply.header("set-cookie") is None
    body = json.dumps({"token": bench.door.token}).encode()
    reply = bench.ask("POST", "/api/session", body, cookie=None, x_csrf_token=None)
    cookie = str(reply.header("set-cookie"))
    found = re.fullmatch(f"{COOKIE}=([\\w-]{{22,}}); HttpOnly; Max-Age=\\d+; Path=/; SameSite=strict", cookie)
    assert reply.status == 200 and found
    assert bench.ask("GET", "/", cookie=f"{COOKIE}={found.group(1)}").status == 200


@pytest.mark.parametrize("of_team", [False, True])
def test_signing_out_ends_the_session_on_the_server(bench: Bench, of_team: bool) -> None:
    """The cookie is taken back and opens nothing any more, wherever it was copied to; other sessions go on."""
    if of_team:
        bench.door = TeamDoor(bench.store.accounts)
        bench.app = create_app(bench.store, bench.door, POLICY, Site(database="0" * 16))
    other = bench.store.accounts.create_session("me")
    assert bench.ask("GET", "/api/history").status == 200
    reply = bench.ask("POST", "/api/leave")
    assert reply.status == 200 and re.search(f'^{COOKIE}="";.* Max-Age=0;', str(reply.header("set-cookie")))
    assert bench.ask("GET", "/api/history").status == 401 and bench.ask("POST", "/api/leave").status == 401
    bench.session = other
    assert bench.ask("GET", "/api/history").status == 200


def test_an_invitation_opens_once(tmp_path: Path) -> None:
    """An invitation makes one account; name and password open later, and nothing else does."""
    store = Store.open(str(tmp_path / "team.db"))
    door = TeamDoor(store.accounts)
    app = create_app(store, door, POLICY, Site(database="1" * 16))

    def enter(**key: str) -> int:
        return ask(app, "POST", "/api/session", honest("", cookie=None), json.dumps(key).encode()).status

    invite = store.accounts.create_invite("Ada")
    assert enter(invite="x" * 22) == 400
    assert enter(invite=invite, password="short") == 400
    assert enter(invite=invite, password="correct horse") == 200
    assert enter(invite=invite, password="correct horse") == 400
    assert enter(name="Ada", password="wrong horse") == 401 and enter(name="Bob", password="correct horse") == 401
    assert enter(name="Ada", password="") == 401 and enter() == 401
    assert enter(name="Ada", password="correct horse") == 200
    store.close()


def test_every_reply_carries_the_headers(bench: Bench) -> None:
    """Policy of content, no sniffing, no referrer, no caching, on answers and refusals alike; no CORS header ever."""
    for reply in (bench.ask("GET", "/"), bench.ask("GET", "/", host="evil.example"), bench.ask("GET", "/nowhere")):
        assert {name: reply.header(name) for name in HEADERS} == dict(HEADERS)
        assert not [name for name, _ in reply.headers if name.startswith("access-control")]
    directives = dict(part.strip().split(" ", 1) for part in HEADERS["content-security-policy"].split(";"))
    assert directives["default-src"] == directives["base-uri"] == directives["frame-ancestors"] == "'none'"
    assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"


@pytest.mark.parametrize("declared", [None, "10", str(MAX_BODY_BYTES + 1), "-1", "many"])
def test_a_long_body_is_refused(bench: Bench, declared: str | None) -> None:
    """However long a request says it is, more than the limit is not read."""
    headers = honest(bench.session, content_length=declared)
    assert ask(bench.app, "POST", "/api/tasks", headers, b" " * (MAX_BODY_BYTES + 1), chunks=9).status == 413
    longest = b'{"count": 1}' + b" " * (MAX_BODY_BYTES - 12)
    assert ask(bench.app, "POST", "/api/tasks", honest(bench.session), longest, chunks=9).status == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"count": 0}', b'{"count": 51}', b'{"count": "1"}', b'{"count": 1, "more": 1}'],
)
def test_a_malformed_request_is_refused_in_words(bench: Bench, body: bytes) -> None:
    """What is no request of the page gets a 400 with a sentence."""
    reply = bench.ask("POST", "/api/tasks", body)
    assert reply.status == 400 and reply.json["error"]


def test_identity_stays_on_the_server(bench: Bench) -> None:
    """No reply holds a model, a sampler setting, a score, a file or the order the responses have in it."""
    tasks = bench.ask("POST", "/api/tasks", b'{"count": 1}')
    task = tasks.json["tasks"][0]
    said = {"task": task["id"], "item": task["item"], "kind": "ranking", "ranks": [1, 2], "strength": 3, "reason": ""}
    replies = [
        tasks,
        bench.ask("GET", "/"),
        bench.ask("POST", "/api/answer", json.dumps({**said, "key": "k" * 20}).encode()),
        bench.ask("POST", "/api/revise", json.dumps({**said, "key": "r" * 20}).encode()),
        bench.ask("GET", "/api/history"),
        bench.ask("POST", "/api/undo", json.dumps({"key": "u" * 20}).encode()),
    ]
    assert [reply.status for reply in replies] == [200] * len(replies)
    traffic = b"".join(reply.body + repr(reply.headers).encode() for reply in replies)
    for word in (b"0123456789abcdef", b"temperature", b"canary", b"provenance", b"7.25", b"7.5", b"-0.25", b"order"):
        assert word not in traffic
    assert set(task) == {"id", "item", "prompt", "responses"}
    assert {name for response in task["responses"] for name in response} == {"html", "raw", "finished"}


def test_ranks_by_place_become_ranks_by_response(bench: Bench) -> None:
    """Whatever order was drawn, the text that was called better is the one stored as better, and read back so."""
    texts = (Response(text="one"), Response(text="two"))
    bench.store.add_items([Item(prompt=f"again {number}", responses=texts) for number in range(12)])
    places = set()
    for task in bench.ask("POST", "/api/tasks", b'{"count": 13}').json["tasks"]:
        place = [response["raw"] for response in task["responses"]].index("two")
        ranks = [1 if i == place else 2 for i in range(2)]
        said = {"task": task["id"], "item": task["item"], "kind": "ranking", "ranks": ranks, "strength": None}
        body = json.dumps({**said, "reason": "", "key": f"key number {task['id']}"}).encode()
        assert bench.ask("POST", "/api/answer", body).json["stored"] is True
        assert bench.ask("GET", "/api/history").json["tasks"][0]["answer"]["ranks"] == ranks
        places.add(place)
    found = [event.answer.ranks for event in bench.store.snapshot().events if event.answer]
    assert found == [(2, 1)] * 13 and places == {0, 1}


def test_an_answer_to_another_databases_item_is_refused(bench: Bench) -> None:
    """A label that waited in a browser while another database came under the same address does not land there."""
    task = bench.ask("POST", "/api/tasks", b'{"count": 1}').json["tasks"][0]
    said = {"task": task["id"], "item": "0" * 16, "kind": "skip", "ranks": [], "strength": None, "reason": ""}
    reply = bench.ask("POST", "/api/answer", json.dumps({**said, "key": "k" * 20}).encode())
    assert reply.status == 409 and "another database" in reply.json["error"] and not bench.store.snapshot().events


def test_tokens_are_long_and_addresses_are_told_apart() -> None:
    """Tokens hold 128 bits and differ; loopback addresses are known from all others."""
    assert len({new_token() for _ in range(100)}) == 100 and min(len(new_token()) for _ in range(9)) * 6 >= 128
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.2", "example.org", ""))
