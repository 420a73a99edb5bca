"""The pictures of docs/labelling.md are of the page as it is. PREFTUNE_FIGURES=docs/figures writes them there."""

from __future__ import annotations

import os
from pathlib import Path

from label_site import Options, served
from playwright.sync_api import Browser, Page, expect

from preftune.records import Message, Response
from preftune.web.labels import Item

GUIDELINES = """# What to prefer

Choose the response **you would rather receive**.

1. *Correct* beats *fluent*: a confident mistake is worse than an honest "I do not know".
2. If both say the same, prefer the shorter one.
3. *Both bad* is for responses that nobody should get, *tie* for two that are equally useful.

> Q: What is 2 + 2?
> A: `4` beats "It is often said to be four".

Skip what you cannot judge, and say why.
"""
STARTER = Item(
    prompt=(
        Message(role="user", content="My sourdough starter smells like acetone. Is it dead?"),
        Message(role="assistant", content="Not necessarily. When did you feed it last, and how warm is your kitchen?"),
        Message(role="user", content="Three days ago, and about 27 degrees. Can I save it?"),
    ),
    responses=(
        Response(
            text="Yes. It is **hungry**, not dead: the acetone smell comes from yeast that has run out of sugar.\n\n"
            "1. Discard all but a tablespoon.\n2. Feed it 1:5:5 (starter, water, flour) and keep it at 24 degrees.\n"
            "3. Repeat every twelve hours until it doubles within six.\n\nAfter that, feed it *daily*, or keep it in "
            "the fridge and feed it once a week."
        ),
        Response(
            text="Yes. It is **hungry**, not dead: the acetone smell comes from yeast that has run out of food.\n\n"
            "| day | feed |\n|---|---|\n| 1 | 50 g flour, 50 g water |\n| 2 to 7 | the same, every day |\n\n"
            "After that, feed it *daily*, or keep it in the fridge and feed it once a month."
        ),
    ),
)
SEA = Item(
    prompt="Write one sentence that makes a child curious about the sea.",
    responses=(
        Response(text="Under the waves stand mountains taller than any on land, and nobody has ever climbed them."),
        Response(text="The sea is big and contains water, fish and salt."),
        Response(text="Right now a whale is singing a song that another will hear a thousand kilometres away."),
    ),
)
DESKTOP = {"viewport": {"width": 1240, "height": 720}}
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True, "device_scale_factor": 1.5}


def test_pictures(chromium: Browser, tmp_path: Path) -> None:
    """Light, dark with differences, ranking and phone: each under 200 KB."""
    folder = Path(os.environ.get("PREFTUNE_FIGURES", tmp_path))
    (tmp_path / "guide.md").write_text(GUIDELINES)
    options = Options(db=str(tmp_path / "labels.db"), guidelines=str(tmp_path / "guide.md"))
    written = []

    def picture(page: Page, name: str) -> None:
        page.wait_for_timeout(400)
        written.append(folder / f"label-{name}.png")
        page.screenshot(path=written[-1])

    with served(options, [STARTER, SEA]) as server:
        for name, skin in (("light", DESKTOP), ("dark", DESKTOP), ("phone", PHONE)):
            scheme = "dark" if name == "dark" else "light"
            context = chromium.new_context(**skin, color_scheme=scheme)  # type: ignore[arg-type]
            page = context.new_page()
            page.goto(server.link)
            expect(page.locator(".response")).to_have_count(2)
            if name == "dark":
                page.keyboard.press("d")
                page.wait_for_timeout(2300)
            picture(page, name)
            if name == "phone":
                page.set_viewport_size({"width": 1240, "height": 480})
                page.keyboard.press("1")
                expect(page.locator(".response")).to_have_count(3)
                page.wait_for_timeout(2300)
                page.keyboard.press("2")
                page.keyboard.press("3")
                picture(page, "ranking")
            context.close()
    assert len(written) == 4 and all(0 < path.stat().st_size < 200_000 for path in written)
