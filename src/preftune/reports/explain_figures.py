"""The figures of the executed derivation: inline SVG in the page's colours, and SVG and PNG files for slides.

Each is a function of the lesson's series, drawn by the name it has in `FIGURES`; nothing is computed but positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from preftune.reports.figures import STYLE, VARIABLES, svg

__all__ = ["FIGURES", "LIGHT", "inline", "save"]

BETA, PI = "\u03b2", "\u03c0"

LIGHT = {
    "ink": "#17202e",
    "muted": "#5a6578",
    "grid": "#d5dae3",
    "before": "#7b8599",
    "after": "#1d5fd6",
    "chosen": "#1d5fd6",
    "rejected": "#c4530a",
}
"""The page's light colours, for files that stand alone."""

Series = Mapping[str, Sequence[float]]
Colours = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Drawing:
    alt: str
    draw: Callable[[Figure, Series, Colours], None]
    size: tuple[float, float] = (8.4, 2.9)


def inline(name: str, series: Series) -> str:
    """Figure `name` as an `<svg>` element whose colours are the page's variables."""
    with _drawn(name, series, VARIABLES) as figure:
        return svg(figure, f"fig-{name}", FIGURES[name].alt)


def save(name: str, series: Series, folder: Path) -> None:
    """Write `FOLDER/name.svg` and `FOLDER/name.png`, in light colours on white, without a date."""
    with _drawn(name, series, LIGHT) as figure:
        figure.set_facecolor("white")
        FigureCanvasSVG(figure).print_svg(folder / f"{name}.svg", metadata={"Date": None, "Title": FIGURES[name].alt})
        figure.set_dpi(200)
        FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})


@contextmanager
def _drawn(name: str, series: Series, colours: Colours) -> Iterator[Figure]:
    """The figure, inside its style: matplotlib makes ticks only when it prints."""
    real = {stand_in: colours[variable] for variable, stand_in in VARIABLES.items()}
    style = {key: real.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=FIGURES[name].size, layout="constrained")
        FIGURES[name].draw(figure, series, colours)
        yield figure


def _say(axes: Axes, text: str, at: tuple[float, float], colour: str, **more: Any) -> None:
    """A label beside what it names, instead of a legend."""
    more = {"textcoords": "offset points", "xytext": (5, 4), "fontsize": 8.5, **more}
    axes.annotate(text, at, color=colour, **more)


def _simplex(figure: Figure, s: Series, c: Colours) -> None:
    axes = figure.add_subplot()

    def place(b: Sequence[float], t: Sequence[float]) -> tuple[list[float], list[float]]:
        return [x + y / 2 for x, y in zip(b, t, strict=True)], [y * 0.866 for y in t]

    levels = [min(s["simplex.j"]) + (max(s["simplex.j"]) - min(s["simplex.j"])) * (i / 12) ** 0.6 for i in range(13)]
    x, y = place(s["simplex.b"], s["simplex.c"])
    shades = [(c["chosen"], 0.03 + 0.035 * i) for i in range(12)]
    field = axes.tricontourf(x, y, s["simplex.j"], levels=levels, colors=shades)
    field.set_clip_on(False)  # a clip path would be named after an address in memory
    axes.plot([0, 1, 0.5, 0], [0, 0, 0.866, 0], color=c["muted"], linewidth=1)
    axes.plot(*place(s["path.b"], s["path.c"]), color=c["rejected"], linewidth=1.8)
    start, end = place(s["mark.b"], s["mark.c"])[0], place(s["mark.b"], s["mark.c"])[1]
    axes.plot(start[0], end[0], "o", color=c["ink"], markersize=6)
    axes.plot(start[1], end[1], "o", color=c["rejected"], markersize=7)
    _say(axes, "reference", (start[0], end[0]), c["ink"], xytext=(-6, 7), ha="right")
    _say(axes, f"{PI}_r, the largest J", (start[1], end[1]), c["ink"], xytext=(0, 11), ha="center")
    _say(axes, f"{BETA} falls to 0", (0.97, 0.035), c["rejected"], xytext=(8, 8))
    _say(axes, "always 'cats'", (0, 0), c["muted"], xytext=(-6, -4), ha="right")
    _say(axes, "always 'reward function'", (1, 0), c["muted"], xytext=(6, -4), ha="left")
    _say(axes, "always 'anything else'", (0.5, 0.866), c["muted"], xytext=(8, -2), ha="left")
    axes.set(xlim=(-0.45, 1.65), ylim=(-0.06, 0.92), aspect="equal")
    axes.set_axis_off()


def _gaussians(figure: Figure, s: Series, c: Colours) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    y = s["density.y"]
    for i, mean in enumerate((-4, -3, -2, -1)):
        left.plot(y, s[f"density.{mean}"], color=c["rejected"], linewidth=1.3, alpha=0.95 - 0.2 * i)
    left.fill_between(y, s["density.0"], color=c["chosen"], alpha=0.18, linewidth=0)
    left.plot(y, s["density.0"], color=c["chosen"], linewidth=1.6)
    left.set(title="densities: the other one slides to 0", xlabel="y", yticks=[], ylim=(0, 0.47))
    _say(left, "N(0, 1)", (0.4, 0.38), c["chosen"])
    _say(left, "N(-4, 1)", (-4, 0.40), c["rejected"], ha="center", xytext=(0, 4))
    right.plot(s["slide.mean"], s["slide.kl"], color=c["chosen"], linewidth=1.6)
    for place, kl in zip(s["slide.mean"], s["slide.kl"], strict=True):
        if place in (-4, -3, -2, -1, 0):
            right.plot(place, kl, "o", color=c["chosen"], markersize=4)
            _say(right, f"{kl:g}", (place, kl), c["ink"], xytext=(6, 2))
    right.set(title="KL, nats", xlabel="mean of the other")


def _beta(figure: Figure, s: Series, c: Colours) -> None:
    left, right = figure.subplots(1, 2)
    left.axhline(0.5, color=c["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
    left.plot(s["beta"], s["sweep.renormalised"], color=c["chosen"], linewidth=1.6)
    left.plot(s["beta"], s["sweep.third outcome"], color=c["rejected"], linewidth=1.4, linestyle=(0, (5, 2)))
    left.set(xscale="log", xlabel=BETA, title="probability of 'reward function'", ylim=(0, 1.05))
    _say(left, "two outcomes, renormalised", (4.5, 0.84), c["chosen"])
    _say(left, "a third outcome for the rest", (4.5, 0.73), c["rejected"])
    right.plot(s["sweep.kl"], s["sweep.reward"], color=c["chosen"], linewidth=1.6)
    for beta in (2, 5, 20):
        i = min(range(len(s["beta"])), key=lambda i, beta=beta: abs(s["beta"][i] - beta))  # type: ignore[misc]
        right.plot(s["sweep.kl"][i], s["sweep.reward"][i], "o", color=c["chosen"], markersize=4)
        _say(right, f"{BETA} = {beta}", (s["sweep.kl"][i], s["sweep.reward"][i]), c["ink"], xytext=(7, -8))
    right.set(xlabel=f"KL({PI}_r || {PI}_ref), nats", title=f"expected reward: the frontier, slope {BETA}")


def _terms(figure: Figure, s: Series, c: Colours) -> None:
    axes = figure.add_subplot()
    for vocabulary, colour in ((100, "before"), (1_000, "rejected"), (50_257, "chosen")):
        axes.plot(s["terms.length"], s[f"terms.{vocabulary}"], "o-", color=c[colour], linewidth=1.5, markersize=3)
        end = (s["terms.length"][-1], s[f"terms.{vocabulary}"][-1])
        _say(axes, f"V = {vocabulary:,}", end, c[colour], xytext=(8, -3))
    (year,) = s["terms.year"]
    axes.axhline(year, color=c["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
    _say(axes, "what the assumed machine adds up in a year", (23, year), c["muted"], xytext=(-4, -12), ha="right")
    axes.set(xlabel="tokens T", title="terms of Z, powers of ten", xlim=(0.5, 23), xticks=[1, 5, 10, 15, 20])


def _rankings(figure: Figure, s: Series, c: Colours) -> None:
    axes = figure.add_subplot()
    labels = [name.removeprefix("ranking: ") for name in s if name.startswith("ranking: ")]
    shares = [s[f"ranking: {label}"][0] for label in labels]
    axes.barh(labels, shares, color=c["chosen"], alpha=0.75, height=0.62)
    for label, share in zip(labels, shares, strict=True):
        _say(axes, f"{share:.3f}", (share, labels.index(label)), c["ink"], xytext=(5, -3))
    axes.set(title="probability of each ranking (Plackett-Luce)", xlim=(0, max(shares) * 1.15))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=c["ink"])


def _bradley_terry(figure: Figure, s: Series, c: Colours) -> None:
    axes = figure.add_subplot()
    margin = s["bt.margin"]
    axes.axhline(0, color=c["muted"], linewidth=0.9)
    axes.plot(margin, s["bt.objective"], color=c["rejected"], linewidth=1.6)
    axes.plot(margin, s["bt.cost"], color=c["chosen"], linewidth=1.6)
    _say(axes, "cost, minimise", (-4.4, 4.4), c["chosen"], xytext=(8, 2))
    _say(axes, "objective, maximise", (-4.4, -4.4), c["rejected"], xytext=(8, -8))
    axes.set(xlabel="r_w - r_l", title="one pair, nats")


def _loss_of_u(figure: Figure, s: Series, c: Colours) -> None:
    looks = {"0.1": ("before", "-"), "0.5": ("rejected", "-"), "1": ("chosen", "-"), "2": ("chosen", (0, (5, 2)))}
    left, right = figure.subplots(1, 2)
    for axes, side in ((left, "below"), (right, "above")):
        axes.axhline(s["u.ln2"][0], color=c["muted"], linewidth=0.9, linestyle=(0, (1, 2)))
        for beta, (colour, dashes) in looks.items():
            u, loss = s[f"u.{side}"], s[f"u.{side}.{beta}"]
            axes.plot(u, loss, color=c[colour], linewidth=1.6, linestyle=dashes, label=f"{BETA} = {beta}")
            if side == "above":
                _say(axes, f"{BETA} = {beta}", (u[40], loss[40]), c[colour], xytext=(4, 3))
        axes.set(xlabel="u")
    left.legend(fontsize=8.5, reverse=True)
    left.set(ylim=(0, 5), title="u < 1: the pair is ranked wrongly")
    right.set(ylim=(0, 0.8), title="u > 1: the pair is ranked rightly")
    _say(right, "ln 2", (10, s["u.ln2"][0]), c["muted"], xytext=(-18, 4))


def _weights(figure: Figure, s: Series, c: Colours) -> None:
    axes = figure.add_subplot()
    margin = s["weight.margin"]
    axes.plot(margin, s["weight.appendix"], color=c["rejected"], linewidth=1.4, linestyle=(0, (5, 2)))
    axes.plot(margin, s["weight.right"], color=c["chosen"], linewidth=1.8)
    _say(axes, "the loss's own gradient", (-7.5, s["weight.right"][2]), c["chosen"], xytext=(0, -14))
    _say(axes, "the sign of Appendix A.4", (7.5, s["weight.appendix"][-3]), c["rejected"], ha="right", xytext=(0, -14))
    axes.set(xlabel="margin r_w - r_l of the implicit rewards", title="weight of a pair", ylim=(0, None))


def _constant(figure: Figure, s: Series, c: Colours) -> None:
    axes = figure.add_subplot()
    extra = s["constant.extra"]
    axes.plot(extra, s["constant.tokens"], "o-", color=c["rejected"], linewidth=1.6, markersize=4)
    axes.plot(extra, [0.0] * len(extra), "o-", color=c["chosen"], linewidth=1.6, markersize=4)
    _say(axes, "uniform over tokens", (3, s["constant.tokens"][8]), c["rejected"], ha="right", xytext=(-8, 4))
    _say(axes, "uniform over responses", (-5, 0), c["chosen"], xytext=(0, 6))
    axes.set(xlabel="n_w - n_l, tokens", title="what the constant adds to log u, nats")


FIGURES: Mapping[str, _Drawing] = {
    "simplex": _Drawing(
        "All policies over three responses as a triangle, shaded by the objective, with the path of solutions as beta "
        "falls from infinity, at the reference, to zero, at the best response", _simplex, (8.4, 3.7),
    ),
    "gaussians": _Drawing("A Gaussian slides from -4 to 0; the KL divergence falls from 8 nats to 0", _gaussians),
    "beta": _Drawing("Probability of 'reward function' against beta, and expected reward against KL", _beta),
    "terms": _Drawing("Number of terms of the partition function against the length of the response", _terms),
    "rankings": _Drawing("Probabilities of the six rankings of three responses", _rankings),
    "bradley-terry": _Drawing("Objective and cost of one pair against its margin, mirrored", _bradley_terry),
    "loss-u": _Drawing("The loss against u below and above one, for four beta", _loss_of_u, (8.4, 3.1)),
    "weights": _Drawing("Gradient weight of a pair against its margin, right sign and wrong sign", _weights),
    "constant": _Drawing("What two constant references add to log u, against the difference of lengths", _constant),
}  # fmt: skip
"""Name -> alternative text and how it is drawn."""
