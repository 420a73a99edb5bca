"""One label and no less: double clicks, reloads, lost replies, no network, two tabs, ended sessions; who gets in."""

from __future__ import annotations

import re

from label_site import PROVENANCE, OpenDesk, pair, triple
from playwright.sync_api import Route, expect


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
    """The server did what was asked but its reply was lost: the page says so and asks again; it was done once."""
    desk = open_desk([pair(number) for number in range(4)])
    lost: dict[str, int] = {}

    def lose_first(route: Route) -> None:
        body = str(route.request.post_data)
        if body in lost:
            route.continue_()
        else:
            lost[body] = route.fetch().status
            route.abort()

    desk.context.route(re.compile("/api/(answer|undo)"), lose_first)
    desk.press("1")
    expect(desk.page.locator("#saved")).to_contain_text("1 unsaved")
    desk.press("2", "z")
    desk.saved()
    assert list(lost.values()) == [200] * 3 and desk.kinds() == ["answer", "answer", "undo"]


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
    """An invitation lets one person in, who labels under their own name; the password opens again after signing out."""
    desk = open_desk([pair(0), pair(1)], accounts=True)
    invite = desk.server.store.accounts.create_invite("Ada")
    desk.page.goto("about:blank")
    desk.page.goto(f"{desk.server.origin}/enter#invite={invite}")
    desk.page.get_by_label("Choose a password").fill("correct horse")
    desk.page.get_by_role("button", name="Join").click()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 0")
    desk.press("1")
    desk.saved()
    desk.page.get_by_role("button", name="Sign out").click()
    desk.page.get_by_label("Name").fill("Ada")
    desk.page.get_by_label("Password", exact=True).fill("correct horse")
    desk.page.get_by_role("button", name="Enter").click()
    expect(desk.page.locator("#prompt")).to_contain_text("Question 1")
    assert {event.annotator for event in desk.server.store.snapshot().events} == {"Ada"}


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
