"""The label store on SQLite and on PostgreSQL: who gets what, what is kept, what is refused."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_items import BOTH_BAD, FIRST, SECOND, SKIP, TIE, Clock, NewDatabase, lived, opened, pair, triple
from sqlalchemy import insert, text
from sqlalchemy.exc import DatabaseError, IntegrityError

from preftune.errors import ConfigError, DataError
from preftune.web.labels import Added, Answer, Settings, TaskGone, UnknownTask, standing
from preftune.web.rows import event_values, loan_values
from preftune.web.schema import events, metadata, tasks
from preftune.web.store import Store


def test_items_are_added_once_by_what_an_annotator_sees(new_database: NewDatabase) -> None:
    """The same prompt and texts again are known, whoever wrote them; a new priority replaces the old one."""
    store = opened(new_database(), [pair(1), pair(2)])
    again = replace(pair(1), origin="elsewhere", priority=2.0)
    assert store.add_items([again, pair(3), pair(3)]) == Added(new=1, known=2)
    assert [item.priority for item in store.snapshot().items] == [2.0, None, None]
    assert store.snapshot().items[0].origin == "f:1"


def test_a_task_tells_nothing_that_would_sway(new_database: NewDatabase) -> None:
    """No model, score, file, priority or gold answer leaves the store with a task."""
    store = opened(new_database(), [pair(1, gold=FIRST, priority=1.0)], gold_rate=1.0)
    (task,) = store.next_tasks("ann", 5)
    assert "model=a" not in repr(task) and "1.5" not in repr(task) and "f:1" not in repr(task)
    assert task.item.gold is None and task.item.priority is None
    assert [response.text for response in task.item.responses] == ["yes 1", "no 1"]


def test_the_order_shown_is_random_per_task_and_kept(new_database: NewDatabase) -> None:
    """Half of 200 tasks show the first response first (within 4 sigma); asking again shows the same order."""
    store = opened(new_database(), [pair(number) for number in range(200)])
    given_out = store.next_tasks("ann", 200)
    assert abs(sum(task.order == (0, 1) for task in given_out) - 100) < 4 * 50**0.5
    assert {task.order for task in given_out} == {(0, 1), (1, 0)}
    assert store.next_tasks("ann", 200) == given_out
    other = {
        task.item.prompt: task.order
        for task in opened(new_database(), list(store.snapshot().items)).next_tasks("b", 200)
    }
    assert any(other[task.item.prompt] != task.order for task in given_out)


def test_overlap_counts_labels_and_live_loans(new_database: NewDatabase) -> None:
    """With overlap 2 a third annotator gets nothing while two hold the item, and nothing once both have answered."""
    store = opened(new_database(), [pair(1)], overlap=2)
    (one,), (two,) = store.next_tasks("a", 3), store.next_tasks("b", 3)
    assert store.next_tasks("c", 3) == []
    store.answer("a", one.id, FIRST, "k")
    store.answer("b", two.id, BOTH_BAD, "k")
    assert store.next_tasks("c", 3) == store.next_tasks("a", 3) == []


def test_a_loan_that_ran_out_is_lent_to_another_and_its_late_answer_refused(new_database: NewDatabase) -> None:
    """Late is fine while there is room; when the place is taken, the answer is refused and nothing is stored."""
    clock = Clock()
    store = opened(new_database(), [pair(1), pair(2)], clock, lease_seconds=60)
    first, second = store.next_tasks("slow", 2)
    clock.now += 61
    (taken,) = store.next_tasks("quick", 1)
    assert taken.item == first.item
    with pytest.raises(TaskGone, match="open too long"):
        store.answer("slow", first.id, FIRST, "1")
    assert store.answer("slow", second.id, FIRST, "2").task == second.id
    assert store.next_tasks("slow", 2) == [] and len(store.snapshot().events) == 1
    store.answer("quick", taken.id, SKIP, "1")
    assert store.answer("slow", first.id, FIRST, "3").task == first.id
    with pytest.raises(TaskGone):
        store.revise("quick", taken.id, FIRST, "2")


def test_a_skip_frees_the_item_for_another(new_database: NewDatabase) -> None:
    """A skip is no label: the item goes on to the next annotator, never back to the one who skipped."""
    store = opened(new_database(), [pair(1)])
    (task,) = store.next_tasks("a", 1)
    store.answer("a", task.id, SKIP, "k")
    assert store.next_tasks("a", 1) == []
    assert len(store.next_tasks("b", 1)) == 1


def test_priority_comes_first_and_a_random_share_is_kept(new_database: NewDatabase) -> None:
    """Of 200 tasks with random_share 0.3, about 30 % are not the next by priority; with 0 none, and ties in order."""
    items = [pair(number, priority=float(number)) for number in range(400)]
    store = opened(new_database(), items, random_share=0.0)
    assert [task.item.prompt for task in store.next_tasks("a", 3)] == [f"question {n}" for n in (399, 398, 397)]
    store.close()
    store = opened(new_database(), items, random_share=0.3)
    numbers = [int(str(task.item.prompt).split()[1]) for task in store.next_tasks("a", 200)]
    left, best = set(range(400)), 0
    for number in numbers:
        best += number == max(left)
        left.remove(number)
    assert 200 - best == pytest.approx(60, abs=4 * (200 * 0.3 * 0.7) ** 0.5)


def test_gold_items_come_at_their_rate_to_everybody(new_database: NewDatabase) -> None:
    """A quarter of each annotator's tasks are gold (within 4 sigma), however many annotators have seen them."""
    items = [pair(n) for n in range(300)] + [pair(n, gold=SECOND) for n in range(1000, 1100)]
    store = opened(new_database(), items, overlap=3, gold_rate=0.25)
    for annotator in ("a", "b"):
        gold = [task for task in store.next_tasks(annotator, 200) if int(str(task.item.prompt).split()[1]) >= 1000]
        assert len(gold) == pytest.approx(50, abs=4 * (200 * 0.25 * 0.75) ** 0.5)
    store.answer("b", gold[0].id, SECOND, "1")
    store.answer("b", gold[1].id, FIRST, "2")
    progress = store.progress("b")
    assert (progress.gold_seen, progress.gold_right, progress.own, progress.team, progress.total) == (2, 1, 0, 0, 900)


def test_one_label_per_annotator_and_item(new_database: NewDatabase) -> None:
    """A retry with the same key, a double click with another, a second tab: one event, the first one, is returned."""
    store = opened(new_database(), [pair(1)])
    (task,) = store.next_tasks("ann", 1)
    event = store.answer("ann", task.id, FIRST, "tab 1")
    assert store.answer("ann", task.id, FIRST, "tab 1") == event
    assert store.answer("ann", task.id, SECOND, "tab 2") == event
    assert store.snapshot().events == (event,)
    revised = store.revise("ann", task.id, TIE, "tab 3")
    assert store.revise("ann", task.id, TIE, "tab 3") == revised
    store.undo("ann", "tab 4")
    store.undo("ann", "tab 5")
    assert store.answer("ann", task.id, FIRST, "tab 1") == event  # a late retry does not bring back what was undone
    assert store.history("ann", 9) == []


def test_the_database_itself_refuses_a_second_label(new_database: NewDatabase) -> None:
    """Were the code wrong: no second task for (item, annotator), no second event for (annotator, key), in any way."""
    store = opened(new_database(), [pair(1)])
    (task,) = store.next_tasks("ann", 1)
    event = store.answer("ann", task.id, FIRST, "k")
    (loan,) = store.snapshot().loans
    for table, row in ((tasks, loan_values(replace(loan, id=9), None)), (events, event_values(replace(event, id=9)))):
        with pytest.raises(IntegrityError), store._database.writing() as connection:
            connection.execute(insert(table), row)


def test_events_cannot_be_changed_or_deleted(new_database: NewDatabase) -> None:
    """Triggers refuse UPDATE and DELETE on events: history is append-only for everybody."""
    store = lived(new_database())
    before = store.snapshot()
    for statement in ("UPDATE events SET client_key = 'x'", "DELETE FROM events WHERE id = 1"):
        with pytest.raises(DatabaseError, match="append-only"), store._database.writing() as connection:
            connection.execute(text(statement))
    assert store.snapshot() == before


def test_undo_takes_back_step_by_step_and_is_an_event(new_database: NewDatabase) -> None:
    """Undo of a revision restores the answer, the next undo opens the task again; all events stay."""
    store = opened(new_database(), [pair(1), pair(2)])
    one, two = store.next_tasks("ann", 2)
    store.answer("ann", one.id, FIRST, "1")
    store.answer("ann", two.id, TIE, "2")
    store.revise("ann", one.id, SECOND, "3")
    assert store.history("ann", 9) == [(one, SECOND), (two, TIE)]
    undone = store.undo("ann", "4")
    assert (undone.kind, undone.undoes, undone.task) == ("undo", 3, one.id)
    assert store.undo("ann", "4") == undone
    assert store.history("ann", 9) == [(two, TIE), (one, FIRST)]
    assert store.undo("ann", "5").undoes == 2
    assert store.next_tasks("ann", 9) == [two] and store.history("ann", 9) == [(one, FIRST)]
    assert store.answer("ann", two.id, SECOND, "6").kind == "answer"
    assert [event.kind for event in store.snapshot().events] == ["answer", "answer", "revise", "undo", "undo", "answer"]
    store.undo("ann", "7")
    store.undo("ann", "8")
    with pytest.raises(DataError, match="no answer to take back"):
        store.undo("ann", "9")


def test_an_undone_task_stays_with_its_annotator(new_database: NewDatabase) -> None:
    """Taking an answer back long after it was given does not lose the place to another."""
    clock = Clock()
    store = opened(new_database(), [pair(1)], clock, lease_seconds=60)
    (task,) = store.next_tasks("a", 1)
    store.answer("a", task.id, FIRST, "1")
    clock.now += 1000
    store.undo("a", "2")
    assert store.next_tasks("b", 1) == []
    assert store.next_tasks("a", 1) == [task]


def test_what_is_wrong_is_refused_by_name(new_database: NewDatabase) -> None:
    """Foreign tasks, malformed answers, reused keys and odd names leave no trace."""
    store = opened(new_database(), [pair(1), triple(2)])
    one, two = store.next_tasks("ann", 2)
    bad = [
        (one.id, Answer(kind="ranking", ranks=(1,)), "2 whole numbers"),
        (two.id, Answer(kind="ranking", ranks=(0, 1, 2)), "whole numbers from 1"),
        (one.id, Answer(kind="ranking", ranks=(True, 2)), "whole numbers"),
        (one.id, Answer(kind="skip", ranks=(1, 2)), "only a ranking"),
        (one.id, Answer(kind="best"), "allowed: ranking, both_bad, skip"),  # type: ignore[arg-type]
        (one.id, replace(FIRST, strength=9), "allowed: none, or 1 to 5"),
        (one.id, replace(FIRST, reason="x" * 5000), "5000 characters"),
    ]
    for task, answer, problem in bad:
        with pytest.raises(DataError, match=problem):
            store.answer("ann", task, answer, "k")
    with pytest.raises(UnknownTask):
        store.answer("bob", one.id, FIRST, "k")
    with pytest.raises(UnknownTask):
        store.task("bob", one.id)
    with pytest.raises(DataError, match="no answer to revise"):
        store.revise("ann", one.id, FIRST, "k")
    with pytest.raises(DataError, match="printable"):
        store.next_tasks("a\nb", 1)
    with pytest.raises(DataError, match="client_key"):
        store.answer("ann", one.id, FIRST, "")
    assert store.snapshot().events == ()
    store.answer("ann", one.id, FIRST, "k")
    with pytest.raises(DataError, match="another act"):
        store.answer("ann", two.id, Answer(kind="skip"), "k")
    with pytest.raises(DataError, match="another act"):
        store.undo("ann", "k")


def test_ranks_are_stored_densely(new_database: NewDatabase) -> None:
    """(3, 7, 3) is (1, 2, 1): equal answers are equal rows."""
    store = opened(new_database(), [triple(1)])
    (task,) = store.next_tasks("ann", 1)
    event = store.answer("ann", task.id, Answer(kind="ranking", ranks=(3, 7, 3)), "k")
    assert event.answer == Answer(kind="ranking", ranks=(1, 2, 1))


def test_progress_counts_current_answers(new_database: NewDatabase) -> None:
    """Own work of today and ever, labels of the team without skips, and what is wanted in all."""
    clock = Clock()
    store = opened(new_database(), [pair(n) for n in range(4)], clock, overlap=2)
    for number, task in enumerate(store.next_tasks("a", 2)):
        store.answer("a", task.id, (FIRST, SKIP)[number], str(number))
    clock.now += 24 * 3600
    store.answer("a", store.next_tasks("a", 1)[0].id, TIE, "3")
    store.answer("b", store.next_tasks("b", 1)[0].id, TIE, "1")
    progress = store.progress("a")
    assert (progress.own, progress.own_today, progress.team, progress.total) == (3, 1, 3, 8)
    store.undo("a", "4")
    assert (store.progress("a").own, store.progress("b").team) == (2, 2)


def test_a_store_is_found_as_it_was_left(new_database: NewDatabase) -> None:
    """Closed and opened again, everything is there, the settings too; new settings replace them."""
    url = new_database()
    store = lived(url)
    before = store.snapshot()
    store.close()
    store = Store.open(url)
    assert store.snapshot() == before and store.settings.overlap == 2
    store.close()
    store = Store.open(url, Settings(overlap=5))
    assert store.snapshot().settings.overlap == 5
    store.close()


def test_the_migrations_make_the_tables_the_code_uses(new_database: NewDatabase) -> None:
    """alembic finds no difference between the migrated database and schema.py."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    store = opened(new_database(), [])
    with store._database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_what_tasks_keep_is_the_fold_of_the_events(new_database: NewDatabase) -> None:
    """The standing event beside each task equals the fold computed from all events."""
    store = lived(new_database())
    stands = standing(store.snapshot().events)
    with store._database.reading() as connection:
        kept = {row.id: row.standing for row in connection.execute(tasks.select()) if row.standing is not None}
    assert kept == {task: event.id for task, event in stands.items()} != {}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("taaruwk")), max_size=40))
def test_no_sequence_of_acts_breaks_the_rules(new_sqlite: NewDatabase, acts: list[tuple[str, str]]) -> None:
    """Ask, answer, revise, undo, wait and skip in any order: never more labels of an item than the overlap."""
    clock, key = Clock(), count()
    store = opened(new_sqlite(), [pair(n) for n in range(3)], clock, overlap=2, lease_seconds=60)
    held: dict[str, list[int]] = {name: [] for name in "abc"}
    for name, act in acts:
        try:
            if act == "t":
                held[name] += [task.id for task in store.next_tasks(name, 2)]
            elif act == "w":
                clock.now += 61
            elif act == "u":
                store.undo(name, str(next(key)))
            elif held[name]:
                said = SKIP if act == "k" else (FIRST, SECOND)[next(key) % 2]
                state = store.revise if act == "r" else store.answer
                state(name, held[name][next(key) % len(held[name])], said, str(next(key)))
        except DataError:
            pass
    snapshot = store.snapshot()
    current = {snapshot.loans[task - 1]: event for task, event in standing(snapshot.events).items()}
    labels = Counter(loan.item for loan, event in current.items() if event.answer and event.answer.kind != "skip")
    assert all(number <= 2 for number in labels.values())
    assert len({(loan.item, loan.annotator) for loan in snapshot.loans}) == len(snapshot.loans)


def test_racing_annotators_never_exceed_the_overlap(new_database: NewDatabase) -> None:
    """Eight threads with a connection each take and answer 30 items: exactly two labels each, by two annotators."""
    store = opened(new_database(), [pair(n) for n in range(30)], overlap=2, random_share=1.0)

    def annotate(name: str) -> None:
        for act in count():
            found = store.next_tasks(name, 2)
            if not found:
                return
            with ThreadPoolExecutor(2) as tabs:  # the same answer from two tabs at once
                for tab in range(2):
                    tabs.submit(store.answer, name, found[0].id, FIRST, f"{act} {tab}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(annotate, "abcdefgh"))
    snapshot = store.snapshot()
    assert Counter(loan.item for loan in snapshot.loans) == dict.fromkeys(range(1, 31), 2)
    assert len(snapshot.events) == len(standing(snapshot.events)) == 60


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "names no file"),
        ("sqlite://", "names no file"),
        ("mysql://host/x", "is no database for labels"),
        ("no/such/folder/labels.db", "cannot be opened"),
        ("://", "is no database"),
    ],
)
def test_what_is_no_database_is_refused(url: str, problem: str) -> None:
    """The message names the address and what would do."""
    with pytest.raises(ConfigError, match=problem):
        Store.open(url)


def test_sqlite_acknowledges_after_the_disk_has_it(new_sqlite: NewDatabase) -> None:
    """WAL with synchronous FULL: no kill of a process can tell it from OFF, only a power cut, so it is asked for."""
    store = opened(new_sqlite(), [])
    with store._database.reading() as connection:
        found = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert found == ["wal", 2, 1]


def test_postgres_acknowledges_after_the_disk_has_it(new_postgres: NewDatabase) -> None:
    """synchronous_commit is on for every session of a store, whatever the server says."""
    url = new_postgres() + "%20-csynchronous_commit%3Doff"
    store = opened(url, [])
    with store._database.reading() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
