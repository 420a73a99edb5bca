"""Exports: what a history says, in the layouts preftune and TRL read, each prompt counting once."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from label_items import BOTH_BAD, FIRST, SECOND, SKIP, TIE, NewDatabase, lived, opened, pair, triple

from preftune.data.sources import open_source
from preftune.errors import DataError
from preftune.records import Judgement, LabelledResponse, RankedResponses, from_json
from preftune.web.export import KINDS, count, export, judgements, snapshot_agreement
from preftune.web.imports import read_history
from preftune.web.labels import Answer, Item, Snapshot

RANKED = Answer(kind="ranking", ranks=(2, 1, 3), strength=2, reason="clear")


def labelled(items: list[tuple[Item, dict[str, Answer]]], new: NewDatabase) -> Snapshot:
    """A history in which each item got these answers, shown as drawn."""
    store = opened(new(), [item for item, _ in items], overlap=9, gold_rate=0.5)
    said = {item.key: answers for item, answers in items}
    by_annotator = sorted({name for _, answers in items for name in answers})
    keys = [item.key for item in store.snapshot().items]
    for name in by_annotator:
        for task in store.next_tasks(name, 99):
            key = keys[store.snapshot().loans[task.id - 1].item - 1]
            if name in said[key]:
                store.answer(name, task.id, said[key][name], f"{name} {task.id}")
    return store.snapshot()


def read(text: str, folder: Path, name: str) -> list[object]:
    path = folder / f"{name}.jsonl"
    path.write_text(text)
    return list(open_source(path, kind="preferences"))


def test_a_history_comes_back_byte_for_byte(new_sqlite: NewDatabase, new_postgres: NewDatabase) -> None:
    """export -> import -> export is the identity on both databases and from one to the other; every kind agrees."""
    for first, second in ((new_sqlite, new_postgres), (new_postgres, new_sqlite), (new_sqlite, new_sqlite)):
        store = lived(first())
        written = export(store.snapshot(), "history")
        other = opened(second(), [])
        other.restore(read_history(written))
        assert other.snapshot() == store.snapshot()
        assert all(export(other.snapshot(), kind) == export(store.snapshot(), kind) for kind in KINDS)
        assert other.next_tasks("ann", 9) == store.next_tasks("ann", 9) and other.progress("ann") == store.progress(
            "ann"
        )
        assert other.undo("ann", "on it goes") == store.undo("ann", "on it goes")
        with pytest.raises(DataError, match="empty store"):
            other.restore(read_history(written))


def test_the_same_acts_give_the_same_bytes_on_both_databases(
    new_sqlite: NewDatabase, new_postgres: NewDatabase
) -> None:
    """Numbers, orders, draws and times do not depend on the database."""
    assert export(lived(new_sqlite()).snapshot(), "history") == export(lived(new_postgres()).snapshot(), "history")


def test_a_prompt_counts_once(new_sqlite: NewDatabase, tmp_path: Path) -> None:
    """Weights of a prompt's rows sum to 1, whatever K, ties and number of annotators: 3, 2 and 1 pairs here."""
    one_tie = Answer(kind="ranking", ranks=(1, 2, 2))
    items = [
        (triple(1), {"a": RANKED}),
        (triple(2), {"a": one_tie, "b": RANKED, "c": BOTH_BAD}),
        (pair(3), {"a": FIRST, "b": SECOND, "c": SKIP}),
        (pair(4), {"a": TIE}),
    ]
    snapshot = labelled(items, new_sqlite)
    for kind in ("pairs", "unpaired", "rankings"):
        total: dict[str, float] = defaultdict(float)
        for line in export(snapshot, kind).splitlines():
            row = json.loads(line)
            total[json.dumps(row["prompt"])] += row["weight"]
        assert list(total.values()) == pytest.approx([1.0] * 3, abs=1e-15)
    rows = read(export(snapshot, "pairs"), tmp_path, "pairs")
    assert [(row.weight, row.annotator) for row in rows if isinstance(row, RankedResponses)] == [
        *[(1 / 3, "a")] * 3,
        *[(1 / 4, "a")] * 2,
        *[(1 / 6, "b")] * 3,
        (1 / 2, "a"),
        (1 / 2, "b"),
    ]


def test_pairs_say_what_was_answered(new_sqlite: NewDatabase, tmp_path: Path) -> None:
    """The layout `preftune dpo` reads; better responses chosen; plain stays plain, conversations stay messages."""
    snapshot = labelled([(pair(1), {"a": SECOND}), (triple(2), {"a": RANKED})], new_sqlite)
    rows = read(export(snapshot, "pairs"), tmp_path, "pairs")
    assert all(isinstance(row, RankedResponses) for row in rows)
    assert [tuple(r.text for r in row.responses) for row in rows] == [  # type: ignore[attr-defined]
        ("no 1", "yes 1"),
        ("bb 2", "a 2"),
        ("bb 2", "ccc 2"),
        ("a 2", "ccc 2"),
    ]
    assert [row.prompt for row in rows] == ["question 1", *[triple(2).prompt] * 3]  # type: ignore[attr-defined]


def test_rankings_say_what_was_answered(new_sqlite: NewDatabase, tmp_path: Path) -> None:
    """Responses in the item's order with their ranks; a full tie orders nothing and is left out."""
    snapshot = labelled([(triple(2), {"a": RANKED}), (pair(3), {"a": TIE, "b": BOTH_BAD})], new_sqlite)
    (row,) = read(export(snapshot, "rankings"), tmp_path, "rankings")
    assert isinstance(row, RankedResponses)
    assert (row.ranks, [response.text for response in row.responses]) == ((2, 1, 3), ["a 2", "bb 2", "ccc 2"])


def test_unpaired_labels_are_best_worst_and_both_bad(new_sqlite: NewDatabase, tmp_path: Path) -> None:
    """The best of a ranking is desirable, the worst is not, the middle neither; both bad are both undesirable."""
    answers = [(triple(1), {"a": RANKED}), (pair(2), {"a": BOTH_BAD}), (pair(3), {"a": TIE}), (pair(4), {"a": SKIP})]
    rows = read(export(labelled(answers, new_sqlite), "unpaired"), tmp_path, "unpaired")
    assert all(isinstance(row, LabelledResponse) for row in rows)
    assert [(row.response.text, row.desirable) for row in rows] == [  # type: ignore[attr-defined]
        ("bb 1", True),
        ("ccc 1", False),
        ("yes 2", False),
        ("no 2", False),
    ]


def test_judgements_are_in_the_order_shown(new_sqlite: NewDatabase) -> None:
    """`first` is what stood first on the page; the text of the winner does not depend on it."""
    snapshot = labelled([(pair(n), {"a": FIRST}) for n in range(40)], new_sqlite)
    found = [from_json(line) for line in export(snapshot, "judgements").splitlines()]
    assert all(isinstance(judgement, Judgement) for judgement in found)
    outcomes = {judgement.outcome for judgement in found}
    winners = [getattr(judgement, judgement.outcome).text for judgement in found]
    assert outcomes == {"first", "second"} and winners == [f"yes {n}" for n in range(40)]
    (judgement,) = judgements(labelled([(pair(1), {"a": replace(BOTH_BAD, reason="both rude")})], new_sqlite))
    assert (judgement.outcome, judgement.judge, judgement.reason) == ("both_bad", "a", "both rude")


def test_gold_items_train_nobody(new_sqlite: NewDatabase) -> None:
    """A gold item's labels are in the history and nowhere else."""
    snapshot = labelled([(pair(1, gold=FIRST), {"a": FIRST})], new_sqlite)
    assert {kind for kind in KINDS if export(snapshot, kind)} == {"history"}
    assert (count(snapshot).gold_answers, count(snapshot).labels, count(snapshot).gold_items) == (1, 0, 1)


def test_counts_and_agreement(new_sqlite: NewDatabase) -> None:
    """Counted by hand: two annotators who agree on 2 of 3 shared pairs."""
    items = [
        (pair(1), {"a": FIRST, "b": FIRST}),
        (pair(2), {"a": SECOND, "b": SECOND}),
        (pair(3), {"a": FIRST, "b": TIE}),
        (pair(4), {"a": SKIP}),
        (pair(5), {"a": BOTH_BAD}),
    ]
    snapshot = labelled(items, new_sqlite)
    found = count(snapshot)
    assert (found.items, found.labels, found.annotators, found.pairs) == (5, 7, 2, 5)
    assert (found.ties, found.both_bad, found.skips, found.revisions, found.undone) == (1, 1, 1, 0, 0)
    assert snapshot_agreement(snapshot).raw.estimate == pytest.approx(2 / 3)
    assert snapshot_agreement(labelled([(pair(1), {})], new_sqlite)).items == 0


def test_only_current_answers_are_exported(new_sqlite: NewDatabase) -> None:
    """A revised answer replaces the first, an undone one is gone, the history keeps all events."""
    store = opened(new_sqlite(), [pair(1), pair(2)])
    one, two = store.next_tasks("a", 2)
    store.answer("a", one.id, FIRST, "1")
    store.revise("a", one.id, SECOND, "2")
    store.revise("a", one.id, BOTH_BAD, "2b")
    store.undo("a", "2c")
    store.answer("a", two.id, FIRST, "3")
    store.undo("a", "4")
    lines = export(store.snapshot(), "pairs").splitlines()
    assert [json.loads(line)["chosen"] for line in lines] == ["no 1"]
    assert export(store.snapshot(), "history").count('"type": "event"') == 6


@pytest.mark.parametrize(
    ("find", "replacement", "problem"),
    [
        ('"version": 1', '"version": 9', "line 1 .*version 9"),
        ('"kind": "undo"', '"kind": "answer"', "line .*kind 'answer' with answer None"),
        ('"order": [0, 1]', '"order": [0, 0]', "no order"),
        ('"type": "task"', '"type": "job"', "unknown"),
        ('"annotator": "ann"', '"annotator": "eve"', "is by"),
        ('{"type": "history"', '{"type": "item"', "line 1"),
        ('"id": 2, "item"', '"id": 7, "item"', "task 2"),
    ],
)
def test_a_damaged_history_is_refused_with_its_line(
    new_sqlite: NewDatabase, find: str, replacement: str, problem: str
) -> None:
    """Nothing of a file that was cut, edited or mixed reaches a store."""
    text = export(lived(new_sqlite()).snapshot(), "history")
    assert find in text
    with pytest.raises(DataError, match=problem):
        read_history(text.replace(find, replacement, 1))
    with pytest.raises(DataError, match="line"):
        read_history("".join(text.splitlines(keepends=True)[2:]))
    with pytest.raises(DataError, match="empty"):
        read_history("")
