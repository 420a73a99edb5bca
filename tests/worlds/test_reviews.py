"""The world of film reviews: its grammar, its reward and its preferences."""

import math
import re
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.models.fresh import word_tokenizer
from preftune.records import Response
from preftune.worlds.reviews import (
    INTENSIFIERS,
    OPINIONS,
    corpus,
    judge,
    preference_probability,
    prompts,
    reward,
    vocabulary,
)

ACTING = "The acting in this film was"
PIECES = st.lists(st.sampled_from(vocabulary()), max_size=30).map("".join)


def test_held_out_prompts_are_disjoint_and_know_every_word():
    """No prompt is in both splits, none is repeated, and the held-out prompts use no word of their own."""
    train, held_out = prompts("train"), prompts("held_out")
    assert len({*train, *held_out}) == len(train) + len(held_out) == 6300
    assert {w for p in held_out for w in p.split()} == {w for p in train for w in p.split()}


def test_corpus_is_a_function_of_its_seed_and_uses_training_prompts_only():
    """The same seed writes the same reviews, another seed others, and no held-out prompt is among them."""
    assert corpus(50, seed=3) == corpus(50, seed=3) != corpus(50, seed=4)
    assert {d.prompt for d in corpus(2000, seed=0)} <= set(prompts("train"))


def test_corpus_is_legible_and_balanced_whatever_the_length():
    """Every review follows the grammar to its last word, and one, two or three clauses all average a reward of 1/2."""
    by_clauses = defaultdict(list)
    for review in corpus(6000, seed=0):
        text = review.response.text
        # Three times the whole answer is a third as legible, which shows that nothing of the answer was illegible.
        assert math.isclose(reward(review.prompt, text * 3), reward(review.prompt, text) / 3)
        by_clauses[len(re.findall(r"[,.]", text))].append(reward(review.prompt, text))
    assert set(by_clauses) == {1, 2, 3}
    for rewards in by_clauses.values():
        assert abs(sum(rewards) / len(rewards) - 0.5) < 4 * 0.3 / math.sqrt(len(rewards))


def test_and_joins_clauses_of_one_mind_and_but_joins_opposites():
    """Negated clauses follow the mood too: the links of the grammar tell the truth about both sides."""
    seen = set()
    for review in corpus(2000, seed=0):
        first, *rest = re.split(r"(, and|, but|, while|\.) [tT]he (\w+ \w+)", review.response.text[:-1])
        praises = reward(review.prompt, first) > 0.5
        for link, subject, phrase in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            praised, praises = praises, reward(f"The {subject}", phrase) > 0.5
            assert (praised == praises) == (link in (", and", "."))
            seen.add(link)
    assert seen == {", and", ", but", ", while", "."}


def test_corpus_round_trips_through_the_word_tokenizer_without_unknown_words():
    """decode(encode(text)) is the text, no UNK, and prompt and response encoded apart make the whole."""
    tokenizer = word_tokenizer(vocabulary())
    for review in corpus(1000, seed=1):
        text = review.prompt + review.response.text
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        apart = tokenizer(review.response.text, add_special_tokens=False)["input_ids"]
        assert tokenizer(review.prompt)["input_ids"] + apart == ids


@settings(max_examples=300, deadline=None)
@given(prompt=st.sampled_from(prompts("train")) | PIECES | st.text(), response=PIECES | st.text())
def test_reward_of_any_text_is_in_the_unit_interval(prompt, response):
    """Word salad, empty text and text from outside the world get a reward between 0 and 1 too."""
    assert 0.0 <= reward(prompt, response) <= 1.0


@pytest.mark.parametrize("negation", ["not", "hardly"])
@pytest.mark.parametrize("opinion", OPINIONS)
def test_negation_flips_and_softens(opinion, negation):
    """A negated praise is a milder blame and a negated blame a milder praise, wherever the negation stands."""
    plain = reward(ACTING, f" {opinion}.") - 0.5
    flipped = reward(ACTING, f" {negation} {opinion}.") - 0.5
    assert flipped * plain < 0 and abs(flipped) < abs(plain)
    assert reward(f"{ACTING} {negation}", f" {opinion}.") - 0.5 == flipped


@pytest.mark.parametrize(("intensifier", "strength"), INTENSIFIERS.items())
def test_intensifiers_scale(intensifier, strength):
    """An intensifier multiplies the distance from neutral, for praise and for blame."""
    for opinion in ("good", "bad"):
        scaled = reward(ACTING, f" {intensifier} {opinion}.") - 0.5
        assert scaled == pytest.approx(strength * (reward(ACTING, f" {opinion}.") - 0.5))


def test_no_intensifier_leaves_the_unit_interval():
    """The strongest praise and blame are cut at 1 and 0."""
    assert reward(ACTING, " utterly brilliant.") == 1.0 and reward(ACTING, " utterly very horrible.") == 0.0


def test_reward_is_not_additive_in_words():
    """Exchanging one word raises the reward in one context and lowers it in another: no sum over words does that."""
    assert reward(ACTING, " good.") > reward(ACTING, " bad.")
    assert reward(ACTING + " not", " good.") < reward(ACTING + " not", " bad.")


def test_what_follows_but_counts_twice():
    """The mean of the clauses, the last one twice after `but`: worked by hand."""
    assert reward(ACTING, " good, and the plot was bad.") == pytest.approx(0.5)
    assert reward(ACTING, " good, but the plot was bad.") == pytest.approx((1 + (0.5 - 2 * 0.5) / 3) / 2)


@pytest.mark.parametrize(
    "text",
    [
        " brilliant brilliant brilliant.",
        " brilliant, and the plot was brilliant, and the story was brilliant.",
        " brilliant, and the acting was superb.",
        " brilliant." * 5,
        " not not awful.",
        " brilliant, and the",
        " utterly utterly utterly",
        "",
    ],
)
def test_degenerate_text_loses_to_one_plain_clause(text):
    """Repeated words, clauses or aspects, double negation, cut-off and empty text all earn less than ` brilliant.`"""
    assert reward(ACTING, text) < 0.9 < reward(ACTING, " brilliant.") == 1.0


@pytest.mark.parametrize(("scale", "better", "worse"), [(4.0, " superb.", " good."), (2.0, " decent.", " awful.")])
def test_draws_follow_bradley_terry(scale, better, worse):
    """The first is preferred with frequency sigmoid(scale * reward difference), within 4 standard errors."""
    n = 4000
    verdicts = judge([(ACTING, Response(text=better), Response(text=worse))] * n, scale=scale, seed=0)
    expected = 1 / (1 + math.exp(-scale * (reward(ACTING, better) - reward(ACTING, worse))))
    frequency = sum(v.outcome == "first" for v in verdicts) / n
    assert {v.outcome for v in verdicts} == {"first", "second"}
    assert abs(frequency - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_preference_probability_is_finite_and_sums_to_one():
    """P(first) + P(second) = 1, also where exp would overflow."""
    for difference in (0.0, 0.3, 1.0):
        p, q = (preference_probability(a, b, scale=1e5) for a, b in ((difference, 0.0), (0.0, difference)))
        assert p + q == 1.0 and p >= 0.5


def test_judgements_keep_both_texts_their_rewards_and_who_judged():
    """A judgement is reproducible from its seed and carries prompt, texts, rewards and the rule with its scale."""
    close = [(ACTING, Response(text=" good."), Response(text=" decent."))] * 50
    assert judge(close, scale=1, seed=5) == judge(close, scale=1, seed=5) != judge(close, scale=1, seed=6)
    pair = (Response(text=" good.", provenance="a"), Response(text=" bad.", finished=False))
    (verdict,) = judge([(ACTING, *pair)], scale=8, seed=5)
    assert (verdict.prompt, verdict.first.text, verdict.second.text) == (ACTING, " good.", " bad.")
    assert (verdict.first.score, verdict.second.score) == (0.75, 0.25)
    assert verdict.first.provenance == "a" and not verdict.second.finished
    assert "scale 8" in verdict.judge


def test_an_infinite_scale_leaves_nothing_to_chance():
    """The larger reward always wins and equal rewards tie, even of different texts."""
    texts = (" good.", " bad.", " very bad, and the plot was brilliant.", " good.", " fairly excellent.")
    responses = [Response(text=text) for text in texts]
    for a in responses:
        for b in responses:
            (verdict,) = judge([(ACTING, a, b)], scale=math.inf, seed=0)
            difference = reward(ACTING, a.text) - reward(ACTING, b.text)
            assert verdict.outcome == ("first" if difference > 0 else "second" if difference < 0 else "tie")
    assert reward(ACTING, " hardly bad.") == reward(ACTING, " hardly very bad.") - 0.05 == 0.625


def test_equal_texts_tie():
    """Two equal answers never get an arbitrary winner."""
    same = Response(text=" good.")
    assert {v.outcome for v in judge([(ACTING, same, same)] * 20, scale=8, seed=0)} == {"tie"}
