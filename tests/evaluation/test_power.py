"""How many prompts: the published example, and simulation of the very tests that are planned."""

from __future__ import annotations

import math

import numpy as np
import pytest

from preftune.equations.stats import Interval
from preftune.evaluation.power import (
    Design,
    detectable_win_rate,
    means_design,
    needed_sentence,
    noise_sentence,
    paired_shares_design,
    power_of,
    prompts_needed,
    shares_design,
    win_rate_design,
)

Z = 1.959963984540054


def test_the_published_difference_needed_seven_times_its_prompts() -> None:
    """158 against 146 of 256 (61.7 and 57.0 %): about 1,720 prompts per arm for 80 % power; 256 had 19 %."""
    design = shares_design(158 / 256, 146 / 256)
    assert prompts_needed(design) == pytest.approx(1720, abs=5)
    assert power_of(design, 256) == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    "design",
    [
        shares_design(0.6, 0.5),
        paired_shares_design(0.6, 0.5, 0.4),
        win_rate_design(0.6, 0.3),
        means_design(0.3, 1.0, paired=True),
        means_design(-0.3, 1.0, paired=False),
    ],
)
def test_the_number_needed_is_the_least_with_that_power(design: Design, power: float) -> None:
    """One prompt fewer has less than the power asked for, that many have it."""
    n = prompts_needed(design, power)
    assert power_of(design, n) >= power - 1e-3 and power_of(design, n - 1) < power


def test_power_is_the_size_of_the_test_where_there_is_no_difference() -> None:
    """Two-sided: alpha."""
    assert power_of(shares_design(0.5, 0.5), 100) == pytest.approx(0.05)
    assert power_of(means_design(0.0, 2.0, paired=True), 100, 0.1) == pytest.approx(0.1)


def test_power_of_shares_is_that_of_the_simulated_test() -> None:
    """Pooled z test of two shares, 20,000 repetitions, and McNemar's on paired ones."""
    rng, n = np.random.default_rng(0), 150
    first, second = rng.binomial(n, 0.65, 20_000), rng.binomial(n, 0.5, 20_000)
    pooled = (first + second) / (2 * n)
    z = np.abs(first - second) / n / np.sqrt(2 * pooled * (1 - pooled) / n)
    assert power_of(shares_design(0.65, 0.5), n) == pytest.approx(np.mean(z > Z), abs=0.02)

    both = 0.65 * 0.5 + 0.4 * math.sqrt(0.65 * 0.35 * 0.25)
    cells = rng.multinomial(n, [both, 0.65 - both, 0.5 - both, both - 0.15], 20_000)
    z = np.abs(cells[:, 1] - cells[:, 2]) / np.sqrt(np.maximum(cells[:, 1] + cells[:, 2], 1))
    paired = paired_shares_design(0.65, 0.5, 0.4)
    assert power_of(paired, n) == pytest.approx(np.mean(z > Z), abs=0.025)
    assert (
        prompts_needed(paired)
        < prompts_needed(shares_design(0.65, 0.5))
        < prompts_needed(paired_shares_design(0.65, 0.5, -0.3)) * 2
    )


def test_power_of_a_win_rate_with_ties_is_that_of_the_simulated_sign_test() -> None:
    """30 % ties: the mean score against 1/2 with the spread under the null, 20,000 repetitions."""
    rng, n, rate, ties = np.random.default_rng(1), 200, 0.58, 0.3
    cells = rng.multinomial(n, [rate - ties / 2, ties, 1 - rate - ties / 2], 20_000)
    z = np.abs(cells[:, 0] - cells[:, 2]) / np.sqrt(cells[:, 0] + cells[:, 2])
    design = win_rate_design(rate, ties)
    assert power_of(design, n) == pytest.approx(np.mean(z > Z), abs=0.02)
    assert prompts_needed(design) < prompts_needed(win_rate_design(rate))


@pytest.mark.parametrize("paired", [True, False])
def test_power_of_means_is_that_of_the_simulated_t_test(paired: bool) -> None:
    """25 prompts, where z in place of t would promise too much."""
    rng, n, t = np.random.default_rng(2), 25, {True: 2.0639, False: 2.0106}[paired]
    first = rng.normal(0.5, 1, (20_000, n))
    second = np.zeros((20_000, n)) if paired else rng.normal(-0.3, 1, (20_000, n))
    spread = first.var(1, ddof=1) + (0 if paired else second.var(1, ddof=1))
    reject = np.abs(first.mean(1) - second.mean(1)) / np.sqrt(spread / n) > t
    assert power_of(means_design(0.5 if paired else 0.8, 1.0, paired=paired), n) == pytest.approx(
        reject.mean(), abs=0.012
    )


def test_what_can_be_seen_is_what_has_the_power() -> None:
    """The detectable distance has exactly 80 %; it shrinks as 1 / sqrt(n); ties shrink it too."""
    seen = detectable_win_rate(256)
    assert power_of(win_rate_design(0.5 + seen), 256) == pytest.approx(0.8, abs=1e-9)
    assert seen == pytest.approx(0.0871, abs=5e-4)
    assert detectable_win_rate(4 * 256) == pytest.approx(seen / 2, rel=0.02)
    assert detectable_win_rate(256, ties=0.5) < 0.75 * seen


def test_the_report_says_it_in_a_sentence() -> None:
    """Points at n, or that nothing can be seen."""
    assert noise_sentence(256) == (
        "with n = 256 prompts a win rate less than 8.7 points from 50 % cannot be told from noise "
        "(80 % power, two-sided test at 5 %)"
    )
    assert noise_sentence(2).startswith("with n = 2 prompts no win rate can be told from noise")
    with pytest.raises(ValueError, match="at least one prompt, not 0"):
        noise_sentence(0)


def test_a_win_rate_not_told_from_half_says_how_many_prompts_it_takes() -> None:
    """The number of `prompts_needed`, ties counted, thousands apart; of 50 % itself none; "" where it is told."""

    def measured(rate: float, half: float = 0.1) -> Interval:
        return Interval(rate, rate - half, rate + half, 100)

    assert needed_sentence(measured(0.55), 100, ties=0.2) == (
        f"if 55.0 % is the win rate, it takes {prompts_needed(win_rate_design(0.55, 0.2))} prompts to tell it from "
        "50 %, not 100 (80 % power, two-sided test at 5 %)"
    )
    assert f"takes {prompts_needed(win_rate_design(0.505)):,} prompts" in needed_sentence(measured(0.505), 100)
    assert needed_sentence(measured(0.5), 100).endswith("no difference that more prompts could show")
    assert needed_sentence(measured(0.55, half=0.04), 100) == needed_sentence(measured(0.45, half=0.04), 100) == ""


def test_what_cannot_be_planned_is_refused() -> None:
    """No difference, impossible shares, correlations and ties, a power below alpha."""
    with pytest.raises(ValueError, match="no number of prompts shows a difference of 0"):
        prompts_needed(shares_design(0.5, 0.5))
    with pytest.raises(ValueError, match=r"shares lie in \[0, 1\], not 61.7, 0.5"):
        shares_design(61.7, 0.5)
    with pytest.raises(ValueError, match=r"shares 0.9 and 0.1 cannot have the correlation 0.9"):
        paired_shares_design(0.9, 0.1, 0.9)
    with pytest.raises(ValueError, match=r"with a share 0.5 of ties a win rate is at most 0.75, not 0.8"):
        win_rate_design(0.8, 0.5)
    with pytest.raises(ValueError, match="0 < alpha < power < 1"):
        prompts_needed(shares_design(0.6, 0.5), power=0.01)
    with pytest.raises(ValueError, match="a standard deviation is above 0"):
        means_design(1.0, 0.0, paired=True)
