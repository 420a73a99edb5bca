"""Plots of the report, written as SVG."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.reports.plots import Curve, Dot, Histogram, Panel, Point, _ticks, dots, histogram, plot

CURVE = Curve(label="held out", colour="after", x=[1, 2, 3], y=[0.6, 0.5, 0.4], bands=[([0.3] * 3, [0.7] * 3)])
PANEL = Panel(title="loss & <loss>", curves=[CURVE], lines={"start": 0.7}, note="a <note>", source="run/metrics.jsonl")
TAGS = {"figure", "figcaption", "b", "span", "svg", "g", "path", "text", "circle", "title", "p", "code"}
DOTS = [Dot(label="a <b>", value=0.4, ends=(0.1, 0.6), text="0.4 [0.1, 0.6]", source="run.json: a")]


def everything():
    bars = histogram(
        "h", [Histogram(label="before", colour="before", values=[0.1, 0.2])], bins=[0, 0.5, 1], x_label="x"
    )
    return plot(PANEL) + bars + dots(DOTS, line=0.5, line_label="half")


def drawn(figure):
    return ET.fromstring(re.search(r"<svg viewBox=.0 0 4.*?</svg>", figure, re.DOTALL)[0])


def numbers(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path)]


def test_the_same_numbers_give_the_same_bytes():
    """No date, no identifier at all, so that nothing can collide on a page."""
    assert everything() == everything() and " id=" not in everything()


def test_every_colour_is_the_page_s():
    """No colour is written into a picture: classes name them, so that the theme and the printer choose."""
    assert not re.search(r"#[0-9a-fA-F]{3}|rgb|style=|fill=|stroke=", everything())
    assert {"c-after", "c-before", "c-muted"} <= set(re.findall(r"c-\w+", everything()))


def test_a_plot_is_well_formed_labelled_and_escaped():
    """One figure element with a picture that says in words what it shows; titles, notes and labels stay text."""
    root = ET.fromstring(plot(PANEL))
    picture = drawn(plot(PANEL))
    assert root.tag == "figure" and root.find("figcaption/b").text == "loss & <loss>"
    assert picture.attrib["role"] == "img"
    assert "held out: from 0.6 at 1 to 0.4 at 3" in picture.attrib["aria-label"]
    assert "a <note>" in "".join(root.itertext()) and "run/metrics.jsonl" in "".join(root.itertext())
    assert {e.tag for e in root.iter()} <= TAGS


def test_numbers_are_drawn_where_they_are():
    """A curve that falls goes down the page, equal differences are equal heights, its points carry their numbers."""
    circles = drawn(plot(PANEL)).findall(".//circle")
    heights = [float(circle.attrib["cy"]) for circle in circles]
    told = [circle.find("title").text for circle in circles]
    assert told == ["held out: 0.6 at 1", "held out: 0.5 at 2", "held out: 0.4 at 3"]
    assert heights == sorted(heights) and abs((heights[1] - heights[0]) - (heights[2] - heights[1])) < 0.2


def test_a_band_goes_along_its_lower_and_back_along_its_upper_end():
    """Above the curve at the upper end, below it at the lower one, from the first step to the last and back."""
    picture = drawn(plot(PANEL))
    band = numbers(next(p for p in picture.iter("path") if "band" in p.attrib.get("class", "")).attrib["d"])
    middle = [float(circle.attrib["cy"]) for circle in picture.iter("circle")]
    assert (
        len(band) == 6
        and [x for x, _ in band] == sorted(x for x, _ in band[:3]) + sorted((x for x, _ in band[3:]))[::-1]
    )
    assert all(down > middle[1] for _, down in band[:2]) and all(down < middle[1] for _, down in band[3:])


def test_a_histogram_holds_every_value_once():
    """Shares sum to 100 %, the upper end belongs to the last bin, the mean is where the mean is."""
    figure = histogram(
        "h", [Histogram(label="v", colour="after", values=[0, 0.2, 0.7, 1])], bins=[0, 0.5, 1], x_label="x"
    )
    picture = drawn(figure)
    area = numbers(next(p for p in picture.iter("path") if p.attrib.get("class") == "area").attrib["d"])
    assert area[1][1] == area[2][1] == area[3][1] == area[4][1], "two bins of two values each"
    assert "mean 0.475 of 4" in picture.attrib["aria-label"]


def test_a_dot_lies_on_its_whisker():
    """Its place and the ends of its interval are on one scale; the text and the source are beside it."""
    row = ET.fromstring(f"<p>{dots(DOTS)}</p>").find(".//div[@class='dot']")
    line, spot = (row.find(f".//path[@class='{name}']").attrib["d"] for name in ("line", "spot"))
    low, high = (float(x) for x in re.search(r"M([\d.]+) 12H([\d.]+)", line).groups())
    at = float(re.search(r"M([\d.]+) 12", spot)[1])
    assert (at - low) / (high - low) == pytest.approx(0.6, abs=0.01)
    assert row.attrib["title"] == "run.json: a" and "a <b>" in "".join(row.itertext())


def test_a_point_has_whiskers_on_both_axes():
    """Four ends around its place."""
    point = Point(label="dpo", colour="r0", x=1.0, y=0.5, x_ends=(0.5, 2.0), y_ends=(0.4, 0.7))
    picture = drawn(plot(Panel(title="f", points=[point, Point(label="ref", colour="r1", x=0, y=0.2)])))
    ends = numbers(next(p for p in picture.iter("path") if p.attrib.get("class") == "line").attrib["d"])
    dot = picture.find(".//circle")
    across, down = float(dot.attrib["cx"]), float(dot.attrib["cy"])
    assert [x < across for x, _ in ends] == [True, False, False, False] and ends[2][0] == ends[3][0] == across
    assert ends[2][1] > down > ends[3][1]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_inside_and_told_apart(low, width):
    """A few values between the ends at equal distances, each written differently, however far from zero."""
    width = max(width, 1e-6 * abs(low))
    high = low + width
    found = _ticks(low, high)
    values = [value for value, _ in found]
    assert 2 <= len(found) <= 11 and all(low - 1e-6 * width <= v <= high + 1e-6 * width for v in values)
    assert len({text for _, text in found}) == len(found)


def test_ticks_say_their_value():
    """Seven and a half is not written as eight, a learning rate keeps its size."""
    assert [text for _, text in _ticks(0, 10.2)] == ["0", "2.5", "5.0", "7.5", "10.0"]
    assert [text for _, text in _ticks(0, 5e-7)] == ["0", "1e-07", "2e-07", "3e-07", "4e-07", "5e-07"]


@pytest.mark.parametrize("y", [[0.5], [0.5, 0.5, 0.5]])
def test_a_single_point_and_a_constant_can_be_drawn(y):
    """An axis is never empty."""
    assert "nan" not in plot(Panel(title="t", curves=[Curve(label="c", colour="after", x=list(range(len(y))), y=y)]))
