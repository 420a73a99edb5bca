"""Who may talk to the labelling page: every request passes `Guard`, and whatever is not let through is refused.

In this order: a Host that is ours (a name rebound to this machine is not), no request made by another site's page, an
Origin that is ours (required where something may change), a session, a CSRF token where something may change, a body
that is not too large. The only exceptions are the paths of `Policy.public`, which hold nothing of anybody, and of
`Policy.entry`, where a session begins and the posted token is the proof.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["HEADERS", "MAX_BODY_BYTES", "Guard", "Policy", "csrf_token", "is_loopback", "new_token"]

MAX_BODY_BYTES = 64 * 1024
"""The longest request: an answer with its reason is a few hundred bytes."""

HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
"""Of every response. There is no CORS header: no other origin may read anything."""

_READING = ("GET", "HEAD")


def new_token() -> str:
    """128 random bits, fit for an address."""
    return secrets.token_urlsafe(16)


def csrf_token(session: str) -> str:
    """The CSRF token of a session: only who holds the session can know it, and the session cannot be told from it."""
    return hmac.new(session.encode(), b"preftune csrf", hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What a server lets in."""

    hosts: frozenset[str]
    """Host headers that are ours, lower case, with the port where it is not the scheme's own."""
    origins: frozenset[str]
    """Origin headers that are ours: scheme://host."""
    cookie: str
    """Name of the session cookie; cookies ignore ports, so the port is part of the name."""
    public: frozenset[str]
    """Paths that anyone on an allowed host may read."""
    entry: frozenset[str]
    """Paths that begin a session: posted to without one, from our own origin."""
    door: str = "/enter"
    """Where a browser without session is sent."""


class Guard:
    """ASGI middleware around the whole app; `who(session)` names the annotator of a session, or None.

    What it lets through carries `annotator` and `session` in the request's state, except on public and entry paths.
    """

    def __init__(self, app: ASGIApp, policy: Policy, who: Callable[[str], object | None]) -> None:
        self.app, self.policy, self.who = app, policy, who

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, _with_headers(send))
        # A websocket, or whatever comes next, is never accepted.

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = _refuse_stranger(scope, self.policy)
        path, reading = scope["path"], scope["method"] in _READING
        open_to_all = path in self.policy.public if reading else path in self.policy.entry
        if refused is None and not open_to_all:
            refused = await self._refuse_session(scope, reading)
        if refused is None:
            body = await _limited_body(scope, receive)
            refused = _refusal(413, f"a request holds at most {MAX_BODY_BYTES} bytes") if body is None else None
        if refused is not None:
            return await refused(scope, receive, send)
        await self.app(scope, _replay(body or b"", receive), send)

    async def _refuse_session(self, scope: Scope, reading: bool) -> Response | None:
        session = _cookie(scope, self.policy.cookie)
        annotator = await run_in_threadpool(self.who, session) if session else None
        if annotator is None:
            if reading and Headers(scope=scope).get("sec-fetch-mode") == "navigate":
                return RedirectResponse(self.policy.door, 303)
            return _refusal(401, "no session: open the link that preftune printed, or your invitation")
        given = Headers(scope=scope).get("x-csrf-token", "")
        if not reading and not hmac.compare_digest(given.encode(), csrf_token(session).encode()):
            return _refusal(403, "no valid CSRF token: reload the page")
        scope.setdefault("state", {}).update(annotator=annotator, session=session)
        return None


def _refuse_stranger(scope: Scope, policy: Policy) -> Response | None:
    """Host, site and Origin: what a browser says about where a request goes to and comes from."""
    headers, method = Headers(scope=scope), scope["method"]
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or hosts[0].lower() not in policy.hosts:
        return _refusal(421, "this server is not known by that Host")
    site = headers.get("sec-fetch-site", "none")
    followed_link = method in _READING and headers.get("sec-fetch-mode") == "navigate" and not origins
    if site not in ("same-origin", "none") and not followed_link:
        return _refusal(403, "requests of other sites are refused")
    if any(origin.lower() not in policy.origins for origin in origins):
        return _refusal(403, "requests of other origins are refused")
    if method not in _READING and len(origins) != 1:
        return _refusal(403, "a request that may change something needs its Origin")
    return None


def _cookie(scope: Scope, name: str) -> str:
    try:
        cookies = SimpleCookie(HTTPConnection(scope).headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[name].value if name in cookies else ""


def _refusal(status: int, problem: str) -> Response:
    return JSONResponse({"error": problem}, status)


async def _limited_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body, or None when it is longer than allowed, whatever Content-Length says."""
    declared = Headers(scope=scope).get("content-length", "0")
    if not declared.isdecimal() or int(declared) > MAX_BODY_BYTES:
        return None
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once, then what the connection still says (that it closed)."""
    unread = [body]

    async def replayed() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return sending
