"""Every number of the lesson is pinned by a value found another way."""

from __future__ import annotations

import json
import math
from itertools import pairwise, product

import lesson_oracle
import pytest
import torch

from preftune.theory.lesson import lesson
from preftune.theory.numbers import Lesson, Number, number, plain, table, to_json

SAMPLED = ("kl_sampled", "kl_sampled_low", "kl_sampled_high")
REFUSED = {
    "steps_refused": "scale by -2: a factor must be a number > 0, this one exchanges minimum and maximum; negate "
    "changes sides",
    "partition_refused": "Z over 50257 tokens and length 2 has 2,525,766,049 terms, allowed are lengths >= 1 and "
    "1,000,000 terms; DPO needs none of them, because log Z cancels in every pair",
}


@pytest.fixture(scope="module")
def told() -> Lesson:
    return lesson()


def values(told: Lesson) -> dict[str, int | float | str]:
    return {number.name: number.value for number in told.numbers()}


def test_every_number_is_pinned(told: Lesson) -> None:
    """No number without an independent value, none that is not told, no name twice."""
    names = [number.name for number in told.numbers()]
    assert len(names) == len(set(names))
    assert set(names) == {*lesson_oracle.expected(), *REFUSED, *SAMPLED, "forced"}


@pytest.mark.parametrize("name", sorted(lesson_oracle.expected()))
def test_the_number_is_right(told: Lesson, name: str) -> None:
    """As by hand: to 1e-12, or to 1e-7 for the slope that is measured between two points of the frontier."""
    found, by_hand = values(told)[name], lesson_oracle.expected()[name]
    tolerance = 1e-7 if name == "frontier_slope" else 1e-12
    assert found == pytest.approx(by_hand, rel=tolerance, abs=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_the_refusals_are_the_library_s_own(told: Lesson, name: str) -> None:
    """Word by word."""
    assert values(told)[name] == REFUSED[name]


def test_the_sampled_divergence_covers_the_exact_one(told: Lesson) -> None:
    """Within its interval, whose half-width is 1.96 standard errors of ten thousand log-ratios."""
    estimate, low, high = (float(values(told)[name]) for name in SAMPLED)
    exact = lesson_oracle.kl(lesson_oracle.PI_R, lesson_oracle.REF)
    assert low < exact < high and estimate == pytest.approx((low + high) / 2)
    ratios = [math.log(p / q) for p, q in zip(lesson_oracle.PI_R, lesson_oracle.REF, strict=True)]
    variance = lesson_oracle.mean(lesson_oracle.PI_R, tuple((r - exact) ** 2 for r in ratios))
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(variance / 10_000), rel=0.03)


def test_the_forced_sum_is_the_sum_by_hand(told: Lesson) -> None:
    """The toy's 4,096 terms added up in plain Python."""
    g = torch.Generator().manual_seed(0)
    start = torch.log_softmax(torch.randn(4, generator=g, dtype=torch.float64), -1).tolist()
    move = torch.log_softmax(torch.randn(4, 4, generator=g, dtype=torch.float64), -1).tolist()
    reward = torch.randn(4, generator=g, dtype=torch.float64).tolist()
    z = 0.0
    for y in product(range(4), repeat=6):
        logp = start[y[0]] + sum(move[a][b] for a, b in pairwise(y))
        z += math.exp(logp + sum(reward[token] for token in y) / 0.5)
    assert values(told)["forced"] == pytest.approx(math.log(z), rel=1e-12)


def test_what_is_drawn_is_what_is_told(told: Lesson) -> None:
    """The series of the figures pass through the numbers of the tables."""
    series = {name: numbers for chapter in told.chapters for name, numbers in chapter.series.items()}
    pinned = lesson_oracle.expected()
    assert dict(zip(series["slide.mean"], series["slide.kl"], strict=True))[-4] == pytest.approx(8)
    assert all(a > b for a, b in pairwise(series["slide.kl"][:41]))
    at_one = series["u.above.0.5"][0], series["u.below.0.5"][-1]
    assert at_one == pytest.approx([math.log(2)] * 2)
    assert max(series["simplex.j"]) <= pinned["j_optimum"] < max(series["simplex.j"]) + 0.01
    assert series["constant.tokens"][6] == pytest.approx(pinned["nats_per_token"])
    for falling in ("sweep.kl", "sweep.reward", "sweep.renormalised"):
        assert all(a > b for a, b in pairwise(series[falling])), falling
    slope = [b - a for a, b in zip(series["bt.cost"], series["bt.objective"], strict=True)]
    assert all(value < 0 for value in slope)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.0, "8"), (0.5, "0.5"), (2.31814718, "2.3181"), (-0.2014132779, "-0.20141"), (0.999644, "0.99964"),
        (10.8249, "10.825"), (0, "0"), (0.0, "0"), (50_257, "50,257"), (50_257**10, "10^47.01"), (1.1e27, "10^27.04"),
        (1e-16, "1.0e-16"), (0.00016768, "0.00016768"), (2_525_766_049, "2,525,766,049"), (126.93742, "126.94"),
        (-3e-5, "-3.0e-05"), ("refused", "refused"),
    ],
)  # fmt: skip
def test_numbers_are_shown_to_the_digits_that_mean_something(value: int | float | str, text: str) -> None:
    """Five digits, no trailing zeros, powers of ten for what is very large or very small, exact whole numbers."""
    assert number("x", value, "x").text == text


def test_a_table_names_its_numbers() -> None:
    """By table, label and column, without the marks of formulas; text is no number."""
    made = table("t", ("who", "`pi_r`", "why"), {"the `best`": (0.25, "because")})
    assert made.rows == (("the `best`", Number("t.the best.pi_r", "who the best: pi_r", 0.25, "0.25"), "because"),)
    assert plain("`a` b") == "a b"


def test_the_file_holds_every_digit(told: Lesson) -> None:
    """What is read back equals what was computed, whole numbers of a hundred digits included."""
    read = json.loads(to_json(told))
    numbers = [n for chapter in read["chapters"] for n in chapter["numbers"]]
    cells = [c for chapter in read["chapters"] for t in chapter["tables"] for row in t["rows"] for c in row]
    back = {n["name"]: n["value"] for n in [*numbers, *(c for c in cells if isinstance(c, dict))]}
    assert back == values(told) and back["terms.20.terms V^T"] == 50_257**20
