"""Held-out pairs and drift: what pairs say about a reward and about policies, and the findings in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.config.comparison import EvaluateConfig
from preftune.config.loss_facts import LOSS_FACTS
from preftune.config.stages import DpoConfig
from preftune.data.answers import answer_groups
from preftune.data.ranking import pair_positions
from preftune.engine.card import read_card
from preftune.engine.run import Run
from preftune.equations.stats import Interval, mean_interval, share
from preftune.errors import DataError
from preftune.evaluation.calibration import calibrate, correlation, ranks, wins
from preftune.evaluation.divergence import log_ratios
from preftune.evaluation.drift import (
    Finding,
    Point,
    accuracy_not_quality,
    collapse,
    displacement,
    length,
    no_path,
    over_optimisation,
    saturation,
)
from preftune.evaluation.paths import paths, start_of, strengths
from preftune.evaluation.texts import said_elsewhere
from preftune.judges.scores import Scorer
from preftune.parts.comparing import is_samples, read_rankings
from preftune.parts.contestants import Contestant, readers
from preftune.parts.measuring import Measured, by_prompt, texts_of
from preftune.parts.room import rows_with_room
from preftune.records import Prompt, Response, RunCard

__all__ = ["Pair", "calibration", "findings", "implicit", "pair_ratios", "read_pairs"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A labelled comparison that no model was trained on."""

    prompt: Prompt
    chosen: Response
    rejected: Response

    @property
    def longer_by(self) -> int:
        """Characters of the chosen less those of the rejected response."""
        return len(self.chosen.text) - len(self.rejected.text)


def read_pairs(cfg: EvaluateConfig, run: Run) -> list[Pair]:
    """Every pair of the preference file `cfg.pairs` that all models can read whole; the others are refused by row.

    Raises DataError on more than `cfg.allow_refused` refused rows, and when no pair is there.
    """
    name = str(cfg.pairs)
    if Path(name).is_file() and is_samples(Path(name)):
        raise DataError(f"{name}: none of its rows prefers one response to another; label samples first")
    read, refusals, digest = read_rankings(name)
    rows, unfit = rows_with_room(read, readers(cfg))
    for refusal in (*refusals, *unfit):
        run.warn(str(refusal))
    if (found := len(refusals) + len(unfit)) > cfg.allow_refused:
        raise DataError(
            f"pairs {name}: {found} of {len(read) + len(refusals)} rows are refused, {cfg.allow_refused} allowed; mend "
            f"the rows named above, or do without them: --allow_refused {found}"
        )
    pairs = [
        Pair(row.prompt, row.responses[chosen], row.responses[rejected])
        for row in rows
        for chosen, rejected in pair_positions(row)
    ]
    if not pairs:
        raise DataError(f"{name}: none of {len(rows)} rows prefers one response to another; label samples first")
    run.record(data={"pairs": {"path": name, "sha256": digest, "pairs": len(pairs), "refused": found}})
    return pairs


def pair_ratios(contestant: Contestant, reference: Contestant, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """(log-ratio of the chosen, of the rejected response) of every pair, nats, at temperature 1."""
    asked = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    groups, places = answer_groups(contestant.loaded.tokenizer, asked)
    batching = contestant.batching(packed=contestant.packed and reference.packed)
    found = log_ratios(contestant.loaded.model, reference.loaded.model, groups, batching, world=contestant.world)
    values = [found[group][i] for group, i in places]
    return list(zip(values[::2], values[1::2], strict=True))


def calibration(pairs: Sequence[Pair], scorers: Mapping[str, Scorer | None], run: Run) -> dict[str, Any]:
    """The reward on the pairs, and what it has to do with the truth where there is one."""
    asked = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    reward, truth = (score(asked) if score else None for score in (scorers["reward"], scorers["truth"]))
    if reward is None:
        return {}
    told = [i for i in range(len(pairs)) if all(value == value for value in reward[2 * i : 2 * i + 2])]
    if len(told) < len(pairs):
        run.warn(f"{len(pairs) - len(told)} of {len(pairs)} pairs have a response without reward and are left out")
    if not told:
        return {}
    prompts = [pairs[i].prompt for i in told]
    margins = [reward[2 * i] - reward[2 * i + 1] for i in told]
    found: dict[str, Any] = {"pairs": calibrate(margins, [pairs[i].longer_by for i in told], clusters=prompts)}
    if truth is not None:
        both = [i for i in told if all(value == value for value in truth[2 * i : 2 * i + 2])]
        sides = [side for i in both for side in (2 * i, 2 * i + 1)]
        found["truth"] = _against_truth(
            [reward[s] for s in sides], [truth[s] for s in sides], [asked[s][0] for s in sides]
        )
    return found


def _against_truth(reward: Sequence[float], truth: Sequence[float], prompts: Sequence[Prompt]) -> dict[str, Interval]:
    if not reward:
        return {}
    return {
        "pearson": correlation(reward, truth, clusters=prompts),
        "spearman": correlation(ranks(reward), ranks(truth), clusters=prompts),
    }


def implicit(ratios: Sequence[tuple[float, float]], pairs: Sequence[Pair]) -> dict[str, Interval]:
    """What a policy says about the pairs: log-ratios of chosen and rejected, and the share ranked as labelled."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = zip(*ratios, strict=True)
    return {
        "chosen_log_ratio": mean_interval(chosen, clusters=prompts),
        "rejected_log_ratio": mean_interval(rejected, clusters=prompts),
        "implicit_accuracy": share(wins([a - b for a, b in ratios]), clusters=prompts),
    }


def findings(
    field: Sequence[Measured], pairs: Sequence[Pair], results: Mapping[str, Any], cfg: EvaluateConfig, run: Run
) -> list[Finding]:
    """Every diagnostic that what was measured allows; one that needs what was not given is absent."""
    reference, *models = field
    found: list[Finding] = []
    for one in models:
        if one.pair_ratios:
            found += _on_pairs(one, pairs, results["models"][one.name], results, cfg)
        if cfg.reward is not None:
            found += _by_length(one, reference)
        if len(one.answers) > 1:
            found.append(collapse(one.name, said_elsewhere(texts_of(one)), said_elsewhere(texts_of(reference))))
    points = {}
    for one in models:
        numbers = results["models"][one.name]
        kl = numbers.get("kl") or numbers.get("k1")
        if kl is not None and cfg.reward is not None:
            points[one.name] = Point(one.name, kl, by_prompt(one.rows, "reward"))
    begin = Point(reference.name, Interval(0.0, 0.0, 0.0, len(reference.rows)), by_prompt(reference.rows, "reward"))
    return [*found, *_along_paths(points, begin, cfg, run)]


def _along_paths(points: Mapping[str, Point], begin: Point, cfg: EvaluateConfig, run: Run) -> Iterator[Finding]:
    """Of every path among the models, and one for those that are on none; the reference belongs to what began at it."""
    cards = {name: card for name in points if (card := card_of(cfg.contestants()[name]))}
    together = paths(cards)
    for path in together:
        own = {name: cards[name] for name in path}
        begins = start_of(own[path[0]]) == run.card.hashes[f"{begin.model}_weights"]
        yield over_optimisation([begin] * begins + [points[name] for name in path], strengths(own))
    alone = [point for name, point in points.items() if not any(name in path for path in together)]
    if alone:
        yield no_path(alone)


def _on_pairs(
    one: Measured, pairs: Sequence[Pair], numbers: Mapping[str, Any], results: Mapping[str, Any], cfg: EvaluateConfig
) -> Iterator[Finding]:
    prompts = [pair.prompt for pair in pairs]
    forward: Interval | None = numbers.get("forward_kl")
    if forward is not None and cfg.temperature == 1:
        forced = Interval(-forward.estimate, -forward.high, -forward.low, forward.n)
        yield displacement(one.name, numbers["chosen_log_ratio"], forced, len(set(prompts)))
    beta = beta_of(cfg.contestants()[one.name])
    if beta is not None:
        yield saturation(one.name, [beta * (a - b) for a, b in one.pair_ratios], clusters=prompts)
    rate = next((r for r in results.get("win_rates", ()) if (r.one, r.other) == (one.name, results["reference"])), None)
    if rate is not None and rate.rate.n:
        yield accuracy_not_quality(
            one.name, numbers["implicit_accuracy"], rate.rate, even=0.5, prompts=min(rate.prompts, len(set(prompts)))
        )


def _by_length(one: Measured, reference: Measured) -> Iterable[Finding]:
    """On the responses that both have a reward for, the i-th with the i-th."""
    gains, longer, prompts = [], [], []
    for ours, theirs in zip(one.rows, reference.rows, strict=True):
        if ours.reward is not None and theirs.reward is not None:
            gains.append(ours.reward - theirs.reward)
            longer.append(ours.characters - theirs.characters)
            prompts.append(ours.prompt)
    return [length(one.name, gains, longer, clusters=prompts)] if len(set(prompts)) > 1 else []


def card_of(folder: str) -> RunCard | None:
    """The card of the run that made a model, of a round of online DPO that of the whole run; None of another folder."""
    run = Path(folder).parent if Path(folder).name == "model" else Path(folder)
    whole = run.parent.parent if run.name == "dpo" and run.parent.name.startswith("round-") else run
    return next((read_card(at / "run.json") for at in (whole, run) if (at / "run.json").exists()), None)


def beta_of(folder: str) -> float | None:
    """The beta a run of `preftune dpo` was trained with; None for any other folder, or a loss without one."""
    card = card_of(folder)
    if card is None or card.stage != "dpo":
        return None
    term = DpoConfig.model_validate(card.config).terms()[0]
    known = LOSS_FACTS[term.loss].knobs
    return float(term.knobs.get("beta", known["beta"][0])) if "beta" in known else None
