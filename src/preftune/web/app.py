"""The labelling page as an ASGI app: one page, its script and style, and what the script asks for.

What leaves here about an item is its prompt and texts, in the order drawn for this annotator: no model, no sampler,
no score, no file, no position in the file. Ranks travel by place on the page; only the server knows which response
that is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from preftune.errors import DataError
from preftune.web.doors import Door, Key
from preftune.web.labels import Answer, Item, Task, TaskGone, UnknownTask
from preftune.web.render import markdown, visible
from preftune.web.security import Guard, Policy, csrf_token
from preftune.web.store import Store

__all__ = ["ENTRY", "PUBLIC", "Site", "create_app"]

HISTORY = 200
MAX_TASKS = 50
SESSION_SECONDS = 30 * 24 * 3600
THEMES = ("system", "light", "dark")
PUBLIC = frozenset({"/enter", "/static/page.js", "/static/page.css"})
ENTRY = frozenset({"/api/session"})

_HERE = Path(__file__).parent
_TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What one server shows."""

    database: str
    """Names the database to the browser, so that labels on their way never reach another one; tells nothing."""
    guidelines: str = ""
    """Markdown."""
    secure: bool = False
    """Whether cookies travel over TLS only."""


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_AskedT = TypeVar("_AskedT", bound=_Asked)


class _Enter(_Asked):
    token: str = Field("", max_length=200)
    invite: str = Field("", max_length=200)
    name: str = Field("", max_length=200)
    password: str = Field("", max_length=1000)


class _More(_Asked):
    count: int = Field(ge=1, le=MAX_TASKS)


class _Undo(_Asked):
    key: str = Field(min_length=8, max_length=100)


class _Said(_Undo):
    task: int
    item: str = Field(max_length=64)
    kind: Literal["ranking", "both_bad", "skip"]
    ranks: list[int] = Field(max_length=100)
    strength: int | None
    reason: str = Field(max_length=4000)


def create_app(store: Store, door: Door, policy: Policy, site: Site) -> Guard:
    """The guarded app. `policy.public` and `policy.entry` should be those of `PUBLIC` and `ENTRY`."""
    page = _Page(store, door, policy, site)
    routes = [
        Route("/", page.desk, methods=["GET"]),
        Route("/enter", page.enter, methods=["GET"]),
        Route("/static/page.js", _file("page.js", "text/javascript"), methods=["GET"]),
        Route("/static/page.css", _file("page.css", "text/css"), methods=["GET"]),
        Route("/api/session", page.begin, methods=["POST"]),
        Route("/api/tasks", page.tasks, methods=["POST"]),
        Route("/api/answer", page.answer, methods=["POST"]),
        Route("/api/revise", page.revise, methods=["POST"]),
        Route("/api/undo", page.undo, methods=["POST"]),
        Route("/api/history", page.history, methods=["GET"]),
        Route("/api/leave", page.leave, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Response]] = {
        UnknownTask: _problem(404),
        TaskGone: _problem(409),
        DataError: _problem(400),
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), policy, door.who)


class _Page:
    """The handlers. Each reads its request, then asks the store in a thread: commits wait for the disk."""

    def __init__(self, store: Store, door: Door, policy: Policy, site: Site) -> None:
        self.store, self.door, self.policy, self.site = store, door, policy, site
        self.guidelines = markdown(site.guidelines) if site.guidelines else ""

    async def desk(self, request: Request) -> Response:
        """The page itself, without any item."""
        return _html(
            request,
            "page.html",
            csrf=csrf_token(request.state.session),
            annotator=request.state.annotator,
            database=self.site.database,
            guidelines=self.guidelines,
            team=self.door.takes_names,
        )

    async def enter(self, request: Request) -> Response:
        """The door: its script posts the token that stands behind the # of the link."""
        return _html(request, "enter.html", takes_names=self.door.takes_names)

    async def begin(self, request: Request) -> Response:
        """A key becomes a session, kept in a cookie that no script and no other site can use."""
        asked = await _read(request, _Enter)
        session = await run_in_threadpool(self.door.enter, Key(**asked.model_dump()))
        if session is None:
            return JSONResponse({"error": "the link is from an earlier start, or name and password do not fit"}, 401)
        response = JSONResponse({})
        response.set_cookie(
            self.policy.cookie,
            session,
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=self.site.secure,
        )
        return response

    async def leave(self, request: Request) -> Response:
        """The session ends, here and for whoever else might hold its cookie."""
        await run_in_threadpool(self.door.leave, request.state.session)
        response = JSONResponse({})
        response.delete_cookie(self.policy.cookie, httponly=True, samesite="strict", secure=self.site.secure)
        return response

    async def tasks(self, request: Request) -> Response:
        """The annotator's next tasks; they are lent, so this is no GET."""
        asked, annotator = await _read(request, _More), request.state.annotator

        def lend() -> dict[str, Any]:
            tasks = [_shown(task) for task in self.store.next_tasks(annotator, asked.count)]
            return {"tasks": tasks, "progress": self._progress(annotator)}

        return JSONResponse(await run_in_threadpool(lend))

    async def answer(self, request: Request) -> Response:
        """The first answer to a task."""
        return await self._state(request, self.store.answer)

    async def revise(self, request: Request) -> Response:
        """Another answer to a task that has one."""
        return await self._state(request, self.store.revise)

    async def _state(self, request: Request, state: Callable[[str, int, Answer, str], Any]) -> Response:
        asked, annotator = await _read(request, _Said), request.state.annotator

        def store() -> dict[str, Any]:
            task = self.store.task(annotator, asked.task)
            if asked.item != _fingerprint(task.item):
                raise TaskGone("this answer belongs to an item of another database")
            event = state(annotator, task.id, _by_response(asked, task), asked.key)
            return {"stored": event.client_key == asked.key, "progress": self._progress(annotator)}

        return JSONResponse(await run_in_threadpool(store))

    async def undo(self, request: Request) -> Response:
        """Take the last answer or revision back; the task is sent along, for it may be open again."""
        asked, annotator = await _read(request, _Undo), request.state.annotator

        def undo() -> dict[str, Any]:
            event = self.store.undo(annotator, asked.key)
            still = {task.id: answer for task, answer in self.store.history(annotator, HISTORY)}
            task = self.store.task(annotator, event.task)
            return {"task": _shown(task, still.get(task.id)), "progress": self._progress(annotator)}

        return JSONResponse(await run_in_threadpool(undo))

    async def history(self, request: Request) -> Response:
        """The annotator's last answered tasks, newest first."""
        found = await run_in_threadpool(self.store.history, request.state.annotator, HISTORY)
        return JSONResponse({"tasks": [_shown(task, answer) for task, answer in found]})

    def _progress(self, annotator: str) -> dict[str, int]:
        found = asdict(self.store.progress(annotator))
        return {name: found[name] for name in ("own", "own_today", "team", "total")}


def _shown(task: Task, answer: Answer | None = None) -> dict[str, Any]:
    """A task as the page may know it."""
    prompt, responses = task.item.prompt, [task.item.responses[index] for index in task.order]
    turns = [("prompt", prompt)] if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]
    shown: dict[str, Any] = {
        "id": task.id,
        "item": _fingerprint(task.item),
        "prompt": [{"role": visible(role), **_text(text)} for role, text in turns],
        "responses": [{"finished": response.finished, **_text(response.text)} for response in responses],
    }
    if answer is not None:
        ranks = [answer.ranks[index] for index in task.order] if answer.ranks else []
        shown["answer"] = {**asdict(answer), "ranks": ranks, "reason": visible(answer.reason)}
    return shown


def _text(text: str) -> dict[str, str]:
    return {"html": markdown(text), "raw": visible(text)}


def _fingerprint(item: Item) -> str:
    """Tells items apart, and is blind to the order in which the file gave the responses."""
    seen = json.dumps([asdict(item)["prompt"], sorted(response.text for response in item.responses)])
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def _by_response(asked: _Said, task: Task) -> Answer:
    """Ranks by place on the page -> ranks by response of the item."""
    if asked.ranks and len(asked.ranks) != len(task.order):
        raise DataError(f"{len(asked.ranks)} ranks were given for {len(task.order)} responses")
    by_response = dict(zip(task.order, asked.ranks, strict=False))
    ranks = tuple(by_response[index] for index in sorted(by_response))
    return Answer(kind=asked.kind, ranks=ranks, strength=asked.strength, reason=asked.reason)


async def _read(request: Request, model: type[_AskedT]) -> _AskedT:
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise DataError(f"{where}: {first['msg']}") from None


def _html(request: Request, template: str, **values: Any) -> Response:
    theme = request.cookies.get("preftune_theme", "")
    text = _TEMPLATES.get_template(template).render(theme=theme if theme in THEMES else "system", **values)
    return HTMLResponse(text, headers={"vary": "Cookie"})


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (_HERE / "static" / name).read_bytes()

    async def serve(_: Request) -> Response:
        return Response(content, media_type=kind)

    return serve


def _problem(status: int) -> Callable[[Request, Exception], Response]:
    return lambda _, problem: JSONResponse({"error": str(problem)}, status)
