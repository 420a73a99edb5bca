"""The figure of a study: reward against KL beside the exact frontier, and what each method misses of it.

A file of its own, for documentation: plain colours for a light or a dark page, text that stays text, the same bytes for
the same numbers. Methods differ in colour and marker.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from preftune.equations.stats import Interval

__all__ = ["INK", "LOOKS", "FrontierPlot", "frontier_figure", "style", "svg"]

INK = {"light": "#1c1c1c", "dark": "#e8e8e8"}
PAGE = {"light": "#ffffff", "dark": "#14161a"}
GRID = {"light": "#dddddd", "dark": "#34373d"}
# family -> (colour on a light page, on a dark page, marker); methods of one kind share a colour's neighbourhood
LOOKS = {
    "DPO": ("#1f66b0", "#6fb1ee", "o"),
    "DPO, deterministic labels": ("#5aa6d6", "#b5dcf7", "o"),
    "PPO": ("#d1532a", "#f58b60", "s"),
    "PPO-GT": ("#e9a020", "#f5c65c", "s"),
    "RLOO": ("#b03a5b", "#f07fa0", "D"),
    "Exact gradient": ("#2f8f4e", "#74cf90", "*"),
    "Best of n": ("#6b6b6b", "#b5b5b5", "^"),
    "Best of n, true reward": ("#a3a3a3", "#808080", "^"),
    "IPO": ("#8a4fb0", "#c493e6", "v"),
    "SimPO": ("#2f9aa8", "#6fd0dc", "P"),
    "KTO": ("#7a6a1f", "#cdbb62", "X"),
    "Unlikelihood": ("#8c564b", "#d3a092", "<"),
    "Preferred-FT": ("#4a4f8c", "#a4a9ea", ">"),
}
OTHER = ("#000000", "#ffffff", "x")
Course = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class FrontierPlot:
    """What is drawn."""

    courses: Mapping[str, Mapping[str, Course]]
    """family -> setting -> (KL, reward) of its measurements in order, means over seeds; "Frontier" is the line."""
    at: Sequence[float]
    """KL, nats, at which methods are compared."""
    gaps: Mapping[str, Sequence[Interval]]
    """family -> the frontier's reward less its own at these KL."""


def frontier_figure(plot: FrontierPlot, scheme: Literal["light", "dark"]) -> str:
    """An SVG file: left every run of every method, right the gap at matched KL with its band over seeds."""
    ink = INK[scheme]
    families = [family for family in plot.courses if family != "Frontier"]
    looks = {name: LOOKS.get(name, OTHER) for name in families}
    look = {name: (dark if scheme == "dark" else light, marker) for name, (light, dark, marker) in looks.items()}
    with matplotlib.rc_context(style(scheme)):
        figure = Figure(figsize=(10.4, 5.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _runs(left, plot, look, ink)
        _gaps(right, plot, look)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8.5, handlelength=1.6)
        return svg(figure)


def _runs(axes: Axes, plot: FrontierPlot, look: Mapping[str, tuple[str, str]], ink: str) -> None:
    (best,) = plot.courses["Frontier"].values()
    axes.plot(*zip(*best, strict=True), color=ink, linewidth=1.6, label="exact frontier", zorder=3)
    for family, (colour, marker) in look.items():
        for i, course in enumerate(plot.courses[family].values()):
            label = family if i == 0 else None
            axes.plot(
                *zip(*course, strict=True), color=colour, marker=marker, markersize=3.6, linewidth=0.7, alpha=0.85,
                label=label,
            )  # fmt: skip
    axes.set_xlabel("KL(policy || reference), nats per response; mean over seeds")
    axes.set_title("True reward, every measurement of every run")
    axes.set_xlim(left=0, right=1.02 * max(kl for courses in plot.courses.values() for c in courses.values()
                                           for kl, _ in c if kl < 25))  # fmt: skip


def _gaps(axes: Axes, plot: FrontierPlot, look: Mapping[str, tuple[str, str]]) -> None:
    for family, gaps in plot.gaps.items():
        colour, marker = look[family]
        axes.plot(plot.at, [gap.estimate for gap in gaps], color=colour, marker=marker, markersize=4, linewidth=1.2)
        if all(gap.n > 1 for gap in gaps):
            low, high = [gap.low for gap in gaps], [gap.high for gap in gaps]
            axes.fill_between(plot.at, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(plot.at)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("KL(policy || reference) at most, nats")
    axes.set_title("Reward below the frontier at matched KL, 95 % over seeds")
    axes.set_ylim(bottom=min(0.0, *(gap.estimate for gaps in plot.gaps.values() for gap in gaps)), top=_top(plot))


def _top(plot: FrontierPlot) -> float:
    """A little above the largest mean: wide bands may leave the picture, means may not."""
    return 1.1 * max(gap.estimate for gaps in plot.gaps.values() for gap in gaps) + 1e-3


def svg(figure: Figure) -> str:
    """The file as text: no date and no random names."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)


def style(scheme: Literal["light", "dark"]) -> dict[str, Any]:
    """matplotlib's settings of a page in these colours."""
    ink, page = INK[scheme], PAGE[scheme]
    return {
        "svg.fonttype": "none", "svg.hashsalt": "preftune", "font.size": 9.0, "axes.titlesize": 10.0,
        "figure.facecolor": page, "axes.facecolor": page, "text.color": ink, "axes.labelcolor": ink,
        "axes.titlecolor": ink, "axes.edgecolor": GRID[scheme], "xtick.color": ink, "ytick.color": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID[scheme],
        "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.titlelocation": "left", "legend.frameon": False,
    }  # fmt: skip
