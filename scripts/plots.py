"""Line plots as small SVG files: the same bytes on every machine, legible on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GUTTER = 340, 190, 46, 24, 34, 16
LEGEND_LINE = 16
COLOURS = ("#2f7ed8", "#e07b16", "#2a9d6f")
"""Mid-tones, which stand out from white and from black alike."""
STYLE = """\
text { font: 11px system-ui, sans-serif; fill: #57606a } .title { font-weight: 600; fill: #24292f }
.grid { stroke: #8b949e; stroke-opacity: .25 } .axis { stroke: #8b949e } polyline { fill: none; stroke-width: 1.8 }
@media (prefers-color-scheme: dark) { text { fill: #9aa4af } .title { fill: #e6edf3 } }"""


@dataclass(frozen=True)
class Line:
    """One curve; `colour` counts through `COLOURS`."""

    ys: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over the x values of the plot."""

    title: str
    lines: Sequence[Line]


def svg(description: str, label: str, xs: Sequence[float], panels: Sequence[Panel], legend: Sequence[str]) -> str:
    """Panels side by side over the same `xs`, called `label`; `legend` names the colours, below."""
    width = len(panels) * (WIDTH + GUTTER) - GUTTER
    height = HEIGHT + LEGEND_LINE * (len(legend) > 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img">',
        f"<title>{escape(description)}</title>",
        f"<style>\n{STYLE}\n</style>",
    ]
    for index, panel in enumerate(panels):
        parts += _panel(index * (WIDTH + GUTTER), label, xs, panel)
    at = float(LEFT)
    for number, text in enumerate(legend):
        y = height - 8
        parts.append(f'<line x1="{at:g}" y1="{y - 4}" x2="{at + 16:g}" y2="{y - 4}" {_ink(number)} stroke-width="2"/>')
        parts.append(_text(at + 21, y, text))
        at += 38 + 6.1 * len(text)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: float, label: str, xs: Sequence[float], panel: Panel) -> Iterator[str]:
    low, high = min(min(line.ys) for line in panel.lines), max(max(line.ys) for line in panel.lines)
    low, high = min(low, 0.0), max(high, 0.0)  # how near to zero is what one asks of a loss and of a weight
    room = 0.06 * (high - low) or 1.0
    low, high = low - room * (low < 0), high + room * (high > 0)
    right, bottom = left + WIDTH - 8, HEIGHT - BOTTOM
    x0, x1 = left + LEFT, right

    def px(x: float) -> float:
        return x0 + (x - xs[0]) / (xs[-1] - xs[0]) * (x1 - x0)

    def py(y: float) -> float:
        return bottom - (y - low) / (high - low) * (bottom - TOP)

    yield _text(x0, 14, panel.title, "title")
    for tick in ticks(low, high):
        kind = "axis" if tick == 0 else "grid"
        yield f'<line class="{kind}" x1="{_px(x0)}" y1="{_px(py(tick))}" x2="{_px(x1)}" y2="{_px(py(tick))}"/>'
        yield _text(x0 - 5, py(tick) + 4, f"{tick:g}".replace("e+0", "e"), anchor="end")
    for tick in ticks(xs[0], xs[-1]):
        kind = "axis" if tick == 0 else "grid"
        yield f'<line class="{kind}" x1="{_px(px(tick))}" y1="{TOP}" x2="{_px(px(tick))}" y2="{_px(bottom)}"/>'
        yield _text(px(tick), bottom + 14, f"{tick:g}", anchor="middle")
    yield _text((x0 + x1) / 2, bottom + 28, label, anchor="middle")
    for line in panel.lines:
        points = " ".join(f"{_px(px(x))},{_px(py(y))}" for x, y in zip(xs, line.ys, strict=True))
        dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
        yield f'<polyline {_ink(line.colour)}{dashes} points="{points}"/>'


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from `low` to `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min(nice for nice in (1, 2, 5, 10) if nice * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.6g}") for k in range(first, last + 1)]


def _ink(colour: int) -> str:
    return f'stroke="{COLOURS[colour]}"'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{_px(x)}" y="{_px(y)}"{more}>{escape(text)}</text>'


def _px(value: float) -> str:
    """Tenths of a pixel; the nudge keeps a last digit of arithmetic from deciding a tie."""
    return f"{round(value + 1e-6, 1):g}"
