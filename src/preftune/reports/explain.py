"""`derivation.json` as one HTML page: the derivation in words and formulas, every number taken from the file by name.

A number stands on the page as `<data value="to the last digit" title="name: meaning">as shown</data>`. No script,
nothing loaded (CSP forbids it), light and dark, and it prints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from preftune.errors import ArtifactError
from preftune.reports.explain_figures import FIGURES, inline, save
from preftune.reports.mathml import mathml

__all__ = ["render_lesson", "write_lesson"]

SOURCE, PAGE, PICTURES = "derivation.json", "index.html", "figures"


def write_lesson(folder: str | Path) -> Path:
    """Write `FOLDER/index.html` and `FOLDER/figures/*.svg, *.png` from `FOLDER/derivation.json`; the page's path.

    Raises ArtifactError where that file is missing or is no lesson.
    """
    folder = Path(folder)
    try:
        lesson = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        series = {name: values for chapter in lesson["chapters"] for name, values in chapter["series"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / SOURCE} is no lesson ({error}); `preftune explain` writes one") from error
    (folder / PICTURES).mkdir(exist_ok=True)
    for name in FIGURES:
        save(name, series, folder / PICTURES)
    temporary = folder / f".{PAGE}.tmp"
    temporary.write_text(render_lesson(lesson), encoding="utf-8")
    os.replace(temporary, folder / PAGE)
    return folder / PAGE


def render_lesson(lesson: Mapping[str, Any]) -> str:
    """The page: the same bytes for the same lesson. KeyError for a number it names and the lesson lacks."""
    chapters = {chapter["key"]: chapter for chapter in lesson["chapters"]}
    tables = {table["name"]: table for chapter in chapters.values() for table in chapter["tables"]}
    numbers = {number["name"]: number for chapter in chapters.values() for number in chapter["numbers"]}
    series = {name: values for chapter in chapters.values() for name, values in chapter["series"].items()}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"math": mathml, "cell": _cell, "label": _label}
    return environment.get_template("explain.html").render(
        chapters=chapters,
        tables=tables,
        n=lambda name: _cell(numbers[name]),
        figure=lambda name: Markup(inline(name, series)),
        alt={name: drawing.alt for name, drawing in FIGURES.items()},
    )


def _cell(cell: Any) -> Markup:
    """A number as `<data>`, a label in words and formulas."""
    if isinstance(cell, str):
        return _label(cell)
    value = cell["value"] if isinstance(cell["value"], str) else repr(cell["value"])
    return Markup('<data value="{}" title="{}: {}">{}</data>').format(
        value, cell["name"], cell["meaning"], _powers(cell["text"])
    )


def _powers(text: str) -> Markup:
    """10^47.01 and 8.3e-17 with raised exponents, a true minus sign."""
    found = re.fullmatch(r"(-?)(?:([\d.]+)e|10\^)([+-]?)0*(\d[\d.]*)", text)
    if found is None:
        return _minus(text)
    sign, mantissa, exponent_sign, exponent = found.groups()
    times = Markup("{} \u00d7 ").format(mantissa) if mantissa else ""
    minus = "\u2212" if exponent_sign == "-" else ""
    return Markup("{}{}10<sup>{}{}</sup>").format("\u2212" if sign else "", times, minus, exponent)


def _minus(text: str) -> Markup:
    """A negative number with a true minus sign; other text as it is."""
    return escape(re.sub(r"^-(?=\d)", "\u2212", text))


def _label(text: str) -> Markup:
    """Words as they are, what stands in backticks as a formula."""
    parts = (mathml(part) if i % 2 else _minus(part) for i, part in enumerate(text.split("`")))
    return Markup("").join(parts)
