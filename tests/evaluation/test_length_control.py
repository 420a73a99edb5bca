"""The win rate at equal length: antisymmetric, blind to length where it has no effect, and right where it has one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from preftune.errors import DataError
from preftune.evaluation.length_control import (
    PRIOR,
    length_controlled,
    length_effect_fit,
    length_win_rate,
)
from preftune.evaluation.win_rate import Match, Outcome


def planted(n: int, theta: float, gamma: float, seed: int, longer: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores 0 and 1 of the model itself; the first model is longer by `longer` standard deviations."""
    rng = np.random.default_rng(seed)
    d = rng.normal(100 * longer, 100, n).round()
    p = 1 / (1 + np.exp(-theta - gamma * np.tanh(d / d.std())))
    return (rng.random(n) < p).astype(float), d


def rows(score: np.ndarray, longer: np.ndarray) -> list[Match]:
    outcome: dict[float, Outcome] = {1.0: "first", 0.0: "second", 0.5: "tie"}
    return [
        Match(prompt=f"p{i}", judge="j", first="a", second="b", outcome=outcome[s],
              first_length=1000 + int(d), second_length=1000)
        for i, (s, d) in enumerate(zip(score.tolist(), longer.tolist(), strict=True))
    ]  # fmt: skip


def test_the_fit_is_the_maximum_of_the_stated_posterior() -> None:
    """Its gradient, written anew, is zero: soft labels, tanh(d / s), both terms under the normal prior."""
    rng = np.random.default_rng(0)
    score, d = rng.choice([0, 0.5, 1], 80), rng.normal(3, 20, 80)
    theta, gamma = length_effect_fit(score, d)[0]
    x = np.tanh(d / d.std())
    rest = score - 1 / (1 + np.exp(-(theta + gamma * x)))
    assert rest.sum() == pytest.approx(theta / PRIOR**2, abs=1e-9)
    assert (rest * x).sum() == pytest.approx(gamma / PRIOR**2, abs=1e-9)


def test_weights_are_rows_given_several_times() -> None:
    """A row of weight 3 is the row three times, the scale s included; every row of weights is its own fit."""
    rng = np.random.default_rng(1)
    score, d = rng.choice([0, 0.5, 1], 30), rng.normal(0, 20, 30)
    weights = rng.integers(0, 4, (5, 30))
    for w, fit in zip(weights, length_effect_fit(score, d, weights), strict=True):
        assert fit == pytest.approx(length_effect_fit(np.repeat(score, w), np.repeat(d, w))[0], abs=1e-8)


def test_a_planted_length_effect_is_recovered() -> None:
    """Longer by one standard deviation, effect 1.5: observed 65 %, at equal length the planted 44 %."""
    score, d = planted(20_000, -0.25, 1.5, seed=2, longer=1.0)
    rate, effect = length_win_rate(score, d, resamples=200)
    truth = 1 / (1 + math.exp(0.25))
    assert rate.low < truth < rate.high and rate.high - rate.low < 0.04
    assert effect.low < 1.5 < effect.high and score.mean() > truth + 0.15


def test_without_a_length_effect_it_is_the_win_rate() -> None:
    """The observed rate is inside its interval, 0 inside that of the effect, and the two numbers are close."""
    score, d = planted(2000, 0.4, 0.0, seed=3)
    rate, effect = length_win_rate(score, d, resamples=300)
    assert rate.estimate == pytest.approx(score.mean(), abs=0.005)
    assert rate.low < score.mean() < rate.high and effect.low < 0 < effect.high


def test_models_exchanged_give_the_complement() -> None:
    """lc(a, b) = 1 - lc(b, a), estimate and ends: the same resamples, mirrored."""
    found = rows(*planted(150, 0.3, 0.8, seed=4, longer=0.5))
    one, other = (length_controlled(found, *names, resamples=200) for names in (("a", "b"), ("b", "a")))
    mirrored = (1 - other.rate.estimate, 1 - other.rate.high, 1 - other.rate.low)
    assert (one.rate.estimate, one.rate.low, one.rate.high) == pytest.approx(mirrored, abs=1e-12)
    assert one.length_effect.estimate == pytest.approx(other.length_effect.estimate)
    assert one.longer_by.estimate == -other.longer_by.estimate


def test_a_model_against_itself_is_one_half() -> None:
    """Equal responses tie at equal length: 1/2 exactly; its own samples both ways round too."""
    rate, _ = length_win_rate(np.full(50, 0.5), np.zeros(50), resamples=50)
    assert (rate.estimate, rate.low, rate.high) == (0.5, 0.5, 0.5)
    score, d = planted(100, 0.7, 1.0, seed=5, longer=1)
    rate, effect = length_win_rate(np.r_[score, 1 - score], np.r_[d, -d], resamples=50)
    assert rate.estimate == pytest.approx(0.5, abs=1e-12) and effect.estimate > 0.3


def test_a_large_correction_is_said_in_words() -> None:
    """More than ten points between the two numbers, or none: a warning, or none."""
    biased = length_controlled(rows(*planted(500, -0.2, 2.0, seed=6, longer=1.0)), "a", "b", resamples=100)
    assert abs(biased.rate.estimate - biased.raw.estimate) > 0.1
    (warning,) = biased.warnings
    assert "at equal length: its responses are longer by" in warning
    assert length_controlled(rows(*planted(500, 0.2, 0.0, seed=7)), "a", "b", resamples=100).warnings == ()


def test_separable_verdicts_are_bounded_by_the_prior_and_said() -> None:
    """All won, or the longer always won: finite numbers and the word separable."""
    d = np.random.default_rng(8).normal(0, 50, 60).round()
    for score in (np.ones(60), (d > 0).astype(float)):
        found = length_controlled(rows(score, d), "a", "b", resamples=50)
        assert 0 < found.rate.estimate < 1 and abs(found.length_effect.estimate) < 3 * PRIOR
        assert any("separable" in warning for warning in found.warnings)
    mixed = (d > 0).astype(float)
    mixed[:6] = 0.5
    assert not any("separable" in w for w in length_controlled(rows(mixed, d), "a", "b", resamples=50).warnings)


def test_one_constant_difference_is_not_corrected_and_few_verdicts_are_named() -> None:
    """Every response longer by 40: nothing to tell length from model by; the observed number, and a warning."""
    score = np.array([1.0] * 12 + [0.0] * 8)
    found = length_controlled(rows(score, np.full(20, 40.0)), "a", "b", resamples=50)
    assert found.rate.estimate == pytest.approx(0.6, abs=0.01)
    assert "differ by the same length (40)" in found.warnings[0] and "20 verdicts are few" in found.warnings[1]


def test_what_cannot_be_fitted_is_refused() -> None:
    """Only skips; unequal lengths; a NaN; a score outside [0, 1]."""
    skip = Match(prompt="p", judge="j", first="a", second="b", outcome="skip", first_length=1, second_length=1)
    with pytest.raises(DataError, match="every verdict on a against b is a skip"):
        length_controlled([skip], "a", "b")
    for score, d in (([1.0], [1.0, 2.0]), ([], []), ([math.nan], [0.0])):
        with pytest.raises(ValueError, match="as many finite length differences as scores"):
            length_win_rate(score, d)
    with pytest.raises(ValueError, match=r"scores lie in \[0, 1\]"):
        length_win_rate([2.0], [0.0])
