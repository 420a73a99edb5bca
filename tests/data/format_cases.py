"""One `Case` per preference layout: rows as people write them, and the records they are."""

from __future__ import annotations

from typing import Any

from source_contract import Case

from preftune.records import LabelledResponse, Message, RankedResponses, Response

__all__ = ["HI", "PING", "PING_JSON", "PREFERENCE_CASES", "said"]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(
    prompt: Any, chosen: str, rejected: str, line: int, scores: tuple[Any, Any] = (None, None), **changes: Any
) -> Any:
    responses = (Response(text=chosen, score=scores[0]), Response(text=rejected, score=scores[1]))
    return RankedResponses(prompt=prompt, responses=responses, ranks=(1, 2), origin=str(line), **changes)


HI = Message(role="user", content="Hi")
PING = (Message(role="system", content=""), HI, Message(role="assistant", content="Yes?"), HI)
PING_JSON = [said(m.role, m.content) for m in PING]

TRL = Case(
    "trl",
    rows=[
        {"prompt": "Hi", "chosen": " Hello. ", "rejected": "No\n", "weight": 2.5, "annotator": "ann"},
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "weight": None, "score_chosen": 3, "score_rejected": 4.5},
        {"prompt": [said("user", "Hi")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
        # Stored whole: the prompt stands in front of both answers (as text, then as messages); it counts once.
        {
            "prompt": "Hi",
            "chosen": [said("user", "Hi"), said("assistant", "a")],
            "rejected": [said("user", "Hi"), said("assistant", "b")],
        },
        {
            "prompt": PING_JSON,
            "chosen": [*PING_JSON, said("assistant", "a")],
            "rejected": [*PING_JSON, said("assistant", "b")],
        },
        # A common beginning of the answers joins the prompt.
        {
            "prompt": PING_JSON[:2],
            "chosen": [*PING_JSON[2:], said("assistant", "a")],
            "rejected": [*PING_JSON[2:], said("assistant", "b")],
        },
        {"prompt": "Hi", "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
    ],
    records=[
        pair("Hi", " Hello. ", "No\n", 1, weight=2.5, annotator="ann"),
        pair("Hi", "a", "b", 2, scores=(3.0, 4.5)),
        pair((HI,), "a", "b", 3),
        pair((HI,), "a", "b", 4),
        pair(PING, "a", "b", 5),
        pair(PING, "a", "b", 6),
        pair((HI,), "a", "b", 7),
    ],
    best=[" Hello. ", *"aaaaaa"],
    required=["prompt", "chosen", "rejected"],
    broken=[
        ({"weight": 0}, "weight"),
        ({"weight": "2"}, "weight"),
        ({"annotator": 7}, "annotator"),
        ({"score_chosen": float("nan")}, "score_chosen"),
        ({"images": ["cat.png"]}, "images"),
        ({"chosen": [said("assistant", "a")]}, "rejected"),
        ({"chosen": [said("user", "a")], "rejected": [said("assistant", "b")]}, "chosen"),
        ({"prompt": "  "}, "prompt"),
    ],
)

IMPLICIT = Case(
    "trl_implicit",
    rows=[
        {"chosen": "The sky is blue", "rejected": "The sky is big"},
        {"chosen": "The sky is blue", "rejected": "The sky is blue and vast"},
        {"chosen": "Q: why?\nA: so", "rejected": "Q: why? no"},
        {"chosen": "same same", "rejected": "same same"},
        {
            "chosen": [said("user", "Hi"), said("assistant", "a")],
            "rejected": [said("user", "Hi"), said("assistant", "b")],
        },
    ],
    records=[
        pair("The sky is", " blue", " big", 1),
        pair("The sky is", " blue", " blue and vast", 2),
        pair("Q: why?", "\nA: so", " no", 3),
        pair("same", " same", " same", 4),
        pair((HI,), "a", "b", 5),
    ],
    best=[" blue", " blue", "\nA: so", " same", "a"],
    required=["chosen", "rejected"],
    broken=[
        ({"chosen": "A ", "rejected": "B!"}, "prompt"),
        ({"chosen": "nothing", "rejected": "in common"}, "prompt"),
        ({"chosen": "one", "rejected": "one"}, "prompt"),
        ({"chosen": " x", "rejected": " y"}, "prompt"),
        ({"chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}, "chosen"),
        (
            {
                "chosen": [said("user", "Hi"), said("assistant", "a")],
                "rejected": [said("user", "Ho"), said("assistant", "b")],
            },
            "rejected",
        ),
    ],
)

TALK = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go on\n\nAssistant:"
HH = Case(
    "hh",
    rows=[
        {"chosen": f"{TALK} Right.", "rejected": f"{TALK} No, \n\nhm"},
        {"chosen": f"{TALK}a", "rejected": f"{TALK} a"},
    ],
    records=[pair(TALK, " Right.", " No, \n\nhm", 1), pair(TALK, "a", " a", 2)],
    best=[" Right.", "a"],
    required=["chosen", "rejected"],
    broken=[
        ({"chosen": "\n\nHuman: Hi"}, "chosen"),
        ({"chosen": f"System: {TALK} a"}, "chosen"),
        ({"rejected": f"{TALK} "}, "rejected"),
        ({"rejected": f"{TALK} a\n\nHuman: b"}, "rejected"),
        ({"rejected": "\n\nHuman: Hi\n\nAssistant: Yes!\n\nHuman: Go on\n\nAssistant: a"}, "rejected"),
    ],
)

TURNS = Case(
    "turns",
    rows=[
        {
            "conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"messages": PING_JSON, "chosen": said("assistant", "a"), "rejected": said("assistant", "b"), "weight": 3},
    ],
    records=[pair(PING[:2], "a", "b", 1), pair(PING, "a", "b", 2, weight=3.0)],
    best=["a", "a"],
    required=["conversations", "chosen", "rejected"],
    broken=[
        ({"chosen": {"from": "human", "value": "a"}}, "chosen"),
        ({"chosen": {"from": "observation", "value": "a"}}, "chosen.from"),
        ({"rejected": {"from": "gpt", "value": ""}}, "rejected.value"),
        ({"conversations": []}, "conversations"),
        ({"conversations": [{"from": "human", "value": ""}]}, "conversations[0].value"),
    ],
)

ABC = (Response(text="a"), Response(text="b"), Response(text="c"))
STATED = Case(
    "dpo_repo",
    rows=[
        {"prompt": "Hi", "responses": ["a", "b", "c"], "pairs": [[2, 0], [2, 1]], "sft_target": "c!"},
        {"prompt": "Ho", "responses": ["a", "b", "c"], "pairs": [[0, 1]], "weight": 2},
    ],
    records=[
        RankedResponses(prompt="Hi", responses=ABC, ranks=(2, 2, 1), pairs=((2, 0), (2, 1)), origin="1"),
        RankedResponses(prompt="Ho", responses=ABC, ranks=(1, 3, 2), pairs=((0, 1),), weight=2.0, origin="2"),
    ],
    best=["c!", "a"],
    required=["prompt", "responses", "pairs"],
    broken=[
        ({"pairs": [[0, 1], [0, 3]]}, "pairs[1]"),
        ({"pairs": [[1, 1]]}, "pairs[0]"),
        ({"pairs": [[-1, 1]]}, "pairs[0]"),
        ({"pairs": [[0, 1.5]]}, "pairs[0][1]"),
        ({"pairs": [0, 1]}, "pairs[0]"),
        ({"pairs": []}, "pairs"),
        ({"responses": ["a"]}, "responses"),
        ({"responses": ["a", ""]}, "responses[1]"),
        ({"responses": ["a", None]}, "responses[1]"),
    ],
)

RANKING = Case(
    "ranking",
    rows=[
        {"prompt": "Hi", "responses": ["a", "b", "c"], "ranking": [2, 1, 2]},
        {"prompt": "Hi", "responses": ["a", "b", "c"], "ranking": [1.0, 7, 3], "pairs": [[1, 0]]},
    ],
    records=[
        RankedResponses(prompt="Hi", responses=ABC, ranks=(2, 1, 2), origin="1"),
        RankedResponses(prompt="Hi", responses=ABC, ranks=(1, 3, 2), pairs=((1, 0),), origin="2"),
    ],
    best=["b", "a"],
    required=["prompt", "responses", "ranking"],
    broken=[
        ({"ranking": [1, 2]}, "ranking"),
        ({"ranking": [0, 1, 2]}, "ranking[0]"),
        ({"ranking": [1, "2", 3]}, "ranking[1]"),
        ({"ranking": [1, 1, 1]}, "ranking"),
        ({"pairs": [[0, 9]]}, "pairs[0]"),
    ],
)


def annotated(*ratings: str) -> dict[str, dict[str, str]]:
    return {aspect: {"Rating": rating} for aspect, rating in zip(("honesty", "helpfulness"), ratings, strict=True)}


ULTRA = Case(
    "ultrafeedback",
    rows=[
        {
            "instruction": "Hi",
            "completions": [
                {"response": "a", "overall_score": 6, "fine-grained_score": 9, "model": "m1"},
                {"response": "b", "overall_score": 8.5, "fine-grained_score": 1, "model": "m2"},
            ],
        },
        {
            "prompt": "Hi",
            "completions": [
                {"response": "a", "annotations": annotated("4", "5")},
                {"response": "b", "annotations": annotated("4", "4")},
                {"response": "c", "annotations": annotated("5", "3")},
            ],
        },
    ],
    records=[
        RankedResponses(
            prompt="Hi",
            responses=(Response(text="a", score=6.0, provenance="m1"), Response(text="b", score=8.5, provenance="m2")),
            ranks=(2, 1),
            origin="1",
        ),
        RankedResponses(
            prompt="Hi",
            responses=(Response(text="a", score=4.5), Response(text="b", score=4.0), Response(text="c", score=4.0)),
            ranks=(1, 2, 2),
            origin="2",
        ),
    ],
    best=["b", "a"],
    required=["instruction", "completions"],
    broken=[
        ({"completions": [{"response": "a", "overall_score": 6}, {"response": "b"}]}, "completions[1].overall_score"),
        ({"completions": [{"response": "a"}, {"response": "b"}]}, "completions[0].overall_score"),
        (
            {"completions": [{"response": "a", "overall_score": 6, "score": 1}, {"response": "b", "score": 2}]},
            "completions[1].overall_score",
        ),
        ({"completions": [{"response": "a", "score": 1}, {"score": 2}]}, "completions[1].response"),
        ({"completions": [{"response": "a", "score": 1}, {"response": "b", "score": 1}]}, "completions"),
        ({"completions": [{"response": "a", "score": 1}]}, "completions"),
        ({"completions": [{"response": "a", "score": 1}, "b"]}, "completions[1]"),
        (
            {
                "completions": [
                    {"response": "a", "annotations": annotated("4", "N/A")},
                    {"response": "b", "annotations": annotated("4", "5")},
                ]
            },
            "completions[0].annotations.helpfulness.Rating",
        ),
        (
            {
                "completions": [
                    {"response": "a", "annotations": annotated("4", "5")},
                    {"response": "b", "annotations": {"honesty": {"Rating": "4"}}},
                ]
            },
            "completions[1].annotations",
        ),
    ],
)

SUMMARIES = [{"text": " a", "policy": "sup4"}, {"text": " b", "policy": "ref"}]
TLDR = Case(
    "summarize_feedback",
    rows=[
        {
            "info": {"post": "I came.\n\nI saw.", "title": "Veni", "subreddit": "rome", "id": "t3_1"},
            "summaries": SUMMARIES,
            "choice": 1,
            "worker": "w7",
        },
        {"info": {"article": "News.", "title": "T", "post": None}, "summaries": SUMMARIES, "choice": 0},
        {"info": {"post": "I came.", "title": "Veni"}, "summaries": SUMMARIES, "choice": 0},
    ],
    records=[
        RankedResponses(
            prompt=prompt,
            responses=(Response(text=" a", provenance="sup4"), Response(text=" b", provenance="ref")),
            ranks=ranks,
            annotator=worker,
            origin=origin,
        )
        for prompt, ranks, worker, origin in (
            ("SUBREDDIT: r/rome\n\nTITLE: Veni\n\nPOST: I came.\n\nI saw.\n\nTL;DR:", (2, 1), "w7", "1"),
            ("Article:\n\nNews.\n\nTL;DR:", (1, 2), "", "2"),
            ("TITLE: Veni\n\nPOST: I came.\n\nTL;DR:", (1, 2), "", "3"),
        )
    ],
    best=[" b", " a", " a"],
    required=["info", "summaries", "choice"],
    broken=[
        ({"choice": 2}, "choice"),
        ({"choice": "1"}, "choice"),
        ({"summaries": SUMMARIES[:1]}, "summaries"),
        ({"summaries": [SUMMARIES[0], {"text": ""}]}, "summaries[1].text"),
        ({"info": {"title": "Veni"}}, "info.post"),
    ],
)

TABLE = Case(
    "scored_table",
    rows=[
        {"prompt": "Hi", "response": "a", "score": 1},
        {"prompt": "Ho", "response": "c", "score": -1},
        {"prompt": "Hi", "response": "b", "score": 2.5},
        {"prompt": [said("user", "Hi")], "response": [said("assistant", "a")], "score": 1},
        {"prompt": "Ho", "response": "d", "score": -2},
        {"prompt": "Hi", "response": "c", "score": 1},
        {"prompt": [said("user", "Hi")], "response": [said("assistant", "b")], "score": 0},
    ],
    records=[
        RankedResponses(
            prompt=prompt,
            responses=tuple(Response(text=text, score=score) for text, score in scored),
            ranks=ranks,
            origin=origin,
        )
        for prompt, scored, ranks, origin in (
            ("Hi", [("a", 1.0), ("b", 2.5), ("c", 1.0)], (2, 1, 2), "1,3,6"),
            ("Ho", [("c", -1.0), ("d", -2.0)], (1, 2), "2,5"),
            ((HI,), [("a", 1.0), ("b", 0.0)], (1, 2), "4,7"),
        )
    ],
    best=["b", "c", "a"],
    required=["prompt", "response", "score"],
    broken=[
        ({"score": float("inf")}, "score"),
        ({"score": "high"}, "score"),
        ({"response": ""}, "response"),
        ({"prompt": "alone"}, "prompt"),
        ({"weight": 2}, "weight"),
    ],
)


def labelled(prompt: Any, text: str, desirable: bool, line: int, **changes: Any) -> Any:
    response = Response(text=text)
    return LabelledResponse(prompt=prompt, response=response, desirable=desirable, origin=str(line), **changes)


UNPAIRED = Case(
    "unpaired",
    rows=[
        {"prompt": "Hi", "completion": " a ", "label": True, "weight": 2.5},
        {"prompt": "Hi", "response": "b", "label": 0, "annotator": "w7"},
        {"prompt": [said("user", "Hi")], "completion": [said("assistant", "c")], "label": 1.0},
        {"messages": [*PING_JSON, said("assistant", "d")], "label": False, "annotator": None},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "e"}], "label": True},
    ],
    records=[
        labelled("Hi", " a ", True, 1, weight=2.5),
        labelled("Hi", "b", False, 2, annotator="w7"),
        labelled((HI,), "c", True, 3),
        labelled(PING, "d", False, 4),
        labelled((HI,), "e", True, 5),
    ],
    required=["prompt", "completion", "label"],
    truths=["label"],
    broken=[
        ({"label": -1}, "label"),
        ({"label": "true"}, "label"),
        ({"label": float("nan")}, "label"),
        ({"completion": " "}, "completion"),
        ({"completion": [said("user", "a")]}, "completion"),
        ({"weight": 0}, "weight"),
        ({"annotator": 7}, "annotator"),
        ({"tools": [1]}, "tools"),
    ],
)

PREFERENCE_CASES = [TRL, IMPLICIT, HH, TURNS, STATED, RANKING, ULTRA, TLDR, TABLE, UNPAIRED]
