"""Answers of a file of samples on its page: which are shown, by which rule, and how long all are."""

from preftune.records import Response, RunCard, SampledResponses
from preftune.reports.html import render
from preftune.reports.reading import Answer, RunFolder
from preftune.reports.telling import answer_groups, by_sampler, sentence

SETTINGS = "model=abc temperature=1 top_p=1 max_tokens=64"


def response(text, seed=0, engine="local", tokens=None):
    told = f"{SETTINGS} seed={seed} engine={engine}" + ("" if tokens is None else f" tokens={tokens}")
    return Response(text=text, provenance=told)


def line(prompt, texts, key="k", **more):
    return SampledResponses(prompt=prompt, responses=tuple(response(text, **more) for text in texts), key=key)


def run(lines, stage="sample", **config):
    card = RunCard(stage=stage, status="done", config={"seed": 0, **config})
    answers = tuple(Answer(record=row, origin=f"s.jsonl:{i}") for i, row in enumerate(lines, start=1))
    return RunFolder(card=card, stages=(), answers=answers, card_file="s.jsonl.run.json")


def groups(lines):
    return {group.title: group for group in answer_groups(run(lines))}


def test_the_longest_and_the_shortest_are_of_all_answers_with_their_numbers():
    """Also beyond the fourth answer to a prompt, and in a line that goes on from number 2."""
    lines = [line(f"p{i}", [f"some text {i}{j}" for j in range(6)]) for i in range(3)]
    lines.append(line("p0", ["x", "long " * 20], key="k+2"))
    lines.append(line("p1", [f"some text {j}" for j in range(5)] + ["longer " * 30]))
    found = groups(lines)
    longest = [(row.sides[0].name, row.origin) for row in found["Longest"].rows]
    assert longest[:2] == [("response 6", "s.jsonl:5"), ("response 4", "s.jsonl:4")] and len(longest) == 4
    shortest = found["Shortest"].rows[0]
    assert (shortest.sides[0].text, shortest.sides[0].name, shortest.origin) == ("x", "response 3", "s.jsonl:4")
    assert shortest.verdict == "1 more response to it" and found["Longest"].rows[0].verdict == "5 more responses to it"


def test_a_line_shows_four_answers_and_says_how_many_it_does_not():
    """Of six: four side by side, two more."""
    (row,) = groups([line("p", list("abcdef"))])["At random"].rows
    assert [side.text for side in row.sides] == list("abcd") and row.verdict == "2 more responses to it"


def test_what_is_said_again_is_counted():
    """The answer that came most often to a prompt; none where all differ; the prompt with most copies first."""
    found = groups([line("p", ["a", "b", "a"]), line("q", list("cde")), line("r", ["f", "f", "f", "g"])])
    shown = [(row.sides[0].text, row.sides[0].name) for row in found["Said again"].rows]
    assert shown == [("f", "3 of 4 responses to it"), ("a", "2 of 3 responses to it")]
    assert "of 2 prompts that got one answer several times" in found["Said again"].rule
    assert "Said again" not in groups([line("p", list("ab"))])


def test_samplers_are_called_by_what_they_do_not_share():
    """Nothing where one wrote all; the seed of a server's task tells nothing; free text is one sampler."""
    assert list(by_sampler(run([line("p", "a", tokens=1), line("q", "b", tokens=2)]).answers)) == [""]
    assert list(by_sampler(run([line("p", "a"), line("p", "b", seed=1)]).answers)) == ["seed=0", "seed=1"]
    served = [line(f"p{i}", "a", seed=i, engine="http://h/v1") for i in range(5)]
    assert list(by_sampler(run(served).answers)) == [""]
    free = SampledResponses(prompt="p", responses=(Response(text="a", provenance="written by hand"),))
    assert list(by_sampler(run([free]).answers)) == [""]


def test_more_samplers_than_are_shown_are_named():
    """Three have their groups, the others are told by name."""
    found = groups([line("p", "a", seed=seed) for seed in range(5)])
    assert "At random (seed=2)" in found and "At random (seed=3)" not in found
    assert found["2 more"].rule == "not shown: seed=3, seed=4"


def test_lengths_are_those_of_the_tokens_or_of_words_where_they_are_not_counted():
    """Every answer in its bin; a sampler that counts none puts all in words."""
    counted = [line("p", ["a b c", "a"], tokens=7), line("q", ["d"], tokens=3)]
    figure = render(run(counted)).partition("length of answers")[2].partition("</figure>")[0]
    assert "length, tokens (answers, %)" in figure and "all: mean 5.67 of 3" in figure
    told = render(run([*counted, line("r", ["e f"])]))
    figure = told.partition("length of answers")[2].partition("</figure>")[0]
    assert "length, words (answers, %)" in figure and "all: mean 1.75 of 4" in figure
    assert "length of answers" not in render(run([]))


def test_a_file_of_samples_is_told_in_a_sentence():
    """The model here or behind a server; how many answers to how many prompts."""
    settings = {"n": 4, "temperature": 0.7, "top_p": 1.0, "max_tokens": 64}
    results = {"responses": 1200, "answered": 300, "prompts": 301}
    local = RunCard(
        stage="sample", status="done", results=results, config={**settings, "model": "m", "prompts": "p.jsonl"}
    )
    assert sentence(local) == (
        "4 responses of m to each prompt of p.jsonl, temperature 0.7, top_p 1.0, at most 64 tokens: "
        "1,200 responses to 300 of 301 prompts"
    )
    engine = {**settings, "model": None, "engine": "http://h", "engine_model": "m", "prompts": "p"}
    served = RunCard(stage="sample", status="failed", config=engine)
    assert sentence(served).startswith("4 responses of m at http://h to each prompt of p, temperature")
