"""Preference layouts -> `RankedResponses` or `LabelledResponse`: which columns mean what, one function per layout.

`PREFERENCES` is the whole list. Nothing is repaired, skipped or guessed: a row is read, or refused by the field
that is wrong. Texts are kept to the character; docs/data.md shows each layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from preftune.data.fields import Completion, Fields, Flaw, Row, answer, conversation, describe, shared_prompt
from preftune.data.layouts import Items, Layout, Rows, each
from preftune.data.ranking import ranks_from_pairs, ranks_from_scores
from preftune.records import LabelledResponse, Prompt, RankedResponses, Refusal, Response

__all__ = ["PREFERENCES", "stated_pairs"]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

RATINGS = ("overall_score", "score", "fine-grained_score")
"""Where UltraFeedback keeps a completion's score; without any, the mean of its annotations' ratings is the score."""


def explicit(row: Fields) -> RankedResponses:
    """TRL's: prompt, chosen, rejected, each plain or messages."""
    return _pair(row, row.prompt("prompt"), [row.completion("chosen"), row.completion("rejected")])


def implicit(row: Fields) -> RankedResponses:
    """TRL's without prompt: it is what chosen and rejected begin with."""
    sides = [row.completion("chosen"), row.completion("rejected")]
    if any(side.conversational for side in sides):
        return _pair(row, None, sides)
    cut = _word_boundary(sides[0].text, sides[1].text)
    return _pair(row, sides[0].text[:cut], [Completion(side.field, side.text[cut:]) for side in sides])


def _word_boundary(chosen: str, rejected: str) -> int:
    """Where the common prompt ends: the last place at which the same word has just ended in both texts.

    White space after that word goes to the responses, and both keep a word. Cutting at the last common
    character instead would tear words apart ("It is b" + "lue" / "ig").
    """
    common = _common_length(chosen, rejected)
    last_word = min(len(chosen.rstrip()), len(rejected.rstrip()))
    for cut in range(min(common, last_word - 1), 0, -1):
        if chosen[cut].isspace() and rejected[cut].isspace() and not chosen[cut - 1].isspace():
            return cut
    raise Flaw("prompt", "is missing, and chosen and rejected share no whole first word to take for it")


def _common_length(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def transcripts(row: Fields) -> RankedResponses:
    """Anthropic's transcripts: prompt + response is the transcript, to the character."""
    (prompt, chosen), (other, rejected) = (_last_turn(row.text(side), side) for side in ("chosen", "rejected"))
    if prompt != other:
        at = _common_length(prompt, other) + 1
        raise Flaw("rejected", f"its history differs from that of chosen from character {at} on")
    return _pair(row, prompt, [Completion("chosen", chosen), Completion("rejected", rejected)])


def _last_turn(transcript: str, field: str) -> tuple[str, str]:
    """(all up to the last `Assistant:` and with it, the response after it with its leading space)."""
    before, mark, response = transcript.rpartition(ASSISTANT)
    if not mark or not transcript.startswith(HUMAN):
        raise Flaw(field, f"is no transcript: it must begin with {HUMAN!r} and hold {ASSISTANT!r}")
    if HUMAN in response:
        raise Flaw(field, "ends with a turn of Human, the last turn must be the Assistant's")
    if not response.strip():
        raise Flaw(field, "is empty in its last turn")
    return before + mark, response


def chosen_turn(row: Fields) -> RankedResponses:
    """LLaMA-Factory's: a conversation, and two messages that could continue it."""
    prompt = row.messages(row.first_of("conversations", "messages"))
    return _pair(row, prompt, [row.completion("chosen"), row.completion("rejected")])


def _pair(row: Fields, prompt: Prompt | None, sides: Sequence[Completion]) -> RankedResponses:
    scores = [row.optional_number(f"score_{side.field}") for side in sides]
    return RankedResponses(
        prompt=shared_prompt(prompt, sides),
        responses=tuple(Response(text=side.text, score=score) for side, score in zip(sides, scores, strict=True)),
        ranks=(1, 2),
        weight=row.weight(),
        annotator=row.annotator(),
        origin=row.origin,
    )


def ranking(row: Fields) -> RankedResponses:
    """`ranking[i]` is the rank of `responses[i]`: 1 is best, equal numbers tie; `pairs`, if given, stand above it."""
    given = row.prompt("prompt")
    responses = row.completions("responses")
    _at_least_two("responses", responses)
    ranks = row.integers("ranking")
    if len(ranks) != len(responses):
        raise Flaw("ranking", f"has {len(ranks)} ranks for {len(responses)} responses")
    for i, rank in enumerate(ranks):
        if rank < 1:
            raise Flaw(f"ranking[{i}]", f"is {rank}, ranks count from 1 (the best; equal ranks tie)")
    return RankedResponses(
        prompt=shared_prompt(given, responses),
        responses=tuple(Response(text=response.text) for response in responses),
        ranks=ranks_from_scores([-rank for rank in ranks]),
        pairs=None if row.optional("pairs") is None else _positions(row, len(responses)),
        weight=row.weight(),
        annotator=row.annotator(),
        origin=row.origin,
    )


def stated_pairs(row: Fields) -> RankedResponses:
    """The original DPO repository's: responses, and pairs of [chosen, rejected] positions into them."""
    given = row.prompt("prompt")
    responses = row.completions("responses")
    _at_least_two("responses", responses)
    pairs = _positions(row, len(responses))
    return RankedResponses(
        prompt=shared_prompt(given, responses),
        responses=tuple(Response(text=response.text) for response in responses),
        ranks=ranks_from_pairs(len(responses), pairs),
        pairs=pairs,
        weight=row.weight(),
        origin=row.origin,
    )


def _positions(row: Fields, k: int) -> tuple[tuple[int, int], ...]:
    pairs = row.integer_pairs("pairs")
    for i, (chosen, rejected) in enumerate(pairs):
        if chosen == rejected or not (0 <= chosen < k and 0 <= rejected < k):
            wanted = f"two different positions from 0 to {k - 1} were expected"
            raise Flaw(f"pairs[{i}]", f"is [{chosen}, {rejected}], {wanted}")
    return tuple(pairs)


def _at_least_two(field: str, responses: Sequence[object]) -> None:
    if len(responses) < 2:
        raise Flaw(field, f"holds {len(responses)}, a preference needs at least 2")


def scored_completions(row: Fields) -> RankedResponses:
    """UltraFeedback's: an instruction, and completions that carry their scores."""
    completions = row.list_of_fields("completions")
    _at_least_two("completions", completions)
    prompt = row.prompt(row.first_of("instruction", "prompt"))
    texts = [completion.completion("response") for completion in completions]
    scores = _ratings(completions)
    authors = [completion.optional("model") for completion in completions]
    return RankedResponses(
        prompt=shared_prompt(prompt, texts),
        responses=tuple(
            Response(text=response.text, score=score, provenance=author if isinstance(author, str) else "")
            for response, score, author in zip(texts, scores, authors, strict=True)
        ),
        ranks=ranks_from_scores(scores),
        weight=row.weight(),
        origin=row.origin,
    )


def _ratings(completions: Sequence[Fields]) -> list[float]:
    """One score per completion, all from the same place: scores of different scales do not compare."""
    for name in RATINGS:
        if any(completion.optional(name) is not None for completion in completions):
            return [completion.number(name, text=True) for completion in completions]
    if not all(completion.has("annotations") for completion in completions):
        return [completion.number(RATINGS[0]) for completion in completions]
    annotations = [completion.fields("annotations") for completion in completions]
    for other in annotations:
        if not other.values or set(other.values) != set(annotations[0].values):
            raise Flaw(other.path.rstrip("."), "rates no aspect, or others than those of completions[0]")
    return [fmean(a.fields(aspect).number("Rating", text=True) for aspect in sorted(a.values)) for a in annotations]


def comparisons(row: Fields) -> RankedResponses:
    """OpenAI's summarize-from-feedback, with the query its authors used. https://arxiv.org/abs/2009.01325"""
    info, summaries, choice = row.fields("info"), row.list_of_fields("summaries"), row.integer("choice")
    if len(summaries) != 2:
        raise Flaw("summaries", f"holds {len(summaries)}, 2 were expected")
    if choice not in (0, 1):
        raise Flaw("choice", f"is {choice}, 0 or 1 was expected")
    if info.optional("article") is not None:
        prompt = f"Article:\n\n{info.text('article')}\n\nTL;DR:"
    else:
        forum = "" if info.optional("subreddit") is None else f"SUBREDDIT: r/{info.text('subreddit')}\n\n"
        title = "" if info.optional("title") is None else f"TITLE: {info.text('title')}\n\n"
        prompt = f"{forum}{title}POST: {info.text('post')}\n\nTL;DR:"
    authors = [summary.optional("policy") for summary in summaries]
    worker = row.optional("worker")
    return RankedResponses(
        prompt=prompt,
        responses=tuple(
            Response(text=summary.text("text"), provenance=author if isinstance(author, str) else "")
            for summary, author in zip(summaries, authors, strict=True)
        ),
        ranks=(1, 2) if choice == 0 else (2, 1),
        weight=row.weight(),
        annotator=worker if isinstance(worker, str) else "",
        origin=row.origin,
    )


def scored_table(rows: Rows) -> Items:
    """prompt, response, score: the rows of one prompt, wherever they stand, become one record with all their places.

    Refused rows come as they are met, records after the last row, in the order of the prompts' first rows.
    """
    origins: dict[Prompt, list[str]] = {}
    responses: dict[Prompt, list[Response]] = {}
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        try:
            prompt, response = _score_row(row)
        except Flaw as flaw:
            yield Refusal(origin=row.origin, field=flaw.field, reason=flaw.reason)
            continue
        origins.setdefault(prompt, []).append(row.origin)
        responses.setdefault(prompt, []).append(response)
    for prompt, places in origins.items():
        file = places[0].rpartition(":")[0] + ":"
        origin = ",".join([places[0], *(place.removeprefix(file) for place in places[1:])])
        if len(places) < 2:
            reason = "has one response in the whole table, a preference needs at least 2"
            yield Refusal(origin=origin, field="prompt", reason=reason)
        else:
            scores = [response.score for response in responses[prompt] if response.score is not None]
            ranks = ranks_from_scores(scores)
            yield RankedResponses(prompt=prompt, responses=tuple(responses[prompt]), ranks=ranks, origin=origin)


def _score_row(row: Row) -> tuple[Prompt, Response]:
    fields = Fields(row)
    fields.refuse_unread()
    if fields.optional("weight") is not None:
        raise Flaw("weight", "is given, but the rows of a scored table become pairs, which it does not weigh")
    prompt, completion = fields.prompt("prompt"), fields.completion("response")
    fields.refuse_lost([prompt] if isinstance(prompt, str) else [message.content for message in prompt])
    return shared_prompt(prompt, [completion]), Response(text=completion.text, score=fields.number("score"))


def unpaired(row: Fields) -> LabelledResponse:
    """KTO's: one response, after a prompt or as the end of a conversation, and the label that calls it good or bad."""
    prompt, text = conversation(row) if _is_conversation(row.values) else answer(row)
    wanted = "true or false (1 or 0)"
    label, desirable = row.get("label", wanted), row.truth("label")
    if desirable is None:
        raise Flaw("label", f"is {describe(label)}, {wanted} was expected")
    return LabelledResponse(
        prompt=prompt,
        response=Response(text=text),
        desirable=desirable,
        weight=row.weight(),
        annotator=row.annotator(),
        origin=row.origin,
    )


def _has(*columns: str, none_of: Sequence[str] = ()) -> Callable[[Mapping[str, object]], bool]:
    return lambda row: all(column in row for column in columns) and not any(column in row for column in none_of)


def _is_transcript(row: Mapping[str, object]) -> bool:
    text = row.get("chosen")
    return isinstance(text, str) and text.startswith(HUMAN) and ASSISTANT in text and _has_no_prompt(row)


def _is_turn(row: Mapping[str, object]) -> bool:
    conversation = "conversations" in row or "messages" in row
    return conversation and "prompt" not in row and _pair_columns(row) and not isinstance(row["chosen"], list | str)


def _is_conversation(row: Mapping[str, object]) -> bool:
    return ("messages" in row or "conversations" in row) and "prompt" not in row


def _is_labelled(row: Mapping[str, object]) -> bool:
    after_prompt = "prompt" in row and ("completion" in row or "response" in row)
    return "label" in row and "chosen" not in row and (after_prompt or _is_conversation(row))


_pair_columns = _has("chosen", "rejected")
_has_no_prompt = _has("chosen", "rejected", none_of=["prompt"])

PREFERENCES: dict[str, Layout] = {
    "trl": Layout(
        "prompt, chosen, rejected[, weight, annotator]", _has("prompt", "chosen", "rejected"), each(explicit)
    ),
    "trl_implicit": Layout(
        "chosen, rejected, both beginning with the prompt",
        lambda row: _has_no_prompt(row) and not _is_transcript(row) and not _is_turn(row),
        each(implicit),
    ),
    "hh": Layout("chosen, rejected as \\n\\nHuman: / \\n\\nAssistant: transcripts", _is_transcript, each(transcripts)),
    "turns": Layout("conversations or messages, chosen, rejected (one message each)", _is_turn, each(chosen_turn)),
    "dpo_repo": Layout(
        "prompt, responses, pairs[, sft_target], or a JSON object prompt -> {responses, pairs}",
        _has("prompt", "responses", "pairs", none_of=["ranking"]),
        each(stated_pairs),
        order="pairs",
    ),
    "ranking": Layout(
        "prompt, responses, ranking[, pairs, weight, annotator]",
        _has("prompt", "responses", "ranking"),
        each(ranking),
        order="ranking",
    ),
    "ultrafeedback": Layout(
        "instruction or prompt, completions (response and overall_score, score, fine-grained_score or annotations)",
        lambda row: "completions" in row and ("instruction" in row or "prompt" in row),
        each(scored_completions),
        order="completions",
    ),
    "summarize_feedback": Layout(
        "info, summaries, choice", _has("info", "summaries", "choice"), each(comparisons), order="choice"
    ),
    "scored_table": Layout(
        "prompt, response, score (the rows of one prompt form a record)",
        _has("prompt", "response", "score"),
        scored_table,
        order="score",
    ),
    "unpaired": Layout(
        "prompt and completion or response (or messages, or conversations), label[, weight, annotator]",
        _is_labelled,
        each(unpaired),
    ),
}
