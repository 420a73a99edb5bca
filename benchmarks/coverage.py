"""How often do the intervals cover the truth? Every interval of preftune, on samples whose truth is known.

    python benchmarks/coverage.py                          # the table of docs/statistics.md, 2000 samples per row
    python benchmarks/coverage.py --samples 200            # the same, rougher

A *case* draws one sample and gives the interval (95 %) and the truth. What is claimed of its coverage is a range: 0.95
to 0.95 for an interval that keeps its word, wider for one that is known to be conservative or too narrow, and the
reason stands beside it. tests/evaluation/test_coverage.py checks the same claims on fewer samples.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from preftune.equations.resampling import Floats, Statistic, weighted_mean
from preftune.equations.stats import (
    Interval,
    bootstrap,
    calibration_error,
    equivalence,
    mean_interval,
    mean_share,
    paired_bootstrap,
    paired_difference,
    ratio_interval,
    seeds_and_prompts,
    share,
    wilson,
)
from preftune.evaluation.calibration import correlation, ranks
from preftune.evaluation.drift import length
from preftune.evaluation.leaderboard import POINTS, Standing, bradley_terry_fit, leaderboard
from preftune.evaluation.length_control import length_win_rate
from preftune.evaluation.win_rate import Match, Outcome, WinRate, win_rate
from preftune.judges.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha, raw_agreement

Draw = Callable[[np.random.Generator], tuple[Interval, float]]
R = 300  # resamples of one interval: enough for its coverage, whatever its ends


@dataclass(frozen=True)
class Case:
    """One interval on one kind of sample, with the range its coverage is claimed to be in."""

    interval: str
    sample: str
    draw: Draw
    least: float = 0.95
    most: float = 0.95
    because: str = ""
    level: float = 0.95


def coverage(case: Case, samples: int, seed: int = 0) -> float:
    """The share of `samples` samples whose interval holds the truth."""
    rng = np.random.default_rng([seed, *map(ord, case.interval + case.sample)])
    found = (case.draw(rng) for _ in range(samples))
    return sum(interval.low - 1e-12 <= truth <= interval.high + 1e-12 for interval, truth in found) / samples


def claim(case: Case) -> str:
    """The range in words."""
    return f"{case.least:g}" if case.least == case.most else f"{case.least:g} to {case.most:g}"


def noise(claim: float, samples: int) -> float:
    """Standard error of a measured coverage."""
    return math.sqrt(max(claim * (1 - claim), 1 / samples) / samples)


# --- samples ---------------------------------------------------------------------------------------------------------


def labels(groups: int, each: int) -> list[int]:
    return [i // each for i in range(groups * each)]


def verdicts(rng: np.random.Generator, groups: int, each: int) -> Floats:
    """[groups * each] wins with P = 0.6, correlation 1/3 within a prompt."""
    return (rng.random(groups * each) < np.repeat(rng.beta(1.2, 0.8, groups), each)).astype(float)


def alike(rng: np.random.Generator, groups: int, each: int) -> Floats:
    """[groups * each] values of mean 0, correlation 0.8 within a group."""
    return np.repeat(rng.normal(0, 2, groups), each) + rng.normal(0, 1, groups * each)


def deviation(values: Floats) -> Statistic:
    """The standard deviation as a statistic of weights."""
    moments = np.stack([values, values**2, np.ones_like(values)], axis=1)

    def statistic(weights_RN: Floats) -> Floats:
        first, second, n = (weights_RN @ moments).T
        return np.asarray(np.sqrt(np.maximum(second / n - (first / n) ** 2, 0)))

    return statistic


def crossed(rng: np.random.Generator, S: int, P: int, prompts_sd: float) -> Floats:
    """[S, P]: mean 0, an effect per seed, one per prompt shared by seeds, and noise."""
    return rng.normal(0, 0.3, (S, 1)) + rng.normal(0, prompts_sd, P) + rng.normal(0, 1, (S, P))


def judged(rng: np.random.Generator, prompts: int, judges: int) -> WinRate:
    """Rate 0.6: a prompt's own P(win), 20 % ties, several judges, either order, P(first wins) = 0.6 by position."""
    found = []
    for i, p in enumerate(rng.beta(1.2, 0.8, prompts)):
        for j in range(judges):
            first, turn = bool(rng.random() < 0.5), rng.random()
            won: bool = rng.random() < p if turn < 0.8 else first
            outcome: Outcome = "tie" if rng.random() < 0.2 else "first" if won else "second"
            found.append(
                Match(prompt=f"{i}", judge=f"{j}", first="a", second="b", outcome=outcome,
                      first_length=9, second_length=9, shown_first=first)
            )  # fmt: skip
    return win_rate(found, "a", "b", resamples=R)


JUDGED_RATE = 0.2 * 0.5 + 0.8 * (0.8 * 0.6 + 0.2 * 0.5)
JUDGED_POSITION = 0.2 * 0.5 + 0.8 * (0.8 * 0.5 + 0.2)


def by_length(rng: np.random.Generator, n: int, each: int = 1) -> tuple[Floats, Floats]:
    """(scores, length differences) with theta 0.4, gamma 1 given s = 100; the first is longer by s / 2 on average."""
    d = rng.normal(50, 100, n)
    p = 1 / (1 + np.exp(-0.4 - np.tanh(d / 100)))
    return (rng.random(n) < p).astype(float), d


STRENGTHS = {"a": 0.0, "b": 0.5, "c": 1.0, "d": -0.5}


def rated(rng: np.random.Generator, prompts: int, model: str) -> Standing:
    """Where a model stands against a: every prompt shifts all verdicts on a its own way (clusters)."""
    names, found = list(STRENGTHS), []
    for i in range(prompts):
        theta = {name: value + 0.5 * rng.normal() for name, value in STRENGTHS.items()}
        for k in range(6):
            a, b = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))[k]
            won = rng.random() < 1 / (1 + math.exp(theta[names[b]] - theta[names[a]]))
            found.append(
                Match(prompt=f"{i}", judge="j", first=names[a], second=names[b], outcome="first" if won else "second",
                      first_length=1, second_length=1)
            )  # fmt: skip
    board = leaderboard(found, anchor="a", anchor_rating=0, resamples=R)
    return next(row for row in board.standings if row.model == model)


@cache
def rated_truth(model: str) -> float:
    """What the fit tends to with unlimited prompts: expected wins under the prompts' shifts, fitted without prior."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    names = list(STRENGTHS)
    wins = np.zeros((4, 4))
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            if i != j:  # the difference of two shifts of deviation 0.5 is one of sqrt(0.5)
                shifted = STRENGTHS[one] - STRENGTHS[other] + math.sqrt(0.5) * nodes
                wins[i, j] = (weights / weights.sum()) @ (1 / (1 + np.exp(-shifted)))
    theta = bradley_terry_fit(wins, math.inf)
    return float(POINTS * (theta[names.index(model)] - theta[0]))


# --- cases -----------------------------------------------------------------------------------------------------------


def _wilson(n: int, p: float) -> Draw:
    return lambda rng: (wilson(float(rng.binomial(n, p)), n), p)


def _tied(rng: np.random.Generator) -> tuple[Interval, float]:
    lost, tied, _ = rng.multinomial(60, [0.2, 0.4, 0.4])
    return wilson(60 - lost - tied / 2, 60), 0.6


def _share(groups: int, each: int, *, told: bool = True) -> Draw:
    return lambda rng: (share(verdicts(rng, groups, each), clusters=labels(groups, each) if told else None), 0.6)


def _near_one(prompts: int) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        falls = rng.random((prompts, 4)) < rng.beta(1, 9, (prompts, 1))
        return mean_share(np.where(falls, rng.random((prompts, 4)), 1).ravel(), clusters=labels(prompts, 4)), 0.95

    return draw


def _clustered_mean(groups: int, each: int, *, told: bool = True) -> Draw:
    return lambda rng: (mean_interval(alike(rng, groups, each), clusters=labels(groups, each) if told else None), 0.0)


def _unequal(rng: np.random.Generator) -> tuple[Interval, float]:
    sizes = rng.integers(1, 9, 40)
    values = np.repeat(rng.normal(0, 2, 40), sizes) + rng.normal(0, 1, sizes.sum())
    return mean_interval(values, clusters=np.repeat(np.arange(40), sizes).tolist()), 0.0


def _paired(rng: np.random.Generator) -> tuple[Interval, float]:
    prompt = np.repeat(rng.normal(0, 5, 30), 4)
    gain = np.repeat(rng.normal(0.5, 1, 30), 4) + rng.normal(0, 1, 120)
    return paired_difference(prompt + gain, prompt, clusters=labels(30, 4)), 0.5


def _bootstrap(n: int, method: str = "percentile") -> Draw:
    return lambda rng: (
        paired_bootstrap(rng.exponential(1.0, n), np.zeros(n), method=method, resamples=R, seed=int(rng.integers(1e9))),  # type: ignore[arg-type]
        1.0,
    )


def _clustered_bootstrap(told: bool) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        values, own = alike(rng, 50, 4), labels(50, 4) if told else None
        return paired_bootstrap(values, 0 * values, clusters=own, resamples=R, seed=int(rng.integers(1e9))), 0.0

    return draw


def _deviation(method: str) -> Draw:
    return lambda rng: (
        bootstrap(deviation(rng.exponential(1.0, 60)), 60, method=method, resamples=R, seed=int(rng.integers(1e9))),  # type: ignore[arg-type]
        1.0,
    )


def _ratio(rng: np.random.Generator) -> tuple[Interval, float]:
    size = rng.integers(1, 20, 100).astype(float)
    values = np.stack([size * rng.normal(2, 1, 100), size], axis=1)
    return bootstrap(weighted_mean(values), 100, resamples=R, seed=int(rng.integers(1e9))), 2.0


def _seeds(S: int, prompts_sd: float, *, same: bool) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        values = crossed(rng, S, 40, prompts_sd if same else 0.0)
        values += 0 if same else rng.normal(0, prompts_sd, values.shape)
        return seeds_and_prompts(values, same_prompts=same), 0.0

    return draw


def _calibration(excess: float) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        truth = rng.random(600) * 0.8
        outcome = (rng.random(600) < truth).astype(float)
        return calibration_error(truth + excess, outcome, resamples=R, seed=int(rng.integers(1e9))), excess

    return draw


def _equivalence(rng: np.random.Generator) -> tuple[Interval, float]:
    gain = np.repeat(rng.normal(0.2, 1, 30), 3) + rng.normal(0, 1, 90)
    return equivalence(gain, 0 * gain, 0.5, clusters=labels(30, 3)).difference, 0.2


def _length(n: int, part: int) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        truth = (1 / (1 + math.exp(-0.4)), 1.0)[part]
        return length_win_rate(*by_length(rng, n), resamples=R, seed=int(rng.integers(1e9)))[part], truth

    return draw


def _length_twice(rng: np.random.Generator) -> tuple[Interval, float]:
    score, d = by_length(rng, 100)
    own, seed = labels(100, 3), int(rng.integers(1e9))
    found, _ = length_win_rate(np.repeat(score, 3), np.repeat(d, 3), clusters=own, resamples=R, seed=seed)
    return found, 1 / (1 + math.exp(-0.4))


def _ratio_of_sums(rng: np.random.Generator) -> tuple[Interval, float]:
    size = rng.integers(1, 20, 160).astype(float)
    each = 2 + np.repeat(rng.normal(0, 0.2, 40), 4) + rng.normal(0, 0.4, 160)
    return ratio_interval(size * each, size, clusters=labels(40, 4)), 2.0


def _correlated(of: Callable[[Floats], Floats], truth: float) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        both = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 180) / math.sqrt(2)  # prompts and answers
        first, second = (of(column) for column in (np.repeat(both[:60], 2, axis=0) + both[60:]).T)
        return correlation(first, second, clusters=labels(60, 2), resamples=R), truth

    return draw


def _gain_by_length(part: str, truth: float) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        longer = 40 + 15 * alike(rng, 60, 2)
        gain = 0.3 + 0.02 * longer + 0.3 * alike(rng, 60, 2)
        return length("m", gain, longer, clusters=labels(60, 2), resamples=R).numbers[part], truth

    return draw


AGREE = 0.8**2 + 0.2**2  # raters who are right four times in five, on their own, about what is one of two things


def _agreed(statistic: Callable[..., Interval], truth: float, missing: float = 0.0) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[Interval, float]:
        case = np.repeat(rng.integers(0, 2, 50), 2)[:, None]
        table = np.where(rng.random((100, 3)) < 0.8, case, 1 - case).astype(float)
        table[rng.random((100, 3)) < missing] = math.nan
        return statistic(table, clusters=labels(50, 2), resamples=R, seed=int(rng.integers(1e9))), truth

    return draw


CASES = (
    Case("wilson", "10 independent, p 0.5", _wilson(10, 0.5), 0.95, 0.98, "10 outcomes take few values"),
    Case("wilson", "20 independent, p 0.9", _wilson(20, 0.9), 0.95, 0.97, "20 outcomes take few values"),
    Case("wilson", "200 independent, p 0.6", _wilson(200, 0.6)),
    Case("wilson", "60 with 40 % ties", _tied, 0.97, 1.0, "a tie varies less than the coin it assumes"),
    Case("share, clusters", "40 prompts of 5, p 0.6", _share(40, 5)),
    Case("share, clusters", "10 prompts of 5, p 0.6", _share(10, 5), 0.93, 0.98,
         "the spread of 10 is itself uncertain"),
    Case("share, not told of clusters", "40 prompts of 5, p 0.6", _share(40, 5, told=False), 0.75, 0.87,
         "verdicts of one prompt agree"),
    Case("mean_share, clusters", "40 prompts of 4, most 1", _near_one(40), 0.93, 0.95, "skewed values"),
    Case("mean_share, clusters", "10 prompts of 4, most 1", _near_one(10), 0.92, 0.95, "skewed values"),
    Case("mean_interval", "5 normal", lambda rng: (mean_interval(rng.normal(3, 2, 5)), 3.0)),
    Case("mean_interval", "20 exponential", lambda rng: (mean_interval(rng.exponential(1, 20)), 1.0), 0.91, 0.94,
         "skewed values, and Student's t is symmetric"),
    Case("mean_interval, clusters", "12 prompts of 6", _clustered_mean(12, 6)),
    Case("mean_interval, clusters", "40 prompts of 1 to 8", _unequal, 0.93, 0.95, "large prompts count for more"),
    Case("mean_interval, not told", "12 prompts of 6", _clustered_mean(12, 6, told=False), 0.5, 0.7,
         "samples of one prompt agree"),
    Case("paired_difference", "30 prompts of 4", _paired),
    Case("equivalence (90 %)", "30 prompts of 3", _equivalence, 0.9, 0.9, level=0.9),
    Case("paired_bootstrap", "100 exponential", _bootstrap(100), 0.92, 0.95, "skewed values"),
    Case("paired_bootstrap", "10 exponential", _bootstrap(10), 0.8, 0.9, "10 items: percentiles are too narrow"),
    Case("paired_bootstrap, bca", "100 exponential", _bootstrap(100, "bca"), 0.925, 0.955, "skewed values"),
    Case("paired_bootstrap, clusters", "50 prompts of 4", _clustered_bootstrap(True), 0.92, 0.95,
         "50 prompts: a little too narrow"),
    Case("paired_bootstrap, not told", "50 prompts of 4", _clustered_bootstrap(False), 0.6, 0.76,
         "samples of one prompt agree"),
    Case("bootstrap, percentile", "deviation of 60 exponential", _deviation("percentile"), 0.78, 0.84,
         "biased and skewed statistic"),
    Case("bootstrap, bca", "deviation of 60 exponential", _deviation("bca"), 0.84, 0.9, "better, not enough"),
    Case("bootstrap, percentile", "ratio of 100 pairs", _ratio, 0.92, 0.95, "100 items"),
    Case("seeds_and_prompts", "5 seeds, same 40 prompts", _seeds(5, 0.3, same=True)),
    Case("seeds_and_prompts", "3 seeds, same 40 prompts", _seeds(3, 0.3, same=True), 0.95, 0.97,
         "fractions of a degree of freedom are dropped"),
    Case("seeds_and_prompts", "5 seeds, prompts dominate", _seeds(5, 2.0, same=True)),
    Case("seeds_and_prompts", "5 seeds, prompts of their own", _seeds(5, 0.3, same=False)),
    Case("calibration_error", "600, off by 0.1", _calibration(0.1), 0.9, 0.97,
         "a sum of absolute values is biased upwards"),
    Case("calibration_error", "600, perfect", _calibration(0.0), 0.0, 0.0, "never 0: its bias is all there is"),
    Case("win_rate.rate", "60 prompts, 3 judges, ties", lambda rng: (judged(rng, 60, 3).rate, JUDGED_RATE)),
    Case("win_rate.bootstrap", "60 prompts, 3 judges, ties", lambda rng: (judged(rng, 60, 3).bootstrap, JUDGED_RATE),
         0.925, 0.95, "60 prompts: a little too narrow"),
    Case("win_rate.position", "60 prompts, 3 judges, ties", lambda rng: (judged(rng, 60, 3).position, JUDGED_POSITION),
         0.925, 0.95, "60 prompts: a little too narrow"),
    Case("length_win_rate", "80 verdicts", _length(80, 0), 0.92, 0.95, "few for two terms"),
    Case("length_win_rate", "300 verdicts", _length(300, 0)),
    Case("length_win_rate, effect", "300 verdicts", _length(300, 1), 0.93, 0.95, "its scale s is estimated too"),
    Case("length_win_rate, clusters", "100 prompts, each thrice", _length_twice, 0.93, 0.95, "100 prompts"),
    Case("leaderboard", "40 prompts, 4 models: d", lambda rng: (rated(rng, 40, "d").rating, rated_truth("d")), 0.92,
         0.95, "40 prompts"),
    Case("leaderboard", "40 prompts, 4 models: c", lambda rng: (rated(rng, 40, "c").rating, rated_truth("c")), 0.92,
         0.95, "40 prompts"),
    Case("leaderboard, rank", "40 prompts, 4 models: b", lambda rng: (rated(rng, 40, "b").rank, 2.0), 0.95, 1.0,
         "ranks are whole numbers"),
    Case("ratio_interval, clusters", "40 prompts of 4", _ratio_of_sums),
    Case("correlation", "60 prompts of 2", _correlated(np.asarray, 0.6), 0.92, 0.95, "60 prompts"),
    Case("correlation of ranks", "60 prompts of 2", _correlated(ranks, 6 / math.pi * math.asin(0.3)), 0.92, 0.95,
         "60 prompts"),
    Case("length, slope", "60 prompts of 2", _gain_by_length("slope", 0.02), 0.92, 0.95, "60 prompts"),
    Case("length, explained", "60 prompts of 2", _gain_by_length("explained", 0.8), 0.92, 0.95, "60 prompts"),
    Case("length, at equal length", "60 prompts of 2", _gain_by_length("at_equal_length", 0.3), 0.92, 0.95,
         "60 prompts"),
    Case("raw_agreement", "50 prompts of 2, 3 raters", _agreed(raw_agreement, AGREE), 0.92, 0.95, "50 prompts"),
    Case("cohen_kappa", "50 prompts of 2, 2 raters",
         _agreed(lambda table, **more: cohen_kappa(*table.T[:2], **more), 2 * AGREE - 1), 0.92, 0.95, "50 prompts"),
    Case("fleiss_kappa", "50 prompts of 2, 3 raters", _agreed(fleiss_kappa, 2 * AGREE - 1), 0.92, 0.95, "50 prompts"),
    Case("krippendorff_alpha", "50 prompts of 2, 3 raters, gaps", _agreed(krippendorff_alpha, 2 * AGREE - 1, 0.2),
         0.92, 0.95, "50 prompts"),
)  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="samples per case (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.samples} samples per row, seed {args.seed}\n")
    print("| interval | sample | level | covers | claimed | because |\n|---|---|---|---|---|---|")
    for case in CASES:
        covers = coverage(case, args.samples, args.seed)
        row = (case.interval, case.sample, f"{case.level:g}", f"{covers:.3f}", claim(case), case.because)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
