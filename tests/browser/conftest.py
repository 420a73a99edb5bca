"""One headless Chromium per file of browser tests; without one they are skipped, and where CI=true they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from label_site import SKIN, Desk, OpenDesk, Options, served
from playwright.sync_api import Browser, Error, expect, sync_playwright

from preftune.web.labels import Item


@pytest.fixture(scope="module")  # while it is open no other event loop can run in this process
def chromium() -> Iterator[Browser]:
    """The system's Chromium, else Playwright's own."""
    options: dict[str, Any] = {"args": ["--no-sandbox", "--disable-dev-shm-usage"]}
    system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=system, **options)
        except Error as problem:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(
                f"no browser: apt-get install chromium, or playwright install chromium ({problem.message[:80]})"
            )
        yield browser
        browser.close()


@pytest.fixture
def open_desk(chromium: Browser, tmp_path: Path) -> Iterator[OpenDesk]:
    """Opens the page by its link; at the end nothing may have gone wrong on it."""
    closing = []

    def open_it(
        items: list[Item], *, skin: dict[str, object] | None = None, guidelines: str = "", **more: object
    ) -> Desk:
        if guidelines:
            (tmp_path / "guide.md").write_text(guidelines)
        given = {"guidelines": str(tmp_path / "guide.md")} if guidelines else {}
        site = served(Options(db=str(tmp_path / "labels.db"), **given, **more), items)  # type: ignore[arg-type]
        server = site.__enter__()
        context = chromium.new_context(**(skin or SKIN))  # type: ignore[arg-type]
        page, errors = context.new_page(), []
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if "Content Security" in said.text else None)
        closing.append((site, context, errors))
        page.goto(server.link)
        expect(page.locator("#door" if "accounts" in more else ".response").first).to_be_visible()
        return Desk(page, server, context, errors)

    yield open_it
    for site, context, errors in closing:
        context.close()
        site.__exit__(None, None, None)
        assert errors == []
