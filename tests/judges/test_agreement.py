"""Claims about agreement: against another implementation, against hand-worked tables, and where nothing is defined."""

from __future__ import annotations

import math
from itertools import combinations

import krippendorff
import numpy as np
import pytest

from preftune.judges.agreement import (
    Level,
    agreement,
    cohen_kappa,
    fleiss_kappa,
    flip_rate,
    krippendorff_alpha,
    longest_wins,
    ratings,
    raw_agreement,
)
from preftune.judges.contract import Outcome
from preftune.records import Judgement, Response

GAP = math.nan
# Krippendorff, Computing Krippendorff's alpha-reliability (2011), example C: 4 observers, 12 units, 7 gaps.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, GAP, GAP, GAP],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, GAP, 3],
    [GAP, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, GAP],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, GAP],
]


def table(rng: np.random.Generator) -> np.ndarray:
    """[items, annotators] of up to 6 values with gaps; two ratings of one item and two values are there."""
    items, annotators, values = rng.integers(2, 20), rng.integers(2, 6), rng.integers(2, 7)
    drawn = rng.choice(np.sort(rng.choice(50, values, replace=False)), size=(items, annotators)).astype(float)
    drawn[rng.random(drawn.shape) < rng.choice([0, 0.2, 0.6])] = GAP
    drawn[0, :2], drawn[1, :2] = (1.0, 2.0), (2.0, 2.0)
    return drawn


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_is_the_krippendorff_package_s_on_random_tables_with_gaps(level: Level) -> None:
    """1000 tables, to 1e-12."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        drawn = table(rng)
        theirs = krippendorff.alpha(reliability_data=drawn.T, level_of_measurement=level)
        assert krippendorff_alpha(drawn, level, resamples=0).estimate == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level: Level, published: float) -> None:
    """The numbers of Krippendorff (2011), three decimals."""
    alpha = krippendorff_alpha(np.array(PUBLISHED).T, level)
    assert alpha.estimate == pytest.approx(published, abs=5e-4)
    assert alpha.low < alpha.estimate < alpha.high <= 1 and alpha.n == 11


def test_a_gap_is_no_rating() -> None:
    """Items with one rating change nothing; a gap is not a value of its own."""
    full = np.array([[0, 0], [1, 1], [0, 1], [1, 1.0]])
    padded = np.array([[0, GAP, 0], [1, 1, GAP], [0, 1, GAP], [GAP, 1, 1], [GAP, 0, GAP], [GAP, GAP, GAP]])
    for level in ("nominal", "ordinal", "interval"):
        whole, gaps = (krippendorff_alpha(t, level, resamples=0) for t in (full, padded))
        assert (whole.estimate, whole.n) == (gaps.estimate, gaps.n) == (whole.estimate, 4)
    assert raw_agreement(padded).estimate == raw_agreement(full).estimate == 0.75


def test_raw_agreement_counts_pairs_of_ratings() -> None:
    """By brute force over all pairs of annotators of one item."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        drawn = table(rng)
        pairs = [p for row in drawn for p in combinations(row, 2) if not any(map(math.isnan, p))]
        assert raw_agreement(drawn, resamples=0).estimate == pytest.approx(np.mean([a == b for a, b in pairs]))


def test_kappa_of_a_hand_worked_table() -> None:
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5, kappa = 0.4; gaps drop their item."""
    first = [1.0] * 25 + [0.0] * 25 + [GAP, 1.0]
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15 + [1.0, GAP]
    kappa = cohen_kappa(first, second)
    assert kappa.estimate == pytest.approx(0.4, abs=1e-15) and kappa.n == 50
    assert kappa.low < 0.4 < kappa.high


def test_kappa_and_alpha_see_no_agreement_in_independent_ratings() -> None:
    """Zero is inside the interval, and the interval has about the spread over fresh tables."""
    rng = np.random.default_rng(2)
    drawn = rng.choice([0.0, 1.0], p=[0.8, 0.2], size=(400, 2))
    kappa, alpha = cohen_kappa(*drawn.T), krippendorff_alpha(drawn)
    assert raw_agreement(drawn).estimate > 0.6
    assert kappa.low < 0 < kappa.high and alpha.low < 0 < alpha.high
    fresh = [
        krippendorff_alpha(rng.choice([0.0, 1.0], p=[0.8, 0.2], size=(400, 2)), resamples=0).estimate
        for _ in range(300)
    ]
    low, high = np.quantile(fresh, (0.025, 0.975))
    assert alpha.high - alpha.low == pytest.approx(high - low, rel=0.25)


@pytest.mark.parametrize("drawn", [[[1.0, 1.0]] * 5, [[1.0, GAP], [GAP, 2.0]], np.empty((0, 2))])
def test_what_is_not_defined_is_nan_never_one(drawn: list[list[float]]) -> None:
    """One value only, no item with two ratings, no item: no kappa, no alpha."""
    rows = np.asarray(drawn)
    found = [krippendorff_alpha(rows, level).estimate for level in ("nominal", "ordinal", "interval")]
    assert all(map(math.isnan, [*found, cohen_kappa(rows[:, 0], rows[:, 1]).estimate]))


def test_a_table_has_two_dimensions() -> None:
    """A flat list is refused."""
    with pytest.raises(ValueError, match=r"a table is \[items, annotators\], not of 1 dimensions"):
        raw_agreement([1.0, 2.0])


def said(judge: str, first: str, second: str, outcome: Outcome, prompt: str = "p") -> Judgement:
    return Judgement(
        prompt=prompt, first=Response(text=first), second=Response(text=second), outcome=outcome, judge=judge
    )


def test_a_question_is_the_same_item_whichever_response_is_shown_first() -> None:
    """Turned, a win is a win of the same response; skips are gaps; the last word of an annotator counts."""
    names, nominal, ordinal = ratings(
        [
            said("x", "a", "b", "second"), said("x", "a", "b", "first"), said("y", "b", "a", "second"),
            said("x", "a", "c", "both_bad"), said("y", "a", "c", "skip"), said("y", "a", "b", "tie", prompt="q"),
        ]
    )  # fmt: skip
    assert names == ["x", "y"]
    np.testing.assert_array_equal(nominal, [[1, 1], [2, GAP], [GAP, 0]])
    np.testing.assert_array_equal(ordinal, [[1, 1], [0, GAP], [GAP, 0]])


def test_the_longest_wins_is_compared_with_every_verdict() -> None:
    """Agreement 1, 0, or one half where only one of the two sees no winner."""
    cases = [("aa", "b", "first", 1), ("aa", "b", "second", 0), ("aa", "b", "tie", 0.5), ("aa", "b", "both_bad", 0.5),
             ("aa", "bb", "first", 0.5), ("aa", "bb", "tie", 1)]  # fmt: skip
    assert [longest_wins(said("x", a, b, outcome)) for a, b, outcome, _ in cases] == [c[3] for c in cases]


def test_the_row_of_an_annotator_tells_its_habits() -> None:
    """Counts, P(first), P(longer), the longest-wins baseline and the agreement with others, each over its own cases."""
    x = [
        said("x", "aaa", "b", "first", "1"), said("x", "b", "aaa", "first", "2"), said("x", "aa", "bb", "first", "3"),
        said("x", "aaa", "b", "tie", "4"), said("x", "a", "b", "skip", "5"), said("x", "a", "a", "tie", "6"),
    ]  # fmt: skip
    y = [said("y", "b", "aaa", "second", "1"), said("y", "aaa", "b", "first", "2"), said("y", "a", "b", "tie", "5")]
    found = agreement([*x, *y])
    row, other = found.annotators
    assert (row.name, row.judged, row.decided, row.ties, row.both_bad, row.skips) == ("x", 4, 3, 1, 0, 1)
    assert (row.first.estimate, row.first.n) == (1.0, 3)
    assert (row.longer.estimate, row.longer.n) == (0.5, 2)
    assert (row.longest_wins.estimate, row.longest_wins.n) == (pytest.approx((1 + 0 + 0.5 + 0.5) / 4), 4)
    assert (row.others.estimate, row.others.n) == (0.5, 2)
    assert (found.items, found.shared, found.raw.estimate) == (5, 2, 0.5)
    assert other.judged == 3 and math.isnan(agreement(x).kappa.estimate) and math.isnan(agreement([]).raw.estimate)


def test_equal_texts_say_nothing_about_agreement() -> None:
    """They tie by definition, whoever judges: counting them would flatter everyone."""
    honest = [said("x", "a", "b", "first"), said("y", "a", "b", "second")]
    flattered = honest + [said(judge, "same", "same", "tie", f"{i}") for i in range(9) for judge in "xy"]
    assert agreement(flattered).raw.estimate == agreement(honest).raw.estimate == 0


def test_the_flip_rate_counts_answers_that_turn_with_the_order() -> None:
    """A win of the same response from either side is steady; a skip is no answer."""
    shown = [
        (said("x", "a", "b", "first", "1"), said("x", "b", "a", "second", "1")),
        (said("x", "a", "b", "first", "2"), said("x", "b", "a", "first", "2")),
        (said("x", "a", "b", "tie", "3"), said("x", "b", "a", "first", "3")),
        (said("x", "a", "b", "tie", "4"), said("x", "b", "a", "tie", "4")),
        (said("x", "a", "b", "skip", "5"), said("x", "b", "a", "first", "5")),
    ]
    rate = flip_rate(shown)
    assert (rate.estimate, rate.n) == (0.5, 4) and 0 < rate.low < 0.5 < rate.high < 1


# Fleiss (1971) as reprinted in textbooks: 10 items, 14 raters, 5 categories, kappa 0.210.
TEXTBOOK = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_fleiss_kappa_of_the_textbook_example() -> None:
    """0.210 of 14 raters; whose rating it is does not matter."""
    drawn = np.array([np.repeat(np.arange(5.0), row) for row in TEXTBOOK])
    kappa = fleiss_kappa(drawn)
    assert kappa.estimate == pytest.approx(0.210, abs=5e-4) and kappa.n == 10
    mixed = np.random.default_rng(0).permuted(drawn, axis=1)
    assert fleiss_kappa(mixed).estimate == pytest.approx(kappa.estimate, abs=1e-12)
    assert kappa.low < kappa.estimate < kappa.high


def test_fleiss_kappa_by_brute_force_over_pairs_of_raters() -> None:
    """Observed: share of equal pairs within items; expected: of any two ratings, itself included."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        drawn = rng.integers(0, 3, (8, 4)).astype(float)
        observed = np.mean([a == b for row in drawn for a, b in combinations(row, 2)])
        expected = np.mean(drawn.ravel()[:, None] == drawn.ravel())
        kappa = fleiss_kappa(drawn, resamples=0).estimate
        assert kappa == pytest.approx((observed - expected) / (1 - expected), abs=1e-12)


def test_fleiss_kappa_needs_equally_many_ratings_and_more_than_one_value() -> None:
    """Gaps are refused with what takes them; one value for all has no kappa."""
    with pytest.raises(ValueError, match=r"equally many ratings per item, not 2 to 3; alpha takes gaps"):
        fleiss_kappa([[0, 1, 1], [0, 1, GAP]])
    assert math.isnan(fleiss_kappa([[1.0, 1.0]] * 5).estimate)


def test_items_of_one_prompt_are_not_taken_as_independent() -> None:
    """Every item ten times under its prompt: no interval gets narrower; as items of their own it would."""
    rng = np.random.default_rng(2)
    wins = [("first", "second")[int(rng.random() < 0.4)] for _ in range(60)]
    others = [w if rng.random() < 0.7 else "tie" for w in wins]

    def judged(copies: int) -> list[Judgement]:
        return [
            said(judge, f"{'a' * (i % 5 + 1)}{copy}", f"b{copy}", outcome, f"{i}")
            for copy in range(copies)
            for i, pair in enumerate(zip(wins, others, strict=True))
            for judge, outcome in zip("xy", pair, strict=True)
        ]

    once, tenfold = agreement(judged(1)), agreement(judged(10))
    x, x_ten = once.annotators[0], tenfold.annotators[0]
    for small, large in (
        (once.raw, tenfold.raw), (once.kappa, tenfold.kappa), (once.alpha, tenfold.alpha),
        (x.others, x_ten.others), (x.first, x_ten.first), (x.longest_wins, x_ten.longest_wins),
    ):  # fmt: skip
        assert large.n == 10 * small.n and large.estimate == pytest.approx(small.estimate, abs=0.01)
        assert (large.high - large.low) == pytest.approx(small.high - small.low, rel=0.12)
    nominal = ratings(judged(10))[1]
    alone = krippendorff_alpha(nominal)
    assert alone.high - alone.low < 0.5 * (tenfold.alpha.high - tenfold.alpha.low)
    turned = [(said("x", "a", "b", w, f"{i}"), said("x", "b", "a", "first", f"{i}")) for i, w in enumerate(wins)]
    assert flip_rate(turned * 10).low == pytest.approx(flip_rate(turned).low, abs=0.02)
