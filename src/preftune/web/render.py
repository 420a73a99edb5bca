"""Text of strangers -> HTML that can do nothing: Markdown with HTML off, sanitised again; no link, no image.

Two walls, each enough alone: markdown-it escapes every tag it is given, nh3 keeps only tags and classes that format.
An address is shown as text beside the words that carried it, never as something to click or to load.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["MAX_MARKDOWN_CHARS", "MAX_MARKDOWN_LINE", "markdown", "visible"]

MAX_MARKDOWN_CHARS = 100_000
"""A longer text is shown as it is: nobody reads it as Markdown, and parsing it would hold up the next item."""
MAX_MARKDOWN_LINE = 20_000
"""The same for a text with a longer line, where nested marks cost the parser quadratic time."""

_TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "code", "em", "strong", "s", "span"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
_ATTRIBUTES = {"span": {"class"}, "ol": {"start"}, "pre": {"class"}}

# Marks that reorder the text around them without being seen, and control characters other than tab and line feed.
_UNSEEN = re.compile("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """`text` with line ends unified and every control character that hides or reorders text written out, [U+202E]."""
    unified = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNSEEN.sub(lambda found: f"[U+{ord(found.group()):04X}]", unified)


@lru_cache(maxsize=512)
def markdown(text: str) -> str:
    """Safe HTML of a Markdown text: blocks, emphasis, code and tables; single line ends are kept as line ends."""
    text = visible(text)
    if len(text) > MAX_MARKDOWN_CHARS or max(map(len, text.split("\n"))) > MAX_MARKDOWN_LINE:
        return f'<pre class="plain">{html.escape(text)}</pre>'
    return nh3.clean(_parser().render(text), tags=_TAGS, attributes=_ATTRIBUTES, link_rel=None)


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable(["html_block", "html_inline"])
    parser.add_render_rule("link_open", _link_open)
    parser.add_render_rule("link_close", _link_close)
    parser.add_render_rule("image", _image)
    return parser


def _link_open(self: Any, tokens: Sequence[Token], index: int, options: Mapping[str, Any], env: dict[str, Any]) -> str:
    shown_already = tokens[index].info == "auto"
    env.setdefault("addresses", []).append("" if shown_already else str(tokens[index].attrs.get("href", "")))
    return '<span class="link">'


def _link_close(self: Any, tokens: Sequence[Token], index: int, options: Mapping[str, Any], env: dict[str, Any]) -> str:
    return f"</span>{_address(env['addresses'].pop())}"


def _image(self: Any, tokens: Sequence[Token], index: int, options: Mapping[str, Any], env: dict[str, Any]) -> str:
    token = tokens[index]
    said = html.escape(token.content or "image")
    return f'<span class="link">{said}</span>{_address(str(token.attrs.get("src", "")))}'


def _address(address: str) -> str:
    return f' <span class="address">({html.escape(address)})</span>' if address else ""
