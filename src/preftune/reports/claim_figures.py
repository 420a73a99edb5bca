"""The figure of a claim: panels of lines with their bands over seeds, as the figures of studies look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from preftune.equations.stats import Interval
from preftune.reports.study_figures import INK, LOOKS, style, svg

__all__ = ["Panel", "panel_figure"]


@dataclass(frozen=True)
class Panel:
    """One coordinate system."""

    title: str
    x: str
    """What runs along the axis, with its unit."""
    series: Mapping[str, Mapping[float, Interval]]
    """name -> x -> what was measured there."""
    log_x: bool = False


def panel_figure(panels: Sequence[Panel], scheme: Literal["light", "dark"]) -> str:
    """An SVG file, panels side by side; a name has the same colour and marker in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    free = cycle([LOOKS[name] for name in LOOKS if name not in names])
    looks = {name: LOOKS[name] if name in LOOKS else next(free) for name in names}
    look = {name: (dark if scheme == "dark" else light, marker) for name, (light, dark, marker) in looks.items()}
    with matplotlib.rc_context(style(scheme)):
        figure = Figure(figsize=(1.0 + 4.2 * len(panels), 4.2), layout="constrained")
        handles: dict[str, Artist] = {}
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, look, INK[scheme])
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
        return svg(figure)


def _draw(axes: Axes, panel: Panel, look: Mapping[str, tuple[str, str]], ink: str) -> None:
    for name, values in panel.series.items():
        colour, marker = look[name]
        at, measured = list(values), list(values.values())
        means = [number.estimate for number in measured]
        axes.plot(at, means, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
        if all(number.n > 1 for number in measured):
            low, high = [number.low for number in measured], [number.high for number in measured]
            axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
    if panel.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for values in panel.series.values() for x in values})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    seen = [number.estimate for values in panel.series.values() for number in values.values()]
    room = 0.25 * (max(seen) - min(seen)) + 1e-3
    axes.set_ylim(min(seen) - room, max(seen) + room)  # wide bands may leave the picture, means may not
    if min(seen) - room < 0 < max(seen) + room:
        axes.axhline(0, color=ink, linewidth=0.6)
    axes.set_xlabel(panel.x)
    axes.set_title(panel.title)
