"""A run folder as one HTML file that can be mailed: no script, nothing loaded, every number named with its file.

Text of models and data sets is escaped wherever it stands, and the page forbids itself (CSP) to run or load anything.
The only arithmetic is what a figure needs, means and shares of what it draws; no torch, no model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from preftune.records import Judgement
from preftune.reports.figures import Curve, Panel, curves, histogram
from preftune.reports.reading import Result, Row, RunFolder, Stage, finite, read, results

__all__ = ["render", "write_report"]

SHOWN = 12  # answers shown side by side, the first ones of the file
WORST = 4  # and those that lost most


@dataclass(frozen=True, kw_only=True)
class _Meaning:
    label: str
    meaning: str
    unit: str = ""
    signed: bool = False
    percent: bool = False


MEANINGS = {
    "reward_gain": _Meaning(label="Reward gain", meaning="after minus before, paired by prompt", signed=True),
    "reward_before": _Meaning(label="Reward before", meaning="mean true reward of the starting policy's answers"),
    "reward_after": _Meaning(label="Reward after", meaning="mean true reward of the trained policy's answers"),
    "win_rate": _Meaning(
        label="Win rate",
        meaning="held-out prompts where the answer after has more reward; a tie counts half",
        percent=True,
    ),
    "kl": _Meaning(
        label="KL from the start",
        meaning="KL(policy || reference) per answer, from the policy's own answers",
        unit="nats",
    ),
    "length_before": _Meaning(label="Length before", meaning="mean length of the answers", unit="words"),
    "length_after": _Meaning(label="Length after", meaning="mean length of the answers", unit="words"),
    "accuracy": _Meaning(
        label="Accuracy", meaning="held-out pairs whose chosen response has the larger implicit reward", percent=True
    ),
    "reward_margin": _Meaning(
        label="Margin", meaning="implicit reward, chosen minus rejected, held-out pairs", signed=True
    ),
    "loss": _Meaning(label="Loss", meaning="on held-out data", unit="nats"),
}


def write_report(folder: str | Path) -> Path:
    """Write `FOLDER/report.html` and return its path. Raises ArtifactError on a folder that holds no run."""
    path = Path(folder) / "report.html"
    temporary = path.with_name(".report.html.tmp")
    temporary.write_text(render(read(Path(folder))), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(run: RunFolder) -> str:
    """The page: the same bytes for the same records."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "json": lambda value: json.dumps(value, ensure_ascii=False)}
    lost = [a for a in sorted(run.answers, key=_gain) if _gain(a) < 0]
    return environment.get_template("report.html").render(
        card=run.card,
        numbers=_shown(results(run.card, "run.json").values()),
        reward_figure=_reward_figure(run.answers),
        length_figure=_length_figure(run.answers),
        stages=[(stage, _stage_figures(stage), _shown(_held_out(stage))) for stage in run.stages],
        answers=run.answers,
        side_by_side=[("The first held-out prompts, not selected", run.answers[:SHOWN])]
        + [("The largest losses of reward", lost[:WORST])] * bool(lost),
        gain=_gain,
        made_by=[("run.json", run.card), *((s.file("run.json"), s.card) for s in run.stages if s.name)],
    )


def _shown(numbers: Iterable[Result]) -> list[tuple[_Meaning, str, str, str]]:
    """(meaning, value, interval, source) of the results that have a meaning, in the order of `MEANINGS`."""
    by_key = {result.key: result for result in numbers}
    shown = []
    for key, meaning in MEANINGS.items():
        if (result := by_key.get(key)) is not None:
            ends = [] if result.low is None or result.high is None else [result.low, result.high]
            value, *interval = [_number(v, meaning) for v in (result.value, *ends)]
            shown.append((meaning, value, f"[{', '.join(interval)}]" if ends else "", result.source))
    return shown


def _held_out(stage: Stage) -> Iterable[Result]:
    return results(stage.card, stage.file("run.json")).values()


def _number(value: float, meaning: _Meaning | None = None) -> str:
    """Three significant digits, thousands with commas, no exponent for everyday sizes."""
    if meaning is not None and meaning.percent:
        return f"{100 * value:.1f} %"
    if isinstance(value, int):
        text = f"{value:,}"
    elif value == 0 or not math.isfinite(value) or not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.3g}"
    else:
        text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"+{text}" if meaning is not None and meaning.signed and value > 0 else text


def _gain(answer: Judgement) -> float:
    return (answer.second.score or 0.0) - (answer.first.score or 0.0)


def _reward_figure(answers: Sequence[Judgement]) -> Markup | None:
    if not answers:
        return None
    samples = {
        "before": ("before", [a.first.score or 0.0 for a in answers]),
        "after": ("after", [a.second.score or 0.0 for a in answers]),
    }
    return Markup(histogram("rewards", samples, label="true reward", bins=[i / 20 for i in range(21)]))


def _length_figure(answers: Sequence[Judgement]) -> Markup | None:
    if not answers:
        return None
    before = [len(answer.first.text.split()) for answer in answers]
    after = [len(answer.second.text.split()) for answer in answers]
    longest = max(*before, *after)
    width = max(1, -(-longest // 40))
    bins = [i - 0.5 for i in range(0, longest + width + 1, width)]
    return Markup(
        histogram("lengths", {"before": ("before", before), "after": ("after", after)}, label="words", bins=bins)
    )


def _stage_figures(stage: Stage) -> Markup | None:
    """The curves of a stage: of preferences when there are margins, else of the likelihood alone."""
    panels = [
        Panel(title="loss, nats", curves=_both(stage, "loss")),
        Panel(title="accuracy of implicit rewards", curves=_both(stage, "accuracy"), lines={"chance": 0.5}),
        Panel(title="margin of implicit rewards", curves=_both(stage, "reward_margin"), lines={"start": 0.0}),
        Panel(
            title="log-probability, change from the reference, nats",
            curves=[
                *_curve(stage.evaluated or stage.train, "logp_chosen_change", "chosen", "chosen"),
                *_curve(stage.evaluated or stage.train, "logp_rejected_change", "rejected", "rejected"),
            ],
            lines={"start": 0.0},
        ),
        Panel(title="fall of the log-probability of all responses, nats", curves=_both(stage, "kl_from_data")),
        Panel(title="gradient norm before clipping", curves=_both(stage, "grad_norm")),
    ]
    panels = [panel for panel in panels if panel.curves]
    return Markup(curves(f"curves-{stage.name or 'run'}", panels)) if panels else None


def _both(stage: Stage, key: str) -> list[Curve]:
    """Held-out evaluations, and the single steps of training behind them."""
    held_out = _curve(stage.evaluated, key, "held out", "after")
    steps = _curve(stage.train, key, "training steps", "before" if held_out else "after", faint=bool(held_out))
    return [*held_out, *steps]


def _curve(rows: Sequence[Row], key: str, label: str, colour: str, *, faint: bool = False) -> list[Curve]:
    """The course of one metric, with its interval where it has one; none when it was never recorded."""
    rows = [row for row in rows if finite(row.get(key))]
    if not rows:
        return []
    banded = not faint and all(finite(row.get(f"{key}_{end}")) for row in rows for end in ("low", "high"))
    low, high = ([row[f"{key}_{end}"] for row in rows] if banded else [] for end in ("low", "high"))
    return [
        Curve(
            label=label,
            colour=colour,
            steps=[row["step"] for row in rows],
            values=[row[key] for row in rows],
            band=(low, high) if banded else None,
            faint=faint,
        )
    ]
