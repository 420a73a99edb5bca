"""One headless Chromium per file of browser tests; without one they are skipped, and where CI=true they fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, sync_playwright


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
