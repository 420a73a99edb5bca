"""Shares with ties and clusters, and the calibration error: by hand, by simulation, and where they must refuse."""

from __future__ import annotations

import numpy as np
import pytest

from preftune.equations.stats import calibration_error, share, wilson


def test_a_share_of_single_items_has_wilsons_interval() -> None:
    """Ties count one half, and without clusters, or with one item each, the interval is Wilson's."""
    outcome = [1, 0, 0.5, 1]
    assert share(outcome) == share(outcome, clusters=list("abcd")) == wilson(2.5, 4)


def test_items_of_one_cluster_are_drawn_together() -> None:
    """Every item given four times says nothing new: the interval stays as wide, where Wilson's would halve."""
    outcome = np.random.default_rng(0).integers(0, 2, 100).astype(float)
    once, fourfold = share(outcome), share(np.repeat(outcome, 4), clusters=[i // 4 for i in range(400)])
    assert fourfold.estimate == once.estimate
    assert fourfold.high - fourfold.low == pytest.approx(once.high - once.low, rel=0.1)


def test_the_calibration_error_by_hand() -> None:
    """Two bins: forecasts 0.6, 0.6 with outcomes 1, 0 and 0.9 with 1: (2 |0.5 - 0.6| + 1 |1 - 0.9|) / 3 = 0.1."""
    assert calibration_error([0.6, 0.6, 0.9], [1, 0, 1]).estimate == pytest.approx(0.1, rel=1e-12)
    assert calibration_error([0.6, 0.9], [0.5, 1.0]).estimate == pytest.approx(0.1, rel=1e-12)  # a tie is one half
    assert calibration_error([1.0, 0.0], [1, 0]).estimate == 0  # the ends belong to the outer bins


def test_an_honest_forecast_has_a_small_error_and_an_overconfident_one_its_excess() -> None:
    """10,000 outcomes drawn with the forecast's probability: about sqrt(bins / n) / 3; forecast + 0.1: close to 0.1."""
    rng = np.random.default_rng(1)
    truth = rng.random(10_000) * 0.9
    outcome = (rng.random(10_000) < truth).astype(float)
    honest, boasting = calibration_error(truth, outcome), calibration_error(truth + 0.1, outcome)
    assert honest.estimate == pytest.approx((10 / 10_000) ** 0.5 / 3, rel=0.6)
    assert boasting.low < 0.1 < boasting.high and boasting.estimate == pytest.approx(0.1, abs=0.01)


def test_the_error_is_the_same_every_time_and_wider_by_clusters() -> None:
    """Deterministic in the seed; tenfold copies in clusters keep the width that they would lose as single items."""
    rng = np.random.default_rng(2)
    forecast, outcome = rng.random(200), rng.integers(0, 2, 200).astype(float)
    assert calibration_error(forecast, outcome) == calibration_error(forecast, outcome)
    tenfold = np.repeat(forecast, 10), np.repeat(outcome, 10)
    alone, together = (calibration_error(*tenfold, clusters=c) for c in (None, [i // 10 for i in range(2000)]))
    assert together.high - together.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize(("forecast", "outcome"), [([0.5], [1, 0]), ([1.2], [1]), ([-0.1], [0])])
def test_what_is_no_forecast_is_refused(forecast: list[float], outcome: list[float]) -> None:
    with pytest.raises(ValueError, match="as many probabilities in"):
        calibration_error(forecast, outcome)
