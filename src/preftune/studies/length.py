"""Does DPO write longer? Mean length of its answers at equal KL, where length is worth nothing, or less than nothing.

    neutral       truth = 2 score / letters: length alone brings nothing
    biased        the same truth, but those who label like long answers: + 0.4 a letter, which the truth does not know
    penalised     truth - 0.4 a letter, labelled honestly

RLOO follows a reward model of the very labels that DPO sees. Lengths are exact, and so is the length of the policy with
the largest true reward at the same KL: longer than that is longer than necessary. The slope of the implicit reward
beta log(pi / pi_ref) on length, over the policy's own answers, tells whether length is what it learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from preftune.evaluation.claims import Finding, above, at_kl, of_seeds
from preftune.reports.claim_figures import Panel
from preftune.studies import frontier
from preftune.studies.claims import Lines, Points, Telling, by_arm, series, taught
from preftune.studies.frontier import Arm
from preftune.studies.settings import JUDGED, TINY
from preftune.studies.world import Start, enumerated
from preftune.worlds.enumerable import Labels, random_world

__all__ = ["ARMS", "FAST", "FULL", "Slanted", "run", "tell"]

GRID = (0.25, 0.5)
BETAS = (0.3, 1.0)
SCALE, LETTER = 2.0, 0.4
FULL, FAST = replace(JUDGED, letters=4), replace(TINY, letters=3)
TRUTHS: Mapping[str, tuple[float, Labels]] = {
    "neutral": (0.0, Labels()),
    "biased": (0.0, Labels(length_bias=LETTER)),
    "penalised": (-LETTER, Labels()),
}
"""Name -> (what the truth adds for a letter, who labels)."""
ARMS = tuple(
    arm
    for truth, (_, labels) in TRUTHS.items()
    for arm in (
        Arm("Frontier", truth, "frontier"),
        *(Arm("DPO", f"{truth} beta={beta:g}", "offline", {"beta": beta}, "dpo", labels) for beta in BETAS),
        *(Arm("RLOO", f"{truth} beta={beta:g}", "rloo", {"beta": beta}, labels=labels) for beta in BETAS),
    )
)


@dataclass(frozen=True)
class Slanted:
    """A policy, exactly; slopes are over its own answers to a prompt, means over prompts."""

    step: int
    kl: float
    reward: float
    letters: float
    implicit: float
    """Slope of beta log(pi / pi_ref) on length, a letter."""
    true: float
    """Slope of the true reward on length."""
    explained: float
    """Share of the implicit reward's variance that length explains."""


def run(start: Start, arm: Arm) -> list[Slanted]:
    """Exchange the truth, fit a reward model where one is needed, train and look."""
    truth = arm.setting.split()[0]
    added, labels = TRUTHS[truth]
    fair = random_world(start.seed, reward="mean", max_tokens=start.world.max_tokens)
    letters = start.world.letters(start.law.tokens)
    start = replace(start, rewards=SCALE * fair.rewards(start.prompts, start.law.tokens) + added * letters)
    if arm.kind == "frontier":
        return [Slanted(p.step, p.kl, p.reward, p.letters, 0.0, 0.0, 0.0) for p in frontier.run(start, arm)]
    if arm.kind == "rloo":
        start = taught(start, start.pairs(labels))
    seen: list[Slanted] = []

    def watch(model: Any, step: int) -> None:
        logps = enumerated(model, start.world, start.prompts).logps
        point, implicit = start.point(logps, step), arm.knobs["beta"] * (logps - start.law.logps)
        slope, explained = slope_on(letters, implicit, logps.exp())
        true, _ = slope_on(letters, start.rewards, logps.exp())
        seen.append(Slanted(step, point.kl, point.reward, point.letters, slope, true, explained))

    frontier.run(replace(start, watch=watch), arm)
    return seen


def slope_on(letters_M: Tensor, values: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Least squares of `values` [P, M] on length under `probabilities` [P, M]: slope and R^2, means over prompts."""

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        mean = (probabilities * a).sum(-1, keepdim=True)
        return (probabilities * (a - mean) * (b - (probabilities * b).sum(-1, keepdim=True))).sum(-1)

    length = letters_M.expand_as(values)
    both, spread = covariance(length, values), covariance(length, length)
    explained = both**2 / (spread * covariance(values, values)).clamp(min=torch.finfo(torch.float64).tiny)
    return float((both / spread).mean()), float(explained.mean())


def tell(lines: Lines) -> Telling:
    """Lengths at equal KL, and slopes at the end with beta = 1."""
    arms = by_arm(lines)
    seeds = sorted(arms["Frontier", "neutral"])

    def courses(family: str, truth: str) -> list[list[tuple[float, float]]]:
        """Of every seed: (KL, letters), the reference's first."""
        own = [runs for (f, setting), runs in arms.items() if f == family and setting.split()[0] == truth]
        first = arms["Frontier", truth]
        return [pairs_of(first[seed][:1]) + [p for runs in own for p in pairs_of(runs[seed])] for seed in seeds]

    def at(family: str, truth: str, kl: float) -> list[float]:
        return [float(at_kl(course, [kl])[0]) for course in courses(family, truth)]

    def slopes(family: str, truth: str) -> list[float]:
        ends = [arms[family, f"{truth} beta=1"][seed][-1] for seed in seeds]
        return [end["implicit"] - end["true"] for end in ends]

    longer = of_seeds({f"{t}, KL {k:g}": minus(at("DPO", t, k), at("RLOO", t, k)) for t in TRUTHS for k in GRID})
    needed = of_seeds({f"{t}, KL {k:g}": minus(at("DPO", t, k), at("Frontier", t, k)) for t in TRUTHS for k in GRID})
    learned = of_seeds({truth: slopes("DPO", truth) for truth in TRUTHS})
    limits = f"answers of at most {FULL.letters} letters end by the grammar; text has far longer tails"
    return Telling(
        (
            Finding("DPO tends to produce longer sequences than RLHF", "letters of DPO less those of RLOO at equal KL",
                    longer, above(longer), limits),
            Finding("... unnecessarily long ones", "letters of DPO less letters of the best policy at the same KL",
                    needed, above(needed), limits),
            Finding("... because length is what it learned", "slope of DPO's implicit reward on length less the true "
                    "reward's, beta = 1, own answers", learned, above(learned), limits),
        ),
        [
            Panel(f"Letters at equal KL, {truth}", "KL(policy || reference), nats", {
                name: series({k: at(family, truth, k) for k in (0.0625, 0.125, *GRID)})
                for name, family in {"DPO": "DPO", "RLOO": "RLOO", "most reward at this KL": "Frontier"}.items()
            }, log_x=True)
            for truth in TRUTHS
        ],
    )  # fmt: skip


def pairs_of(points: Points) -> list[tuple[float, float]]:
    return [(point["kl"], point["letters"]) for point in points]


def minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]
