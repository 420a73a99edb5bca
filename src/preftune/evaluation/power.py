"""How many prompts it takes to see a difference, and what can be seen with those at hand. No torch.

With d the difference, s_0 and s_1 the standard deviations of what one prompt contributes when there is none and when
it is d, and z the normal quantiles of a two-sided test of size alpha:

    n = ((z_{1 - alpha/2} s_0 + z_power s_1) / |d|)^2
    power = Phi((|d| sqrt(n) - z_{1 - alpha/2} s_0) / s_1) + Phi((-|d| sqrt(n) - z_{1 - alpha/2} s_0) / s_1)

A *prompt* is what is independent: several samples or judges of one prompt count as less than that many. Unpaired
designs count prompts per arm. Normal approximations: good from about 20 prompts with wins and losses among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from preftune.equations.stats import Interval

__all__ = [
    "Design",
    "detectable_win_rate",
    "means_design",
    "needed_sentence",
    "noise_sentence",
    "paired_shares_design",
    "power_of",
    "prompts_needed",
    "shares_design",
    "win_rate_design",
]

NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Design:
    """A difference to be seen, and what one prompt (per arm, if unpaired) tells about it; all in one unit."""

    difference: float
    null_sd: float
    """Standard deviation of one prompt's contribution where there is no difference, > 0."""
    sd: float
    """The same where there is this one, >= 0."""
    of_means: bool = False
    """The standard deviation is estimated and the test is Student's: a few more prompts."""
    arms: int = 1


def shares_design(first: float, second: float) -> Design:
    """Two shares on different prompts, n in each arm: s_1^2 = p q + p' q', s_0 of the pooled share (Fleiss, 1981)."""
    _check_share(first, second)
    pooled = (first + second) / 2
    return Design(
        first - second,
        math.sqrt(2 * pooled * (1 - pooled)),
        math.sqrt(first * (1 - first) + second * (1 - second)),
        arms=2,
    )


def paired_shares_design(first: float, second: float, correlation: float = 0.0) -> Design:
    """Two shares on the same prompts, with the correlation of success over prompts: McNemar's test (Miettinen, 1968).

    s_0^2 = P(exactly one succeeds), s_1^2 = s_0^2 - d^2. Raises ValueError where no two such shares can be correlated
    that much.
    """
    _check_share(first, second)
    both = first * second + correlation * math.sqrt(first * (1 - first) * second * (1 - second))
    least, most = max(0.0, first + second - 1), min(first, second)
    if not least - 1e-12 <= both <= most + 1e-12:
        raise ValueError(
            f"shares {first:g} and {second:g} cannot have the correlation {correlation:g}: both would succeed with "
            f"probability {both:.3g}, which must be in [{least:.3g}, {most:.3g}]"
        )
    discordant, difference = first + second - 2 * both, first - second
    return Design(difference, math.sqrt(max(discordant, 0.0)), math.sqrt(max(discordant - difference**2, 0.0)))


def win_rate_design(rate: float, ties: float = 0.0) -> Design:
    """A win rate with ties as half against 1/2, a share `ties` of all verdicts: s_0^2 = (1 - ties) / 4.

    Ties say little about who is better but also vary less: s_1^2 = s_0^2 - (rate - 1/2)^2. Raises ValueError where
    so many ties leave no room for the rate.
    """
    _check_share(rate, ties)
    if abs(rate - 0.5) > (1 - ties) / 2 + 1e-12:
        raise ValueError(f"with a share {ties:g} of ties a win rate is at most {0.5 + (1 - ties) / 2:g}, not {rate:g}")
    variance = (1 - ties) / 4
    return Design(rate - 0.5, math.sqrt(variance), math.sqrt(max(variance - (rate - 0.5) ** 2, 0.0)))


def means_design(difference: float, sd: float, *, paired: bool) -> Design:
    """Two means: `sd` > 0 of the differences over prompts (paired) or of the values in each arm (unpaired)."""
    if not sd > 0:
        raise ValueError(f"a standard deviation is above 0, not {sd}")
    of_one = sd if paired else sd * math.sqrt(2)
    return Design(difference, of_one, of_one, of_means=True, arms=1 if paired else 2)


def prompts_needed(design: Design, power: float = 0.8, alpha: float = 0.05) -> int:
    """The least number of prompts (per arm, if unpaired) with this power; Student's test costs z^2 / (2 arms) more.

    Raises ValueError on no difference, or a power not between alpha and 1.
    """
    if design.difference == 0:
        raise ValueError("no number of prompts shows a difference of 0; equivalence within a margin can be shown")
    if not 0 < alpha < power < 1:
        raise ValueError(f"needs 0 < alpha < power < 1, not alpha {alpha:g} and power {power:g}")
    z = NORMAL.inv_cdf(1 - alpha / 2)
    n = ((z * design.null_sd + NORMAL.inv_cdf(power) * design.sd) / design.difference) ** 2
    return max(1, math.ceil(n + (z**2 / (2 * design.arms) if design.of_means else 0.0) - 1e-9))


def power_of(design: Design, n: int, alpha: float = 0.05) -> float:
    """The chance that n prompts (per arm, if unpaired) show the difference at level alpha, on either side."""
    z = NORMAL.inv_cdf(1 - alpha / 2)
    counted = max(n - z**2 / (2 * design.arms), 0.0) if design.of_means else float(n)
    away, bar = abs(design.difference) * math.sqrt(counted), z * design.null_sd
    if design.sd == 0:
        return float(away > bar)
    return NORMAL.cdf((away - bar) / design.sd) + NORMAL.cdf((-away - bar) / design.sd)


def detectable_win_rate(n: int, ties: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> float:
    """The least distance of a win rate from 1/2 that n prompts show with this power; its largest where none is shown.

    In shares: 0.05 is a win rate of 55 or of 45 %.
    """
    low, high = 0.0, (1 - ties) / 2
    if power_of(win_rate_design(0.5 + high, ties), n, alpha) < power:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        enough = power_of(win_rate_design(0.5 + middle, ties), n, alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def noise_sentence(n: int, ties: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> str:
    """What a report prints beside a win rate over n prompts, of which a share `ties` tied."""
    if n < 1:
        raise ValueError(f"a win rate needs at least one prompt, not {n}")
    points = 100 * detectable_win_rate(n, ties, power, alpha)
    shown = f"{100 * power:g} % power, two-sided test at {100 * alpha:g} %"
    if points >= 50 * (1 - ties):
        return f"with n = {n} prompts no win rate can be told from noise ({shown})"
    return (
        f"with n = {n} prompts a win rate less than {points:.1f} points from 50 % cannot be told from noise ({shown})"
    )


def needed_sentence(rate: Interval, n: int, ties: float = 0.0, power: float = 0.8, alpha: float = 0.05) -> str:
    """How many prompts would show a win rate that n did not tell from 1/2, were it as measured; "" if they did."""
    if not rate.low <= 0.5 <= rate.high:
        return ""
    if rate.estimate == 0.5:
        return "a win rate of exactly 50 % is no difference that more prompts could show"
    needed = prompts_needed(win_rate_design(rate.estimate, ties), power, alpha)
    return (
        f"if {100 * rate.estimate:.1f} % is the win rate, it takes {needed:,} prompts to tell it from 50 %, not {n:,} "
        f"({100 * power:g} % power, two-sided test at {100 * alpha:g} %)"
    )


def _check_share(*shares: float) -> None:
    if not all(0 <= value <= 1 for value in shares):
        raise ValueError(f"shares lie in [0, 1], not {', '.join(f'{value:g}' for value in shares)}")
