"""The report in a browser: nothing runs, nothing is loaded, it fits a phone, can be read in the dark and on paper.

PREFTUNE_FIGURES=docs/figures writes the pictures of docs/report.md there, PREFTUNE_RUNS=FOLDER shows that quickstart.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from preftune.config.loop import SampleConfig
from preftune.config.stages import DpoConfig, QuickstartConfig
from preftune.recipes import dpo, quickstart, sample
from preftune.records import RunCard, to_json
from preftune.reports.html import write_report

TINY = quickstart.Size(hidden=32, reviews=1500, prompts=160, held_out=24, epochs=4, lr=1e-3)
DESKTOP = {"width": 1240, "height": 860}
PHONE = {"width": 390, "height": 800}
# Text against what is behind it (WCAG 2.2, 1.4.3): every colour as a browser resolves it, alpha composed.
CONTRAST = """() => {
  const rgba = c => { const n = c.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1] };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255)); return .2126 * r + .7152 * g + .0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) return c.slice(0, 3) } return [255, 255, 255] };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || e.closest("style, title") || !e.getClientRects().length) continue;
    const ink = light(rgba(e.closest("svg") ? style.fill : style.color).slice(0, 3)), page = light(behind(e));
    const ratio = (Math.max(ink, page) + .05) / (Math.min(ink, page) + .05);
    found.push([ratio, walker.currentNode.data.trim().slice(0, 40), e.className.baseVal ?? e.className]);
  }
  for (const line of document.querySelectorAll("svg .line, svg circle, svg .spot")) {
    const style = getComputedStyle(line), colour = line.tagName === "circle" ? style.fill : style.stroke;
    const ink = light(rgba(colour).slice(0, 3)), page = light(behind(line.closest("svg").parentElement));
    const ratio = (Math.max(ink, page) + .05) / (Math.min(ink, page) + .05);
    found.push([ratio * 1.5, "a line, which needs 3", line.parentElement.className.baseVal]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a quickstart, of two runs, of samples, and of results with wide tables, intervals and long words."""
    out = tmp_path_factory.mktemp("runs")
    given = os.environ.get("PREFTUNE_RUNS")
    first = Path(given) if given else out / "quickstart"
    if not given:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quickstart, "FAST", TINY)
            quickstart.main(QuickstartConfig(out=str(first), fast=True))
    made: dict[str, Any] = json.loads((first / "dpo" / "run.json").read_text())["config"]
    known = {key: value for key, value in made.items() if key in DpoConfig.model_fields}
    dpo.main(DpoConfig(**{**known, "beta": 0.3, "out": str(out / "beta-0.3"), "resume": False}))
    shutil.copytree(first / "dpo", out / "beta-1")
    (out / "wide").mkdir()
    (out / "wide" / "run.json").write_text(to_json(wide()))
    settings: dict[str, Any] = {"n": 5, "max_tokens": 12, "allow_refused": 1, "out": str(out / "samples.jsonl")}
    words = ["the", "film", "was", "long", "x" * 200]
    rows = [*({"prompt": " ".join(words[: i + 1])} for i in range(5)), {"prompt": 7}]
    (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed in (0, 1):
        prompts = str(out / "prompts.jsonl")
        sample.main(SampleConfig(model=str(first / "sft" / "model"), prompts=prompts, seed=seed, **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        two = write_report("beta-1", "beta-0.3", out=out / "two.html")
    return {
        "quickstart": write_report(first, out=out / "one.html"),
        "runs": two,
        "samples": out / "samples.jsonl.html",
        "wide": write_report(out / "wide"),
    }


def wide() -> RunCard:
    """What an evaluation of many models leaves."""
    interval = {"estimate": 0.5123, "low": 0.4001, "high": 0.6234, "n": 10}
    models = {f"model-{i}": {"reward": interval, "kl": {**interval, "estimate": 0.4 + i / 10}} for i in range(9)}
    rows = [{"one": "model-1", "other": "a" * 60, "rate": interval, **{f"c{i}": i for i in range(12)}}] * 9
    findings = [{"name": "length", "model": "model-1", "verdict": "seen", "sentence": "x" * 300}]
    config = {"a_path": "/".join(["folder"] * 40), "seed": 0}
    results = {"models": models, "win_rates": rows, "findings": findings}
    return RunCard(stage="evaluate", status="failed", config=config, results=results, notes=("failed: " + "y" * 300,))


def opened(browser: Browser, path: Path, seen: list[str], **skin: Any) -> Page:
    """The page with every part unfolded; requests, errors and policy violations are collected in `seen`."""
    page = browser.new_context(**skin).new_page()
    page.on("request", lambda request: seen.append(request.url))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("console", lambda said: seen.append(said.text))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    return page


@pytest.mark.parametrize("name", ["quickstart", "runs", "samples", "wide"])
def test_it_runs_and_loads_nothing(name: str, pages: dict[str, Path], chromium: Browser) -> None:
    """One request, the file; no script in it; the policy in its head stops one that is put in."""
    seen: list[str] = []
    page = opened(chromium, pages[name], seen)
    assert seen == [pages[name].as_uri()]
    assert page.locator("script, link, img, iframe, object, embed").count() == 0
    policy = page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert policy is not None and policy.startswith("default-src 'none'")
    page.evaluate("""() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';
        const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(s, i) }""")
    assert page.evaluate("window.ran") is None and any("Content Security Policy" in line for line in seen)
    page.context.close()


@pytest.mark.parametrize("name", ["quickstart", "runs", "samples", "wide"])
@pytest.mark.parametrize("viewport", [PHONE, {"width": 320, "height": 600}, DESKTOP], ids=lambda v: str(v["width"]))
def test_it_fits_the_screen(name: str, viewport: Any, pages: dict[str, Path], chromium: Browser) -> None:
    """Nothing is wider than the page, unfolded, at any width; on a phone no part scrolls sideways either."""
    page = opened(chromium, pages[name], [], viewport=viewport)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    inner = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert viewport is DESKTOP or page.evaluate(inner) == 0
    page.context.close()


@pytest.mark.parametrize("name", ["quickstart", "runs", "samples", "wide"])
@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_it_can_be_read(name: str, scheme: str, pages: dict[str, Path], chromium: Browser) -> None:
    """Text has a contrast of at least 4.5 and lines of 3, in the light, in the dark, and on paper in dark mode."""
    page = opened(chromium, pages[name], [], viewport=DESKTOP, color_scheme="light" if scheme == "light" else "dark")
    if scheme == "print":
        page.emulate_media(media="print")
    found = page.evaluate(CONTRAST)
    assert len(found) > 50 and [entry for entry in found if entry[0] < 4.5] == []
    page.context.close()


def test_it_tells_what_it_shows_to_those_who_do_not_see_it(pages: dict[str, Path], chromium: Browser) -> None:
    """Every picture is named in words or hidden, tables have headers, headings come in order."""
    page = opened(chromium, pages["quickstart"], [])
    silent = "[...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label') && !s.ariaHidden).length"
    assert page.evaluate(silent) == 0 and page.locator("svg[role=img]").count() > 10
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope]'))")
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    page.context.close()


def test_pictures(pages: dict[str, Path], chromium: Browser, tmp_path: Path) -> None:
    """A desktop in the light, curves in the dark, a phone, and paper: each is there and none is large."""
    folder = Path(os.environ.get("PREFTUNE_FIGURES", tmp_path))
    seen: list[str] = []
    page = opened(chromium, pages["quickstart"], seen, viewport=DESKTOP, color_scheme="light")
    page.screenshot(path=folder / "report-light.png")
    assert len(page.pdf(format="A4")) > 50_000
    page.context.close()
    page = opened(chromium, pages["runs"], seen, viewport={"width": 1240, "height": 1100}, color_scheme="dark")
    page.locator("h2", has_text="Training").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('.plots').scrollIntoView()")
    page.screenshot(path=folder / "report-runs-dark.png")
    page.context.close()
    page = opened(chromium, pages["quickstart"], seen, viewport=PHONE, color_scheme="light")
    page.screenshot(path=folder / "report-phone.png")
    page.context.close()
    sizes = [(folder / f"report-{name}.png").stat().st_size for name in ("light", "runs-dark", "phone")]
    assert all(5_000 < size < 250_000 for size in sizes)
