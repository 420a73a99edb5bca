"""Formulas as one types them, as browsers set them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from preftune.reports.mathml import mathml


def inside(formula: str) -> str:
    """Without the outer element."""
    return str(mathml(formula)).removeprefix('<math display="inline"><mrow>').removesuffix("</mrow></math>")


@pytest.mark.parametrize(
    ("formula", "element"),
    [
        ("pi_ref", "<msub><mi>\u03c0</mi><mi>ref</mi></msub>"),
        ("u^{-beta}", '<msup><mi>u</mi><mrow><mo form="prefix">\u2212</mo><mi>\u03b2</mi></mrow></msup>'),
        ("x_1^2", "<msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup>"),
        ("{a}/{b}", "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>"),
        ("a/b", "<mi>a</mi><mo>/</mo><mi>b</mi>"),
        ("sum_y", "<munder><mo>\u2211</mo><mi>y</mi></munder>"),
        ("max_pi", "<munder><mi>max</mi><mi>\u03c0</mi></munder>"),
        ("Z", '<mi mathvariant="normal">Z</mi>'),
        ("log(u)", "<mi>log</mi><mrow><mo>(</mo><mi>u</mi><mo>)</mo></mrow>"),
        ("log u", '<mi>log</mi><mspace width="0.17em"/><mi>u</mi>'),
        ("beta log u", '<mi>\u03b2</mi><mspace width="0.17em"/><mi>log</mi><mspace width="0.17em"/><mi>u</mi>'),
        ("0.1", "<mn>0.1</mn>"),
        ("a < b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
    ],
)
def test_a_formula_becomes_its_elements(formula: str, element: str) -> None:
    """Scripts, fractions, sums with limits, Greek letters, functions with thin spaces, nothing unescaped."""
    assert inside(formula) == element


def test_a_formula_is_well_formed() -> None:
    """A nested one is XML, on a line of its own when asked."""
    made = mathml("L = -E_{(x, y) ~ D} log sigma(beta log {pi(y | x)}/{pi_ref(y | x)})", display=True)
    root = ET.fromstring(str(made))
    assert root.tag == "math" and root.attrib == {"display": "block"}
    assert len(root.findall(".//mfrac")) == 1


@pytest.mark.parametrize("formula", ["{a", "a}", "(a", "a)", "(a}", "a_", "[a)"])
def test_a_bracket_without_its_partner_is_refused(formula: str) -> None:
    """Rather than half a formula."""
    with pytest.raises(ValueError, match=r"closes what was opened|that nothing opened|need something after them"):
        mathml(formula)
