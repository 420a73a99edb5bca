"""The labelling page in a real browser: by keyboard, by mouse, on a phone, offline, twice, and after a reload."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from label_site import CONTRAST, PROVENANCE, Options, Running, pair, served, triple
from playwright.sync_api import Browser, BrowserContext, Page, expect

from preftune.web.labels import Answer, Item, standing

GUIDELINES = "# What to prefer\n\nThe response **you would rather receive**.\n"
SKIN = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


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


def test_one_key_stores_a_label_and_the_next_item_is_there(open_desk: OpenDesk) -> None:
    """Keyboard only: each key is the answer its button shows, the next item needs no request, all of it is stored."""
    desk = open_desk([pair(number) for number in range(6)])
    asked: list[str] = []
    desk.page.on("request", lambda request: asked.append(request.url))
    desk.context.route("**/api/**", lambda route: route.abort())  # whatever comes next is there already
    for number, key in enumerate(("1", "2", "3", "4")):
        assert f"Question {number}" in desk.question()
        shown = [desk.text_of(place) for place in (0, 1)]
        desk.press(key)
        expect(desk.page.locator("#prompt")).to_contain_text(f"Question {number + 1}")
        assert shown != [desk.text_of(place) for place in (0, 1)]
    assert "unsaved" in desk.page.locator("#saved").inner_text()
    desk.context.unroute("**/api/**")
    desk.page.evaluate("dispatchEvent(new Event('online'))")
    desk.saved()
    answers = [answer for _, answer in desk.labels()]
    assert [answer.kind for answer in answers] == ["ranking", "ranking", "ranking", "both_bad"]
    assert answers[1].ranks == (1, 1) and sorted(answers[0].ranks) == sorted(answers[2].ranks) == [1, 2]


def test_better_is_the_text_that_was_shown_there(open_desk: OpenDesk) -> None:
    """Sides are drawn at random, and the label is about the text, not the side."""
    desk = open_desk([pair(number) for number in range(8)])
    sides = set()
    for _ in range(8):
        painted_is_left = "painted" in desk.text_of(0)
        sides.add(painted_is_left)
        before = desk.question()
        desk.press("b" if painted_is_left else "a")
        expect(desk.page.locator("#prompt")).not_to_have_text(before)
    desk.saved()
    expect(desk.page.locator("#empty h2")).to_have_text("All done")
    assert [answer.ranks for _, answer in desk.labels()] == [(1, 2)] * 8 and sides == {True, False}


def test_by_mouse_a_double_click_is_one_label(open_desk: OpenDesk) -> None:
    """Buttons do what keys do, and the second click of a double click does not answer the next item."""
    desk = open_desk([pair(number) for number in range(4)])
    desk.page.wait_for_timeout(300)
    desk.page.get_by_role("button", name="A better").dblclick()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    desk.page.wait_for_timeout(300)
    desk.page.get_by_role("radio", name="much").click()
    desk.page.get_by_role("button", name="B better").click()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.saved()
    assert len(desk.labels()) == 2 and desk.labels()[1][1].strength == 5


def test_ranking_three_with_ties(open_desk: OpenDesk) -> None:
    """Digits rank the marked response and move on; ties are equal numbers; Enter stores; a rank can be corrected."""
    desk = open_desk([triple(1), triple(2)])
    save = desk.page.locator('[data-act="save"]')
    expect(save).to_be_disabled()
    desk.press("2", "1", "Enter")
    assert desk.kinds() == [] and "Rank 1" in desk.question()
    desk.press("1", "Backspace", "2")
    texts = [desk.text_of(place) for place in range(3)]
    expect(save).to_be_enabled()
    desk.press("Enter")
    expect(desk.page.locator("#prompt")).to_contain_text("Rank 2")
    desk.page.wait_for_timeout(300)
    for place, rank in enumerate((3, 1, 2)):
        desk.page.get_by_role("radiogroup", name=f"Rank of response {'ABC'[place]}").get_by_role("radio").nth(
            rank - 1
        ).click()
    save.click()
    desk.saved()
    expect(desk.page.locator("#empty h2")).to_have_text("All done")
    by_text = dict(zip(texts, (2, 1, 2), strict=True))
    first, second = (answer for _, answer in desk.labels())
    assert first.ranks == tuple(by_text[f"answer {name}"] for name in "xyz")
    assert sorted(second.ranks) == [1, 2, 3]


def test_skipping_asks_why(open_desk: OpenDesk) -> None:
    """5 asks for a reason: a digit, own words or none; Esc answers nothing."""
    desk = open_desk([pair(number) for number in range(4)])
    desk.press("5", "Escape")
    assert "Question 0" in desk.question()
    desk.press("5", "2")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    desk.press("s")
    desk.page.get_by_label("In your own words").fill("both in a language I cannot read, 1 2 3")
    desk.press("Enter")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.press("s", "Enter")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 3")
    desk.saved()
    assert [(answer.kind, answer.reason) for _, answer in desk.labels()] == [
        ("skip", "The prompt makes no sense"),
        ("skip", "both in a language I cannot read, 1 2 3"),
        ("skip", ""),
    ]


def test_undo_before_and_after_a_reload(open_desk: OpenDesk) -> None:
    """Z brings the last item back at once; after a reload it brings back what the store knows to be the last."""
    desk = open_desk([pair(number) for number in range(4)])
    desk.press("1", "2")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.press("z")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    desk.saved()
    desk.page.reload()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    desk.press("z")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 0")
    desk.saved()
    assert desk.kinds() == ["answer", "answer", "undo", "undo"] and desk.labels() == []
    desk.press("4")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    desk.saved()
    assert [answer.kind for _, answer in desk.labels()] == ["both_bad"]
    desk.press("z", "z")
    expect(desk.page.locator("#said")).to_contain_text("no answer to take back")
    desk.saved()


def test_a_past_label_is_revised_from_the_history(open_desk: OpenDesk) -> None:
    """H lists what was said; choosing one shows it with its answer; another answer replaces it; then work goes on."""
    desk = open_desk([pair(number) for number in range(3)])
    desk.press("1", "2")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.press("h")
    entries = desk.page.locator("#history li button")
    expect(entries).to_have_count(2)
    expect(entries.nth(1)).to_contain_text("A better")
    desk.press("Tab", "Enter")
    expect(desk.page.locator("#banner")).to_contain_text("You said: A better")
    assert "Question 0" in desk.question() and desk.page.locator("[data-mine]").inner_text().startswith("A better")
    desk.press("Escape")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.press("h")
    entries.nth(1).click()
    desk.press("4")
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.saved()
    assert desk.kinds() == ["answer", "answer", "revise"]
    assert [answer.kind for _, answer in desk.labels()] == ["both_bad", "ranking"]


def test_differences_and_raw_text_on_request(open_desk: OpenDesk) -> None:
    """D marks exactly the words the other response has not; R shows the text as written; both again: as before."""
    one, two = "The **cat** sat on the mat.", "The **cat** lay on the red mat."
    item = pair(0)
    texts = tuple(type(response)(text=text) for response, text in zip(item.responses, (one, two), strict=True))
    desk = open_desk([Item(prompt="p", responses=texts)])
    before = desk.page.locator("#responses").inner_html()
    desk.press("d")
    marked = {
        desk.text_of(place): desk.page.locator(".response").nth(place).locator("mark").all_inner_texts()
        for place in (0, 1)
    }
    assert marked == {"The cat sat on the mat.": ["sat"], "The cat lay on the red mat.": ["lay", "red"]}
    desk.press("d", "r")
    assert {desk.text_of(0), desk.text_of(1)} == {one, two}
    desk.press("r")
    assert desk.page.locator("#responses").inner_html() == before


def test_guidelines_stand_beside_the_task(open_desk: OpenDesk) -> None:
    """They are rendered, open on a wide screen, and G turns them off, which a reload remembers."""
    desk = open_desk([pair(0)], guidelines=GUIDELINES)
    panel = desk.page.get_by_role("complementary", name="Guidelines")
    expect(panel.locator("h1")).to_have_text("What to prefer")
    expect(panel.locator("strong")).to_have_text("you would rather receive")
    desk.press("g")
    expect(panel).to_be_hidden()
    desk.page.reload()
    expect(desk.page.locator(".response").first).to_be_visible()
    expect(panel).to_be_hidden()


def test_a_reload_loses_nothing(open_desk: OpenDesk) -> None:
    """The item, a half-finished ranking, the theme, and labels that could not be sent yet are there again."""
    desk = open_desk([triple(number) for number in range(4)])
    desk.press("l", "l")
    desk.context.route("**/api/answer", lambda route: route.abort())
    desk.press("1", "2", "3", "Enter")
    expect(desk.page.locator("#prompt")).to_contain_text("Rank 1")
    desk.press("3", "1")
    expect(desk.page.locator("#saved")).to_contain_text("1 unsaved")
    desk.page.on("dialog", lambda dialog: dialog.accept())
    desk.page.reload()
    expect(desk.page.locator("#prompt")).to_contain_text("Rank 1")
    expect(desk.page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(desk.page.locator('[aria-checked="true"]')).to_have_text(["3", "1"])
    expect(desk.page.locator("#saved")).to_contain_text("1 unsaved")
    assert desk.kinds() == []
    desk.context.unroute("**/api/answer")
    desk.page.reload()
    desk.saved()
    assert desk.kinds() == ["answer"]


def test_a_lost_reply_is_retried_and_stored_once(open_desk: OpenDesk) -> None:
    """The server stored the label but its reply was lost: the page says so, asks again, and there is one label."""
    desk = open_desk([pair(number) for number in range(3)])
    lost: list[int] = []

    def lose(route: object) -> None:
        if len(lost) < 2:
            lost.append(route.fetch().status)  # type: ignore[attr-defined]
            route.abort()  # type: ignore[attr-defined]
        else:
            route.continue_()  # type: ignore[attr-defined]

    desk.context.route("**/api/answer", lose)
    desk.press("1")
    expect(desk.page.locator("#saved")).to_contain_text("1 unsaved")
    desk.saved()
    assert lost == [200, 200] and desk.kinds() == ["answer"]


def test_offline_for_a_moment(open_desk: OpenDesk) -> None:
    """Without a network work goes on with what is held; when it is back everything arrives, in order."""
    desk = open_desk([pair(number) for number in range(5)])
    desk.context.set_offline(True)
    desk.press("1", "2", "z", "4")
    expect(desk.page.locator("#saved")).to_contain_text("4 unsaved")
    assert desk.kinds() == []
    desk.context.set_offline(False)
    desk.saved()
    assert desk.kinds() == ["answer", "answer", "undo", "answer"]
    assert [answer.kind for _, answer in desk.labels()] == ["ranking", "both_bad"]


def test_two_tabs_give_one_label(open_desk: OpenDesk) -> None:
    """The same item answered in two tabs keeps the first answer, and the second tab is told."""
    desk = open_desk([pair(number) for number in range(3)])
    other = desk.context.new_page()
    other.goto(desk.server.origin)
    expect(other.locator("#prompt")).to_contain_text("Question 0")
    desk.press("4")
    desk.saved()
    other.keyboard.press("1")
    expect(other.locator("#said")).to_contain_text("had your label already")
    assert desk.kinds() == ["answer"] and desk.labels()[0][1].kind == "both_bad"


def test_on_a_phone(open_desk: OpenDesk) -> None:
    """On a narrow screen nothing is wider than it, the buttons stay in reach and a tap labels."""
    desk = open_desk([pair(0), triple(1), pair(2)], skin=PHONE, guidelines=GUIDELINES)
    assert desk.page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(desk.page.locator("#guidelines")).to_be_hidden()
    desk.page.wait_for_timeout(300)
    button = desk.page.get_by_role("button", name="A better")
    box = button.bounding_box()
    assert box and box["height"] >= 44 and box["y"] + box["height"] <= 780
    button.tap()
    expect(desk.page.locator("#prompt")).to_contain_text("Rank 1")
    for place in range(3):
        desk.page.locator(f'[data-place="{place}"][data-rank="1"]').tap()
    desk.page.wait_for_timeout(300)
    desk.page.locator('[data-act="save"]').tap()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 2")
    desk.saved()
    assert [answer.ranks for _, answer in desk.labels()][1] == (1, 1, 1)


def test_long_texts_scroll_by_themselves(open_desk: OpenDesk) -> None:
    """A long conversation and long answers each scroll in their own box; the page, the prompt and the buttons stay."""
    item = pair(0)
    long = tuple(type(item.responses[0])(text=f"word {n}\n\n" * 300) for n in (1, 2))
    desk = open_desk([Item(prompt="once upon a time\n\n" * 200, responses=long)])
    prompt, first, second = (
        desk.page.locator(box) for box in ("#prompt", ".response .text >> nth=0", ".response .text >> nth=1")
    )
    bottom = prompt.evaluate("e => e.scrollTop + e.clientHeight - e.scrollHeight")
    assert abs(bottom) <= 1, "the end of the conversation is what is answered"
    first.evaluate("e => { e.scrollTop = 200; }")
    assert second.evaluate("e => e.scrollTop") == 0
    desk.press("j")
    assert second.evaluate("e => e.scrollTop") > 0 and first.evaluate("e => e.scrollTop") > 200
    assert desk.page.evaluate("document.documentElement.scrollHeight") <= 800
    expect(desk.page.get_by_role("button", name="Tie")).to_be_in_viewport()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(open_desk: OpenDesk, scheme: str) -> None:
    """The system's scheme is followed, L overrides it, and each text has a contrast of 4.5 to 1 or more."""
    desk = open_desk([triple(0), pair(1)], skin={**SKIN, "color_scheme": scheme}, guidelines=GUIDELINES)
    ground = "getComputedStyle(document.body).backgroundColor"
    system = desk.page.evaluate(ground)
    desk.press("d", "1", "2", "e")
    desk.page.wait_for_timeout(2300)  # the note at the bottom has gone
    checked = desk.page.evaluate(CONTRAST)
    desk.press("x")
    desk.page.wait_for_timeout(2300)
    checked += desk.page.evaluate(CONTRAST)
    assert len(checked) > 60 and [found for found in checked if found[0] < 4.5] == []
    desk.press(*(["l", "l"] if scheme == "light" else ["l"]))
    assert desk.page.evaluate(ground) != system


def test_roles_focus_and_motion(open_desk: OpenDesk) -> None:
    """Landmarks and names are there, the focus order is that of the page and is seen, motion stops when asked to."""
    desk = open_desk([pair(0), pair(1)], skin={**SKIN, "reduced_motion": "reduce"}, guidelines=GUIDELINES)
    for role, name in (
        ("main", None),
        ("banner", None),
        ("navigation", "Tools"),
        ("region", "Prompt"),
        ("complementary", "Guidelines"),
    ):
        expect(desk.page.get_by_role(role, name=name)).to_have_count(1)  # type: ignore[arg-type]
    expect(desk.page.get_by_role("region", name="Response B")).to_have_count(1)
    expect(desk.page.locator("#progress")).to_have_attribute("aria-live", "polite")
    order = []
    for _ in range(21):
        desk.press("Tab")
        order.append(
            desk.page.evaluate("(document.activeElement.innerText || document.activeElement.id).trim().split(/\\s/)[0]")
        )
        assert desk.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert order[:3] == ["To", "Undo", "History"] and order.index("A") < order.index("B") < order.index("Both")
    desk.press("1")
    assert desk.page.locator(".response").first.evaluate("e => getComputedStyle(e).animationName") == "none"


def test_identity_is_absent_from_page_and_traffic(open_desk: OpenDesk) -> None:
    """Nothing the browser receives or shows tells which model wrote a response, before the answer or after."""
    received: list[str] = []
    desk = open_desk([pair(number) for number in range(3)])
    desk.page.on("response", lambda reply: received.append(f"{reply.all_headers()} {reply.text()}"))
    desk.page.reload()
    expect(desk.page.locator(".response").first).to_be_visible()
    desk.press("1")
    desk.saved()
    desk.press("h")
    expect(desk.page.locator("#history li button")).to_have_count(1)
    traffic = " ".join([*received, desk.page.content()])
    assert "Question 1" in traffic and len(received) > 4
    assert [word for word in re.split(r"[ =]", PROVENANCE) if len(word) > 5 and word in traffic] == []


def test_the_link_is_the_only_way_in(open_desk: OpenDesk) -> None:
    """Without the link there is a door and no task; the token never appears in an address that is sent."""
    desk = open_desk([pair(0)])
    token = desk.server.link.partition("token=")[2]
    stranger = desk.context.browser.new_context() if desk.context.browser else desk.context
    page, sent = stranger.new_page(), []
    page.on("request", lambda request: sent.append(request.url + str(request.headers)))
    page.goto(desk.server.origin)
    expect(page.locator("#door")).to_contain_text("opens by the link")
    page.goto(f"{desk.server.origin}/enter#token={'x' * 22}")
    expect(page.locator("#door")).to_contain_text("stays closed")
    page.goto("about:blank")
    page.goto(desk.server.link)
    expect(page.locator(".response").first).to_be_visible()
    assert len(token) == 22 and not [url for url in sent if token in url] and token not in page.url
    stranger.close()


def test_a_team_joins_by_invitation(open_desk: OpenDesk) -> None:
    """An invitation lets one person in, who labels under their own name; the password opens again."""
    desk = open_desk([pair(0), pair(1)], accounts=True)
    invite = desk.server.store.accounts.create_invite("Ada")
    desk.page.goto("about:blank")
    desk.page.goto(f"{desk.server.origin}/enter#invite={invite}")
    desk.page.get_by_label("Choose a password").fill("correct horse")
    desk.page.get_by_role("button", name="Join").click()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 0")
    desk.press("1")
    desk.saved()
    desk.context.clear_cookies()
    desk.page.goto(f"{desk.server.origin}/enter")
    desk.page.get_by_label("Name").fill("Ada")
    desk.page.get_by_label("Password", exact=True).fill("correct horse")
    desk.page.get_by_role("button", name="Enter").click()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    assert {event.annotator for event in desk.server.store.snapshot().events} == {"Ada"}


def test_a_session_that_ended_loses_nothing(open_desk: OpenDesk) -> None:
    """When the session is gone, labels wait in the browser, and the link brings them to the store."""
    desk = open_desk([pair(number) for number in range(3)])
    desk.context.clear_cookies()
    desk.press("4")
    expect(desk.page.locator("#saved")).to_contain_text("sign in again by your link")
    desk.page.on("dialog", lambda dialog: dialog.accept())
    desk.page.goto("about:blank")
    desk.page.goto(desk.server.link)
    desk.saved()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    assert [answer.kind for _, answer in desk.labels()] == ["both_bad"]
