"""The labelling page in a real browser: every act by keyboard or by mouse, on a desk and on a phone, readable."""

from __future__ import annotations

import pytest
from label_site import CONTRAST, GUIDELINES, SKIN, OpenDesk, pair, triple
from playwright.sync_api import expect

from preftune.web.labels import Item

PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}


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
    for number in range(8):
        expect(desk.page.locator("#prompt")).to_contain_text(f"Question {number}")  # may have to be fetched
        painted_is_left = "painted" in desk.text_of(0)
        sides.add(painted_is_left)
        desk.press("b" if painted_is_left else "a")
    desk.saved()
    expect(desk.page.locator("#empty h2")).to_have_text("All done")
    assert [answer.ranks for _, answer in desk.labels()] == [(1, 2)] * 8 and sides == {True, False}


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


def test_a_key_right_after_the_dialog_counts(open_desk: OpenDesk) -> None:
    """A closed dialog's field keeps the focus until the next frame; a key pressed before that is the page's."""
    desk = open_desk([pair(number) for number in range(3)])
    desk.press("s")
    desk.page.get_by_label("In your own words").fill("no idea")
    opened = desk.page.evaluate(
        """() => {
          const field = document.activeElement;
          document.querySelector("#skip form").requestSubmit(document.querySelector("#skip button.main"));
          field.dispatchEvent(new KeyboardEvent("keydown", { key: "s", bubbles: true, cancelable: true }));
          return document.querySelector("#skip").open;
        }"""
    )
    assert opened


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
