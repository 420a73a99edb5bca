"""Small items, answers and stores for the tests of the label store."""

from __future__ import annotations

from collections.abc import Callable

from preftune.records import Message, Response
from preftune.web.labels import Answer, Item, Settings
from preftune.web.store import Store

FIRST = Answer(kind="ranking", ranks=(1, 2))
SECOND = Answer(kind="ranking", ranks=(2, 1))
TIE = Answer(kind="ranking", ranks=(1, 1))
BOTH_BAD = Answer(kind="both_bad")
SKIP = Answer(kind="skip", reason="no idea")

NewDatabase = Callable[[], str]
OPENED: list[Store] = []
"""Closed after every test."""


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def pair(number: int, **more: object) -> Item:
    responses = (Response(text=f"yes {number}", provenance="model=a", score=1.5), Response(text=f"no {number}"))
    return Item(prompt=f"question {number}", responses=responses, origin=f"f:{number}", **more)  # type: ignore[arg-type]


def triple(number: int) -> Item:
    prompt = (Message(role="system", content="be kind"), Message(role="user", content=f"question {number}"))
    return Item(prompt=prompt, responses=tuple(Response(text=f"{word} {number}") for word in ("a", "bb", "ccc")))


def opened(url: str, items: list[Item], clock: Clock | None = None, **settings: object) -> Store:
    """A store with items; their order is that of arrival unless settings say otherwise."""
    wanted = Settings(**{"random_share": 0.0, **settings})  # type: ignore[arg-type]
    store = Store.open(url, wanted, clock=clock or Clock())
    OPENED.append(store)
    store.add_items(items)
    return store


def lived(url: str) -> Store:
    """A store in which everything has happened once: pairs, triples, gold, ties, skips, revisions, undos, odd texts."""
    odd = Item(
        prompt="\ud800\0 <b>\u2028",
        responses=(Response(text="\0"), Response(text="\u00e9", finished=False, logp=-1.25)),
    )
    store = opened(url, [odd, pair(1, priority=0.1), pair(2), pair(3, gold=FIRST), triple(4), triple(5)], overlap=2)
    given = [FIRST, TIE, BOTH_BAD, SKIP]
    for annotator in ("ann", "b\u00f6b"):
        for number, task in enumerate(store.next_tasks(annotator, 4)):
            k = len(task.item.responses)
            answer = given[number] if k == 2 else Answer(kind="ranking", ranks=(2, 1, 3), strength=3, reason="\0 odd")
            store.answer(annotator, task.id, answer, f"{annotator} {number}")
        store.revise(annotator, task.id, Answer(kind="skip", reason="after all"), f"{annotator} r")
        store.undo(annotator, f"{annotator} u")
    store.undo("ann", "again")
    return store
