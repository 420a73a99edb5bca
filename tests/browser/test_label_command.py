"""`preftune label` as a person uses it: the command, the printed link, some keys, Ctrl-C, the export."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, expect

from preftune.records import Response, SampledResponses, to_json


def test_from_samples_to_pairs(chromium: Browser, tmp_path: Path) -> None:
    """Samples in, a link out; what was labelled by keyboard is exported as pairs with the annotator's name."""
    samples = [
        SampledResponses(prompt=f"prompt {number}", responses=(Response(text="good"), Response(text="bad")))
        for number in range(3)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(to_json(sampled) + "\n" for sampled in samples))
    preftune = [sys.executable, "-m", "preftune", "label"]
    serving = [
        *preftune,
        "--samples",
        "samples.jsonl",
        "--db",
        "labels.db",
        "--port",
        "0",
        "--random_share",
        "0",
        "--annotator",
        "Ada",
    ]
    server = subprocess.Popen(serving, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        said = [server.stderr.readline() for _ in range(3)]
        link = re.search(r"http://127\.0\.0\.1:\d+/enter#token=[\w-]{22}", said[1])
        assert link, said
        label_three(chromium, link.group())
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130 and server.stderr.read() == "preftune: stopped\n"
    finally:
        server.kill()
        server.communicate()
    export = [*preftune, "export", "--db", "labels.db", "--out", "pairs.jsonl"]
    assert "3 lines of pairs" in subprocess.run(export, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == ["good"] * 3 and {row["annotator"] for row in rows} == {"Ada"}


def label_three(chromium: Browser, link: str) -> None:
    """Prefer "good" three times, by keyboard, in whatever order the prompts come."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(link)
    prompt = page.locator("#prompt p")
    expect(prompt).to_contain_text("prompt ")
    for left in (2, 1, 0):
        shown = prompt.inner_text()
        page.keyboard.press("1" if page.locator(".response .text").first.inner_text() == "good" else "3")
        if left:
            expect(prompt).not_to_have_text(shown)
    expect(page.locator("#empty h2")).to_have_text("All done")
    expect(page.locator("#saved")).to_have_text("Saved")
    context.close()
