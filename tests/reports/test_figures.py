"""matplotlib's figures as inline SVG."""

import re
import xml.etree.ElementTree as ET

import matplotlib
from matplotlib.figure import Figure

from preftune.reports.figures import STYLE, VARIABLES, svg


def picture(name="a"):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4, 2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([1, 2, 3], [0.6, 0.5, 0.4], color=VARIABLES["after"], marker="o", label="held out")
        axes.set_title("loss & <loss>")
        axes.legend()
        return svg(figure, name, "loss & <loss>")


def test_the_same_numbers_give_the_same_bytes():
    """No date, no random identifier."""
    assert picture() == picture()


def test_every_colour_belongs_to_the_page():
    """Only CSS variables, so that a figure can be read in the light and in the dark theme."""
    used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", picture()))
    assert used <= {f"var(--{name})" for name in VARIABLES} | {"none"}
    assert {"var(--after)", "var(--ink)", "var(--grid)"} <= used


def test_a_figure_is_one_svg_element_without_style_script_or_reference_to_elsewhere():
    """It can stand inside a page: well-formed, labelled, nothing loaded, nothing that leaks into the page."""
    root = ET.fromstring(picture())
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "g", "path", "text", "defs", "use", "clipPath", "rect"}
    targets = [v for element in root.iter() for k, v in element.attrib.items() if k.endswith("href")]
    assert targets and all(target.startswith("#") for target in targets)
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == "loss & <loss>"


def test_two_figures_on_one_page_share_no_identifier():
    """Identifiers carry the figure's name, and every reference to one still finds it."""
    first, second = (set(re.findall(r'\bid="([^"]+)"', picture(name))) for name in ("a", "b"))
    assert first and not first & second
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', picture("a")))
    assert references and references <= first
