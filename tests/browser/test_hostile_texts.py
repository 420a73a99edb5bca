"""Hostile texts as prompts, answers, names and guidelines: no script runs, and nothing is asked of anyone else."""

from __future__ import annotations

from pathlib import Path

import pytest
from label_site import Options, served
from playwright.sync_api import Browser, Page, Route, expect

from preftune.records import Message, Response
from preftune.web.labels import Item

ELSEWHERE = "http://elsewhere.example"
TEXTS = (
    "<script>trap()</script>",
    "</script><script>trap()</script>",
    "<img src=x onerror=trap()>",
    f"<img src={ELSEWHERE}/pixel.png>",
    "<svg onload=trap()><script>trap()</script></svg>",
    f"<svg><image href={ELSEWHERE}/a.svg /><use href='{ELSEWHERE}/b.svg#x'/></svg>",
    "<math><mtext><style><img src=x onerror=trap()></style></mtext></math>",
    "<iframe src='javascript:parent.trap()'></iframe><iframe srcdoc='<script>parent.trap()</script>'>",
    f"<link rel=stylesheet href={ELSEWHERE}/x.css><style>@import '{ELSEWHERE}/y.css'; body{{display:none}}</style>",
    f"<base href={ELSEWHERE}/><meta http-equiv=refresh content='0;url={ELSEWHERE}'>",
    f"<form action={ELSEWHERE}><input autofocus onfocus=trap()><button>go</button></form>",
    "<details open ontoggle=trap()>x</details><video><source onerror=trap()></video>",
    "<a href=javascript:trap()>click</a> [click](javascript:trap()) [click](JaVaScRiPt&colon;trap())",
    f"[exfiltrate]({ELSEWHERE}/?q=secret) ![pixel]({ELSEWHERE}/p.png) <{ELSEWHERE}/auto>",
    f"![a][r]\n\n[r]: {ELSEWHERE}/r.png 'x\" onload=trap()'",
    "[data](data:text/html,<script>parent.trap()</script>) ![d](data:image/svg+xml,<svg onload=trap()>)",
    '```"><img src=x onerror=trap()>\ncode\n```',
    "`<img src=x onerror=trap()>` **<img src=x onerror=trap()>**",
    "| <img src=x onerror=trap()> |\n|---|\n| <script>trap()</script> |",
    "&lt;script&gt;trap()&lt;/script&gt; &#60;img src=x onerror=trap()&#62;",
    "\u202etxet desrever\u202c \u2066isolated\u2069 \u200f\u05d0\u05d1",
    "{{ constructor.constructor('trap()')() }} ${trap()} {% raw %}",
    "'\"><img src=x onerror=trap()>' onmouseover='trap()",
    "\x00<scr\x00ipt>trap()</scr\x00ipt>\x1b[31m",
    "x" * 100_000,
    "<b>" * 30_000,
    "",
)
HOSTILE_NAME = "<img src=x onerror=trap()>\" onload='trap()"


def watched(page: Page, origin: str) -> tuple[list[str], list[str]]:
    """(scripts of others that ran, requests that would have left), kept up to date."""
    ran: list[str] = []
    left: list[str] = []

    def gate(route: Route) -> None:
        if route.request.url.startswith((f"{origin}/", "data:,")):
            route.continue_()
        else:
            left.append(route.request.url)
            route.abort()

    page.expose_function("trap", lambda *_: ran.append(page.url))
    page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
    page.on("popup", lambda popup: left.append(popup.url))
    page.context.route("**/*", gate)
    return ran, left


@pytest.mark.parametrize("part", range(3))
def test_no_text_runs_or_leaves(chromium: Browser, tmp_path: Path, part: int) -> None:
    """Each text in each place, rendered, raw, compared and listed: shown, and nothing else happens."""
    texts = TEXTS[part::3]
    items = [
        Item(
            prompt=(Message(role=text[:200] or "user", content=text), Message(role="user", content=f"number {number}")),
            responses=(Response(text=text), Response(text=f"{text} other")),
        )
        for number, text in enumerate(texts)
    ]
    (tmp_path / "guide.md").write_text("\n\n".join(text for text in TEXTS if len(text) < 1000), encoding="utf-8")
    options = Options(db=str(tmp_path / "l.db"), guidelines=str(tmp_path / "guide.md"), annotator=HOSTILE_NAME)
    with served(options, items) as server:
        context = chromium.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        ran, left = watched(page, server.origin)
        page.goto(server.link)
        for number in range(len(texts)):
            expect(page.locator("#prompt")).to_contain_text(f"number {number}")
            for key in ("d", "d", "r", "r"):
                page.keyboard.press(key)
            for clickable in page.locator(".response .text .link").all():
                clickable.click()
            page.keyboard.press("1")
        expect(page.locator("#empty h2")).to_have_text("All done")
        expect(page.locator("#saved")).to_have_text("Saved")
        page.keyboard.press("h")
        expect(page.locator("#history li button")).to_have_count(len(texts))
        assert page.locator("body").get_attribute("data-annotator") == HOSTILE_NAME
        assert page.locator("main img, main svg, main a, main iframe, main form, aside img, aside a").count() == 0
        assert (ran, left) == ([], []) and len(server.store.snapshot().events) == len(texts)
        context.close()


def test_the_trap_snaps(chromium: Browser, tmp_path: Path) -> None:
    """The watch would notice: a script that runs and a picture from elsewhere are both reported."""
    with served(Options(db=str(tmp_path / "l.db")), []) as server:
        context = chromium.new_context(bypass_csp=True)
        page = context.new_page()
        ran, left = watched(page, server.origin)
        page.goto(server.link)
        expect(page.locator("#empty h2")).to_have_text("All done")
        page.evaluate("html => { document.body.innerHTML = html; }", TEXTS[2] + TEXTS[3])
        page.wait_for_timeout(500)
        assert ran and left == [f"{ELSEWHERE}/pixel.png"]
        context.close()
