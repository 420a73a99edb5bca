"""Requests to an ASGI app, header by header, without a client that would add or repair any; and a site to ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.web.security import csrf_token

HOST = "127.0.0.1:8517"
ORIGIN = f"http://{HOST}"
COOKIE = "preftune_8517"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name]
        return values[-1] if values else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    app: Any, method: str, path: str, headers: Sequence[tuple[str, str]], body: bytes = b"", chunks: int = 1
) -> Reply:
    """One request, its body sent in so many chunks."""
    size = max(1, -(-len(body) // chunks))
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": raw,
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8517),
    }
    asyncio.run(app(scope, receive, send))
    found = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    return Reply(sent[0]["status"], tuple(found), b"".join(message.get("body", b"") for message in sent[1:]))


def honest(session: str, **changed: str | None) -> list[tuple[str, str]]:
    """What the page's own script sends; a header is replaced, or left out with None."""
    headers: Mapping[str, str | None] = {
        "host": HOST,
        "origin": ORIGIN,
        "sec-fetch-site": "same-origin",
        "cookie": f"{COOKIE}={session}",
        "x-csrf-token": csrf_token(session),
    }
    merged = {**headers, **{name.replace("_", "-"): value for name, value in changed.items()}}
    return [(name, value) for name, value in merged.items() if value is not None]
