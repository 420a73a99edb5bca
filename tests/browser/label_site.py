"""A labelling page that runs: the real server on a free port, and what the tests show on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from playwright.sync_api import BrowserContext, Page, expect

from preftune.records import Message, Response
from preftune.web.labels import Answer, Item, Settings, standing
from preftune.web.serve import build, listen
from preftune.web.store import Store

PROVENANCE = "model=feedfacecafe0123 temperature=0.7 top_p=1 max_tokens=64 seed=0 engine=canary-engine"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line would say."""

    db: str
    samples: str = ""
    gold: str | None = None
    guidelines: str | None = None
    annotator: str = "me"
    overlap: int = 1
    gold_rate: float = 0.0
    random_share: float = 0.0
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    url: str | None = None
    open: bool = False
    accounts: bool = False
    invite: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    link: str
    store: Store

    @property
    def origin(self) -> str:
        return self.link.partition("/enter")[0]


@contextmanager
def served(options: Options, items: list[Item]) -> Iterator[Running]:
    """The page of these items until the block ends."""
    store = Store.open(options.db, Settings(overlap=options.overlap, random_share=0.0))
    store.add_items(items)
    with listen(options.host, options.port) as listener:
        app, link = build(options, store, listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the server does not start"
            time.sleep(0.01)
        try:
            yield Running(link, store)
        finally:
            server.should_exit = True
            thread.join(20)
            store.close()


@dataclass
class Desk:
    """An open page, the server behind it, and whatever went wrong on it."""

    page: Page
    server: Running
    context: BrowserContext
    errors: list[str]

    def labels(self) -> list[tuple[str, Answer]]:
        """(first text, answer) of everything the store holds now, by task."""
        kept = self.server.store.snapshot()
        stands = standing(kept.events)
        found = [(kept.items[loan.item - 1], stands[loan.id]) for loan in kept.loans if loan.id in stands]
        return [(item.responses[0].text, event.answer) for item, event in found if event.answer is not None]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.server.store.snapshot().events]

    def saved(self) -> None:
        expect(self.page.locator("#saved")).to_have_text("Saved")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def question(self) -> str:
        return self.page.locator("#prompt").inner_text()

    def text_of(self, place: int) -> str:
        return self.page.locator(".response .text").nth(place).inner_text()


OpenDesk = Callable[..., Desk]


def response(text: str) -> Response:
    return Response(text=text, provenance=PROVENANCE, score=None)


def pair(number: int) -> Item:
    """A small conversation with two answers."""
    prompt = (Message(role="user", content=f"Question {number}: why is the sky blue?"),)
    return Item(
        prompt=prompt, responses=(response(f"Air scatters short waves ({number})."), response("It is painted."))
    )


def triple(number: int) -> Item:
    """A plain prompt with three answers."""
    return Item(prompt=f"Rank {number}", responses=tuple(response(f"answer {name}") for name in ("x", "y", "z")))


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {  // painted one upon the other, last on top
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of ["white", ...colours]) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility({ opacityProperty: true })) continue;
    if (element.closest("button:disabled, noscript, .unseen")) continue;
    const below = [];
    for (let e = element; e; e = e.parentElement) below.unshift(getComputedStyle(e).backgroundColor);
    const back = over(below), front = over([...below, getComputedStyle(element).color]);
    found.push([(Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05), node.data.trim().slice(0, 40)]);
  }
  return found;
}"""
"""(contrast, text) of every text that is seen: WCAG 2's ratio of relative luminances."""

GUIDELINES = "# What to prefer\n\nThe response **you would rather receive**.\n"
SKIN = {"viewport": {"width": 1280, "height": 800}}
