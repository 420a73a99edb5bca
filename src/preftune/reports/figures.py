"""The report's figures as inline SVG: no script, no date, the same bytes for the same numbers.

Colours are CSS variables of the page (`--ink`, `--before`, ...), so a figure follows the reader's light or dark
theme; text stays text. matplotlib writes stand-in colours, which are replaced at the end.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

__all__ = ["STYLE", "VARIABLES", "Curve", "Panel", "curves", "histogram", "svg"]

# Stand-in colour -> CSS variable: nothing else may use these colours.
VARIABLES = {
    "ink": "#010101",
    "muted": "#010102",
    "grid": "#010103",
    "before": "#010104",
    "after": "#010105",
    "chosen": "#010106",
    "rejected": "#010107",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "preftune",
    "font.size": 9.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": VARIABLES["grid"],
    "axes.labelcolor": VARIABLES["muted"],
    "axes.titlecolor": VARIABLES["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": VARIABLES["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": VARIABLES["grid"],
    "ytick.color": VARIABLES["grid"],
    "xtick.labelcolor": VARIABLES["muted"],
    "ytick.labelcolor": VARIABLES["muted"],
    "legend.frameon": False,
    "legend.labelcolor": VARIABLES["ink"],
    "text.color": VARIABLES["ink"],
}
Numbers = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number over optimizer steps."""

    label: str
    colour: str
    """A key of `VARIABLES`."""
    steps: Sequence[int]
    values: Numbers
    band: tuple[Numbers, Numbers] | None = None
    """Lower and upper ends of an interval around each value."""
    faint: bool = False
    """Drawn thin, behind the others: noisy numbers of single steps."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of a figure: its title says what is shown and in which unit."""

    title: str
    curves: Sequence[Curve]
    lines: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines to compare with: label -> value."""


def curves(name: str, panels: Sequence[Panel], *, columns: int = 2) -> str:
    """Panels side by side, each with its curves over optimizer steps; `name` tells the figure's ids apart."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.3 * rows), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.06))
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(panel.title)
            for curve in panel.curves:
                _draw(axes, curve)
            for label, value in panel.lines.items():
                axes.axhline(value, color=VARIABLES["muted"], linewidth=0.9, linestyle=(0, (4, 3)), label=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if index + columns >= len(panels):
                axes.set_xlabel("optimizer step")
            if len(panel.curves) + len(panel.lines) > 1:
                axes.legend(fontsize=8, handlelength=1.4, borderaxespad=0.2)
        return svg(figure, name, f"Curves over optimizer steps: {', '.join(panel.title for panel in panels)}")


def histogram(
    name: str, samples: Mapping[str, tuple[str, Numbers]], *, label: str, bins: Numbers, share_label: str = "answers, %"
) -> str:
    """Overlaid histograms in percent with their means: label -> (colour, values), on the same bins."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        for title, (colour, values) in samples.items():
            paint: dict[str, Any] = {"bins": list(bins), "weights": [100 / len(values)] * len(values)}
            axes.hist(values, **paint, color=VARIABLES[colour], alpha=0.3, label=title)
            axes.hist(values, **paint, color=VARIABLES[colour], histtype="step", linewidth=1.4)
            mean = sum(values) / len(values)
            axes.axvline(mean, color=VARIABLES[colour], linewidth=1.4, linestyle=(0, (4, 3)), label=f"mean {mean:.3g}")
        axes.set_xlim(bins[0], bins[-1])
        axes.set_xlabel(label)
        axes.set_ylabel(share_label)
        axes.legend(fontsize=8.5, ncols=2 * len(samples), loc="lower left", bbox_to_anchor=(-0.01, 1.0))
        return svg(figure, name, f"Histogram of {label}: {' and '.join(samples)}")


def _draw(axes: Axes, curve: Curve) -> None:
    colour = VARIABLES[curve.colour]
    if curve.faint:
        axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.35, zorder=1.5, label=curve.label)
        return
    marker = "o" if len(curve.steps) <= 40 else None
    width = 1.6 if len(curve.steps) <= 200 else 1.0
    axes.plot(curve.steps, curve.values, color=colour, linewidth=width, marker=marker, markersize=3, label=curve.label)
    if curve.band is not None:
        axes.fill_between(curve.steps, *curve.band, color=colour, alpha=0.18, linewidth=0)


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for an HTML page: no prolog, no metadata, ids of its own, the page's colours."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    for variable, stand_in in VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1).strip()
