"""How much does DPO depend on preference data? Fewer pairs, flipped labels, prompts that nobody labelled.

    pairs, flip     DPO against a reward model of the same pairs and RLOO on it, steps fixed
    prompts         labels for a few prompts; reward model + RLOO gets others without labels, and so does DPO when the
                    reward model labels pairs for them: only that tells "more data" from "another algorithm"

Measured as worth (`study_claims`) on the labelled prompts and, for the second part, on prompts that no arm saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from preftune.evaluation.claims import Finding, above, of_seeds
from preftune.reports.claim_figures import Panel
from preftune.studies import frontier
from preftune.studies.claims import OPTIMUM, Lines, Telling, among, by_arm, series, taught, worth
from preftune.studies.frontier import Arm, on_pairs
from preftune.studies.settings import JUDGED, TINY
from preftune.studies.world import Point, Start
from preftune.worlds.enumerable import Labels

__all__ = ["ARMS", "AT", "FAST", "FULL", "Elsewhere", "run", "tell"]

PAIRS = (125, 500, 2000, 8000)
FLIPS, ONLY_DPO = (0.1, 0.2, 0.3, 0.4), (0.1, 0.3)
AT = 2000  # pairs where labels are flipped
EXTRA, HELD_OUT = 24, 16
BETA = {"beta": 1.0}
SMALL_DATA = "RM + RLOO"
FULL, FAST = (
    replace(size, prompts=8, pairs=AT, rloo=replace(size.rloo, course=replace(size.rloo.course, batch_size=64)))
    for size in (JUDGED, TINY)
)
WIDE = "RM + RLOO, unlabelled prompts too"
RELABELLED = "DPO, pairs of these prompts labelled by the RM"


@dataclass(frozen=True)
class Elsewhere:
    """A policy at the end, on the labelled prompts and on prompts that no arm saw."""

    labelled: Point
    held_out: Point


def both(pairs: int, flip: float = 0.0) -> tuple[Arm, Arm]:
    knobs, setting = {**BETA, "pairs": float(pairs)}, f"pairs={pairs} flip={flip:g}"
    labels = Labels(flip=flip)
    return Arm("DPO", setting, "offline", knobs, "dpo", labels), Arm(SMALL_DATA, setting, "rloo", knobs, labels=labels)


def prompts() -> tuple[Arm, ...]:
    """The arms of the second part, as the knob `extra` tells; their pairs are the setting's."""
    knobs = {**BETA, "extra": float(EXTRA)}
    return (
        Arm("Frontier", "prompts", "frontier", {"extra": float(EXTRA)}),
        Arm("DPO", "prompts", "offline", knobs, "dpo"),
        Arm(SMALL_DATA, "prompts", "rloo", knobs),
        Arm(WIDE, "prompts", "rloo", knobs),
        Arm(RELABELLED, "prompts", "offline", knobs, "dpo"),
    )


ARMS = (
    OPTIMUM,
    *(arm for n in PAIRS for arm in both(n)),
    *(arm for e in FLIPS for arm in both(AT, e)[: 1 if e in ONLY_DPO else 2]),
    *prompts(),
)


def run(start: Start, arm: Arm) -> list[Point] | list[Elsewhere]:
    """Train on as many pairs as the arm has, its reward model too."""
    if "pairs" in arm.knobs:
        start = replace(start, setting=replace(start.setting, pairs=int(arm.knobs["pairs"])))
    if "extra" in arm.knobs:
        return beyond(start, replace(arm, knobs=BETA))
    if arm.kind == "rloo":
        start = taught(start, start.pairs(arm.labels))
    return frontier.run(start, replace(arm, knobs=BETA))


def beyond(start: Start, arm: Arm) -> list[Elsewhere]:
    """The second part: policies on both sets of prompts, at every measurement."""
    others = [prompt for prompt in start.world.prompts if prompt not in start.prompts][: EXTRA + HELD_OUT]
    held_out = among(start, others[EXTRA:])
    if arm.kind == "frontier":
        pairs = zip(frontier.run(start, arm), frontier.run(held_out, arm), strict=True)
        return [Elsewhere(*pair) for pair in pairs]
    seen: list[Elsewhere] = []

    def watch(model: Any, step: int) -> None:
        seen.append(Elsewhere(start.measure(model, step), held_out.measure(model, step)))

    watched = replace(start, watch=watch)
    extra = among(start, others[:EXTRA])
    if arm.family == RELABELLED:
        by_model = replace(extra, rewards=extra.learned, setting=replace(
            extra.setting, pairs=extra.setting.pairs * EXTRA // len(start.prompts)))  # fmt: skip
        on_pairs(watched, arm, [*start.pairs(arm.labels), *by_model.pairs(Labels())])
    elif arm.family == WIDE:
        wide = among(start, [*start.prompts, *extra.prompts])
        frontier.run(replace(wide, watch=watch), arm)
    else:
        frontier.run(watched, arm)
    return seen


def tell(lines: Lines) -> Telling:
    """What fewer pairs, wrong labels and prompts without labels cost or bring."""
    arms = by_arm(lines)
    optimum, seeds = arms[OPTIMUM.family, OPTIMUM.setting], sorted(arms[OPTIMUM.family, OPTIMUM.setting])

    def at(family: str, pairs: int, flip: float = 0.0) -> list[float]:
        own = arms[family, f"pairs={pairs} flip={flip:g}"]
        return [worth(own[seed][-1], optimum[seed]) for seed in seeds]

    def place(family: str, where: str) -> list[float]:
        own, best = arms[family, "prompts"], arms["Frontier", "prompts"]
        return [worth(own[s][-1][where], [point[where] for point in best[s]]) for s in seeds]

    fewer = {f: minus(at(f, PAIRS[-1]), at(f, PAIRS[0])) for f in ("DPO", SMALL_DATA)}
    noisier = {f: minus(at(f, AT), at(f, AT, FLIPS[-1])) for f in ("DPO", SMALL_DATA)}
    places = {f: place(f, "held_out") for f in ("DPO", SMALL_DATA, WIDE, RELABELLED)}
    methods = ("DPO", SMALL_DATA)
    return Telling(
        tuple(findings(fewer, noisier, places)),
        (
            Panel("Worth against the number of pairs", "preference pairs",
                  {f: series({n: at(f, n) for n in PAIRS}) for f in methods}, log_x=True),
            Panel(f"Worth against flipped labels, {AT} pairs", "share of labels turned around", {
                f: series({0.0: at(f, AT), **{e: at(f, AT, e) for e in FLIPS if f == "DPO" or e not in ONLY_DPO}})
                for f in methods
            }),
            Panel("0: on the labelled prompts, 1: on prompts no arm saw", "prompts",
                  {f: series({0: place(f, "labelled"), 1: place(f, "held_out")}) for f in places}),
        ),
    )  # fmt: skip


Worths = Mapping[str, Sequence[float]]


def findings(fewer: Worths, noisier: Worths, places: Worths) -> Iterator[Finding]:
    """Claims with what decides them; `fewer` and `noisier` are losses of worth, `places` worths on unseen prompts."""
    limits = "one size of model and of world; steps fixed, so few pairs are seen often"
    few = of_seeds({"DPO": fewer["DPO"]})
    yield Finding(
        "DPO depends on the amount of preference data", f"worth with {PAIRS[-1]} pairs less worth with {PAIRS[0]}",
        few, above(few), limits,
    )  # fmt: skip
    noise = of_seeds({"DPO": noisier["DPO"]})
    yield Finding(
        "DPO depends on the quality of preference data", f"worth with clean labels less with {FLIPS[-1]:.0%} flipped",
        noise, above(noise), "flips are independent of the answers; people err where answers are close",
    )  # fmt: skip
    more = of_seeds({
        "fewer pairs": minus(fewer["DPO"], fewer[SMALL_DATA]),
        "flipped labels": minus(noisier["DPO"], noisier[SMALL_DATA]),
    })  # fmt: skip
    yield Finding(
        "... more than RLHF, whose reward model needs less of it", "DPO's loss of worth less that of RM + RLOO",
        more, above(more), limits,
    )  # fmt: skip
    wider = of_seeds({"with less without": minus(places[WIDE], places[SMALL_DATA])})
    yield Finding(
        "RLHF can use a larger set of prompts without labels",
        f"worth on unseen prompts of RM + RLOO with {EXTRA} unlabelled prompts less without", wider, above(wider),
        "unseen prompts are of the same language",
    )  # fmt: skip
    against = of_seeds({"RLOO - DPO": minus(places[WIDE], places["DPO"])})
    yield Finding(
        "This limits the data DPO can leverage",
        "worth on unseen prompts of RM + RLOO with the unlabelled prompts less that of DPO on the labelled pairs",
        against, above(against), "mixes more data with another algorithm",
    )  # fmt: skip
    same = of_seeds({"RLOO - DPO": minus(places[WIDE], places[RELABELLED])})
    yield Finding(
        "... because of the algorithm", "the same with DPO on pairs that the reward model labelled for these prompts",
        same, above(same), "labels of a reward model cost its training and the sampling of pairs",
    )  # fmt: skip


def minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]
