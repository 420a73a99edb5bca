"""The figures and the table of `convergence.py`, from its JSON alone.

python benchmarks/convergence_figures.py [benchmarks/convergence.json [docs/figures]]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from preftune.equations.stats import Interval, mean_interval

__all__ = ["draw", "show"]

BLUE, ORANGE, GREEN, GREY = "#2a6fb0", "#d1632a", "#3b8f5a", "#707070"
HERE = Path(__file__).resolve().parent
Rows = Sequence[dict[str, Any]]


def draw(result: dict[str, Any], folder: Path) -> None:
    """Four PNG files: what is claimed, and the three counter-examples."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, painter, height in (
        ("convergence", convergence, 5.6),
        ("convergence-deterministic", deterministic, 3.1),
        ("convergence-coverage", coverage, 3.1),
        ("convergence-displacement", displacement, 3.1),
    ):
        figure = Figure(figsize=(8.4, height), dpi=100, layout="constrained")
        painter(figure, result)
        for axes in figure.axes:
            axes.grid(True, linewidth=0.5, color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=7.5, frameon=False, loc="lower left" if painter is convergence else "best")
        FigureCanvasAgg(figure).print_png(folder / f"{name}.png")


def convergence(figure: Figure, result: dict[str, Any]) -> None:
    """TV and KL to the optimum: over optimizer steps, and over pairs."""
    setting, points = result["setting"], pick(result["points"], labels="bradley-terry", beta=1.0)
    sampled, longest = pick(points, pairs=max(setting["pairs"])), pick(points, steps=max(setting["course"]))
    certain, known = pick(result["points"], labels="exact", beta=1.0), pick(result["exact"], beta=1.0)
    measures = (
        ("total_variation", "total_variation_of_reference", "floor_total_variation", "TV(policy, optimum)"),
        ("kl", "kl_of_reference", "floor_kl", "KL(policy || optimum), nats"),
    )
    for (by_steps, by_pairs), (measure, of_reference, floor, title) in zip(
        figure.subplots(2, 2), measures, strict=True
    ):
        curve(by_steps, sampled, "steps", measure, BLUE, f"DPO, {max(setting['pairs']):,} pairs")
        curve(by_steps, certain, "steps", measure, GREEN, "the same pairs, exact labels")
        curve(by_pairs, pick(points, steps=setting["steps"]), "pairs", measure, BLUE, f"DPO, {setting['steps']} steps")
        curve(by_pairs, longest, "pairs", measure, ORANGE, f"DPO, {max(setting['course'])} steps")
        curve(by_pairs, known, "pairs", floor, GREY, "a table fitted to these pairs, first order", line="--")
        for axes in (by_steps, by_pairs):
            level(axes, pick(known, pairs=max(setting["pairs"])), of_reference, "the reference itself")
            axes.set_title(title, loc="left", fontsize=9.5)
            logarithmic(axes)
        ticks(by_steps, setting["course"])
        ticks(by_pairs, setting["pairs"])
    by_steps.set_xlabel("optimizer steps (every point is a whole run)")
    by_pairs.set_xlabel("pairs sampled from the reference and labelled")


def deterministic(figure: Figure, result: dict[str, Any]) -> None:
    """KL to the reference and TV to the optimum over steps, with sampled and with deterministic labels."""
    setting = result["setting"]
    most = max(setting["pairs"])
    known = pick(result["exact"], beta=1.0, pairs=most)
    left, right = figure.subplots(1, 2)
    for name, colour in (("bradley-terry", BLUE), ("deterministic", ORANGE)):
        points = pick(result["points"], labels=name, beta=1.0, pairs=most)
        curve(left, points, "steps", "kl_to_reference", colour, f"{name} labels")
        curve(right, points, "steps", "total_variation", colour, f"{name} labels")
    level(left, known, "kl_to_reference", "optimum for beta = 1, exact")
    level(left, known, "kl_of_the_best", "only the best response, exact", colour=ORANGE)
    level(right, known, "total_variation_of_reference", "the reference itself")
    left.set_title("KL(policy || reference), nats, beta = 1", loc="left", fontsize=9.5)
    right.set_title("TV(policy, optimum for beta = 1)", loc="left", fontsize=9.5)
    for axes in (left, right):
        ticks(axes, setting["course"])
        axes.set_xlabel("optimizer steps")
        axes.set_ylim(bottom=0)


def coverage(figure: Figure, result: dict[str, Any]) -> None:
    """Distance from pi*_beta as beta falls, and the mass on responses that no pair shows."""
    points, known = by_beta(result)
    most, longest = max(result["setting"]["pairs"]), max(result["setting"]["course"])
    left, right = figure.subplots(1, 2)
    curve(left, points, "beta", "total_variation", BLUE, f"TV(policy, optimum), {result['setting']['steps']} steps")
    for name, colour, label in (("bradley-terry", ORANGE, ""), ("exact", GREEN, ", exact labels")):
        long = pick(result["points"], labels=name, pairs=most, steps=longest)
        curve(left, long, "beta", "total_variation", colour, f"TV, {longest} steps{label}", line="none")
    curve(left, known, "beta", "floor_total_variation", GREY, "a table fitted to these pairs, first order", line="--")
    curve(left, known, "beta", "effective", "black", "effective share of the draws, exact", line="--")
    left.set_ylim(0, 1.4)
    left.set_title("Smaller beta, larger distance", loc="left", fontsize=9.5)
    curve(right, points, "beta", "not_drawn", BLUE, "the trained policy's")
    curve(right, known, "beta", "not_drawn", ORANGE, "the optimum's")
    curve(right, known, "beta", "never_drawn", GREY, "the optimum's, expected exactly", line="--")
    right.set_title("Mass on responses that were never drawn", loc="left", fontsize=9.5)
    logarithmic(right)
    for axes in (left, right):
        ticks(axes, result["setting"]["betas"])
        axes.set_xlabel("beta")


def displacement(figure: Figure, result: dict[str, Any]) -> None:
    """Mean log-ratio of chosen and rejected responses: measured, and what the optimum forces."""
    points, known = by_beta(result)
    longest = pick(result["points"], labels="exact", steps=max(result["setting"]["course"]))
    for axes, side in zip(figure.subplots(1, 2), ("chosen", "rejected"), strict=True):
        curve(axes, points, "beta", side, BLUE, f"trained policy, {result['setting']['steps']} steps")
        curve(
            axes, longest, "beta", side, GREEN, f"exact labels, {max(result['setting']['course'])} steps", line="none"
        )
        curve(axes, known, "beta", side, GREY, "forced, exact: E[r] / beta - log Z", line="--")
        axes.set_title(f"Mean log-ratio of {side} responses, nats", loc="left", fontsize=9.5)
        axes.axhline(0, color="black", linewidth=0.7)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_locator(FixedLocator([-30, -10, -3, -1, -0.5, 0, 0.5, 1]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(-50 if side == "rejected" else -30, 1)
        ticks(axes, result["setting"]["betas"])
        axes.set_xlabel("beta")


def by_beta(result: dict[str, Any]) -> tuple[Rows, Rows]:
    """(points, exact numbers) at the usual steps and the most pairs, of every beta."""
    setting = result["setting"]
    most = max(setting["pairs"])
    points = pick(result["points"], labels="bradley-terry", pairs=most, steps=setting["steps"])
    return points, pick(result["exact"], pairs=most)


def pick(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def over_seeds(rows: Rows, x: str, y: str) -> dict[float, Interval]:
    """x -> the mean of y over seeds, in the order of x."""
    return {at: mean_interval([row[y] for row in rows if row[x] == at]) for at in sorted({row[x] for row in rows})}


def curve(axes: Axes, rows: Rows, x: str, y: str, colour: str, label: str, *, line: str = "-") -> None:
    """Means over seeds, dashed for exact numbers; measured: a dot for each seed, a bar for the interval of the mean."""
    means = over_seeds(rows, x, y)
    style = {"linewidth": 1.0} if line == "--" else {"marker": "D", "markersize": 4, "linewidth": 1.5}
    axes.plot(
        list(means), [mean.estimate for mean in means.values()], linestyle=line, color=colour, label=label, **style
    )
    if line == "--":
        return
    axes.plot([row[x] for row in rows], [row[y] for row in rows], "o", color=colour, markersize=2.5, alpha=0.6)
    for at, mean in means.items():
        if mean.n > 1:
            axes.plot([at, at], [mean.low, mean.high], color=colour, linewidth=5, alpha=0.2, solid_capstyle="butt")


def level(axes: Axes, rows: Rows, y: str, label: str, *, colour: str = GREY) -> None:
    axes.axhline(
        mean_interval([row[y] for row in rows]).estimate, color=colour, linewidth=1, linestyle=":", label=label
    )


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, as far as the means go: bars of wide intervals may leave it."""
    heights = [height for line in axes.lines if line.get_marker() != "o" for height in line.get_ydata() if height > 0]
    drawn = [height for height in heights if height > 1e-3]
    axes.set_yscale("log")
    axes.set_ylim(min(drawn) / 1.6, max(drawn) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def show(result: dict[str, Any], write: Callable[[str], object] = print) -> None:
    """Every point as a line of a Markdown table: means over seeds with 95 % intervals."""
    columns = ("total_variation", "kl", "reverse_kl", "kl_to_reference", "objective_gap", "chosen", "silent")
    write(f"| labels | beta | pairs | steps | {' | '.join(column.replace('_', ' ') for column in columns)} |")
    write("|" + "---|" * (4 + len(columns)))
    keys = sorted({(p["labels"], p["beta"], p["pairs"], p["steps"]) for p in result["points"]})
    for labels, beta, pairs, steps in keys:
        rows = pick(result["points"], labels=labels, beta=beta, pairs=pairs, steps=steps)
        cells = [spelled(mean_interval([row[column] for row in rows])) for column in columns]
        write(f"| {labels} | {beta} | {pairs:,} | {steps} | {' | '.join(cells)} |")
    minutes, runs = result["cpu_minutes"], len(result["points"])
    write(f"\n{minutes:.1f} CPU minutes in {runs} runs; {result['cpu']}; {result['versions']}")


def spelled(number: Interval) -> str:
    return str(number) if number.n > 1 else f"{number.estimate:.4g}"


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    told = json.loads((paths[0] if paths else HERE / "convergence.json").read_text(encoding="utf-8"))
    show(told)
    draw(told, paths[1] if len(paths) > 1 else HERE.parent / "docs" / "figures")
