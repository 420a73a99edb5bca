"""Calibration of rewards on pairs: by definition, where it is perfect, and where it is known to be off."""

from __future__ import annotations

import numpy as np
import pytest

from preftune.evaluation.calibration import calibrate, correlation, ranks, wins

RNG = np.random.default_rng(0)


def labelled(gaps: np.ndarray, trust: float = 1.0) -> np.ndarray:
    """Margins as the label turns them: the truth is sigmoid(gap), the reward says trust * gap."""
    chosen = RNG.random(len(gaps)) < 1 / (1 + np.exp(-gaps))
    return np.where(chosen, 1, -1) * gaps * trust


def test_every_number_is_its_definition() -> None:
    """Five pairs by hand: a tie counts half in accuracy, its confidence is 1/2."""
    margins, longer = np.array([2.0, -1.0, 0.0, 0.5, 3.0]), np.array([1, 1, 0, -2, 3])
    found = calibrate(margins, longer, clusters=range(5))
    p = 1 / (1 + np.exp(-margins))
    assert found.accuracy.estimate == pytest.approx(3.5 / 5)
    assert found.longest_wins.estimate == pytest.approx(3.5 / 5)
    assert found.brier.estimate == pytest.approx(np.mean((1 - p) ** 2))
    assert [(part.name, part.pairs, part.accuracy.estimate) for part in found.by_length] == [
        ("chosen_longer", 3, pytest.approx(2 / 3)), ("chosen_shorter", 1, 1.0), ("same_length", 1, 0.5),
    ]  # fmt: skip
    assert [part.accuracy.estimate for part in found.by_margin] == [0.75, 0.0, 1.0, 1.0]
    assert [part.pairs for part in found.by_margin] == [2, 1, 1, 1]


def test_the_reliability_table_adds_up_to_the_calibration_error() -> None:
    """sum n_b / n |accuracy_b - confidence_b| over the table is the ECE; its pairs are all pairs; bins start at 1/2."""
    margins = labelled(RNG.normal(0, 2, 300))
    found = calibrate(margins, np.ones(300), clusters=range(300))
    gaps = [b.pairs / 300 * abs(b.accuracy.estimate - b.confidence) for b in found.reliability]
    assert sum(gaps) == pytest.approx(found.ece.estimate)
    assert sum(b.pairs for b in found.reliability) == 300 and found.reliability[0].low == 0.5
    assert all(b.low <= b.confidence < b.high for b in found.reliability)


def test_a_true_reward_is_calibrated_and_a_loud_one_is_not() -> None:
    """Labels drawn from sigmoid(gap): the gap itself has an ECE near 0, three times the gap is too sure of itself."""
    gaps = RNG.normal(0, 1.5, 4000)
    margins = labelled(gaps)
    true, loud = (calibrate(scale * margins, np.ones(4000), clusters=range(4000)) for scale in (1, 3))
    assert true.ece.estimate < 0.03 < 0.1 < loud.ece.low
    assert true.brier.high < loud.brier.low
    assert true.accuracy == loud.accuracy
    assert all(b.accuracy.low <= b.confidence <= b.accuracy.high for b in true.reliability)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_their_definitions(ties: bool) -> None:
    """Pearson's by numpy and Spearman's as that of ranks by counting; the interval holds a planted correlation."""
    first = RNG.normal(size=400)
    second = 0.6 * first + 0.8 * RNG.normal(size=400)
    if ties:
        first, second = np.round(first), np.round(second)
    pearson = correlation(first, second, clusters=range(400))
    assert pearson.estimate == pytest.approx(np.corrcoef(first, second)[0, 1])
    spearman = correlation(ranks(first), ranks(second), clusters=range(400))
    counted = [[1 + sum(v < u for v in x) + (sum(v == u for v in x) - 1) / 2 for u in x] for x in (first, second)]
    assert spearman.estimate == pytest.approx(np.corrcoef(*counted)[0, 1])
    if not ties:
        assert pearson.low < 0.6 < pearson.high


def test_a_column_that_does_not_vary_has_no_correlation() -> None:
    """NaN instead of a number that means nothing; a win, a tie and a loss are 1, 1/2 and 0."""
    assert np.isnan(correlation([1, 1, 1], [1, 2, 3], clusters=range(3)).estimate)
    assert wins([2.0, 0.0, -1.0]).tolist() == [1.0, 0.5, 0.0]
