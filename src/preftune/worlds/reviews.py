"""Short film reviews from a grammar written for this project, with a ground-truth sentiment in [0, 1].

    prompt     "For a thriller, the pacing was not"
    response   " very good, but the ending felt truly superb."

A prompt ends in a verb or in a negation, so the same word may praise after one prompt and blame after another:
the reward reads prompt and response together and is no sum over words. A response is one to three clauses

    clause    = [negation] [intensifier] opinion
    response  = clause { link "the" aspect verb clause } "."        link = ", and" | ", but" | ", while" | "."

The reward of a response, for any text whatever:

    clause value   = valence(opinion) * strengths of its intensifiers, cut to [-1, 1], times the factor of its
                     negation (< 0); 0 when it says nothing new: an aspect or an opinion word for the second time
    sentiment      = mean of the clause values, where a clause after "but" counts twice          in [-1, 1]
    legible        = share of the response's words and marks that belong to its longest beginning that follows
                     the grammar                                                                  in [0, 1]
    reward         = legible * (1 + sentiment) / 2                                                in [0, 1]

It is a mean, not a sum, so longer is not better; repetition and word salad are illegible or worth nothing; the empty
response has reward 0. Preferences follow Bradley-Terry: P(first preferred) = sigmoid(scale * (reward_1 - reward_2)).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

from preftune.records import Demonstration, Judgement, Response

__all__ = ["corpus", "judge", "preference_probability", "prompts", "reward", "vocabulary"]

# How strongly a word praises (> 0) or blames (< 0). Praise and blame mirror each other, so the corpus is balanced.
OPINIONS = {
    "decent": 0.3, "pleasant": 0.4, "good": 0.5, "charming": 0.6, "lovely": 0.7,
    "weak": -0.3, "dull": -0.4, "bad": -0.5, "clumsy": -0.6, "tedious": -0.7,
    "excellent": 0.8, "wonderful": 0.85, "superb": 0.9, "brilliant": 1.0,
    "awful": -0.8, "terrible": -0.85, "dreadful": -0.9, "horrible": -1.0,
}  # fmt: skip
EXTREME = 0.8  # from this strength on a word takes "utterly" rather than "very"
INTENSIFIERS = {"fairly": 0.7, "rather": 0.8, "really": 1.2, "very": 1.4}
INTENSIFIERS_OF_EXTREMES = {"simply": 1.05, "truly": 1.1, "utterly": 1.2}
STRENGTHS = INTENSIFIERS | INTENSIFIERS_OF_EXTREMES
NEGATIONS = {"not": -0.6, "hardly": -0.5}
INTENSIFIERS_AFTER_NOT = ("really", "very")
LINKS = (", and", ", but", ", while", ".")

VERBS = ("was", "felt", "seemed")
ASPECTS = (
    "acting", "casting", "dialogue", "direction", "editing", "ending", "humour", "lighting",
    "music", "pacing", "photography", "plot", "script", "soundtrack", "story",
)  # fmt: skip
GENRES = (
    "comedy", "documentary", "drama", "film", "movie", "musical", "remake", "sequel", "thriller", "western",
)  # fmt: skip
OPENINGS = (
    "The {aspect} in this {genre}",
    "In this {genre}, the {aspect}",
    "For a {genre}, the {aspect}",
    "Even for a {genre}, the {aspect}",
    "As in every {genre}, the {aspect}",
    "Compared to the last {genre}, the {aspect}",
    "The {aspect} of this new {genre}",
    "I must say that in this {genre} the {aspect}",
    "I thought the {aspect}",
    "To be honest, the {aspect}",
    "In the end, the {aspect}",
    "This time the {aspect}",
)
ENDINGS = (*VERBS, "was not", "was hardly")
HELD_OUT = 500

# One letter per word turns the grammar into a regular expression.
TAGS = (
    dict.fromkeys(OPINIONS, "o") | dict.fromkeys(STRENGTHS, "i") | dict.fromkeys(NEGATIONS, "n")
    | dict.fromkeys(VERBS, "v") | dict.fromkeys(ASPECTS, "a")
    | {"the": "t", "and": "c", "while": "c", "but": "b", ",": ",", ".": "."}
)  # fmt: skip
CLAUSE = re.compile(r"n?i*o")
LINK = re.compile(r"(?:,[cb]|\.)tav")


@cache
def prompts(split: Literal["train", "held_out"]) -> tuple[str, ...]:
    """All prompts of a split, in a fixed shuffled order: 5,800 to train on, 500 others held out.

    No prompt is in both; every word is in both.
    """
    openings = [
        opening.format(aspect=aspect, genre=genre)
        for opening in OPENINGS
        for genre in (GENRES if "{genre}" in opening else ("",))
        for aspect in ASPECTS
    ]
    whole = [f"{opening} {ending}" for opening in openings for ending in ENDINGS]
    random.Random("reviews").shuffle(whole)
    return tuple(whole[:HELD_OUT] if split == "held_out" else whole[HELD_OUT:])


def vocabulary() -> tuple[str, ...]:
    """Every piece of the world's texts as it stands there: `The`, ` the` with its space, `,`, `.`."""
    words = (*OPINIONS, *STRENGTHS, *NEGATIONS, *VERBS, *ASPECTS, "the", "and", "but", "while")
    texts = (*prompts("train"), "," + "".join(f" {word}" for word in words) + ". The")
    return tuple(sorted({piece for text in texts for piece in re.findall(r" ?\w+|[^\w\s]", text)}))


def corpus(n: int, *, seed: int) -> list[Demonstration]:
    """`n` reviews of training prompts, as people might write them: a mood is drawn, and most clauses follow it.

    Mean reward close to 1/2, whatever the number of clauses.
    """
    rng = random.Random(f"corpus {seed}")
    return [
        Demonstration(prompt=prompt, response=Response(text=_write(prompt, rng), provenance=f"grammar, seed {seed}"))
        for prompt in rng.choices(prompts("train"), k=n)
    ]


def reward(prompt: str, response: str) -> float:
    """The sentiment of a review, in [0, 1]: 1 praises, 0 blames or cannot be read. Defined for any two strings."""
    before, words = _words(prompt), _words(response)
    clauses = list(_clauses(before + words, len(before)))
    if not clauses:
        return 0.0
    total, weights, said = 0.0, 0.0, set[str]()
    for aspect, phrase, weight, _ in clauses:
        total += weight * (0.0 if said & {aspect, phrase[-1]} else _value(phrase))
        weights += weight
        said |= {aspect, phrase[-1]}
    end = clauses[-1][-1]
    end += words[end - len(before) : end - len(before) + 1] == ["."]
    legible = (end - len(before)) / len(words)
    return legible * (1 + total / weights) / 2


def preference_probability(first: float, second: float, *, scale: float) -> float:
    """P(first preferred) = sigmoid(scale * (first - second)) for two rewards; 1/2 when they are equal."""
    if first == second:
        return 0.5
    return (1 + math.tanh(scale * (first - second) / 2)) / 2  # the sigmoid, without overflow


def judge(comparisons: Iterable[tuple[str, Response, Response]], *, scale: float, seed: int) -> list[Judgement]:
    """One Bradley-Terry draw per (prompt, first, second); both responses come back with their reward as score.

    Equal texts tie. With `scale=math.inf` nothing is left to chance: the larger reward wins, equal rewards tie.
    The same comparisons and seed give the same draws.
    """
    rng = random.Random(f"judge {seed}")
    name = f"Bradley-Terry draw, scale {scale:g}" if scale < math.inf else "larger reward"
    judgements = []
    for prompt, *pair in comparisons:
        first, second = (replace(response, score=reward(prompt, response.text)) for response in pair)
        assert first.score is not None and second.score is not None
        outcome: Literal["first", "second", "tie"] = "second"
        if rng.random() < preference_probability(first.score, second.score, scale=scale):
            outcome = "first"
        if first.text == second.text or (scale == math.inf and first.score == second.score):
            outcome = "tie"
        judgements.append(
            Judgement(prompt=prompt, first=first, second=second, outcome=outcome, judge=f"reviews reward: {name}")
        )
    return judgements


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _clauses(words: Sequence[str], start: int) -> Iterator[tuple[str, Sequence[str], float, int]]:
    """(aspect, phrase, weight, end) of every clause from the prompt's last verb on, as far as the grammar goes."""
    tags = "".join(TAGS.get(word, "?") for word in words)
    opening = re.search(r"vn?$", tags[:start])
    at, weight = opening.start() + 1 if opening else len(words), 1.0
    aspect = next((word for word in reversed(words[:start]) if word in ASPECTS), "")
    while clause := CLAUSE.match(tags, at):
        yield aspect, words[at : clause.end()], weight, clause.end()
        link = LINK.match(tags, clause.end())
        if link is None:
            return
        at, weight, aspect = link.end(), 2.0 if "b" in link.group() else 1.0, words[link.end() - 2]


def _value(phrase: Sequence[str]) -> float:
    """Signed strength of `[negation] intensifier* opinion`, in [-1, 1]; a negation flips and softens what follows."""
    strength = OPINIONS[phrase[-1]] * math.prod(STRENGTHS.get(word, 1.0) for word in phrase[:-1])
    factor = math.prod(NEGATIONS.get(word, 1.0) for word in phrase[:-1])
    return factor * max(-1.0, min(1.0, strength))


def _write(prompt: str, rng: random.Random) -> str:
    """A response to the prompt in one mood: one to three clauses, the aspects all different."""
    praise = rng.random()  # the mood: how likely a clause is to praise
    mentioned = [word for word in _words(prompt) if word in ASPECTS]
    before = _words(prompt)[-1]
    favourable = rng.random() < praise
    text = _phrase(before, favourable, rng)
    for aspect in rng.sample([a for a in ASPECTS if a not in mentioned], k=rng.randrange(3)):
        agrees, favourable = favourable, rng.random() < praise
        link = rng.choice((", and", ".") if agrees == favourable else (", but", ", while"))
        verb = rng.choice(VERBS)
        text += f"{link} {'The' if link == '.' else 'the'} {aspect} {verb}{_phrase(verb, favourable, rng)}"
    return text + "."


def _phrase(before: str, favourable: bool, rng: random.Random) -> str:
    """What may follow the word `before` (a verb or a negation) so that the clause praises, or blames."""
    negation = ""
    if before in VERBS and rng.random() < 0.25:
        negation = rng.choice(("not", "hardly")) if before == "was" else "hardly"
    negated = negation or (before if before in NEGATIONS else "")
    opinion = rng.choice([word for word, valence in OPINIONS.items() if (valence > 0) == (favourable == (not negated))])
    choices: Iterable[str] = INTENSIFIERS_OF_EXTREMES if abs(OPINIONS[opinion]) >= EXTREME else INTENSIFIERS
    if negated:
        choices = INTENSIFIERS_AFTER_NOT if negated == "not" and abs(OPINIONS[opinion]) < EXTREME else ()
    intensifier = rng.choice(["", *choices])
    return "".join(f" {word}" for word in (negation, intensifier, opinion) if word)
