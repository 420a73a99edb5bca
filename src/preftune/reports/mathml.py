"""A formula as one types it -> MathML, which browsers set without script or fonts from elsewhere.

pi_r = {pi_ref exp(r/beta)}/{Z}      names of Greek letters and operators are words; _ and ^ take a word, a number
                                     or a {group}; two groups with a slash between them become a fraction
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from markupsafe import Markup, escape

__all__ = ["mathml"]

_SYMBOLS = {
    "pi": "\u03c0", "beta": "\u03b2", "sigma": "\u03c3", "theta": "\u03b8", "grad": "\u2207", "sum": "\u2211",
    "prod": "\u220f", "||": "\u2225", "->": "\u2192", "-": "\u2212", "~": "\u223c", ">=": "\u2265", "<=": "\u2264",
    "*": "\u00b7", "|": "\u2223", "succ": "\u227b", "!=": "\u2260", "...": "\u2026",
}  # fmt: skip
_OPERATORS = {"sum", "prod", "succ", "grad"}
_FUNCTIONS = {"log", "exp", "max", "min", "E", "KL"}  # thin space around them, but none before their parenthesis
_CLOSING = {"{": "}", "(": ")", "[": "]"}
_THIN = '<mspace width="0.17em"/>'
_TOKEN = re.compile(r"\s*([A-Za-z]+|\d[\d.,]*|\|\||->|>=|<=|!=|\.\.\.|[^\sA-Za-z\d])")


def mathml(formula: str, *, display: bool = False) -> Markup:
    """The formula as a `<math>` element. Raises ValueError on a bracket without its partner."""
    body = "".join(_sequence(iter(_TOKEN.findall(formula)), closing=""))
    return Markup(f'<math display="{"block" if display else "inline"}"><mrow>{body}</mrow></math>')  # escaped by token


def _sequence(tokens: Iterator[str], closing: str) -> list[str]:
    """Elements up to `closing` ("" for the end of the formula); _, ^ and {}/{} act on the element before them."""
    elements: list[str] = []
    slashed = applied = grouped = False
    for token in tokens:
        if token == closing:
            return elements
        if token in _CLOSING.values():
            raise ValueError(f"a {token} that nothing opened")
        if token in ("_", "^"):
            elements.append(_script(elements.pop() if elements else "<mrow></mrow>", token, _next(tokens)))
        elif token == "/" and grouped:
            slashed = True
        elif slashed:
            elements.append(f"<mfrac>{elements.pop()}{_element(token, tokens)}</mfrac>")
            slashed = False
        else:
            if (applied and (token == "{" or token[0].isalnum())) or (
                token in _FUNCTIONS and elements and not elements[-1].startswith("<mo")
            ):
                elements.append(_THIN)
            sign = token == "-" and (not elements or elements[-1].startswith("<mo"))
            elements.append('<mo form="prefix">\u2212</mo>' if sign else _element(token, tokens))
            applied, grouped = token in _FUNCTIONS, token == "{"
    if closing:
        raise ValueError(f"no {closing} closes what was opened")
    return elements


def _script(base: str, kind: str, script: str) -> str:
    """Below for sums, products, max and min; a subscript that gets a power becomes both."""
    if kind == "_":
        under = any(f">{word}</" in base for word in ("max", "min", _SYMBOLS["sum"], _SYMBOLS["prod"]))
        return f"<munder>{base}{script}</munder>" if under else f"<msub>{base}{script}</msub>"
    if base.startswith("<msub>"):
        return f"<msubsup>{base.removeprefix('<msub>').removesuffix('</msub>')}{script}</msubsup>"
    return f"<msup>{base}{script}</msup>"


def _next(tokens: Iterator[str]) -> str:
    token = next(tokens, None)
    if token is None:
        raise ValueError("_ and ^ need something after them")
    return _element(token, tokens)


def _element(token: str, tokens: Iterator[str]) -> str:
    if token in _CLOSING:
        opening, closing = ("", "") if token == "{" else (f"<mo>{token}</mo>", f"<mo>{_CLOSING[token]}</mo>")
        return f"<mrow>{opening}{''.join(_sequence(tokens, _CLOSING[token]))}{closing}</mrow>"
    text = escape(_SYMBOLS.get(token, token))
    if token[0].isdigit():
        return f"<mn>{text}</mn>"
    if token[0].isalpha() and token not in _OPERATORS:
        return f'<mi mathvariant="normal">{text}</mi>' if token in "ELZ" else f"<mi>{text}</mi>"
    fence = ' stretchy="false"' if token in ("|", "||") else ""
    return f"<mo{fence}>{text}</mo>"
