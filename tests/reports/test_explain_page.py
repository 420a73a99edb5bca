"""The page of the derivation: every number from the file, nothing from elsewhere, figures beside it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import ArtifactError
from preftune.reports.explain import render_lesson, write_lesson
from preftune.reports.explain_figures import FIGURES, LIGHT, inline, save
from preftune.reports.figures import VARIABLES
from preftune.theory.lesson import lesson
from preftune.theory.numbers import to_json

VOID = {"meta", "br", "hr", "img", "input", "link", "mspace"}


class Page(HTMLParser):
    """What a browser would make of it: numbers, prose outside of numbers, formulas, figures and code, targets."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[tuple[str, str, str]] = []
        self.prose: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(value) for key, value in attrs if key in ("href", "src", "xlink:href")]
        if tag == "data":
            name = str(found["title"]).partition(": ")[0] if ": " in str(found["title"]) else ""
            self.numbers.append((name, str(found["value"]), ""))
        if tag == "sup" and self.inside("data"):
            self.add("^")
        if tag not in VOID:
            self.open.append((tag, found))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [str(value) for key, value in attrs if key in ("href", "src", "xlink:href")]
        self.ids += [str(value) for key, value in attrs if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.inside("data"):
            self.add(data)
        elif not any(self.inside(tag) for tag in ("math", "svg", "style", "code", "tbody th", "title")):
            self.prose.append(data)

    def inside(self, path: str) -> bool:
        tags = [tag for tag, _ in self.open]
        return all(tag in tags for tag in path.split())

    def add(self, text: str) -> None:
        name, value, shown = self.numbers[-1]
        self.numbers[-1] = (name, value, shown + text)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return dict(json.loads(to_json(lesson())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, told: dict[str, Any]) -> Path:
    out = tmp_path_factory.mktemp("explain")
    (out / "derivation.json").write_text(json.dumps(told))
    assert write_lesson(out) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def numbers_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    cells = [c for chapter in told["chapters"] for t in chapter["tables"] for row in t["rows"] for c in row]
    return [n for chapter in told["chapters"] for n in chapter["numbers"]] + [c for c in cells if isinstance(c, dict)]


def test_every_number_of_the_lesson_is_on_the_page(told: dict[str, Any], page: Page) -> None:
    """By name, exact in its attribute; and no number on the page that the lesson does not hold."""
    in_file = {(n["name"], str(n["value"])) for n in numbers_of(told)}
    assert {(name, value) for name, value, _ in page.numbers} == in_file


def test_what_is_shown_is_the_exact_value_rounded(page: Page) -> None:
    """To half a unit of the last digit shown, exponents and thousands read back."""
    checked = 0
    for name, value, shown in page.numbers:
        text = shown.replace("\u2212", "-").replace(",", "")
        if name.endswith("_refused"):
            assert shown == value
            continue
        mantissa, times, power = text.partition(" \u00d7 10^")
        if text.startswith("10^"):
            import math

            assert math.log10(int(value) if value.isdigit() else float(value)) == pytest.approx(
                float(text[3:]), abs=0.0051
            )
        else:
            read = float(mantissa) * (10.0 ** float(power) if times else 1.0)
            last = 10.0 ** (-1 if times else -len(text.partition(".")[2]))
            unit = last * (10.0 ** float(power) if times else 1.0)
            size = max(unit / 2, 6e-5 * abs(float(value)))
            assert abs(read - float(value)) <= size * 1.001, (name, value, shown)
        checked += 1
    assert checked > 250


def test_no_measured_number_is_written_into_the_prose(page: Page) -> None:
    """A decimal fraction outside of a number, a formula, a figure or a row's label would be typed by hand."""
    prose = " ".join(page.prose).replace("arXiv 2305.18290", "")
    assert re.findall(r"\d+\.\d+", prose) == []


def test_the_page_stands_alone(page: Page, folder: Path) -> None:
    """No script, nothing loaded; the policy forbids both; links lead to places on the page or to its figures."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert not page.tags & {"script", "link", "iframe", "img", "object", "foreignobject"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert "@import" not in text and "url(http" not in text
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_file(), link
    assert len(page.ids) == len(set(page.ids))


def test_every_chapter_has_a_place_and_the_way_leads_on(told: dict[str, Any], page: Page, folder: Path) -> None:
    """A section for each chapter in the lesson's order, where lectures are loose, and a command to go on with."""
    sections = [name for name in page.ids if name in {c["key"] for c in told["chapters"]} | {"loose"}]
    assert sections == [*(c["key"] for c in told["chapters"]), "loose"]
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert text.count('class="said"') >= 7
    assert "preftune dpo --model MODEL --data PAIRS.jsonl --out runs/dpo" in text


def test_it_can_be_read_in_the_dark_and_on_paper(folder: Path) -> None:
    """Both colour schemes and print have their rules, and every colour of a figure is the page's."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert used <= {f"var(--{name})" for name in VARIABLES} | {"none"}
        assert 'role="img"' in svg and 'aria-label="' in svg


def test_figures_are_files_too(folder: Path) -> None:
    """SVG and PNG of each: light colours on white, no stand-in left, large enough for a slide."""
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{n}.{k}" for n in FIGURES for k in ("svg", "png")
    }
    for name in FIGURES:
        svg = (folder / f"figures/{name}.svg").read_text(encoding="utf-8")
        ET.fromstring(svg)
        assert not [stand_in for stand_in in VARIABLES.values() if stand_in in svg]
        assert "var(--" not in svg and "<script" not in svg
        png = (folder / f"figures/{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) >= 1600


def test_the_light_colours_are_the_page_s() -> None:
    """The palette of the files is the one of the style sheet."""
    css = (Path(__file__).resolve().parents[2] / "src/preftune/reports/report.css").read_text(encoding="utf-8")
    light = css[: css.index("@media")]
    assert {name: re.search(rf"--{name}: (#\w+)", light)[1] for name in LIGHT} == LIGHT  # type: ignore[index]


def test_the_same_lesson_gives_the_same_bytes(told: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """No date, no random identifier, in the page and in the files."""
    assert render_lesson(told) == (folder / "index.html").read_text(encoding="utf-8")
    series = {name: values for chapter in told["chapters"] for name, values in chapter["series"].items()}
    assert inline("loss-u", series) == inline("loss-u", series)
    save("loss-u", series, tmp_path)
    for kind in ("svg", "png"):
        assert (tmp_path / f"loss-u.{kind}").read_bytes() == (folder / f"figures/loss-u.{kind}").read_bytes()


def test_a_changed_number_changes_the_page(told: dict[str, Any]) -> None:
    """The page has no number of its own."""
    changed = json.loads(json.dumps(told))
    changed["chapters"][0]["numbers"][1] |= {"value": 0.123456, "text": "0.12346"}
    name = changed["chapters"][0]["numbers"][1]["name"]
    assert (name, "0.123456", "0.12346") in Page(render_lesson(changed)).numbers


def test_a_number_that_is_missing_stops_the_page(told: dict[str, Any]) -> None:
    """No gap in a sentence."""
    changed = json.loads(json.dumps(told))
    del changed["chapters"][0]["numbers"][1]
    with pytest.raises(KeyError, match="j_reference"):
        render_lesson(changed)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"chapters": [{}]}'])
def test_a_folder_without_a_lesson_is_refused(tmp_path: Path, content: str | None) -> None:
    """With the file's name and the command that writes it."""
    if content is not None:
        (tmp_path / "derivation.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"derivation\.json is no lesson \(.*\); `preftune explain` writes one"):
        write_lesson(tmp_path)
