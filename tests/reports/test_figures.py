"""Figures as inline SVG."""

import re
import xml.etree.ElementTree as ET

from preftune.reports.figures import VARIABLES, Curve, Panel, curves, histogram

CURVE = Curve(label="held out", colour="after", steps=[1, 2, 3], values=[0.6, 0.5, 0.4], band=([0.5] * 3, [0.7] * 3))
PANELS = [Panel(title="loss & <loss>", curves=[CURVE], lines={"start": 0.7}), Panel(title="b", curves=[CURVE])]


def picture(name="a"):
    return curves(name, PANELS) + histogram(
        f"{name}-h", {"before": ("before", [0.1, 0.2])}, label="x", bins=[0, 0.5, 1]
    )


def test_the_same_numbers_give_the_same_bytes():
    """No date, no random identifier."""
    assert picture() == picture()


def test_every_colour_belongs_to_the_page():
    """Only CSS variables, so that a figure can be read in the light and in the dark theme."""
    used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", picture()))
    assert used <= {f"var(--{name})" for name in VARIABLES} | {"none"}
    assert {"var(--after)", "var(--before)", "var(--ink)", "var(--grid)"} <= used


def test_a_figure_is_one_svg_element_without_style_script_or_reference_to_elsewhere():
    """It can stand inside a page: well-formed, labelled, nothing loaded, nothing that leaks into the page."""
    for svg in (curves("a", PANELS), histogram("b", {"x": ("after", [1.0])}, label="x", bins=[0, 1])):
        root = ET.fromstring(svg)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert tags <= {"svg", "g", "path", "text", "defs", "use", "clipPath", "rect"}
        targets = [v for element in root.iter() for k, v in element.attrib.items() if k.endswith("href")]
        assert targets and all(target.startswith("#") for target in targets)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
    assert "loss & <loss>" in ET.fromstring(curves("a", PANELS)).attrib["aria-label"]


def test_two_figures_on_one_page_share_no_identifier():
    """Identifiers carry the figure's name, and every reference to one still finds it."""
    first, second = (set(re.findall(r'\bid="([^"]+)"', picture(name))) for name in ("a", "b"))
    assert first and not first & second
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', picture("a")))
    assert references and references <= first


def test_numbers_are_drawn_where_they_are():
    """A curve that falls goes down the page, equal differences are equal heights."""
    svg = curves("a", [Panel(title="t", curves=[CURVE])])
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--after\)', svg)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", paths[0])]
    assert len(heights) == 3 and heights == sorted(heights)
    assert abs((heights[1] - heights[0]) - (heights[2] - heights[1])) < 1e-3
