"""matplotlib's figures as inline SVG of a page: no script, no date, the same bytes for the same numbers.

Colours are CSS variables of the page (`--ink`, `--before`, ...), so a figure follows the reader's light or dark
theme; text stays text. matplotlib writes stand-in colours, which are replaced at the end.
"""

from __future__ import annotations

import html
import io
import re

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["STYLE", "VARIABLES", "svg"]

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
