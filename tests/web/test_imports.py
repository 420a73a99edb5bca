"""Labels from elsewhere: files as Label Studio and Argilla write them, and preftune's own layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from label_items import FIRST, NewDatabase, opened, pair

from preftune.records import Message, Refusal
from preftune.web.imports import Columns, read_labels
from preftune.web.labels import Added, Labelled

STUDIO_PAIR = {
    "id": 17,
    "data": {"prompt": "Which?", "text1": "left text", "text2": "right text"},
    "annotations": [
        {
            "id": 1001,
            "completed_by": {"id": 3, "email": "ann@example.org"},
            "result": [
                {
                    "id": "a",
                    "from_name": "pw",
                    "to_name": "text1,text2",
                    "type": "pairwise",
                    "value": {"selected": "right"},
                }
            ],
            "was_cancelled": False,
            "ground_truth": False,
            "created_at": "2024-05-02T09:50:00.1Z",
            "lead_time": 4.288,
        },
        {"id": 1002, "completed_by": 4, "result": [], "was_cancelled": True},
    ],
    "predictions": [],
    "project": 83,
}
STUDIO_RANK = {
    "id": 18,
    "data": {
        "prompt": "Rank!",
        "items": [
            {"id": "m1", "title": "one", "body": "body 1"},
            {"id": "m2", "body": "body 2"},
            {"id": 3, "body": "body 3"},
        ],
    },
    "annotations": [
        {
            "completed_by": 4,
            "result": [
                {
                    "from_name": "rank",
                    "to_name": "items",
                    "type": "ranker",
                    "value": {"ranker": {"rank": ["m2", "3", "m1"]}},
                }
            ],
        }
    ],
}
ARGILLA_FLAT = {
    "id": "7d0e",
    "status": "completed",
    "_server_id": "b1",
    "instruction": "Which?",
    "response_1": "one",
    "response_2": "two",
    "response_3": "three",
    "order.responses": [["response-2", "response-1", "response-3"], None, ["response-1", "response-2", "response-3"]],
    "order.responses.users": ["u1", "u2", "u3"],
    "order.responses.status": ["submitted", "discarded", "draft"],
    "order.suggestion": None,
}
ARGILLA_NESTED = {
    "id": "7d0f",
    "fields": {
        "prompt": [{"role": "user", "content": "Which?"}],
        "answer_a": "one",
        "answer_b": "two",
    },
    "metadata": {},
    "suggestions": {},
    "responses": {
        "best": [
            {"value": "answer_b", "user_id": "u1"},
            {"value": "tie", "user_id": "u2"},
            {"value": "both bad", "user_id": "u3"},
            {"value": [{"value": "answer_a", "rank": 1}, {"value": "answer_b", "rank": 1}], "user_id": "u4"},
        ]
    },
    "status": "completed",
}

STUDIO_MIN = [
    {
        "prompt": "Which?",
        "text1": "left text",
        "text2": "right text",
        "id": 17,
        "pw": [{"selected": "right"}],
        "annotator": 3,
        "annotation_id": 1001,
        "created_at": "2024-05-02T09:50:00.1Z",
        "updated_at": "2024-05-02T09:50:00.1Z",
        "lead_time": 4.288,
    },
    {
        "prompt": "Rank!",
        "items": [{"id": "m1", "body": "body 1"}, {"id": "m2", "body": "body 2"}, {"id": 3, "body": "body 3"}],
        "id": 18,
        "rank": [{"ranker": {"rank": ["m2", "3", "m1"]}}],
        "annotator": 4,
        "annotation_id": 1003,
        "created_at": "2024-05-02T09:51:00.1Z",
        "updated_at": "2024-05-02T09:51:00.1Z",
        "lead_time": 9.1,
        "agreement": 1.0,
    },
]
ARGILLA_1 = {
    "prompt": "Which?",
    "reply-1": "one",
    "reply-2": "two",
    "reply-3": "three",
    "order": [
        {
            "user_id": "u1",
            "value": {"rank": [1, 2, 2], "value": ["reply-2", "reply-1", "reply-3"]},
            "status": "submitted",
        },
        {
            "user_id": "u2",
            "value": [{"rank": 2, "value": "reply-1"}, {"rank": 1, "value": "reply-3"}],
            "status": "draft",
        },
        {"user_id": "u3", "value": None, "status": "discarded"},
    ],
    "order-suggestion": {"rank": [1, 2, 3], "value": ["reply-1", "reply-2", "reply-3"]},
    "order-suggestion-metadata": {"type": None, "score": None, "agent": None},
    "external_id": None,
    "metadata": "{}",
}


def written(rows: object, folder: Path, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


def said(labels: list[Labelled | Refusal]) -> list[tuple[str, str, tuple[int, ...]]]:
    assert all(isinstance(label, Labelled) for label in labels), labels
    return [(label.annotator, label.answer.kind, label.answer.ranks) for label in labels if isinstance(label, Labelled)]


def test_label_studios_short_form_says_the_same(tmp_path: Path) -> None:
    """JSON-MIN: one annotation per row beside the columns of its task, the annotator's number as the name."""
    labels = read_labels(written(STUDIO_MIN, tmp_path))
    assert said(labels) == [("3", "ranking", (2, 1)), ("4", "ranking", (3, 1, 2))]
    found = [label.item for label in labels if isinstance(label, Labelled)]
    full = read_labels(written([STUDIO_PAIR, STUDIO_RANK], tmp_path))
    assert {item.key for item in found} == {label.item.key for label in full if isinstance(label, Labelled)}
    (refused,) = read_labels(written([{**STUDIO_MIN[0], "pw": []}], tmp_path))
    assert isinstance(refused, Refusal) and "holds 0 results of type pairwise or ranker" in refused.reason


def test_argilla_1_says_it_by_columns(tmp_path: Path) -> None:
    """A ranking as `datasets` writes it, by name and rank; a draft is left out, a discarded response is a skip."""
    labels = read_labels(written([ARGILLA_1], tmp_path))
    assert said(labels) == [("u1", "ranking", (2, 1, 2)), ("u3", "skip", ())]
    item = labels[0].item if isinstance(labels[0], Labelled) else None
    assert item is not None and item.prompt == "Which?"
    assert [response.text for response in item.responses] == ["one", "two", "three"]
    choice = {**ARGILLA_1, "order": [{"user_id": "u1", "value": "reply-1", "status": "submitted"}]}
    two = {name: value for name, value in choice.items() if name != "reply-3"}
    assert said(read_labels(written([two], tmp_path))) == [("u1", "ranking", (1, 2))]
    other = {**ARGILLA_1, "why": [], "why-suggestion": None}
    (refused,) = read_labels(written([other], tmp_path))
    assert isinstance(refused, Refusal) and "answers order, why; name one" in refused.reason
    assert said(read_labels(written([other], tmp_path), Columns(question="order"))) == said(labels)


def test_label_studio_pairwise_and_ranker(tmp_path: Path) -> None:
    """The right text wins, a cancelled annotation is a skip, a ranker's ids become ranks of its items."""
    labels = read_labels(written([STUDIO_PAIR, STUDIO_RANK], tmp_path))
    assert said(labels) == [
        ("ann@example.org", "ranking", (2, 1)),
        ("4", "skip", ()),
        ("4", "ranking", (3, 1, 2)),
    ]
    pair_item, _, rank_item = (label.item for label in labels if isinstance(label, Labelled))
    assert (pair_item.prompt, [r.text for r in pair_item.responses]) == ("Which?", ["left text", "right text"])
    assert (rank_item.prompt, [r.text for r in rank_item.responses]) == ("Rank!", ["body 1", "body 2", "body 3"])


def test_left_is_the_first_column(tmp_path: Path) -> None:
    """The other side, so that one of them cannot be right by accident."""
    row = json.loads(json.dumps(STUDIO_PAIR))
    row["annotations"][0]["result"][0]["value"]["selected"] = "left"
    assert said(read_labels(written([row], tmp_path)))[0][2] == (1, 2)


@pytest.mark.parametrize("value", [["m2", "3", "m1"], {"_": [], "best": ["m2", "3", "m1"]}])
def test_label_studio_writes_one_list_in_several_ways(tmp_path: Path, value: object) -> None:
    """A bare list and a single filled bucket say the same."""
    row = json.loads(json.dumps(STUDIO_RANK))
    row["annotations"][0]["result"][0]["value"]["ranker"] = value
    assert said(read_labels(written([row], tmp_path))) == [("4", "ranking", (3, 1, 2))]


def test_argilla_flat_and_nested(tmp_path: Path) -> None:
    """Rankings by name, labels by name, ties, both bad; discarded is a skip and drafts are no labels."""
    labels = read_labels(written([ARGILLA_FLAT], tmp_path))
    assert said(labels) == [("u1", "ranking", (2, 1, 3)), ("u2", "skip", ())]
    labels = read_labels(written([ARGILLA_NESTED], tmp_path))
    assert said(labels) == [
        ("u1", "ranking", (2, 1)),
        ("u2", "ranking", (1, 1)),
        ("u3", "both_bad", ()),
        ("u4", "ranking", (1, 1)),
    ]
    assert isinstance(labels[0], Labelled)
    assert labels[0].item.prompt == (Message(role="user", content="Which?"),)


def test_columns_name_what_cannot_be_told(tmp_path: Path) -> None:
    """Without usual names a row is refused and says so; named, it is read."""
    row = json.loads(json.dumps(ARGILLA_NESTED))
    row["fields"] = {"ask": "Which?", "ours": "one", "theirs": "two"}
    row["responses"]["best"] = [{"value": "theirs", "user_id": "u1"}]
    row["responses"]["why"] = [{"value": "because", "user_id": "u1"}]
    path = written([row], tmp_path)
    (refusal,) = read_labels(path)
    assert isinstance(refusal, Refusal) and "name one with columns.question" in refusal.reason
    (refusal,) = read_labels(path, Columns(question="best"))
    assert isinstance(refusal, Refusal) and "cannot be told among ask, ours, theirs" in refusal.reason
    columns = Columns(prompt="ask", responses=("ours", "theirs"), question="best")
    assert said(read_labels(path, columns)) == [("u1", "ranking", (2, 1))]


@pytest.mark.parametrize(
    ("row", "where", "value", "problem"),
    [
        (STUDIO_PAIR, ("annotations", 0, "result", 0, "value", "selected"), "up", "left or right was expected"),
        (STUDIO_PAIR, ("annotations", 0, "completed_by"), None, "labels are per annotator"),
        (STUDIO_PAIR, ("annotations", 0, "result"), [], "holds 0 results"),
        (STUDIO_PAIR, ("data", "prompt"), " ", "white space"),
        (STUDIO_RANK, ("annotations", 0, "result", 0, "value", "ranker"), ["m1", "m2"], "every id of items"),
        (STUDIO_RANK, ("annotations", 0, "result", 0, "value", "ranker"), {"a": ["m1"], "b": ["m2"]}, "buckets"),
        (ARGILLA_FLAT, ("order.responses",), [["response-1"]], "1 values, 3 users"),
        (ARGILLA_FLAT, ("order.responses.users",), ["u1", 5, "u3"], "no user"),
        (ARGILLA_FLAT, ("order.responses", 0), ["response-1", "response-2"], "each of response_1"),
        (ARGILLA_NESTED, ("responses", "best", 0, "value"), 3, "a list of response names"),
    ],
)
def test_a_flawed_row_is_refused_with_its_place(
    tmp_path: Path, row: dict[str, object], where: tuple[str | int, ...], value: object, problem: str
) -> None:
    """Never half a guess: the row's place, the field and what was expected; the rows around it are read."""
    flawed = json.loads(json.dumps(row))
    at = flawed
    for step in where[:-1]:
        at = at[step]
    at[where[-1]] = value
    labels = read_labels(written([row, flawed], tmp_path))
    refusals = [label for label in labels if isinstance(label, Refusal)]
    assert len(refusals) == 1 and problem in str(refusals[0]) and refusals[0].origin == "rows.json:row 2"
    assert any(isinstance(label, Labelled) for label in labels)


def test_preference_files_are_labels_too(tmp_path: Path) -> None:
    """Pairs with their annotator, rankings, stated pairs that are a ranking; single labels are refused."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "ann"}) + "\n")
    assert said(read_labels(path)) == [("ann", "ranking", (1, 2))]
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 2]}) + "\n")
    assert said(read_labels(path)) == [("imported", "ranking", (2, 1, 2))]
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "pairs": [[1, 0]]}) + "\n")
    assert said(read_labels(path)) == [("imported", "ranking", (2, 1))]
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b", "c"], "pairs": [[0, 1], [1, 2], [2, 0]]}) + "\n")
    assert "not those of any ranking" in str(read_labels(path)[0])
    path.write_text(json.dumps({"prompt": "p", "completion": "a", "label": True}) + "\n")
    assert "a comparison needs two" in str(read_labels(path)[0])


def test_imported_labels_fill_their_places_once(new_database: NewDatabase, tmp_path: Path) -> None:
    """Importing twice adds nothing; the item is not asked again of whoever labelled it, nor beyond the overlap."""
    labels = [label for label in read_labels(written([STUDIO_PAIR], tmp_path)) if isinstance(label, Labelled)]
    store = opened(new_database(), [pair(1)])
    assert store.add_labels(labels) == Added(new=2, known=0)
    assert store.add_labels(labels) == Added(new=0, known=2)
    assert [task.item.prompt for task in store.next_tasks("someone", 9)] == ["question 1"]
    assert len(store.history("ann@example.org", 9)) == 1
    task = store.history("ann@example.org", 9)[0][0]
    assert store.revise("ann@example.org", task.id, FIRST, "k").answer == FIRST
