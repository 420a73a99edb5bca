"""Judges decide which of two sampled responses is better: samples -> comparisons -> verdicts -> files to train on.

    judgements.jsonl   one Judgement per comparison and judge, with the order it was shown in
    shown.jsonl        everything that was shown and said, where that is more: both orders
    pairs.jsonl        the winners: prompt, chosen, rejected, weight, annotator; what `preftune dpo` reads
    rankings.jsonl     prompts with more than two responses, ranked by comparisons won
    scored.jsonl       the samples with the scores of the first judge that scores: the page then asks close calls first
    label.json         counts, agreement, what sways each judge; also printed
    answers.jsonl      what language models answered: a run that is repeated asks nothing twice; answers-1.jsonl and
                       so on are those of further processes

The files are replaced whole at the end; the same samples, judges and seed give the same files, by one process or by
several, which ask the judges in turn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from preftune.config.loop import LabelConfig
from preftune.engine.card import jsonable
from preftune.engine.parallel import world
from preftune.engine.run import Run
from preftune.equations.stats import Interval
from preftune.errors import DataError
from preftune.judges.agreement import Agreement, agreement, flip_rate
from preftune.judges.contract import Judge, Verdict
from preftune.parts.comparing import (
    Question,
    category,
    pair_rows,
    questions,
    ranking_rows,
    read_samples,
    scored_rows,
    tally,
)
from preftune.parts.ending import finish, opened
from preftune.parts.judging import open_judges, verdicts_on
from preftune.records import RunCard, to_json

__all__ = ["LabelConfig", "main"]

WIDTH = 132  # columns of the table: a narrower terminal breaks its lines, no number is cut


@dataclass(frozen=True)
class Labels:
    """What a run of the stage found: `flips` holds the judges that were asked in both orders."""

    counts: dict[str, dict[str, int]]
    agreement: Agreement
    flips: dict[str, Interval]


def main(cfg: LabelConfig) -> RunCard:
    """Ask every judge of `cfg.judge` about every comparison; write the files into `cfg.out`, print the summary."""
    ranks = world()
    rows, digest = read_samples(cfg.samples)
    asked = questions(rows, cfg.samples)
    comparisons = sum(len(question.comparisons) for question in asked)
    if not comparisons:
        left_out = sum((question.left_out for question in asked), Counter[str]())
        why = "; left out: " + ", ".join(f"{count} {kind} comparisons" for kind, count in left_out.items())
        advice = "; sample with a larger --max_tokens, or train the model to end" * bool(left_out["unfinished"])
        raise DataError(
            f"{cfg.samples}: none of {len(rows)} rows holds two responses that are finished and not empty"
            f"{why * bool(left_out)}{advice}"
        )
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with open_judges(cfg) as judges, _opened(cfg) as run:
        verdicts = [_ask(judge, asked, cfg, run) for judge in judges]
        flat = [verdict for of_judge in verdicts for verdict in of_judge]
        pairs = pair_rows([verdict.judgement for verdict in flat])
        rankings, ranked = ranking_rows(asked, verdicts)
        labels = Labels(_counts(asked, verdicts, ranked), _agreement(asked, flat, cfg.seed), _flips(verdicts))

        run.write("judgements.jsonl", (to_json(verdict.judgement) for verdict in flat))
        if any(len(verdict.shown) > 1 for verdict in flat):
            run.write("shown.jsonl", (to_json(shown) for verdict in flat for shown in verdict.shown))
        run.write("pairs.jsonl", (json.dumps(row, ensure_ascii=False) for row in pairs))
        if ranked:
            run.write("rankings.jsonl", (json.dumps(row, ensure_ascii=False) for row in rankings))
        scoring = next((of for of in verdicts if any(v.judgement.first.score is not None for v in of)), None)
        if scoring and (scored := scored_rows(rows, [verdict.judgement for verdict in scoring])):
            run.write("scored.jsonl", map(to_json, scored))
        run.write("label.json", [json.dumps(jsonable(labels), indent=1)])
        card = finish(run, {"samples": {"name": cfg.samples, "sha256": digest}, "labels": jsonable(labels)})
    if not ranks.rank:
        _show(labels, cfg, bool(pairs))
    return card


def _opened(cfg: LabelConfig) -> AbstractContextManager[Run]:
    resume = (Path(cfg.out) / "run.json").exists()
    return opened(cfg.out, stage="label", config=cfg.model_dump(), resume=resume)


def _ask(judge: Judge, asked: Sequence[Question], cfg: LabelConfig, run: Run) -> list[Verdict]:
    """One judge's verdicts on all comparisons, in their order, and a warning where it had none to give."""
    verdicts = verdicts_on(judge, [comparison for question in asked for comparison in question.comparisons], cfg, run)
    failed = [v.judgement.reason for v in verdicts if category(v.judgement) == "failed"]
    if failed:
        run.warn(f"{judge.name}: {len(failed)} comparisons got no answer ({failed[0]}); run again to ask those anew")
    return verdicts


def _counts(
    asked: Sequence[Question], verdicts: Sequence[Sequence[Verdict]], ranked: Counter[str]
) -> dict[str, dict[str, int]]:
    """Every comparison in exactly one place: `all` = judged + what is left out; a judge's categories sum to judged."""
    left_out = sum((question.left_out for question in asked), Counter[str]())
    judged_ = sum(len(question.comparisons) for question in asked)
    counts = {
        "prompts": {"all": len(asked), "compared": sum(bool(question.comparisons) for question in asked)},
        "comparisons": {"all": judged_ + left_out.total(), "judged": judged_, **left_out},
    }
    for of_judge in verdicts:
        said = [verdict.judgement for verdict in of_judge]
        counts[said[0].judge] = tally(said)
    return counts | ({"rankings": dict(ranked)} if ranked else {})


def _agreement(asked: Sequence[Question], flat: Sequence[Verdict], seed: int) -> Agreement:
    """The judges, and the labels the data came with; those were shown to nobody here."""
    stated = [judgement for question in asked for judgement in question.stated]
    shown = [judgement for verdict in flat for judgement in verdict.shown]
    return agreement([verdict.judgement for verdict in flat] + stated, shown, seed=seed)


def _flips(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Interval]:
    twice = {of_judge[0].judgement.judge: [v.shown for v in of_judge if len(v.shown) == 2] for of_judge in verdicts}
    return {name: flip_rate((one, other) for one, other in shown) for name, shown in twice.items() if shown}


def _show(labels: Labels, cfg: LabelConfig, any_pair: bool) -> None:
    """Counts and numbers with their intervals on standard output."""
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, WIDTH)
    for name, parts in labels.counts.items():
        console.print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in parts.items()), soft_wrap=True)
    columns = ("annotator", "verdicts", "ties", "P(first wins)", "P(longer wins)", "longest wins", "with others")
    table = Table(*columns, title="shares with 95 % intervals; P(first wins) near 0.5: no position bias")
    for row in labels.agreement.annotators:
        shares = (row.first, row.longer, row.longest_wins, row.others)
        table.add_row(row.name, str(row.judged), str(row.ties), *map(_share, shares))
    console.print(table)
    console.print('"longest wins": agreement with the rule that the longer response wins; a judge should beat it')
    for name, interval in labels.flips.items():
        console.print(f"{name}: answers that turn with the order {_share(interval)}", soft_wrap=True)
    if len(labels.agreement.annotators) > 1:
        for name in ("raw", "kappa", "alpha", "alpha_ordinal"):
            if (interval := getattr(labels.agreement, name)).n:
                console.print(f"agreement, {name.replace('_', ' ')}: {_share(interval)} over {interval.n} comparisons")
    if any_pair:
        console.print(f"Next: preftune dpo --model MODEL --data {cfg.out}/pairs.jsonl --out RUN", soft_wrap=True)


def _share(interval: Interval) -> str:
    if interval.n == 0:
        return "-"
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
