"""Text of strangers as safe HTML."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.web.render import MAX_MARKDOWN_CHARS, MAX_MARKDOWN_LINE, markdown, visible

HARMLESS = {"class", "start"}
ACTIVE = {"script", "style", "iframe", "img", "svg", "a", "object", "embed", "form", "input", "link", "meta", "base"}


class Elements(HTMLParser):
    """Every start tag a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data


def assert_harmless(text: str) -> None:
    for tag, attributes in Elements(markdown(text)).tags:
        assert tag not in ACTIVE and set(attributes) <= HARMLESS, (tag, attributes)


def test_markdown_formats() -> None:
    """Headings, emphasis, code, lists and tables are formatted, and a line end stays a line end."""
    found = markdown("# T\n**b** *i* `c`\nnext\n\n- x\n\n|a|\n|-|\n|1|\n\n~~s~~")
    for piece in ("<h1>T</h1>", "<strong>b</strong>", "<em>i</em>", "<code>c</code><br>", "<li>x</li>", "<td>1</td>"):
        assert piece in found
    assert "<s>s</s>" in found


HOSTILE = (
    "<script>x()</script>",
    "<img src=x onerror=x()>",
    "<svg/onload=x()>",
    "[a](javascript:x())",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "![a](http://elsewhere.example/pixel.png)",
    '[a](http://elsewhere.example/"onmouseover="x())',
    "<http://elsewhere.example/>",
    "[ref]\n\n[ref]: http://elsewhere.example/ 'title\" onclick=x()'",
    '```"><script>x()</script>\ncode\n```',
    "<style>@import 'http://elsewhere.example/x.css'</style>",
    "<iframe srcdoc='<script>x()</script>'>",
    "<a href=http://elsewhere.example ping=http://elsewhere.example>a</a>",
    "<form action=http://elsewhere.example><button>go",
    "&lt;script&gt;x()&lt;/script&gt;",
    "</div></article><base href=//elsewhere.example>",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_becomes_only_text(text: str) -> None:
    """No active element, no attribute that could hold an address or a handler."""
    assert_harmless(text)


@given(st.text(alphabet="<>[]()!`*_~|-&\"'=/:; \nascriptonmgvhf#\u202e\x00", max_size=80))
def test_no_text_becomes_active(text: str) -> None:
    """Whatever is written with the characters of HTML and Markdown, only harmless elements come out."""
    assert_harmless(text)


def test_an_address_is_shown_not_linked() -> None:
    """The words of a link and its address can both be read; an autolink is written once."""
    assert Elements(markdown("[words](https://a.example/x)")).said.strip() == "words (https://a.example/x)"
    assert Elements(markdown("![words](https://a.example/x.png)")).said.strip() == "words (https://a.example/x.png)"
    assert Elements(markdown("<https://a.example/x>")).said.strip() == "https://a.example/x"


def test_what_hides_or_reorders_is_written_out() -> None:
    """Overrides of the writing direction and control characters are seen; tabs, line ends and letters stay."""
    assert visible("a\u202eb\u2066c\x00d\x1b[31m\te\r\nf\rg\u05d0") == (
        "a[U+202E]b[U+2066]c[U+0000]d[U+001B][31m\te\nf\ng\u05d0"
    )
    assert "[U+202E]" in markdown("\u202eabc")


@pytest.mark.parametrize(
    "text", ["x" * (MAX_MARKDOWN_LINE + 1), "x\n" * (MAX_MARKDOWN_CHARS // 2 + 1)], ids=["line", "text"]
)
def test_what_nobody_reads_as_markdown_is_shown_as_it_is(text: str) -> None:
    """Beyond the limits a text is one escaped block, to the character."""
    found = Elements(markdown(f"{text}<b>*"))
    assert [tag for tag, _ in found.tags] == ["pre"] and found.said == f"{text}<b>*"


@pytest.mark.parametrize("mark", ["[", "![a](", "*a_ ", "> ", "`a", "<a ", "|a"])
def test_no_mark_makes_the_parser_slow(mark: str) -> None:
    """The longest text that is parsed at all takes no longer than a few seconds, whatever it repeats."""
    line = (mark * MAX_MARKDOWN_LINE)[: MAX_MARKDOWN_LINE - 1]
    begun = time.process_time()
    markdown("\n".join([line] * (MAX_MARKDOWN_CHARS // MAX_MARKDOWN_LINE)))
    assert time.process_time() - begun < 5
